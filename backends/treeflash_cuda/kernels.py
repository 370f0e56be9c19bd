"""Attention of long prompts by FlashAttention, where it can be used.

It is checked with the operation for trees, which attends for all other rows. It has neither
soft-capped scores nor attention sinks, and takes no keys in 8 bits.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from treeflash.errors import first_line, is_out_of_memory
from treeflash_cuda.cache import decoded
from treeflash_cuda.operations import RandomInputs, Shapes, tree_attention
from treeflash_cuda.visible_keys import RowPlan, VisibleKeys

TOLERANCE = 0.01
"""Root mean square error of a kernel's outputs in standard deviations. Fused kernels round the
softmax to the dtype before they multiply it by the values: an error of 0.002 in bfloat16."""
MIN_CAPABILITY = 8, 0
"""FlashAttention needs an Ampere GPU."""


class Kernels(Protocol):
    """Attention of prompts."""

    def causal(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """Attend from the last n positions to the whole sequence: (n, heads, head_dim).

        q is (n, heads, head_dim); k and v are (m, kv_heads, head_dim) of all positions, as the
        cache stores them. Each position sees `window` positions, itself included; None for all
        before it. The scores are multiplied by `scale`.
        """


class FlashKernels:
    """FlashAttention through PyTorch, in half precision on a CUDA device."""

    def __init__(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        # The kernel chooses the number of splits; cuDNN's kernels do not take the argument.
        self.varlen: Any = functools.partial(varlen_attn, enable_gqa=True, num_splits=0)

    def causal(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        # 0 and the length are made on the device, so that nothing is uploaded.
        queries, keys = (
            torch.arange(0, len(x) + 1, len(x), dtype=torch.int32, device=q.device) for x in (q, k)
        )
        sizes, sides = (queries, keys, len(q), len(k)), (-1 if window is None else window - 1, 0)
        return self.varlen(q, k, v, *sizes, scale=scale, window_size=sides)


class EncodedKernels:
    """Kernels over keys and values in 8 bits, which become floats first, one layer at a time."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels  # takes floats

    def causal(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        if window is not None:  # the first row's
            unseen = max(len(k) - len(q) + 1 - window, 0)
            k, v = k[unseen:], v[unseen:]
        k, v = (decoded(x, q.dtype) for x in (k, v))
        return self.kernels.causal(q, k, v, window, scale)


def flash_kernels(
    device: torch.device, dtype: torch.dtype, shapes: Shapes
) -> tuple[FlashKernels | None, str]:
    """Load FlashAttention's kernels, or None if their results differ from plain products.

    The second result is the reason if they fail although they support the device and the dtype.
    """
    on_cuda = device.type == "cuda" and dtype != torch.float32
    if not on_cuda or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return None, ""
    sizes = shapes.heads, shapes.kv_heads, shapes.head_dim
    try:
        kernels = FlashKernels()
        difference = _difference(kernels, device, dtype, *sizes)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None, first_line(error)
    if not difference <= TOLERANCE:
        return None, f"FlashAttention's results differ by {difference:.1%}"
    return kernels, ""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Compute `Kernels.causal` by PyTorch's definition of the operation for trees."""
    plan = RowPlan.of(np.array([0]), np.array([len(k) - len(q)]), [len(q)], len(q))
    arrays = (torch.from_numpy(np.asarray(x, np.int32)).to(q.device) for x in plan.arrays())
    keys = VisibleKeys.of_rows(len(q), *arrays)
    keys = keys if window is None else keys.within(window)
    columns = k.transpose(0, 1), v.transpose(0, 1)
    return tree_attention(q, *columns, keys, scale=scale)


def _difference(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> float:
    """Return the root mean square error of the kernels on random numbers, in standard deviations.

    Of several windows the largest one.
    """
    numbers, columns, rows, scale = RandomInputs(device, dtype), 600, 40, size**-0.5
    k, v = numbers.draw(2, kv_heads, columns, size).transpose(1, 2)  # strided as in a cache
    q = numbers.draw(rows, heads, size)
    errors = []
    for window in (None, 100):
        actual = kernels.causal(q, k, v, window, scale).float()
        expected = causal_attention(q, k, v, window, scale).float()
        errors.append((actual - expected).square().mean().sqrt() / expected.std())
    return float(torch.stack(errors).max())
