"""The attention of a decoder's pass on a CPU, over the KV caches of its sequences.

`RowStore` writes the keys and values of a pass's rows. `MaskedAttention` attends with PyTorch's
kernels; `ExactAttention` adds in the order of positions (see `exact`). Both are made for one pass,
and prepare once what all layers with equal windows share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from treeflash_cuda.attention import (
    MANY_QUERIES,
    TokenBlock,
    additive_mask,
    group_mask,
    grouped_attention,
)
from treeflash_cuda.cache import KVCache, SeenColumns, WrittenRows, decoded
from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.operations import Rotation, rotate
from treeflash_cuda.exact_attention import AttentionPlan, visible_rows


@dataclass(frozen=True, eq=False)
class CacheBlock(TokenBlock):
    """A block of one sequence, whose keys and values have a cache."""

    cache: KVCache

    def visible(self, window: int | None) -> Tensor | None:
        """Return the (n, committed + n) bool mask; None if a lone row sees every column."""
        if len(self) == 1 and window is None:
            return None
        keys = torch.cat([torch.arange(self.committed), self.positions])
        visible = sees(window, self.positions[:, None], keys)
        if self.ancestors is not None:
            visible[:, self.committed :] &= self.ancestors
        return visible


def sees(window: int | None, queries: Tensor, keys: Tensor) -> Tensor:
    """Return whether queries see keys, by their positions, in layers with a window."""
    visible = queries >= keys
    return visible if window is None else visible & (queries < keys + window)


class RowStore:
    """Writes keys and values behind the committed columns of the sequences."""

    def __init__(
        self,
        facts: DecoderFacts,
        blocks: Sequence[CacheBlock],
        width: int | None = None,  # numbers of a column that are written; None for all
    ) -> None:
        self.facts, self.blocks, self.kv_heads = facts, blocks, facts.kv_heads
        like = blocks[0].cache.arena.like
        assert like is not None
        segments = [(block.cache, block.committed, len(block)) for block in blocks]
        self._rows = WrittenRows(segments, like, width)

    def turn(
        self,
        layer: int,
        heads: Tensor,
        rotation: Rotation | None,
        norms: Tensor | None,
        eps: float,
    ) -> Tensor:
        kv_heads = self.kv_heads
        turned, values = heads.tensor_split([heads.shape[1] - kv_heads], 1)
        wholes = [self.facts.heads, kv_heads] if self.facts.norms_heads == "all" else None
        turned = rotate(turned, rotation, norms, eps, wholes)
        queries, keys = turned.tensor_split([turned.shape[1] - kv_heads], 1)
        self.store(layer, keys, values)
        return queries

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write (n, kv_heads, head_dim) keys and values to the KV caches of the rows' sequences."""
        keys, values = self._encoded(keys), self._encoded(values)
        self._rows.write(layer, keys.transpose(0, 1), values.transpose(0, 1))

    def _encoded(self, x: Tensor) -> Tensor:
        """Convert (n, kv_heads, head_dim) keys or values to the format that is stored."""
        return self.blocks[0].cache.arena.encode(x)


class MaskedAttention(RowStore):
    """`Attention` with a mask for each sequence."""

    def __init__(self, facts: DecoderFacts, blocks: Sequence[CacheBlock]) -> None:
        super().__init__(facts, blocks)
        self._seen = [SeenColumns(block.cache, block.committed + len(block)) for block in blocks]
        self._masks: dict[int | None, list[Tensor | None]] = {}

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        if window not in self._masks:
            self._masks[window] = [self._mask(block, window, queries) for block in self.blocks]
        parts = queries.split([len(block) for block in self.blocks])
        outputs = [
            self._attend(block, q, seen.layer(layer), mask)
            for block, q, seen, mask in zip(
                self.blocks, parts, self._seen, self._masks[window], strict=True
            )
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _is_whole(self, block: CacheBlock, window: int | None) -> bool:
        """Return whether a block is a whole sequence, for which the kernel needs no mask."""
        is_causal = block.ancestors is None and block.committed == 0 and window is None
        return is_causal and self.facts.factors.score_cap is None

    def _mask(self, block: CacheBlock, window: int | None, queries: Tensor) -> Tensor | None:
        """Return the additive mask of a block's rows, or of all heads' rows if they are few."""
        visible = None if self._is_whole(block, window) else block.visible(window)
        if visible is None:
            return None
        mask = additive_mask(visible, queries.dtype)[None, None]
        many = len(block) >= MANY_QUERIES and self.facts.factors.score_cap is None
        return mask if many else group_mask(mask, queries.shape[1] // self.kv_heads)

    def _attend(
        self, block: CacheBlock, q: Tensor, seen: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        n, scale, cap = len(block), self.facts.score_scale, self.facts.factors.score_cap
        keys, values = (decoded(x, q.dtype) for x in seen)
        q = q.transpose(0, 1)[None]
        if cap is None and n > 1 and (mask is None or n >= MANY_QUERIES):
            output = F.scaled_dot_product_attention(
                q, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
            return output[0].transpose(0, 1).reshape(n, -1)
        return grouped_attention(q, [(keys, values)], [mask], [n], scale, cap)[0].flatten(1)


class ExactAttention(RowStore):
    """`Attention` in the order of positions, over float32 keys and values."""

    def __init__(self, facts: DecoderFacts, blocks: Sequence[CacheBlock]) -> None:
        super().__init__(facts, blocks, blocks[0].cache.arena.head_dim)
        self._plans: dict[int | None, AttentionPlan] = {}

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        query = queries.transpose(0, 1)[None]
        if window not in self._plans:
            function = None if window is None else partial(sees, window)
            members = [
                (rows, block.cache.parts)
                for block in self.blocks
                for rows in visible_rows(block, function)
            ]
            self._plans[window] = AttentionPlan(members, self.kv_heads, query)
        return self._plans[window].attend(query, layer, self.facts.score_scale)[0].flatten(1)

    def _encoded(self, x: Tensor) -> Tensor:
        return x  # stored as float32, which the copy makes of it
