"""The passes of a model of transformers: over rows, or with masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.tree import DraftTree
from treeflash_cuda.attention import TokenBlock
from treeflash_cuda.gpu.row_pass import RowInputs, RowPass
from treeflash_cuda.gpu.tree_recurrences import TreeRecurrences
from treeflash_cuda.hf.attention_contexts import TreeContext
from treeflash_cuda.hf.hybrid import HybridCache, HybridTreeCache
from treeflash_cuda.hf.model_caches import SlabCache
from treeflash_cuda.numerics import upload_all
from treeflash_cuda.sampling import Logits
from treeflash_cuda.state import State
from treeflash_cuda.target import Rows, RowsResult

if TYPE_CHECKING:
    from treeflash_cuda.hf.model_target import ModelTarget

Forward: TypeAlias = Callable[[Sequence[Rows], Sequence[bool]], RowsResult]
"""A pass over rows; some need logits."""


class ModelPasses:
    """Runs rows of sequences in as few passes as a model allows; see `Target.run_rows`."""

    def __init__(self, target: ModelTarget) -> None:
        self.target = target
        self.row_pass = RowPass(target, self._run_rows)
        self.has_row_pass = True  # whether all layers can run in it, which loading finds out

    def in_row_pass(self, state: State, tokens: DraftTree | Sequence[int]) -> bool:
        """Return whether a tree or new tokens run in the pass that CUDA graphs can have."""
        can_run = self.has_row_pass and self.target.reads_cache
        return can_run and self.row_pass.takes(state, tokens)

    def run(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> RowsResult:
        found: list[tuple[list[int], RowsResult]] = []

        def run(forward: Forward, members: list[int]) -> None:
            part = forward([rows[i] for i in members], [needs_logits[i] for i in members])
            found.append((members, part))

        in_row_pass = [i for i, row in enumerate(rows) if self.in_row_pass(*row)]
        if in_row_pass:
            run(self.row_pass.run, in_row_pass)
        others = [i for i in range(len(rows)) if i not in in_row_pass]
        has_features = [state.has_features(tokens) for state, tokens in rows]
        alone = [i for i in others if has_features[i] or not self.target.reads_cache]
        for members in (*([i] for i in alone), [i for i in others if i not in alone]):
            if members:
                run(self._run_with_masks, members)
        return RowsResult.joined(found)

    def _run_rows(self, rows: RowInputs) -> tuple[Tensor, dict[int, Tensor], list[Tensor]]:
        """Compute a pass of `RowPass`."""
        target = self.target
        assert target.operations is not None
        storage = rows.slab, target.arena.encode, rows.slots.long()
        cache, recurrences = SlabCache(*storage), None
        if rows.recurrent is not None:
            assert target.state_arena is not None
            nodes, states = rows.recurrent
            recurrences = TreeRecurrences(target.operations, target.state_arena, states, nodes)
            cache = HybridTreeCache(*storage, target.attention_slots, recurrences)
        context = TreeContext(target.operations, cache, rows.keys, rows.positions.long())
        logits, outputs = target.forward(
            rows.ids.long(), context, cache, logits_to_keep=0, rotary=rows.rotary.long()
        )
        return logits, outputs, [] if recurrences is None else recurrences.outputs()

    def _run_with_masks(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> RowsResult:
        """Run one pass, in which every sequence has its mask."""
        sizes = [len(tokens) for _, tokens in rows]
        arrays: list[NDArray[Any]] = []
        for state, tokens in rows:
            if isinstance(tokens, DraftTree):
                arrays += [tokens.tokens, tokens.positions(state.length), tokens.ancestor_mask()]
            else:
                arrays += [np.array(tokens), state.length + np.arange(len(tokens))]
        counts = [
            (size if isinstance(tokens, DraftTree) else 1) if needed else 0
            for (_, tokens), size, needed in zip(rows, sizes, needs_logits, strict=True)
        ]
        ends = np.cumsum(sizes)
        rows_to_keep = np.concatenate(
            [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
        )
        if turned := any(state.positions.shift or state.images for state, _ in rows):
            each = [state.rotary_positions(tokens) for state, tokens in rows]
            arrays.insert(0, np.concatenate(each, -1))
        uploaded = iter(upload_all([*arrays, rows_to_keep], self.target.device))
        rotary = next(uploaded).long() if turned else None
        tower, images = self.target.tower, None
        state, tokens = rows[0]
        if tower is not None and state.has_features(tokens):
            images = tower.rows(state, len(tokens))
        token_ids: list[Tensor] = []
        blocks: list[TokenBlock] = []
        for state, tokens in rows:
            token_ids.append(next(uploaded).long())
            positions = next(uploaded).long()
            ancestors = next(uploaded).bool() if isinstance(tokens, DraftTree) else None
            blocks.append(TokenBlock(state.length, positions, ancestors))
        cache = self.target.new_cache(rows, [block.ancestors for block in blocks])
        logits_to_keep: int | Tensor = 1  # transformers needs at least 1; the row is discarded
        if len(rows_to_keep) == ends[-1]:
            logits_to_keep = 0  # all
        elif len(rows_to_keep):
            logits_to_keep = next(uploaded).long()
        logits, outputs = self.target.forward(
            torch.cat(token_ids),
            self.target.context(blocks, cache, images),
            cache,
            logits_to_keep=logits_to_keep,
            rotary=rotary,
            images=images,
        )
        found = Logits.split(logits[: len(rows_to_keep)], counts)
        written = [x.writes for x in cache.parts] if isinstance(cache, HybridCache) else []
        firsts = (ends - sizes).tolist()
        return RowsResult.of_pass(found, rows, outputs, firsts, written=written)
