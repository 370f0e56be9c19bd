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
from treeflash_cuda.cpu.decoder_operations import Rotation
from treeflash_cuda.cpu.layer_code import LANES
from treeflash_cuda.cpu.layer_kernels import LayerKernels, SequencesTable


class KernelAttention:
    """`Attention` over the columns of the sequences' regions."""

    def __init__(
        self, kernels: LayerKernels, blocks: Sequence[Block], heads: int, kv_heads: int
    ) -> None:
        self.kernels, self.blocks, self.heads, self.kv_heads = kernels, blocks, heads, kv_heads
        # By window: the first column that each row sees, and the table of the sequences.
        self._layouts: dict[int | None, tuple[Tensor, SequencesTable, list[Tensor]]] = {}

    def turn(
        self,
        layer: int,
        heads: Tensor,
        rotation: Rotation | None,
        norms: Tensor | None,
        eps: float,
    ) -> Tensor:
        _, table, _ = self._layout(None)  # where rows are stored does not depend on a window
        self.kernels.turn(heads, rotation, norms, eps, table, layer)
        return heads[:, : self.heads]

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        firsts, table, _ = self._layout(window)
        return self.kernels.attend(queries, firsts, table, layer)

    def _layout(self, window: int | None) -> tuple[Tensor, SequencesTable, list[Tensor]]:
        if window not in self._layouts:
            self._layouts[window] = self._make_layout(window)
        return self._layouts[window]

    def _make_layout(self, window: int | None) -> tuple[Tensor, SequencesTable, list[Tensor]]:
        lines, masks, firsts = [], [], []
        rows = units = columns = stride = 0
        for block in self.blocks:
            n, committed = len(block), block.committed
            block.cache.allocate()
            like = block.cache.arena.like
            assert like is not None
            (part,) = block.cache.reserve(like, like, committed + n).parts
            layer, kind, head, stride = part.stride()[:4]
            first = part.data_ptr() + np.arange(len(part)) * layer * part.itemsize
            masks.append(self._mask(block, window))
            mask = masks[-1]
            rows, columns = rows + n, max(columns, committed + n)
            units += self.kv_heads * -(-n * (self.heads // self.kv_heads) // LANES)
            facts = head, committed, n, rows, units, 0 if mask is None else mask.data_ptr()
            lines.append(
                np.column_stack(
                    [first, first + kind * part.itemsize, *(np.full(len(part), x) for x in facts)]
                )
            )
            if window is None:
                firsts.append(torch.zeros(n, dtype=torch.int32))
            else:
                firsts.append((block.positions - window + 1).clamp(min=0).int())
        table = np.ascontiguousarray(np.stack(lines, 1), np.int64)
        held = [mask for mask in masks if mask is not None]
        return torch.cat(firsts), SequencesTable(table, self.kv_heads, stride, columns), held

    def _mask(self, block: Block, window: int | None) -> Tensor | None:
        """Return the (n, n) bytes that say which new columns rows see; None up to their own."""
        if block.ancestors is None:
            return None
        visible = block.ancestors & sees(window, block.positions[:, None], block.positions)
        return visible.to(torch.uint8).contiguous()
