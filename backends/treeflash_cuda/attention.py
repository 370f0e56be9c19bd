"""Attention by PyTorch's kernels: additive masks, and heads that share keys without copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from treeflash_cuda.numerics import concatenate

ALIGNMENT = 8
"""Elements: CUDA's attention kernel copies masks whose rows start elsewhere."""

MANY_QUERIES = 256
"""From this many queries on, copying a mask for every head costs more than grouping saves."""


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """New tokens of one sequence: a draft tree, or the next tokens."""

    committed: int  # positions before the block
    positions: Tensor  # (n,) absolute positions
    # (n, n) bool, which of the block's tokens each token sees, if its layer allows it; None for
    # next tokens.
    ancestors: Tensor | None

    def __len__(self) -> int:
        return len(self.positions)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 for keys that are visible, -inf for the others."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf"))


def group_mask(mask: Tensor, groups: int) -> Tensor:
    """Repeat the rows of an (..., n, m) mask for each head of a group: (..., n * groups, m).

    Rows start at multiples of `ALIGNMENT` elements.
    """
    *batch, n, m = mask.shape
    padded = mask.new_zeros(*batch, n, groups, -(-m // ALIGNMENT) * ALIGNMENT)
    padded[..., :m] = mask[..., None, :]
    return padded.flatten(-3, -2)[..., :m]


class GroupedMasks:
    """The masks of one forward pass as `grouped_attention` takes them, made once for all layers."""

    def __init__(self) -> None:
        self._grouped: dict[tuple[Tensor, int, torch.device], Tensor] = {}

    def get(self, mask: Tensor | None, groups: int, device: torch.device) -> Tensor | None:
        """Return the result of `group_mask` on the device of a layer."""
        if mask is None:
            return None
        key = mask, groups, device
        if key not in self._grouped:
            self._grouped[key] = group_mask(mask.to(device), groups)
        return self._grouped[key]


def grouped_attention(
    query: Tensor,  # (batch, heads, rows, head_dim), sequence by sequence
    # Each sequence has keys and values of shape (batch, kv_heads, m, head_dim).
    keys_and_values: Sequence[tuple[Tensor, Tensor]],
    # Each sequence has a mask as `group_mask` makes it, or None if every key is visible. A mask
    # broadcasts over batch and kv_heads.
    masks: Sequence[Tensor | None],
    rows: Sequence[int],  # the rows of each sequence
    scale: float,  # factor on the scores
    softcap: float | None = None,  # see `AttentionInputs`
    sinks: Tensor | None = None,  # see `AttentionInputs`
) -> Tensor:
    """Compute grouped-query attention of one or more sequences, without repeated keys.

    The heads of a group become more queries, next to each other, so that the queries of a
    sequence are a slice, which costs nothing.

    Returns:
        (batch, rows, heads, head_dim), contiguous.
    """
    kv_heads, head_dim = keys_and_values[0][0].shape[1::2]
    groups = query.shape[1] // kv_heads
    queries = query.unflatten(1, (kv_heads, groups)).transpose(2, 3).flatten(2, 3)
    parts = zip(queries.split([n * groups for n in rows], 2), keys_and_values, masks, strict=True)
    on_cuda = query.device.type == "cuda" and head_dim % ALIGNMENT == 0
    outputs = []
    for q, (k, v), mask in parts:
        if softcap is not None or sinks is not None:
            outputs.append(_products(q, k, v, mask, scale, softcap, sinks))
        elif on_cuda:
            # PyTorch may choose cuDNN, which builds a plan for every new number of keys.
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
            bias = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
            outputs.append(kernel(q, k, v, bias, False, scale=scale)[0])
        else:
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
    output = concatenate(outputs, 2)
    # CUDA's kernels return other strides than the CPU's: no view may join dimensions here.
    return output.unflatten(2, (-1, groups)).transpose(1, 2).flatten(2, 3).contiguous()


def _products(
    q: Tensor,  # (batch, kv_heads, n * groups, head_dim)
    k: Tensor,  # (batch, kv_heads, m, head_dim)
    v: Tensor,  # (batch, kv_heads, m, head_dim)
    mask: Tensor | None,  # (1, 1, n * groups, m)
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # (kv_heads * groups,)
) -> Tensor:
    """Return (batch, kv_heads, n * groups, head_dim) attention with soft-capped scores or sinks."""
    outputs, first = [], 0
    if sinks is not None:
        sinks = sinks.float().view(k.shape[1], 1, -1)
    for part in q.split(MANY_QUERIES * (1 if sinks is None else sinks.shape[2]), 2):
        end = first + part.shape[2]
        scores = (part @ k.transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if mask is not None:
            scores = scores + mask[..., first:end, :]
        if sinks is not None:
            column = sinks.expand(-1, part.shape[2] // sinks.shape[2], -1).reshape(len(sinks), -1)
            scores = torch.cat([scores, column.expand(*scores.shape[:-1])[..., None]], -1)
        outputs.append(scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v)
        first = end
    return torch.cat(outputs, 2)
