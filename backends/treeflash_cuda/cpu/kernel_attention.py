"""The attention of a decoder's pass on a CPU, by the compiled functions of `layer_kernels`.

All sequences are one call in each layer. A row has equal bits whatever else is in the pass, so this
is the attention of exact mode as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treeflash_cuda.cache import Segment
from treeflash_cuda.cpu.decoder_attention import CacheBlock, sees
from treeflash_cuda.cpu.layer_code import LANES, SEQUENCE
from treeflash_cuda.cpu.layer_kernels import LayerKernels, SequencesTable
from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.operations import Rotation


class KernelAttention:
    """`Attention` over the columns of the sequences."""

    def __init__(
        self, facts: DecoderFacts, blocks: Sequence[CacheBlock], *, kernels: LayerKernels
    ) -> None:
        self.kernels, self.facts, self.blocks = kernels, facts, blocks
        self.heads = facts.heads
        segments = [(block.cache, block.committed, len(block)) for block in blocks]
        self.places = places_of(segments, facts.heads)
        # By window: the columns that each row sees, and the table with what it masks.
        self._layouts: dict[int | None, tuple[Tensor, SequencesTable, list[Tensor | None]]] = {}

    def turn(
        self,
        layer: int,
        heads: Tensor,
        rotation: Rotation | None,
        norms: Tensor | None,
        eps: float,
    ) -> Tensor:
        self.kernels.turn(heads, rotation, norms, eps, self.places, layer)
        return heads[:, : self.heads]

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        bounds, table = self.layout(window)
        factors = self.facts.score_scale, self.facts.factors.score_cap
        return self.kernels.attend(queries, bounds, table, layer, *factors)

    def layout(self, window: int | None) -> tuple[Tensor, SequencesTable]:
        """Return the bounds of what each row sees in a window, and the table with masks."""
        if window not in self._layouts:
            self._layouts[window] = self._make_layout(window)
        return self._layouts[window][:2]

    def _make_layout(
        self, window: int | None
    ) -> tuple[Tensor, SequencesTable, list[Tensor | None]]:
        masks = [self._mask(block, window) for block in self.blocks]
        addresses = [0 if mask is None else mask.data_ptr() for mask in masks]
        table = self.places.with_masks(addresses) if any(addresses) else self.places
        bounds = []
        for block in self.blocks:
            lasts = block.committed + torch.arange(len(block))
            firsts = torch.zeros_like(lasts)
            if window is not None:
                firsts = (block.positions - window + 1).clamp(min=0)
            bounds.append(torch.stack([firsts, lasts], 1))
        return torch.cat(bounds).int(), table, masks

    def _mask(self, block: CacheBlock, window: int | None) -> Tensor | None:
        """Return the (n, n) bytes that say which new columns rows see; None up to their own."""
        if block.ancestors is None:
            return None
        visible = block.ancestors & sees(window, block.positions[:, None], block.positions)
        return visible.to(torch.uint8).contiguous()


def places_of(segments: Sequence[Segment], heads: int) -> SequencesTable:
    """Make the table of where rows of sequences are, without masks; their columns are reserved."""
    layers = segments[0][0].arena.layers
    lines = np.zeros((layers, len(segments), len(SEQUENCE)), np.int64)
    rows = units = columns = stride = kv_heads = 0
    for n, (cache, first, count) in enumerate(segments):
        cache.reserve_rows(first, first + count)
        (part,) = cache.parts
        kv_heads = part.shape[2]
        layer, kind, head, stride = part.stride()[:4]
        rows, columns = rows + count, max(columns, first + count)
        units += kv_heads * -(-count * (heads // kv_heads) // LANES)
        keys = part.data_ptr() + np.arange(layers) * (layer * part.itemsize)
        lines[:, n, 0], lines[:, n, 1] = keys, keys + kind * part.itemsize
        lines[:, n, 2:] = head, first, count, rows, units, 0
    return SequencesTable(lines, kv_heads, stride, columns)
