"""Attention of many blocks of one text: each sees the text before its root, and itself.

FlexAttention skips the tiles that no block sees and makes no mask in memory, but needs a compiler
and a GPU. Elsewhere the blocks are split into groups that share a row of keys; no block sees
another, so that small groups waste little.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from treeflash_cuda.attention import additive_mask
from treeflash_cuda.grouped_attention import group_mask, grouped_attention

GROUP = 8
"""Anchors whose blocks share a row of keys."""


class BlockAttention(Protocol):
    """The attention of one layer."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(rows, A * S, heads, head_dim) of the blocks.

        Args:
            q: (rows, heads, A * S, head_dim).
            k: (rows, kv_heads, length + A * S, head_dim), the text's keys first.
            v: the shape of `k`.
        """


class GroupedAttention:
    """With a mask, by groups of blocks; any device."""

    def __init__(
        self, anchors: Tensor, size: int, length: int, window: int | None, causal: bool
    ) -> None:
        """Make the mask.

        Args:
            anchors: (rows, A) positions of the roots, A a multiple of `GROUP`.
            size: S, slots of a block.
            length: of the texts.
            window: how far a slot sees, in positions; None is everything.
            causal: whether a slot sees only itself and earlier positions.
        """
        device = anchors.device
        columns = torch.arange(length, device=device)
        roots = anchors.reshape(-1, GROUP).repeat_interleave(size, 1)[:, :, None]
        positions = (anchors[:, :, None] + torch.arange(size, device=device)).reshape(
            -1, GROUP * size
        )
        blocks = torch.arange(GROUP * size, device=device) // size
        own = (blocks[:, None] == blocks).expand(len(positions), -1, -1)
        seen = torch.cat([columns < roots, own], -1)
        if causal or window is not None:
            keys = torch.cat([columns.expand(len(positions), -1), positions], 1)
            seen = seen & _near(positions[:, :, None] - keys[:, None, :], window, causal)
        self.groups = anchors.shape[1] // GROUP
        self.length = length
        self.mask = additive_mask(seen, torch.float32)[:, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `BlockAttention`."""

        def grouped(blocks: Tensor) -> Tensor:
            return blocks.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1).to(v.dtype)

        def with_context(both: Tensor) -> Tensor:
            context = both[:, :, : self.length].to(v.dtype).repeat_interleave(self.groups, 0)
            return torch.cat([context, grouped(both[:, :, self.length :])], 2)

        bias = group_mask(self.mask.to(v.dtype), q.shape[1] // k.shape[1])
        seen = grouped_attention(
            grouped(q), with_context(k), with_context(v), bias, q.shape[-1] ** -0.5
        )
        return seen.unflatten(0, (len(q), self.groups)).flatten(1, 2)


class FlexBlockAttention:
    """With FlexAttention; `compiled` False runs the same on a CPU, slowly, without a gradient."""

    def __init__(
        self,
        anchors: Tensor,
        size: int,
        length: int,
        window: int | None,
        causal: bool,
        *,
        compiled: bool = True,
    ) -> None:
        """See `GroupedAttention`; A may be any number."""
        rows, count = anchors.shape

        def seen(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
            block, slot = query // size, query % size
            root = anchors[row, block]
            in_block = key >= length
            drafted = (key - length).clamp(min=0)
            found = torch.where(in_block, drafted // size == block, key < root)
            if causal or window is not None:
                position = torch.where(in_block, root + drafted % size, key)
                found = found & _near(root + slot - position, window, causal)
            return found

        self.compiled = compiled
        self.mask: BlockMask = create_block_mask(
            seen, rows, None, count * size, length + count * size, device=str(anchors.device)
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `BlockAttention`."""
        attend: Any = _compiled() if self.compiled else flex_attention
        out: Tensor = attend(q.to(v.dtype), k.to(v.dtype), v, block_mask=self.mask, enable_gqa=True)
        return out.transpose(1, 2).contiguous()


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def _near(distance: Tensor, window: int | None, causal: bool) -> Tensor:
    """Whether a key so many positions before a query is visible to it."""
    near = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return near if window is None else near & (distance.abs() < window)


def block_attention(
    anchors: Tensor, size: int, length: int, window: int | None, causal: bool
) -> BlockAttention:
    """The fastest attention on the device of the anchors; see `GroupedAttention`."""
    kind = FlexBlockAttention if anchors.device.type == "cuda" else GroupedAttention
    return kind(anchors, size, length, window, causal)
