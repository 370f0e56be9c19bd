"""Grouped-query attention in which the heads of a group become more queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 8


class GroupedMasks:
    """The masks of one forward pass as `grouped_attention` takes them, made once for all layers."""

    def __init__(self) -> None:
        """Start empty."""
        self._made: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor | None]] = {}

    def get(self, mask: Tensor | None, groups: int, device: torch.device) -> Tensor | None:
        """See `group_mask`; on the device of a layer."""
        if mask is None:
            return None
        key = id(mask), groups, device
        if key not in self._made:  # holding the mask itself keeps its id from being reused
            self._made[key] = mask, group_mask(mask.to(device), groups)
        return self._made[key][1]


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Grouped-query attention without repeated keys: the heads of a group become more queries.

    Args:
        q: (batch, heads, n, head_dim).
        k: (batch, kv_heads, m, head_dim).
        v: (batch, kv_heads, m, head_dim).
        mask: additive, (..., groups * n, m) as `group_mask` makes it; it broadcasts over batch and
            kv_heads. None if every key is visible.
        scale: factor on the scores.

    Returns:
        (batch, n, heads, head_dim), contiguous.
    """
    batch, heads, n, head_dim = q.shape
    queries = q.reshape(batch, k.shape[1], heads // k.shape[1] * n, head_dim)
    if q.device.type == "cuda" and head_dim % ALIGNMENT == 0:
        # cuDNN's attention builds a plan for every new number of keys, and each step has a new one.
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = None if mask is None else mask.expand(*queries.shape[:3], k.shape[2])
        out = kernel(queries, k, v, bias, False, scale=scale)[0]
    else:
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale)
    if n == 1:  # heads are in order already
        return out.reshape(batch, 1, heads, head_dim).contiguous()
    # CUDA's kernels return other strides than the CPU's: no view may join dimensions here.
    return out.unflatten(2, (-1, n)).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def group_mask(mask: Tensor | None, groups: int) -> Tensor | None:
    """(..., groups * n, m) from an (..., n, m) mask: the same rows for every head of a group.

    Rows start at multiples of `ALIGNMENT` elements, or CUDA's kernel would copy the mask again.
    """
    if mask is None:
        return None
    *batch, n, m = mask.shape
    padded = mask.new_zeros(*batch, groups, n, -(-m // ALIGNMENT) * ALIGNMENT)
    padded[..., :m] = mask[..., None, :, :]
    return padded.flatten(-3, -2)[..., :m]
