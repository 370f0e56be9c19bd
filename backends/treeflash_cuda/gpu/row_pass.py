"""The forward pass over rows of several sequences: nodes of trees, and next tokens.

The number of rows alone fixes the shapes of a pass: `visible_keys` explains how each row says what
it sees. So a few numbers of rows have all CUDA graphs that are needed.

Targets with recurrent layers are an exception: their recurrences run all trees at once, so that
every tree is filled up to the size of the largest one, and next tokens run elsewhere.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.tree import DraftTree
from treeflash_cuda.cache import NO_PAGES, Pages, Slab
from treeflash_cuda.gpu.graphs import MAX_ROWS, Outputs, padded_order, power_of_two, round_up
from treeflash_cuda.gpu.state_arena import SlotStates, StateArena, TreeWrites, WrittenTree
from treeflash_cuda.numerics import pack, unpack, upload
from treeflash_cuda.recurrence import TreeNodes, plan_nodes
from treeflash_cuda.sampling import Logits, finite_argmax
from treeflash_cuda.state import State
from treeflash_cuda.target import PASS_NAME, Rows, RowsResult, Target, logit_counts, token_ids
from treeflash_cuda.visible_keys import PAGE, RowPlan, VisibleKeys

MAX_CHUNK = 256
"""The most next tokens of a sequence that are rows of this pass where there is a kernel that is
faster for prompts."""
MIN_DEPTHS = 64
"""Depths of trees for which paths have room; deeper trees, which are rare, have other graphs."""


@dataclass(frozen=True, eq=False)
class RowInputs:
    """The rows of a pass, as tensors on the device."""

    slab: Slab | None  # the slab of all sequences; None for a target without attention layers
    ids: Tensor  # (n,) int32 tokens
    rotary: Tensor  # (n,) int32 rotary positions
    positions: Tensor  # (n,) int32 positions
    slots: Tensor  # (n,) int32 column of each row's own key
    keys: VisibleKeys  # the keys that rows see in layers without a window
    # The nodes of trees, and the (trees,) int32 slots of the states before them; None for a target
    # without recurrent layers.
    recurrent: tuple[TreeNodes, Tensor] | None = None


class RowTarget(Target):
    """A target that runs rows of sequences in one pass, a function of tensors."""

    @abstractmethod
    def compute(self, rows: RowInputs) -> tuple[Tensor, dict[int, Tensor], Sequence[Tensor]]:
        """Compute the pass: logits of all rows, outputs of captured layers by index, and writes.

        They are `TreeWrites.outputs`. The result depends on the inputs alone, and nothing is read
        back, so that a CUDA graph can replay the computation.
        """

    @abstractmethod
    def group_others(self, rows: Sequence[Rows], members: Sequence[int]) -> Iterable[list[int]]:
        """Return the members, sequences that this pass does not take, in a group for each pass."""

    @abstractmethod
    def run_others(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> RowsResult:
        """Run such a group; see `run_rows`."""

    def in_row_pass(self, state: State, tokens: DraftTree | Sequence[int]) -> bool:
        """Return whether a tree or next tokens of a sequence are rows of this pass."""
        if self.operations is None or not self.operations.runs_trees:
            return False
        if isinstance(tokens, DraftTree):
            return True
        if state.has_features(tokens) or self.state_arena is not None:
            return False
        return self.prompt_attention is None or len(tokens) <= MAX_CHUNK

    def most_rows(self, state: State, tokens: Sequence[int]) -> int | None:
        return MAX_ROWS if self.in_row_pass(state, tokens) else None

    def run_rows(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> RowsResult:
        taken: list[int] = []
        others: list[int] = []
        for i, row in enumerate(rows):
            (taken if self.in_row_pass(*row) else others).append(i)
        passes = [(self.run_pass, group) for group in self._groups(rows, taken)]
        passes += [(self.run_others, group) for group in self.group_others(rows, others)]
        found = [
            (group, run([rows[i] for i in group], [needs_logits[i] for i in group]))
            for run, group in passes
        ]
        return RowsResult.joined(found)

    def _groups(self, rows: Sequence[Rows], members: Sequence[int]) -> Iterator[list[int]]:
        """Yield the members that share a pass: all are in one slab."""
        groups: dict[Slab | None, list[int]] = {}
        for i in members:
            slab = slab_of(rows[i][0])
            group = groups.setdefault(slab, [])
            if group and self._count([rows[j] for j in (*group, i)]) > MAX_ROWS:
                yield group
                groups[slab] = group = []
            group.append(i)
        yield from groups.values()

    def _count(self, rows: Sequence[Rows]) -> int:
        """Return the rows of a pass, before they are rounded up to one of `GRAPH_ROWS`."""
        sizes = [len(tokens) for _, tokens in rows]
        if self.state_arena is None:
            return sum(sizes)
        return power_of_two(len(sizes)) * power_of_two(max(sizes))

    def run_pass(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> RowsResult:
        """Run sequences of one slab: logits of all nodes, and of last tokens where needed."""
        arena, operations = self.state_arena, self.operations
        assert operations is not None
        graphs, count = self.graphs, self._count(rows)
        captured = graphs.is_capturing and count <= MAX_ROWS
        sizes = np.array([len(tokens) for _, tokens in rows])
        tables, slots = zip(*(rows_of(*row) for row in rows), strict=True)
        stride, trees = None, (len(rows), int(sizes.max()))
        if arena is None:
            order = padded_order(count, round_up(count) if captured else count)
        else:
            trees = (power_of_two(trees[0]), power_of_two(trees[1])) if captured else trees
            order, stride = _rectangle(sizes, *trees), trees[1]
        plan = plan_rows(rows, tables, self.groups, stride)
        placed = plan.arranged(order, path_room(plan, len(order)))
        rotary = np.concatenate([state.rotary_positions(x) for state, x in rows])
        ids = np.concatenate([token_ids(x) for _, x in rows])
        arrays = [ids[order], rotary[order]]
        arrays += [np.concatenate(slots)[order], *placed.arrays()]
        slab, addresses = slab_of(rows[0][0]), 0
        if arena is not None:
            before, recurrent = recurrent_inputs(arena, rows, *trees)
            arrays += recurrent
            addresses = arena.slots  # a graph belongs to the tensors of an arena of this size
        shapes = tuple(array.shape for array in arrays)
        forward = functools.partial(self._forward, slab, shapes)
        uploaded = upload(pack(arrays), self.device)
        results = graphs.run(
            PASS_NAME, (slab, shapes, addresses), forward, uploaded, capture=captured
        )
        logits, best, layers, *outputs = results
        by_layer = dict(zip(layers, outputs[: len(layers)], strict=True))
        written: list[WrittenTree] = []
        if arena is not None:
            writes = TreeWrites(arena, operations, trees[1], before, outputs[len(layers) :])
            written = [WrittenTree(writes, i) for i in range(len(rows))]
        parts, firsts = [], plan.starts.tolist()
        for first, size, n in zip(firsts, sizes, logit_counts(rows, needs_logits), strict=True):
            parts.append(slice(first + size - n, first + size))
        whole = None
        if arena is None and sum(part.stop - part.start for part in parts) == count:
            whole = logits[:count]
        found = Logits([logits[part] for part in parts], [best[part] for part in parts], whole)
        return RowsResult.of_pass(found, rows, by_layer, firsts, written=written)

    @torch.inference_mode()
    def run_tree(self, nodes: int) -> None:
        """Run a tree in this pass without a graph; its state is dropped.

        Raises an UnsupportedModelError if a layer cannot run in such a pass.
        """
        arena = copy(self.arena)
        arena.slabs = []  # the target's own memory is allocated later
        state = State(arena, None, nodes, recurrent=self.new_recurrent_states())
        tokens = np.arange(nodes, dtype=np.int32) % self.vocab_size
        with self.graphs.paused():
            self.run_pass([(state, DraftTree.chain(tokens, np.zeros(nodes)))], [True])

    def _forward(
        self,
        slab: Slab | None,
        shapes: Sequence[tuple[int, ...]],  # the shapes of the packed arrays
        # `inputs` packs ids, rotary positions, slots and `RowPlan.arrays`; and for recurrent layers
        # the result of `plan_nodes`, and the slots of the states.
        inputs: Tensor,
    ) -> Outputs:
        """Run a pass: logits, each row's best token, captured layers' indices and outputs.

        With recurrent layers `TreeWrites.outputs` follow.
        """
        ids, rotary, slots, *plan = unpack(inputs, shapes)
        recurrent = None
        if self.state_arena is not None:
            *plan, ancestors, visits, counts, states = plan
            recurrent = TreeNodes.of(ancestors, visits, counts), states
        keys = VisibleKeys.of_rows(*plan)
        rows = RowInputs(slab, ids, rotary, plan[0], slots, keys, recurrent)
        logits, outputs, writes = self.compute(rows)
        return logits, finite_argmax(logits), tuple(outputs), *outputs.values(), *writes


def slab_of(state: State) -> Slab | None:
    """Return the slab of a sequence; None if no layer of the target has keys and values."""
    cache = state.kv_cache
    return None if cache.arena.like is None else cache.allocate()


def plan_rows(
    rows: Sequence[Rows], tables: Sequence[Pages], groups: int, stride: int | None = None
) -> RowPlan:
    """Return the plan of rows of sequences with these tables; see `RowPlan.of`."""
    lengths = np.array([state.length for state, _ in rows])
    trees = [tokens if isinstance(tokens, DraftTree) else len(tokens) for _, tokens in rows]
    return RowPlan.of(tables, lengths, trees, groups, stride)


def path_room(plan: RowPlan, rows: int) -> int:
    """Return the depths that paths have room for in a pass over so many rows."""
    return power_of_two(max(plan.paths.shape[1], min(MIN_DEPTHS, rows)))


def rows_of(state: State, tokens: DraftTree | Sequence[int]) -> tuple[Pages, NDArray[np.int64]]:
    """Return the table of a sequence, and the (n,) columns that its next n rows write."""
    cache, count = state.kv_cache, len(tokens)
    if cache.arena.like is None:
        return NO_PAGES, np.zeros(count, np.int64)
    assert cache.arena.page == PAGE
    offsets = cache.next_offsets(token_ids(tokens))
    cache.reserve_rows(int(offsets[0]), int(offsets[-1]) + 1)
    return cache.table(state.length + count), cache.columns_at(offsets)


def recurrent_inputs(
    arena: StateArena, rows: Sequence[Rows], trees: int, nodes: int
) -> tuple[list[SlotStates | None], list[NDArray[np.int32]]]:
    """Return the states before trees, and what recurrent layers read: `plan_nodes`, and slots.

    The trees are filled up to `nodes`, and copies of the first tree up to `trees`.
    """
    states = [state.recurrent for state, _ in rows if state.recurrent is not None]
    before = [arena.adopt(x) for x in states]
    slots = [0 if x is None else x.slot for x in before]
    slots += slots[:1] * (trees - len(rows))
    planned = plan_nodes([x for _, x in rows if isinstance(x, DraftTree)], trees, nodes)
    return before, [*planned, np.array(slots, np.int32)]


def _rectangle(sizes: NDArray[np.int64], trees: int, nodes: int) -> NDArray[np.int64]:
    """Return the rows of trees that are filled up with copies of their roots.

    The other trees are copies of the first one.
    """
    node, first = np.arange(nodes), sizes.cumsum() - sizes
    order = first[:, None] + np.where(node < sizes[:, None], node, 0)
    return np.concatenate([order, np.tile(order[:1], (trees - len(sizes), 1))]).ravel()
