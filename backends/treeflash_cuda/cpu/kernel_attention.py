"""The attention of a decoder's pass on a CPU, by the compiled functions of `layer_kernels`.

All sequences are one call in each layer. A row has equal bits whatever else is in the pass, so this
is the attention of exact mode as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treeflash_cuda.cpu.decoder_attention import Block, sees
from treeflash_cuda.cpu.layer_code import LANES
from treeflash_cuda.cpu.layer_kernels import LayerKernels, SequencesTable
from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.operations import Rotation


class KernelAttention:
    """`Attention` over the columns of the sequences."""

    def __init__(
        self, facts: DecoderFacts, blocks: Sequence[Block], *, kernels: LayerKernels
    ) -> None:
        self.kernels, self.facts, self.blocks = kernels, facts, blocks
        self.heads, self.kv_heads = facts.heads, facts.kv_heads
        self.places = self._make_places()
        # By window: the first column that each row sees, and the table with what it masks.
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
        firsts, table = self.layout(window)
        factors = self.facts.score_scale, self.facts.factors.score_cap
        return self.kernels.attend(queries, firsts, table, layer, *factors)

    def layout(self, window: int | None) -> tuple[Tensor, SequencesTable]:
        """Return the first column that each row sees in a window, and the table with masks."""
        if window not in self._layouts:
            self._layouts[window] = self._make_layout(window)
        return self._layouts[window][:2]

    def _make_places(self) -> SequencesTable:
        """Make the table of where the sequences' columns and rows are, without masks."""
        lines = []
        rows = units = columns = stride = 0
        for block in self.blocks:
            n, committed = len(block), block.committed
            block.cache.reserve_rows(committed, committed + n)
            (part,) = block.cache.parts
            layer, kind, head, stride = part.stride()[:4]
            first = part.data_ptr() + np.arange(len(part)) * layer * part.itemsize
            rows, columns = rows + n, max(columns, committed + n)
            units += self.kv_heads * -(-n * (self.heads // self.kv_heads) // LANES)
            facts = head, committed, n, rows, units, 0
            lines.append(
                np.column_stack(
                    [first, first + kind * part.itemsize, *(np.full(len(part), x) for x in facts)]
                )
            )
        table = np.ascontiguousarray(np.stack(lines, 1), np.int64)
        return SequencesTable(table, self.kv_heads, stride, columns)

    def _make_layout(
        self, window: int | None
    ) -> tuple[Tensor, SequencesTable, list[Tensor | None]]:
        masks = [self._mask(block, window) for block in self.blocks]
        addresses = [0 if mask is None else mask.data_ptr() for mask in masks]
        table = self.places.with_masks(addresses) if any(addresses) else self.places
        firsts = [
            torch.zeros(len(block), dtype=torch.int32)
            if window is None
            else (block.positions - window + 1).clamp(min=0).int()
            for block in self.blocks
        ]
        return torch.cat(firsts), table, masks

    def _mask(self, block: Block, window: int | None) -> Tensor | None:
        """Return the (n, n) bytes that say which new columns rows see; None up to their own."""
        if block.ancestors is None:
            return None
        visible = block.ancestors & sees(window, block.positions[:, None], block.positions)
        return visible.to(torch.uint8).contiguous()
