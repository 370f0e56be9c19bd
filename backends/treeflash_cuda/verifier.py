"""The target over the trees and new tokens of several sequences, and commits."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.backend_base import rows_by_pass, undone_on_failure
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.sampling import SampledTokens
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.attention import AttentionContext, TreeContext
from treeflash_cuda.cache import Region, Slab, SlabCache
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.graphs import MIN_LENGTH, Outputs, power_of_two
from treeflash_cuda.hybrid import HybridTreeCache, RecurrentStates, TreeWrites
from treeflash_cuda.mtp_head import MtpModel
from treeflash_cuda.numerics import upload, upload_all
from treeflash_cuda.operations import VisibleKeys
from treeflash_cuda.sampling import Logits, finite_argmax, sample
from treeflash_cuda.state import State
from treeflash_cuda.target import Target

MAX_ROWS = 512
"""More rows run without a graph, in their own shapes."""
TREE_PASS = "the target"
"""The name of the forward pass over trees as a function."""
OUTGROWN = "the sequence has outgrown its capacity"
FIRST_CHUNK, NEXT_CHUNK = 2048, 1024
"""Prompt tokens per forward pass; chunks after the first need a mask, and so are smaller."""

Rows: TypeAlias = tuple[State, DraftTree | Sequence[int]]
"""A sequence, and its tree or its next tokens."""
Path: TypeAlias = tuple[State, NDArray[np.int32]]
"""A sequence, and the nodes to commit."""


class TreePass:
    """One forward pass over trees of sequences of one slab, as a function of tensors.

    Where a sequence begins, how long it is, and its recurrent states are tensors. For CUDA graphs
    the sizes are rounded up to powers of two: the number of sequences, the nodes of the largest
    tree, and the length of the longest sequence.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def run(self, trees: Sequence[tuple[State, DraftTree]]) -> list[tuple[Tensor, Tensor]]:
        """Return the (n, vocab) logits, and their (n,) `finite_argmax`, of each tree's nodes.

        Raises:
            UnsupportedModelError: a layer's attention is neither causal nor a window.
        """
        sequences, nodes = len(trees), max(len(tree) for _, tree in trees)
        longest = max(max(state.length for state, _ in trees), 1)
        graphs = self.target.graphs
        captured = graphs.is_capturing and power_of_two(sequences) * power_of_two(nodes) <= MAX_ROWS
        if captured:
            sequences, nodes = power_of_two(sequences), power_of_two(nodes)
            longest = max(power_of_two(longest), MIN_LENGTH)
        regions = [region_of(state) for state, _ in trees]
        for (state, tree), region in zip(trees, regions, strict=True):
            assert region is None or state.length + len(tree) <= region.columns, OUTGROWN
        slab, sizes = slab_of(trees[0][0]), (sequences, nodes, longest)
        forward = functools.partial(self._forward, slab, *sizes)
        uploaded = upload(_inputs(trees, regions, sequences, nodes), self.target.device)
        layout, before = self.target.state_layout, []
        recurrent = [state.recurrent for state, _ in trees if state.recurrent is not None]
        if layout is not None:
            committed = [states.committed for states in recurrent]
            committed += committed[:1] * (sequences - len(trees))
            before = layout.stack(committed, self.target.device)
        results = graphs.run(TREE_PASS, (slab, sizes), forward, uploaded, *before, capture=captured)
        logits, best, layers, *outputs = results
        by_layer = dict(zip(layers, outputs[: len(layers)], strict=True))
        if layout is not None:
            writes = TreeWrites(layout, nodes, before, outputs[len(layers) :])
            for i, states in enumerate(recurrent):
                states.drop_pending()
                states.tree = writes, i
        rows = [slice(i * nodes, i * nodes + len(tree)) for i, (_, tree) in enumerate(trees)]
        for (state, _), part in zip(trees, rows, strict=True):
            state.outputs, state.first_row = by_layer, part.start
        return [(logits[part], best[part]) for part in rows]

    def _forward(
        self,
        slab: Slab | None,
        sequences: int,
        nodes: int,
        longest: int,
        inputs: Tensor,  # see `_inputs`
        *states: Tensor,  # the recurrent states; see `StateLayout.stack`
    ) -> Outputs:
        """Run a pass: logits, each row's best token, captured layers' indices and outputs.

        With recurrent layers `TreeWrites.outputs` follow.
        """
        target, rows = self.target, sequences * nodes
        assert target.operations is not None
        tokens, positions, rotary, slots = inputs[: 4 * rows].long().view(4, rows)
        first, length = inputs[4 * rows : 4 * rows + 2 * sequences].view(2, sequences)
        ancestors = inputs[4 * rows + 2 * sequences :].view(sequences, nodes, nodes).bool()
        layout, storage = target.state_layout, (slab, target.arena.encode, slots)
        cache = (
            SlabCache(*storage)
            if layout is None
            else HybridTreeCache(*storage, target.attention_slots, layout, states, ancestors)
        )
        by_tree = positions.view(sequences, nodes).int()
        keys = VisibleKeys.of_trees(first, length, by_tree, ancestors)
        context = TreeContext(target.operations, cache, keys, positions, longest)
        logits, outputs = target.forward(tokens, context, cache, logits_to_keep=0, rotary=rotary)
        writes = cache.outputs() if isinstance(cache, HybridTreeCache) else []
        return logits, finite_argmax(logits), tuple(outputs), *outputs.values(), *writes


