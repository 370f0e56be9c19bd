"""The target over the trees and new tokens of several sequences, and commits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.backend_base import (
    CommittedPath,
    Outputs,
    PassRows,
    Unprojected,
    by_outputs,
    rows_of,
    undone_on_failure,
)
from treeflash.decoding.interfaces import Pass, Prefill, Verify
from treeflash.decoding.tree import DraftTree
from treeflash_mlx.attention import TreePass
from treeflash_mlx.cache import BatchStorage, PassWrites, share_storage, size_class, storages_of
from treeflash_mlx.drafter import OutputStage
from treeflash_mlx.drafter_model import DrafterModel
from treeflash_mlx.mtp_head import MtpModel
from treeflash_mlx.sampling import draw, edit, read_tokens, sample, with_log_probs
from treeflash_mlx.state import Ahead, ContextPart, State
from treeflash_mlx.target import Target

PREFILL_CHUNK = 2048
"""Prompt tokens per forward pass."""
EXACT_CHUNK = 128
"""Prompt tokens per forward pass with the kernels of exact mode, which keep the outputs of each
split of the context in memory, for each token."""
WIDE_HEAD, WIDE_COLUMNS = 192, 8192
"""MLX keeps the scores of heads of at least this width in memory. Beyond this number of columns
chunks become smaller, so that the scores do not take more."""

Path: TypeAlias = CommittedPath[State]
"""The nodes of a sequence to commit."""
Places: TypeAlias = dict[int, tuple[int, NDArray[np.int32]]]
"""By row, the first column that a path is written to, and its nodes."""
Found: TypeAlias = tuple[mx.array, PassRows[State]]
"""The (n, vocab) logits at the nodes of a sequence, and what commits of them need."""


class Verifier:
    """`treeflash.decoding.interfaces.TreeVerifier` in MLX.

    The drafter projects the outputs of its target layers to features.
    """

    def __init__(self, target: Target, drafter: DrafterModel | MtpModel | None) -> None:
        self.target, self.drafter = target, drafter
        self.chunk, self.wide_head, self.wide_columns = PREFILL_CHUNK, WIDE_HEAD, WIDE_COLUMNS
        self._layer_ids = drafter.config.target_layer_ids if drafter is not None else ()

    def run(self, work: Sequence[Prefill | Verify]) -> Pass:
        """Run the target over trees and new tokens.

        Trees run in one pass, together with new tokens that are not more than the largest tree has
        nodes. Longer chunks of new tokens would pad the pass, so each of them runs alone.
        """
        for item in work:
            state: Any = item.state
            state.begin(item)
        if (single := self._run_single(work)) is not None:
            return single
        states: list[Any] = [item.state for item in work if isinstance(item, Prefill)]
        with undone_on_failure(states):  # chunks may have been committed
            logits, trees, prefilled = self._run(work)
            sampled = sample(logits, [item.params for item in work])
            self._submit_commit(prefilled)
        return Pass(sampled, rows=trees)

    def commit(self, verified: Pass, paths: Sequence[tuple[Any, NDArray[np.int32]]]) -> None:
        self._submit_commit(CommittedPath.of_pass(verified, paths))

    def _submit_commit(self, paths: Sequence[Path]) -> None:
        """Commit paths, and let the device begin."""
        storages = storages_of(path.state.kv_cache for path in paths)
        before = [(storage.states, storage.states.layers) for storage in storages]
        context = self._commit(paths)
        submitted = [rows_of(part) for part in context]
        submitted += [x for storage in storages for x in storage.states.arrays]
        # The next drafts read the context alone. The rows are moved after them, or where the next
        # pass reads them; without a drafter the device has nothing else to do.
        if not context:
            submitted += [x for storage in storages for x in storage.arrays]
        try:
            mx.async_eval(submitted)
        except Exception:  # memory may run out; a failed call must change no sequence
            for states, layers in before:
                states.layers = layers
            for path in paths:
                path.state.rollback(path.state.length - len(path.nodes), None)
            raise

    def logits(self, trees: Sequence[tuple[Any, DraftTree]]) -> Pass:
        for state, _ in trees:
            state.images = None
        found = self._forward(trees)
        logits = [np.array(part.astype(mx.float32)) for part, _ in found]
        return Pass(logits=logits, rows={rows.state: rows for _, rows in found})

    def _run_single(self, work: Sequence[Prefill | Verify]) -> Pass | None:
        """Decode plainly: submit the next pass before this token is read.

        So the device does not wait for Python. Returns None for other work, and for the first pass
        over a single node, after which anything may follow.
        """
        item, *others = work
        if others or not isinstance(item, Verify) or len(item.tree) > 1:
            return None
        state: Any = item.state
        if state.positions.shift:  # its rotary positions make a pass that is not plain
            return None
        params, ahead, tokens = item.params, state.ahead, item.tree.tokens
        state.ahead = None
        if ahead is None or ahead.start != state.length:
            return None
        if ahead.token == tokens[0]:
            outputs = Outputs(ahead.outputs)
            logits, rows = ahead.logits, PassRows(state, outputs, 0, tokens, written=ahead.written)
        else:
            ((logits, rows),) = self._forward([(state, item.tree)])
        edited = edit(logits, params)
        drawn = draw(edited, params.sampling, params.keys)
        ahead = self._submit_next(state, rows.written, drawn[:1])
        read = np.array(drawn)
        chosen = read_tokens(read, edited, params.sampling, params.keys)
        state.ahead = replace(ahead, token=int(read[0]))
        return Pass([with_log_probs(chosen, logits, params)], rows={state: rows})

    def _submit_next(self, state: State, present: PassWrites, token: mx.array) -> Ahead:
        """Start the pass over the token after the next position.

        Its recurrent layers read the states after the present token, which is yet to be committed.
        `present` is what the pass over it wrote.
        There is a column for it even after the last position: see `allocated_columns`.
        """
        sequence = state.kv_cache
        storage, length = sequence.storage, sequence.length
        assert storage is not None
        sequence.length = length + 1
        try:
            with storage.states.committed_early(present.recurrent):
                logits, outputs, written = self.target.forward(
                    token[None], [sequence], self._layer_ids
                )
        finally:
            sequence.length = length
        mx.async_eval(logits, outputs)
        return Ahead(
            start=length + 1,
            logits=logits[0],
            outputs=None if outputs is None else outputs[0],
            written=written,
        )

    def _run(
        self, work: Sequence[Prefill | Verify]
    ) -> tuple[list[mx.array | None], dict[State, PassRows[State]], list[Path]]:
        """Run trees and new tokens: logits at nodes, and at last tokens if they are needed.

        Also returns the rows of trees by state, and the new tokens that are not committed yet.
        """
        largest = max((len(x.tree) for x in work if isinstance(x, Verify)), default=0)
        logits: list[mx.array | None] = [None] * len(work)
        batch: list[tuple[int, State, DraftTree]] = []
        trees: dict[State, PassRows[State]] = {}
        prefilled: list[Path] = []
        for i, item in enumerate(work):
            state: Any = item.state
            if isinstance(item, Verify):
                batch.append((i, state, item.tree))
                continue
            token_ids = item.token_ids
            stop = state.length + len(token_ids)
            together = len(token_ids) <= largest and not state.has_features(token_ids)
            if not together:
                # The last token has its own pass: no other token needs logits.
                end = len(token_ids) - (item.params is not None)
                if (last := state.length + state.chunk_size(end)) > stop - 1:
                    end = 0 if item.params is not None else last - state.length
                self._prefill(state, token_ids[:end])
                token_ids = token_ids[end:]
            if token_ids:
                chain = DraftTree.chain(np.array(token_ids, np.int32))
                if together:
                    batch.append((i, state, chain))
                else:
                    ((logits[i], rows),) = self._forward([(state, chain)], prefill=True)
                    prefilled.append(CommittedPath.whole(rows))
        found = self._forward([(state, tree) for _, state, tree in batch]) if batch else []
        for (i, state, _), (part, rows) in zip(batch, found, strict=True):
            item = work[i]
            if isinstance(item, Verify):
                logits[i], trees[state] = part, rows
                continue
            prefilled.append(CommittedPath.whole(rows))
            if item.params is not None:
                logits[i] = part[-1:]
        return logits, trees, prefilled

    def _prefill(self, state: State, token_ids: Sequence[int]) -> None:
        """Run and commit new tokens chunk by chunk."""
        while token_ids:
            size = self._chunk_size(state.length)
            size = state.chunk_size(size)
            chunk = DraftTree.chain(np.array(token_ids[:size], np.int32))
            token_ids = token_ids[size:]
            ((_, rows),) = self._forward([(state, chunk)], prefill=True)
            # The outputs are projected at once, because five layers have five times as many.
            self._commit([CommittedPath.whole(rows)])
            (storage,) = storages_of([state.kv_cache])
            mx.eval(storage.arrays, storage.states.arrays, state.context_arrays())

    def _chunk_size(self, committed: int) -> int:
        """Return the new tokens of a pass after this number of committed positions."""
        if self.target.exact:
            return EXACT_CHUNK
        if self.target.head_dim < self.wide_head:
            return self.chunk
        return self.chunk * self.wide_columns // max(committed + self.chunk, self.wide_columns)

    def _forward(
        self, sequences: Sequence[tuple[State, DraftTree]], *, prefill: bool = False
    ) -> list[Found]:
        """Run trees, one forward pass for each group.

        In a `prefill` the trees are chains of new tokens, all of which will be committed.
        """
        if len(groups := self._groups(sequences)) > 1:
            found: dict[State, Found] = {}
            for group in groups:
                parts = self._forward(group, prefill=prefill)
                found |= zip((state for state, _ in group), parts, strict=True)
            return [found[state] for state, _ in sequences]
        storage = share_storage([state.kv_cache for state, _ in sequences])
        by_row = sorted(sequences, key=lambda sequence: sequence[0].kv_cache.row)
        trees = [tree for _, tree in by_row]
        n = max(len(tree) for tree in trees)
        token_ids = [
            np.concatenate([tree.tokens, tree.tokens[:1].repeat(n - len(tree))]) for tree in trees
        ]
        starts, caches = zip(*((s.length, s.kv_cache) for s, _ in by_row), strict=True)
        solve = None if prefill else self.target.solve
        tower, images = self.target.tower, None
        if tower is not None and prefill:
            (state, tree), *_ = sequences
            images = tower.rows(state, tree.tokens.tolist())
        tree_pass = TreePass.build(
            trees,
            starts,
            storage.columns - 1,
            solve=solve,
            rotary=_rotary_positions(by_row),
            is_seen=None if images is None else images.is_seen,
            sliding=images is not None and images.sliding,
            exact=self.target.exact,
            chains_from=self.target.chains_from(n),
        )
        # A head that reads embeddings takes features from the first layer's input.
        reads = isinstance(self.drafter, MtpModel) and sequences[0][0].drafter is not None
        merges = reads and images is not None
        layer_ids = (*self._layer_ids, -1) if merges else self._layer_ids
        rows, outputs, written = self.target.forward(
            mx.array(np.array(token_ids), mx.int32), caches, layer_ids, tree_pass, images
        )
        if outputs is not None:
            outputs = outputs.reshape(-1, outputs.shape[-1])
        merged = None
        if merges:
            ((state, tree),) = sequences
            assert outputs is not None
            outputs, merged = self._merge(state, tree.tokens, outputs)
        shared = Outputs(outputs)
        made: dict[State, Found] = {}
        follows = not prefill and len(sequences) == n == 1
        for row, (state, tree) in enumerate(by_row):
            state.ahead = Ahead(state.length + 1) if follows else None
            part = PassRows(state, shared, row * n, tree.tokens, merged, written)
            made[state] = rows[state.kv_cache.row, : len(tree)], part
        return [made[state] for state, _ in sequences]

    def _merge(
        self, state: State, tokens: NDArray[np.int32], outputs: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Split the outputs of a pass over a prompt, for a head that reads embeddings.

        The last of them are the layers' inputs. Returns the others, and `PassRows.merged`.
        """
        assert isinstance(self.drafter, MtpModel)
        assert state.images is not None
        merged = OutputStage(self.drafter, self.target).embed(mx.array(tokens))
        width = merged.shape[-1]
        outputs, embedded = outputs[:, :-width], outputs[:, -width:]
        is_feature = state.images.prompt.is_feature[state.length : state.length + len(tokens)]
        places = mx.array(np.flatnonzero(is_feature))
        merged[places] = embedded[places]
        return outputs, merged

    def _groups(
        self, sequences: Sequence[tuple[State, DraftTree]]
    ) -> list[list[tuple[State, DraftTree]]]:
        """Group the sequences that share a pass: of similar capacity, or each alone."""
        groups: dict[Any, list[tuple[State, DraftTree]]] = {}
        for state, tree in sequences:
            key = size_class(state.kv_cache.columns) if self.target.batches else state
            groups.setdefault(key, []).append((state, tree))
        return list(groups.values())

    def _commit(self, paths: Sequence[Path]) -> list[ContextPart]:
        """Commit paths, and project their features, which it returns.

        The projection may fail, so it comes first: a failed call must change no sequence.
        """
        context: list[tuple[State, ContextPart]] = []
        for group in by_outputs(paths):
            assert self.drafter is not None
            first, states = group[0].rows, [path.state for path in group]
            kept = np.concatenate([path.rows.first + path.nodes for path in group])
            outputs = first.outputs.layers[mx.array(kept)]
            ends = np.cumsum([len(path.nodes) for path in group])[:-1].tolist()
            if first.merged is not None:
                features = self.drafter.project(outputs)
                context.append((first.state, mx.stack([features, first.merged], 1)))
                continue
            if all(len(path.rows.tokens) == 1 for path in group):  # the drafter may pause
                context += zip(states, map(Unprojected, mx.split(outputs, ends)), strict=True)
                continue
            features = self.drafter.project(outputs)
            context += zip(states, mx.split(features, ends), strict=True)
        # Sequences that ran together share a storage and the outputs of a forward pass.
        by_storage: dict[tuple[BatchStorage, PassWrites], Places] = {}
        for path in paths:
            cache = path.state.kv_cache
            assert cache.storage is not None
            places = by_storage.setdefault((cache.storage, path.rows.written), {})
            places[cache.row] = cache.length, path.nodes
        for (storage, written), places in by_storage.items():
            storage.commit(written, places)
        for path in paths:
            path.state.kv_cache.length += len(path.nodes)
            path.state.tokens += path.tokens
        for state, part in context:
            state.context.append(part)
        return [part for _, part in context]


def _rotary_positions(
    sequences: Sequence[tuple[State, DraftTree]],
) -> list[NDArray[np.int32]] | None:
    """Return the rotary positions of each sequence; None if they are the positions of all."""
    if not any(state.positions.shift or state.images for state, _ in sequences):
        return None
    return [
        state.rotary_positions(tree if state.images is None else tree.tokens.tolist())
        for state, tree in sequences
    ]
