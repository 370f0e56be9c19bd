"""Repairs of Triton's interpreter, which runs kernels on a CPU.

The interpreter of Triton 3.7 truncates float32 to bfloat16 where GPUs round, and its products read
bfloat16 as integers. Both are mended here, so that kernels are tested in bfloat16 too. Its products
are NumPy's, whose order of sums depends on the number of rows on some processors, unlike a GPU's.
Here a row is summed in order, so that tests can ask for equal bits.

The interpreter replaces the language of Triton in each call of a function, and lists NumPy's types
for each value. Here it does the one once for each function that a kernel calls, and the other once
for each type, which takes a third less time. Sums and products of integers are not compared with
the largest one, as on a GPU; and a block's shape is an object that all blocks of the shape share,
which takes a quarter less time again. It also copies the memory of all arguments back to the
device. On a CPU it was never copied, and a test may have a huge cache, of which it uses little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from treeflash_cuda.gpu.triton_kernels import attention
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

attention.PROGRAMS = 8  # one runs after another, and most of a GPU's would have no work
cast, patch, run = InterpreterBuilder.cast_impl, interpreter._patch_lang, GridExecutor.__call__
find_dtype = interpreter._get_np_dtype
dtypes: dict[str, Any] = {}  # NumPy's, by the name of Triton's
patched: set[Callable[..., Any]] = set()  # functions that the running kernel has called


def to_bfloat16(x: Any) -> Any:
    data = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16)
    return TensorHandle(data.numpy().view(np.uint16), tl.bfloat16)


def to_float32(x: Any) -> Any:
    data = torch.from_numpy(np.ascontiguousarray(x.data).view(np.int16)).view(torch.bfloat16)
    return TensorHandle(data.float().numpy(), tl.float32)


def rounding_cast(self: Any, x: Any, dtype: Any) -> Any:
    rounds = x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16
    return to_bfloat16(x) if rounds else cast(self, x, dtype)


def dot_in_order(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
    a, b = (to_float32(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    a, b = (x.data.astype(total.data.dtype) for x in (a, b))
    # A sum over an axis that is not the last adds one slice after another.
    product = (a[..., None] * b[..., None, :, :]).sum(-2)
    return TensorHandle(product + total.data, total.dtype.scalar)


def dtype_once(dtype: Any) -> Any:
    """Find NumPy's type of a value, or of the elements of a block."""
    if (name := dtype.scalar.name) not in dtypes:
        dtypes[name] = find_dtype(dtype)
    return dtypes[name]


@cache
def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """Return a shape in Triton's language, and the number of its elements."""
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def init_tensor(self: Any, handle: Any, kind: Any) -> None:
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.shape, self.numel = shape_of(tuple(kind.shape) if kind.is_block() else ())


def patch_once(function: Callable[..., Any]) -> Any:
    """Replace the language that a function sees, unless this kernel has called it before."""
    if function in patched:
        return None  # only a kernel restores the language, and it is the first to be patched
    patched.add(function)
    return patch(function)


def run_anew(self: Any, *args: Any, **kwargs: Any) -> None:
    """Run a kernel, which finds the language as it is for a compiler."""
    patched.clear()
    run(self, *args, **kwargs)


builder = interpreter.interpreter_builder
builder.options = replace(builder.options, sanitize_overflow=False)
tl.tensor.__init__ = init_tensor
InterpreterBuilder.cast_impl = rounding_cast
InterpreterBuilder.create_dot = dot_in_order
interpreter._get_np_dtype, interpreter._patch_lang = dtype_once, patch_once
GridExecutor.__call__ = run_anew
GridExecutor._restore_args_dev = lambda *_: None
