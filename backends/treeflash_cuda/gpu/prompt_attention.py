"""Attention of long prompts by FlashAttention, where it can be used.

It is checked with the operation for trees, which attends for all other rows. It has neither
soft-capped scores nor attention sinks. Keys and values in 8 bits become floats first, one layer at
a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from treeflash.errors import first_line, is_out_of_memory
from treeflash_cuda.cache import decoded
from treeflash_cuda.gpu.kernel_loading import RandomInputs
from treeflash_cuda.operations import Shapes, tree_attention
from treeflash_cuda.visible_keys import PAGE, RowPlan, VisibleKeys

TOLERANCE = 0.015
"""Root mean square error of a row of a kernel's outputs in standard deviations. Fused kernels round
the softmax to the dtype before they multiply it by the values: an error of 0.004 in bfloat16."""
MIN_CAPABILITY = 8, 0
"""FlashAttention needs an Ampere GPU."""


CausalAttention: TypeAlias = Callable[[Tensor, Tensor, Tensor, int | None, float], Tensor]
"""Attends from the last n positions to the whole sequence: (n, heads, head_dim).

The queries are (n, heads, head_dim); keys and values are (m, kv_heads, head_dim) of all positions,
as the cache stores them. Each position sees a number of positions, itself included; None for all
before it. The last argument is the factor on the scores.
"""


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Attend by FlashAttention through PyTorch, in half precision on a CUDA device."""
    from torch.nn.attention.varlen import varlen_attn  # a CPU never needs the module

    if k.dtype == torch.int8:
        k, v = seen_floats(q, k, v, window)
    # 0 and the length are made on the device, so that nothing is uploaded.
    queries, keys = (
        torch.arange(0, len(x) + 1, len(x), dtype=torch.int32, device=q.device) for x in (q, k)
    )
    sizes, sides = (queries, keys, len(q), len(k)), (-1 if window is None else window - 1, 0)
    # The kernel chooses the number of splits; cuDNN's kernels do not take the argument.
    options = {"scale": scale, "window_size": sides, "enable_gqa": True, "num_splits": 0}
    attend: Any = varlen_attn
    return attend(q, k, v, *sizes, **options)


def seen_floats(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Return keys and values in 8 bits as floats, without those that no row sees."""
    first = 0 if window is None else max(len(k) - len(q) + 1 - window, 0)
    return decoded(k[first:], q.dtype), decoded(v[first:], q.dtype)


def load_flash_attention(
    device: torch.device, dtype: torch.dtype, shapes: Shapes
) -> tuple[CausalAttention | None, str]:
    """Return FlashAttention, or None if its results differ from plain products.

    The second result is the reason if it fails although it supports the device and the dtype.
    """
    on_cuda = device.type == "cuda" and dtype != torch.float32
    if not on_cuda or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return None, ""
    try:
        difference = attention_difference(flash_attention, device, dtype, shapes)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None, first_line(error)
    if not difference <= TOLERANCE:
        return None, f"FlashAttention's results differ by {difference:.1%}"
    return flash_attention, ""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Compute a `CausalAttention` by PyTorch's definition of the operation for trees."""
    table = np.arange(-(-len(k) // PAGE))
    plan = RowPlan.of([table], np.array([len(k) - len(q)]), [len(q)], 1)
    arrays = (torch.from_numpy(np.asarray(x, np.int32)).to(q.device) for x in plan.arrays())
    keys = VisibleKeys.of_rows(*arrays)
    keys = keys if window is None else keys.within(window)
    columns = k.transpose(0, 1), v.transpose(0, 1)
    return tree_attention(q, *columns, keys, scale=scale)


def attention_difference(
    attend: CausalAttention, device: torch.device, dtype: torch.dtype, shapes: Shapes
) -> float:
    """Return the largest root mean square error of a row, in standard deviations.

    Rows attend to random numbers, with and without a window. A mean over all rows would hide an
    error in a few of them.
    """
    numbers, columns, rows, size = RandomInputs(device, dtype), 600, 40, shapes.head_dim
    k, v = numbers.draw(2, shapes.kv_heads, columns, size).transpose(1, 2)  # strided as in a cache
    q, scale = numbers.draw(rows, shapes.heads, size), size**-0.5
    errors = []
    for window in (None, 100):
        actual = attend(q, k, v, window, scale).float()
        expected = causal_attention(q, k, v, window, scale).float()
        row_errors = (actual - expected).square().mean((1, 2)).sqrt()
        errors.append(row_errors.max() / expected.std())
    return float(torch.stack(errors).max())
