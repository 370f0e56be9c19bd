"""The target over the trees and new tokens of several texts, and commits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.choices import Chosen
from treeflash.decoding.interfaces import Extension, Verification
from treeflash.decoding.sampling import check_finite
from treeflash.decoding.tree import DraftTree
from treeflash_mlx.cache import release_freed_memory, share_storage
from treeflash_mlx.choices import choose
from treeflash_mlx.drafter_model import DrafterModel
from treeflash_mlx.state import Ahead, State
from treeflash_mlx.target import Target
from treeflash_mlx.tree_hooks import TreePass

PREFILL_CHUNK = 2048
"""Prompt tokens per forward pass."""
RELEASE_INTERVAL = 256
"""Committed tokens of a text between two releases of freed memory."""

Path: TypeAlias = tuple[State, NDArray[np.int32]]
"""A text, and the nodes to commit."""


class Verifier:
    """`treeflash.decoding.interfaces.TreeVerifier` in MLX."""

    def __init__(self, target: Target, drafter: DrafterModel | None) -> None:
        """Hold the models.

        Args:
            target: the model.
            drafter: projects the outputs of its target layers to features; None for no features.
        """
        self.target = target
        self.drafter = drafter

    def run(self, work: Sequence[Extension | Verification]) -> list[Chosen | None]:
        """See `TreeVerifier.run`.

        Trees, and new tokens that are no more than the largest tree, are one pass. Longer ones
        would pad it, and are run alone.
        """
        single = self._run_single(work)
        if single is not None:
            return [single]
        states: list[Any] = [item.state for item in work if isinstance(item, Extension)]
        before = [(state, state.length, state.key_values.states()) for state in states]
        try:
            logits, ends = self._run(work)
            chosen = choose(logits, [item.choice for item in work])
        except Exception:
            for state, length, recurrent in before:  # chunks may have been committed
                state.restore(length, recurrent)
            raise
        self._commit(ends)
        return chosen

    def commit(self, paths: Sequence[tuple[Any, NDArray[np.int32]]]) -> None:
        """See `TreeVerifier.commit`."""
        self._commit(paths)

    def logits(self, trees: Sequence[tuple[Any, DraftTree]]) -> list[NDArray[np.float32]]:
        """See `TreeVerifier.logits`."""
        return [np.array(part.astype(mx.float32)) for part in self._forward(trees)]

    def _run_single(self, work: Sequence[Extension | Verification]) -> Chosen | None:
        """Plain greedy decoding of a text: the next pass is submitted before this token is read.

        So the device does not wait for Python. Returns None for everything else, and for the first
        such pass: what follows it is not known yet.
        """
        item, *others = work
        if others or not isinstance(item, Verification) or len(item.tree) > 1:
            return None
        state: Any = item.state
        choice, ahead, start = item.choice, state.ahead, state.length
        follows, state.ahead, state.single_until = state.single_until == start, None, start + 1
        plain = choice.edits is None and choice.allowed is None and choice.log_probs is None
        if not (follows and plain and choice.sampling.greedy) or state.needs_snapshots:
            return None
        if ahead is not None and (ahead.start, ahead.token) == (start, int(item.tree.tokens[0])):
            logits, state.outputs, state.first_row = ahead.logits, ahead.outputs, 0
        else:
            (logits,) = self._forward([(state, item.tree)])
        token = logits.argmax(-1).astype(mx.int32)
        submitted = self._submit(state, token)
        finite = mx.isfinite(logits.max(-1)).astype(mx.int32)
        read = np.array(mx.concatenate([token, finite]))
        check_finite(read[1])
        if submitted is not None:
            state.ahead = Ahead(start + 1, int(read[0]), *submitted)
        return Chosen(read[:1])

    def _submit(self, state: State, token: mx.array) -> tuple[mx.array, mx.array | None] | None:
        """Start the pass over the token after the next position, if there is room for it.

        Returns:
            (1, vocab) logits, and (1, layers * hidden_size) outputs of the captured layers.
        """
        text = state.key_values
        if text.storage is None or text.length + 2 >= text.storage.columns:
            return None
        layers = self.drafter.config.target_layer_ids if self.drafter is not None else ()
        text.length += 1  # as it will be
        try:
            logits, outputs = self.target.forward(token[None], [text], layers)
        finally:
            text.length -= 1
        mx.async_eval(logits, outputs)
        return logits[0], None if outputs is None else outputs[0]

    def _run(
        self, work: Sequence[Extension | Verification]
    ) -> tuple[list[mx.array | None], list[Path]]:
        """Run everything.

        Returns:
            Logits at the nodes of each tree and the last of new tokens, None if they are not
            wanted; and what is to be committed of new tokens.
        """
        longest = max((len(x.tree) for x in work if isinstance(x, Verification)), default=0)
        logits: list[mx.array | None] = [None] * len(work)
        batch: list[tuple[int, State, DraftTree]] = []
        ends: list[Path] = []
        for i, item in enumerate(work):
            state: Any = item.state
            if isinstance(item, Verification):
                batch.append((i, state, item.tree))
                continue
            token_ids = item.token_ids
            together = len(token_ids) <= longest
            if not together:
                # The last token has a pass of its own: no other needs logits.
                end = len(token_ids) - (item.choice is not None)
                self._prefill(state, token_ids[:end])
                token_ids = token_ids[end:]
            if token_ids:
                chain = DraftTree.chain(np.array(token_ids, np.int32))
                ends.append((state, np.arange(len(chain), dtype=np.int32)))
                if together:
                    batch.append((i, state, chain))
                else:
                    (logits[i],) = self._forward([(state, chain)], new=True)
        parts = self._forward([(state, tree) for _, state, tree in batch]) if batch else []
        for (i, _, _), part in zip(batch, parts, strict=True):
            item = work[i]
            if isinstance(item, Verification):
                logits[i] = part
            elif item.choice is not None:
                logits[i] = part[-1:]
        return logits, ends

    def _prefill(self, state: State, token_ids: Sequence[int]) -> None:
        """Commit new tokens chunk by chunk."""
        for first in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = DraftTree.chain(np.array(token_ids[first : first + PREFILL_CHUNK], np.int32))
            self._forward([(state, chunk)], new=True)
            # Projected at once: the outputs of five layers take five times the memory.
            self._keep([(state, np.arange(len(chunk), dtype=np.int32))])
            mx.eval(_arrays(state))
            if first:
                release_freed_memory()

    def _forward(
        self, texts: Sequence[tuple[State, DraftTree]], *, new: bool = False
    ) -> list[mx.array]:
        """(n, vocab) logits at the nodes of each tree, from one forward pass if the model can.

        Args:
            texts: states and trees.
            new: whether they are chains of new tokens, which will all be committed.
        """
        if len(texts) > 1 and not self.target.batches:
            return [part for text in texts for part in self._forward([text])]
        storage = share_storage([state.key_values for state, _ in texts])
        by_row = sorted(texts, key=lambda text: text[0].key_values.row)
        trees = [tree for _, tree in by_row]
        rows = max(len(tree) for tree in trees)
        token_ids = np.array(
            [[*tree.tokens, *tree.tokens[:1].repeat(rows - len(tree))] for tree in trees]
        )
        logits, outputs = self.target.forward(
            mx.array(token_ids, mx.int32),
            [state.key_values for state, _ in by_row],
            self.drafter.config.target_layer_ids if self.drafter is not None else (),
            TreePass.of(
                trees,
                [state.length for state, _ in by_row],
                storage.columns - 1,
                solve=None if new else self.target.solve,
            ),
        )
        if outputs is not None:
            outputs = outputs.reshape(-1, outputs.shape[-1])
        for row, (state, _) in enumerate(by_row):
            state.outputs, state.first_row, state.ahead = outputs, row * rows, None
        return [logits[state.key_values.row, : len(tree)] for state, tree in texts]

    def _commit(self, paths: Sequence[Path]) -> None:
        lengths = [state.length for state, _ in paths]
        self._keep(paths)
        # The device moves the rows while Python builds the next drafts.
        mx.async_eval([_arrays(state) for state, _ in paths])
        if any(
            length // RELEASE_INTERVAL != state.length // RELEASE_INTERVAL
            for length, (state, _) in zip(lengths, paths, strict=True)
        ):
            release_freed_memory()

    def _keep(self, paths: Sequence[Path]) -> None:
        """Commit paths of the latest passes, and project their features."""
        # Texts that were run together share a storage and the outputs of a forward pass.
        texts = [state.key_values for state, _ in paths]
        for storage in {id(text.storage): text.storage for text in texts}.values():
            assert storage is not None
            storage.keep(
                {
                    text.row: (text.length, path)
                    for text, (_, path) in zip(texts, paths, strict=True)
                    if text.storage is storage
                }
            )
        for text, (_, path) in zip(texts, paths, strict=True):
            text.length += len(path)
        drafted = [(state, path) for state, path in paths if state.drafter is not None]
        for outputs in {id(state.outputs): state.outputs for state, _ in drafted}.values():
            assert self.drafter is not None
            assert outputs is not None
            own = [(state, path) for state, path in drafted if state.outputs is outputs]
            rows = np.concatenate([path + state.first_row for state, path in own])
            context = self.drafter.project(outputs[mx.array(rows)])
            ends = np.cumsum([len(path) for _, path in own])[:-1].tolist()
            for (state, _), part in zip(own, mx.split(context, ends), strict=True):
                state.context.append(part)


def _arrays(state: State) -> list[Any]:
    """What a commit changes."""
    storage = state.key_values.storage
    return [storage and [storage.layers, storage.states.arrays], state.context]
