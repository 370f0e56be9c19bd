"""Attention of one new token in each of many texts, whose keys and values lie in slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from treeflash_cuda.attention import MaskFunction, additive_mask, evaluate


class SlotContext:
    """What the new token of each text sees: its own text, column by column.

    Attributes:
        positions: (slots,) of the new tokens; a text's columns are its positions.
        columns: of the cache that attention covers.
        reaching: for each chunk of columns, how many of the first slots reach into it.
    """

    def __init__(self, positions: Tensor, columns: int, reaching: Sequence[int]) -> None:
        """Describe one forward pass."""
        self.positions = positions
        self.columns = columns
        self.reaching = reaching

    def mask(self, function: MaskFunction, dtype: torch.dtype) -> Tensor:
        """(slots, 1, 1, columns) additive."""
        keys = torch.arange(self.columns, device=self.positions.device)
        visible = evaluate(function, self.positions[:, None], keys[None, :])
        return additive_mask(visible, dtype)[:, None, None]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """See `Context.attend`; key and value as `SlotCache` returns them."""
        assert mask is not None
        return slot_attention(query, key, value, mask, scale, self.reaching)


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, reaching: Sequence[int]
) -> Tensor:
    """Grouped-query attention of one query per head in each of many texts, chunk by chunk.

    Plain products, because a fused kernel spends more on starting each text than on its few
    queries. Keys are the left factor, which for so few queries is twice as fast on a CPU, and each
    chunk is contiguous in memory, so that none is copied.

    Args:
        q: (slots, heads, 1, head_dim).
        k: (chunks, slots, kv_heads, columns of a chunk, head_dim).
        v: (chunks, slots, kv_heads, columns of a chunk, head_dim).
        mask: (slots, 1, 1, columns of all chunks) additive.
        scale: factor on the scores.
        reaching: for each chunk, how many of the first slots reach into it.

    Returns:
        (slots, 1, heads, head_dim).
    """
    _, slots, kv_heads, width, head_dim = k.shape
    grouped = (q * scale).view(slots, kv_heads, -1, head_dim)
    scores = mask.expand(-1, kv_heads, grouped.shape[2], -1).clone()
    for chunk, (part, n) in enumerate(zip(scores.split(width, -1), reaching, strict=True)):
        part[:n] += (k[chunk, :n] @ grouped[:n].transpose(-1, -2)).transpose(-1, -2)
    out = torch.zeros_like(grouped)
    probs = scores.softmax(-1)
    for chunk, (part, n) in enumerate(zip(probs.split(width, -1), reaching, strict=True)):
        out[:n] += part[:n] @ v[chunk, :n]
    return out.view(slots, 1, -1, head_dim)