def region_of(state: State) -> Region | None:
    """Return the columns of a sequence; None if no layer of the target has keys and values."""
    cache = state.kv_cache
    return None if cache.arena.like is None else cache.allocate()


def slab_of(state: State) -> Slab | None:
    """Return the allocation that has the columns of a sequence."""
    region = region_of(state)
    return None if region is None else region.slab


def _inputs(
    trees: Sequence[tuple[State, DraftTree]],
    regions: Sequence[Region | None],  # of the sequences; None for a model without attention layers
    sequences: int,
    nodes: int,
) -> NDArray[np.int32]:
    """Return an array of what a pass differs in from others of its sizes.

    It has tokens, positions, rotary positions and slots of nodes, columns and lengths of sequences,
    and ancestors.

    Trees are filled up with copies of their roots, and sequences with copies of the first one.
    Copies write the same keys and values to the same slots.
    """
    rows = np.zeros((4, sequences, nodes), np.int32)
    ends = np.zeros((2, sequences), np.int32)
    ancestors = np.zeros((sequences, nodes, nodes), np.int32)
    for i, ((state, tree), region) in enumerate(zip(trees, regions, strict=True)):
        n, start, first = len(tree), state.length, 0 if region is None else region.first
        node = np.arange(nodes)
        node[n:] = 0
        positions, rotary = tree.positions(start), state.rotary_positions(tree)
        rows[:, i] = tree.tokens[node], positions[node], rotary[node], first + start + node
        ends[:, i] = first, start
        ancestors[i, :n, :n] = tree.ancestor_mask()
        ancestors[i, n:, 0] = 1
    for array in (rows.swapaxes(0, 1), ends.swapaxes(0, 1), ancestors):
        array[len(trees) :] = array[0]
    return np.concatenate([rows.ravel(), ends.ravel(), ancestors.ravel()])


def has_features(state: State, tokens: DraftTree | Sequence[int]) -> bool:
    """Return whether new tokens of a sequence stand for features of an image."""
    if state.images is None or isinstance(tokens, DraftTree):
        return False
    return bool(state.images.is_feature[state.length : state.length + len(tokens)].any())


def _passes(rows: Mapping[int, Rows]) -> list[list[int]]:
    """Group rows by passes: a model takes the features of one sequence alone."""
    alone = [i for i, row in rows.items() if has_features(*row)]
    together = [i for i in rows if i not in alone]
    return [*([i] for i in alone), *([together] if together else [])]


