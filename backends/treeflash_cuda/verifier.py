"""The target over the trees and new tokens of several sequences, and commits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.backend_base import (
    CommittedPath,
    PassRows,
    Unprojected,
    by_outputs,
    project_contexts,
    undone_on_failure,
)
from treeflash.decoding.interfaces import Pass, Prefill, Verify
from treeflash.decoding.tree import DraftTree
from treeflash_cuda.cache import Slab
from treeflash_cuda.drafter import OutputStage
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.gpu.state_arena import TreeWrites, WrittenTree
from treeflash_cuda.mtp_head import MtpModel
from treeflash_cuda.numerics import upload_all
from treeflash_cuda.recurrent_states import CommittedStates, SequenceWrites
from treeflash_cuda.sampling import sample
from treeflash_cuda.state import ContextPart, State, has_many_unprojected
from treeflash_cuda.target import Rows, RowsResult, Target

FIRST_CHUNK, NEXT_CHUNK = 2048, 1024
"""Prompt tokens per forward pass; chunks after the first need a mask, and so are smaller."""

Path: TypeAlias = CommittedPath[State]
"""The nodes of a sequence to commit."""


class CommitStep(NamedTuple):
    """A part of a commit. The steps of a commit share one upload."""

    arrays: list[NDArray[Any]]  # numbers that it needs on the device
    # Does what may fail, with these arrays as tensors, and returns a function that does the rest.
    prepare: Callable[..., Callable[[], None]]


class Verifier:
    """`treeflash.decoding.interfaces.TreeVerifier` in PyTorch."""

    def __init__(self, target: Target, drafter: DrafterModel | MtpModel | None) -> None:
        self.target = target
        self.drafter = drafter  # projects outputs of target layers to features, unless None
        self.first_chunk, self.next_chunk = FIRST_CHUNK, NEXT_CHUNK

    @torch.inference_mode()
    def run(self, work: Sequence[Prefill | Verify]) -> Pass:
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
            found = self.forward(rows, [item.params is not None for item in work])
            operations = self.target.operations
            sample_rows = None if operations is None else operations.sample_rows
            sampled = sample(found.logits, [item.params for item in work], sample_rows)
            trees: dict[State, PassRows[State]] = {}
            prompts: list[Path] = []
            for item, part in zip(work, found.rows, strict=True):
                if isinstance(item, Verify):
                    trees[part.state] = part
                else:
                    prompts.append(CommittedPath.whole(part))
            self.commit_paths(prompts)
        return Pass(sampled, rows=trees)

    @torch.inference_mode()
    def commit(self, verified: Pass, paths: Sequence[tuple[Any, NDArray[np.int32]]]) -> None:
        self.commit_paths(CommittedPath.of_pass(verified, paths))

    @torch.inference_mode()
    def logits(self, trees: Sequence[tuple[Any, DraftTree]]) -> Pass:
        found = self.forward(trees, [True] * len(trees))
        logits = [part.float().cpu().numpy() for part in found.logits.parts]
        return Pass(logits=logits, rows={part.state: part for part in found.rows})

    def _last_chunk(self, state: State, token_ids: Sequence[int]) -> Sequence[int]:
        """Commit all chunks of new tokens but the last chunk, which is returned."""
        while len(token_ids) > (size := self._chunk_size(state, token_ids)):
            size = state.chunk_size(size)
            chunk, token_ids = token_ids[:size], token_ids[size:]
            if not token_ids:
                return chunk
            (rows,) = self.forward([(state, chunk)], [False]).rows
            self.commit_paths([CommittedPath.whole(rows)])
        return token_ids

    def _chunk_size(self, state: State, token_ids: Sequence[int]) -> int:
        """Return how many new tokens are run at once."""
        if (most := self.target.most_rows(state, token_ids)) is not None:
            return most
        return self.next_chunk if state.length else self.first_chunk

    def forward(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> RowsResult:
        """Run trees and new tokens: logits of all nodes, and of last tokens where needed.

        Only one sequence of a pass may have features of images.
        """
        if self.target.threads is not None:
            self.target.threads.update(self.target.is_compiled)
        found = self.target.run_rows(rows, needs_logits)
        if not isinstance(self.drafter, MtpModel) or self.target.tower is None:
            return found
        # The head reads embeddings, in which features of images stand.
        parts = [
            replace(part, merged=self._merged(self.drafter, part))
            if state.drafter is not None and state.has_features(tokens)
            else part
            for part, (state, tokens) in zip(found.rows, rows, strict=True)
        ]
        return replace(found, rows=parts)

    def commit_paths(self, paths: Sequence[Path]) -> None:
        """Commit paths. Steps that may fail come first: a failed call must change no sequence."""
        if waiting := [x.state for x in paths if has_many_unprojected(x.state)]:
            assert self.drafter is not None
            project_contexts(waiting, self.drafter.project, torch.cat)
        steps = [*self._moves(paths), *self._features(paths), *self._states(paths)]
        arrays = [x for step in steps for x in step.arrays]
        uploaded = iter(upload_all(arrays, self.target.device))
        ends = [step.prepare(*itertools.islice(uploaded, len(step.arrays))) for step in steps]
        for end in ends:
            end()
        for path in paths:
            path.state.kv_cache.commit(len(path.nodes))
            path.state.tokens += path.tokens

    def _moves(self, paths: Sequence[Path]) -> Iterator[CommitStep]:
        """Yield a step for each slab in which accepted rows move to the committed positions."""
        moves: dict[Slab, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
        for path in paths:
            cache, nodes = path.state.kv_cache, path.nodes
            places = np.arange(len(nodes), dtype=np.int32)
            if cache.slab is not None and (moved := nodes != places).any():
                offsets = (cache.length + x[moved] for x in (nodes, places))
                source, target = map(cache.columns_at, offsets)
                moves.setdefault(cache.slab, []).append((source, target))
        for slab, pairs in moves.items():
            arrays = [np.concatenate(columns) for columns in zip(*pairs, strict=True)]
            arrays.append(np.cumsum([len(sources) for sources, _ in pairs]))
            yield CommitStep(arrays, functools.partial(self._prepare_move, slab))

    def _prepare_move(
        self, slab: Slab, sources: Tensor, targets: Tensor, ends: Tensor
    ) -> Callable[[], None]:
        """Return a function that moves columns of sequences, for which it needs no memory.

        PyTorch's copies of columns are many launches where a slab is larger than 2 GiB.
        """
        operations = self.target.operations
        has_kernel = operations is not None and operations.has_kernel("move_columns")
        if operations is not None and has_kernel and len(slab.parts) == 1:
            return functools.partial(operations.move_columns, slab.storage, sources, targets, ends)
        return functools.partial(slab.write, targets.long(), slab.read(sources))

    def _features(self, paths: Sequence[Path]) -> Iterator[CommitStep]:
        """Yield a step for each pass whose outputs become features, or wait for the next draft."""
        for group in by_outputs(paths):
            rows = np.concatenate([x.rows.first + x.nodes for x in group])
            yield CommitStep([rows], functools.partial(self._prepare_features, group))

    def _prepare_features(self, group: Sequence[Path], rows: Tensor) -> Callable[[], None]:
        assert self.drafter is not None
        captured, sizes = group[0].rows.outputs.layers, [len(path.nodes) for path in group]
        layers = [captured[i].index_select(0, rows) for i in self.drafter.config.target_layer_ids]
        outputs, parts = torch.cat(layers, -1), list[ContextPart]()
        if all(len(x.rows.tokens) == 1 and x.rows.merged is None for x in group):
            parts += map(Unprojected, outputs.split(sizes))  # the drafter may pause
        else:
            # Prompts are projected at once: five layers have five times as many numbers.
            features = self.drafter.project(outputs).split(sizes)
            merged = (path.rows.merged for path in group)
            parts += (
                own if embedded is None else torch.stack([own, embedded], 1)
                for own, embedded in zip(features, merged, strict=True)
            )

        def append() -> None:
            for path, part in zip(group, parts, strict=True):
                path.state.context.append(part)

        return append

    def _states(self, paths: Sequence[Path]) -> Iterator[CommitStep]:
        """Yield a step for each sequence, or pass over trees, with recurrent states."""
        trees: dict[TreeWrites, dict[int, Path]] = {}
        for path in paths:
            if isinstance(written := path.rows.written, WrittenTree):
                trees.setdefault(written.writes, {})[written.tree] = path
            elif isinstance(written, SequenceWrites):
                yield CommitStep([path.nodes], functools.partial(_prepare_states, path))
        for writes, members in trees.items():
            after = writes.arena.take(len(members))
            rows = writes.rows({i: path.nodes for i, path in members.items()}, after)
            pairs = list(zip(members.values(), after, strict=True))
            yield CommitStep([rows], functools.partial(_prepare_trees, writes, pairs))

    def _merged(self, head: MtpModel, rows: PassRows[State]) -> Tensor:
        """Return `PassRows.merged` of a part of a prompt that has features."""
        state, n = rows.state, len(rows.tokens)
        assert state.images is not None
        is_feature = state.images.prompt.is_feature[state.length : state.length + n]
        tokens, places = upload_all([rows.tokens, is_feature], self.target.device)
        merged = OutputStage(head, self.target).embed(tokens.long())
        read = rows.outputs.layers[-1].narrow(0, rows.first, n)  # by the target's first layer
        return torch.where(places.bool()[:, None], read.to(merged.dtype), merged)


def _prepare_states(path: Path, nodes: Tensor) -> Callable[[], None]:
    states = path.rows.written.states_after(nodes)
    return functools.partial(path.state.restore_recurrent, states)


def _prepare_trees(
    writes: TreeWrites, pairs: Sequence[tuple[Path, CommittedStates]], rows: Tensor
) -> Callable[[], None]:
    writes.commit(rows)

    def restore() -> None:
        for path, states in pairs:
            path.state.restore_recurrent(states)

    return restore
