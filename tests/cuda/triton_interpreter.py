"""Repairs of Triton's interpreter, which runs kernels on a CPU.

The interpreter of Triton 3.7 truncates float32 to bfloat16 where GPUs round, and its products read
bfloat16 as integers. Both are mended here, so that kernels are tested in bfloat16 too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def to_bfloat16(x: Any) -> Any:
    data = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16)
    return TensorHandle(data.numpy().view(np.uint16), tl.bfloat16)


def to_float32(x: Any) -> Any:
    data = torch.from_numpy(np.ascontiguousarray(x.data).view(np.int16)).view(torch.bfloat16)
    return TensorHandle(data.float().numpy(), tl.float32)


def rounding_cast(self: Any, x: Any, dtype: Any) -> Any:
    rounds = x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16
    return to_bfloat16(x) if rounds else cast(self, x, dtype)


def wide_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
    a, b = (to_float32(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return dot(self, a, b, *args)


InterpreterBuilder.cast_impl = rounding_cast
InterpreterBuilder.create_dot = wide_dot