class Verifier:
    """`treeflash.decoding.interfaces.TreeVerifier` in PyTorch."""

    def __init__(self, target: Target, drafter: DrafterModel | MtpModel | None) -> None:
        self.target = target
        self.drafter = drafter  # projects outputs of target layers to features; None for none
        self.trees = TreePass(target)
        self._has_tree_pass = target.operations is not None

    @torch.inference_mode()
    def run(self, work: Sequence[Prefill | Verify]) -> list[SampledTokens | None]:
        states: list[Any] = [item.state for item in work]  # the backend's own
        with undone_on_failure(states):
            for state, item in zip(states, work, strict=True):
                state.begin(item)
            rows: list[Rows] = [
                (state, item.tree)
                if isinstance(item, Verify)
                else (state, self._last_chunk(state, item.token_ids))
                for state, item in zip(states, work, strict=True)
            ]
            logits = self.forward(rows, [item.params is not None for item in work])
            operations, params = self.target.operations, [item.params for item in work]
            kernel = None
            if operations is not None and operations.has_kernel("sample_rows"):
                kernel = operations.sample_rows
            sampled = sample(logits, params, self.target.graphs, kernel)
            new = [row for row in rows if not isinstance(row[1], DraftTree)]
            self._commit([(state, _all_nodes(tokens)) for state, tokens in new])
        return sampled

    @torch.inference_mode()
    def commit(self, paths: Sequence[tuple[Any, NDArray[np.int32]]]) -> None:
        self._commit(paths)

    @torch.inference_mode()
    def logits(self, trees: Sequence[tuple[Any, DraftTree]]) -> list[NDArray[np.float32]]:
        logits = self.forward(trees, [True] * len(trees))
        return [part.float().cpu().numpy() for part in logits.parts]

    def _last_chunk(self, state: State, token_ids: Sequence[int]) -> Sequence[int]:
        """Commit all chunks of new tokens but the last chunk, which is returned."""
        while len(token_ids) > (size := NEXT_CHUNK if state.length else FIRST_CHUNK):
            if state.images is not None:
                size = state.images.chunk_end(state.length, size) - state.length
            chunk, token_ids = token_ids[:size], token_ids[size:]
            if not token_ids:
                return chunk
            self.forward([(state, chunk)], [False])
            self._commit([(state, _all_nodes(chunk))])
        return token_ids

    def forward(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> Logits:
        """Run trees and new tokens: logits of all nodes, and of last tokens where needed.

        One forward pass runs all sequences. If there is the operation for trees, the trees of each
        slab have a pass of their own, and so has every chunk with features of images.
        """
        if self.target.threads is not None:
            self.target.threads.update()
        for state, tokens in rows:
            ids = tokens.tokens if isinstance(tokens, DraftTree) else tokens
            state.pass_tokens = np.asarray(ids, np.int32)
        passes: dict[Slab | None, dict[int, tuple[State, DraftTree]]] = {}
        others = dict(enumerate(rows))
        for i, (state, tokens) in enumerate(rows):
            if self._has_tree_pass and isinstance(tokens, DraftTree):
                passes.setdefault(slab_of(state), {})[i] = others.pop(i)[0], tokens
        results: dict[int, tuple[Tensor, Tensor | None]] = {}
        try:
            for trees in passes.values():
                results |= zip(trees, self.trees.run(list(trees.values())), strict=True)
        except UnsupportedModelError as error:
            if self.target.is_exact:
                raise
            self._has_tree_pass = False
            warnings.warn(f"draft trees run without CUDA graphs: {error}", stacklevel=2)
            others = dict(enumerate(rows))
        for members in _passes(others):
            logits = self._forward_with_masks(
                [others[i] for i in members], [needs_logits[i] for i in members]
            )
            if len(members) == len(rows):
                return logits
            results |= zip(members, zip(logits.parts, logits.best, strict=True), strict=True)
        parts, best = zip(*(results[i] for i in range(len(rows))), strict=True)
        return Logits(list(parts), list(best))

    def _forward_with_masks(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> Logits:
        """Run `_forward` in one pass, in which every sequence has its mask."""
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
        if turned := any(state.shift or state.images for state, _ in rows):
            each = [state.rotary_positions(tokens) for state, tokens in rows]
            arrays.insert(0, np.concatenate(each, -1))
        uploaded = iter(upload_all([*arrays, rows_to_keep], self.target.device))
        rotary = next(uploaded).long() if turned else None
        tower, images = self.target.tower, None
        if tower is not None and has_features(*rows[0]):
            images = tower.rows(rows[0][0], sizes[0])
        token_ids: list[Tensor] = []
        contexts: list[AttentionContext] = []
        for state, tokens in rows:
            token_ids.append(next(uploaded).long())
            positions = next(uploaded).long()
            ancestors = next(uploaded).bool() if isinstance(tokens, DraftTree) else None
            contexts.append(self.target.context(state.length, positions, ancestors, images))
        cache = self.target.new_cache(rows, [context.ancestors for context in contexts])
        logits_to_keep: int | Tensor = 1  # at least, of which none is returned
        if len(rows_to_keep) == ends[-1]:
            logits_to_keep = 0  # all
        elif len(rows_to_keep):
            logits_to_keep = next(uploaded).long()
        logits, outputs = self.target.forward(
            torch.cat(token_ids),
            self.target.packed_context(contexts, cache) if len(contexts) > 1 else contexts[0],
            cache,
            logits_to_keep=logits_to_keep,
            rotary=rotary,
            images=images,
        )
        for (state, _), end, size in zip(rows, ends, sizes, strict=True):
            state.outputs, state.first_row = outputs, int(end) - size
        return Logits.split(logits[: len(rows_to_keep)], counts)

    def _commit(self, paths: Sequence[Path]) -> None:
        """Commit paths. Steps that may fail come first: a failed call must change no sequence."""
        moves: dict[Slab, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
        for state, path in paths:
            region, places = state.kv_cache.region, _all_nodes(path)
            if region is not None and (moved := path != places).any():
                start = region.first + state.length
                pair = start + path[moved], start + places[moved]
                moves.setdefault(region.slab, []).append(pair)
        passes = rows_by_pass(paths)
        hybrid: list[tuple[RecurrentStates, NDArray[np.int32]]] = []
        by_tree: dict[TreeWrites, dict[int, tuple[RecurrentStates, NDArray[np.int32]]]] = {}
        for state, path in paths:
            if (states := state.recurrent) is not None and states.tree is not None:
                writes, i = states.tree
                by_tree.setdefault(writes, {})[i] = states, path
            elif states is not None:
                hybrid.append((states, path))
        arrays: list[NDArray[Any]] = []
        for pairs in moves.values():
            arrays += [np.concatenate(columns) for columns in zip(*pairs, strict=True)]
        arrays += [group.rows for group in passes]
        arrays += [path for _, path in hybrid]
        for writes, members in by_tree.items():
            arrays.append(writes.rows({i: path for i, (_, path) in members.items()}))
        uploaded = iter(upload_all(arrays, self.target.device))
        copies = [(slab, slab.gather(next(uploaded)), next(uploaded).long()) for slab in moves]
        context: list[tuple[State, Tensor]] = []
        for group in passes:
            features = self._project(group.outputs, next(uploaded))
            context += zip(group.states, features.split(group.sizes), strict=True)
        committed = [(states, states.states_after(next(uploaded))) for states, _ in hybrid]
        for writes, members in by_tree.items():
            after = writes.commit(next(uploaded), list(members))
            committed += zip((states for states, _ in members.values()), after, strict=True)
        for slab, columns, destination in copies:
            slab.write(destination, columns)
        for state, path in paths:
            state.kv_cache.commit(len(path))
            state.keep_tokens(path)
        for states, new in committed:
            states.resume(new)
        for state, part in context:
            state.context.append(part)

    def _project(self, outputs: dict[int, Tensor], rows: Tensor) -> Tensor:
        """Project the (n, hidden_size) features of n rows of a forward pass."""
        assert self.drafter is not None
        layers = [outputs[i].index_select(0, rows) for i in self.drafter.config.target_layer_ids]
        # Projected at once: the outputs of five layers take five times the memory.
        return self.drafter.project(torch.cat(layers, -1))


def _all_nodes(tokens: DraftTree | Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
    return np.arange(len(tokens), dtype=np.int32)
