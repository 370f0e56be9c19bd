"""The target over the trees and new tokens of several texts, and commits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.choices import Chosen
from treeflash.decoding.interfaces import Extension, Verification
from treeflash.decoding.tree import DraftTree
from treeflash_cuda.cache import upload_all
from treeflash_cuda.choices import choose
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.packed import PackedContext
from treeflash_cuda.state import State
from treeflash_cuda.static_trees import StaticTrees
from treeflash_cuda.target import Target

FIRST_CHUNK, NEXT_CHUNK = 2048, 1024
"""Prompt tokens per forward pass; chunks after the first need a mask, and so are smaller."""

Rows: TypeAlias = tuple[State, DraftTree | Sequence[int]]
"""A text, and its tree or its next tokens."""


class Verifier:
    """`treeflash.decoding.interfaces.TreeVerifier` in PyTorch."""

    def __init__(self, target: Target, drafter: DrafterModel | None) -> None:
        """Hold the models.

        Args:
            target: the model.
            drafter: projects the outputs of its target layers to features; None for no features.
        """
        self.target = target
        self.drafter = drafter
        self.static = StaticTrees(target)

    @torch.inference_mode()
    def run(self, work: Sequence[Extension | Verification]) -> list[Chosen | None]:
        """See `TreeVerifier.run`."""
        states: list[Any] = [item.state for item in work]
        before = [(state.length, state.recurrent and state.recurrent.committed) for state in states]
        try:
            rows: list[Rows] = [
                (item.state, item.tree)
                if isinstance(item, Verification)
                else (item.state, self._last_chunk(item.state, item.token_ids))
                for item in work
            ]
            logits, counts = self._forward(rows, [item.choice is not None for item in work])
            choices = [item.choice for item in work]
            chosen = choose(logits, counts, choices, self.target.graphs)
            self._commit([(state, _whole(tokens)) for state, tokens in rows if _is_text(tokens)])
        except Exception:
            for state, (length, recurrent) in zip(states, before, strict=True):
                state.go_back(length, recurrent)
            raise
        return chosen

    @torch.inference_mode()
    def commit(self, paths: Sequence[tuple[Any, NDArray[np.int32]]]) -> None:
        """See `TreeVerifier.commit`."""
        self._commit(paths)

    @torch.inference_mode()
    def logits(self, trees: Sequence[tuple[Any, DraftTree]]) -> list[NDArray[np.float32]]:
        """See `TreeVerifier.logits`."""
        logits, counts = self._forward(trees, [True] * len(trees))
        return [part.float().cpu().numpy() for part in logits.split(counts)]

    def _last_chunk(self, state: State, token_ids: Sequence[int]) -> Sequence[int]:
        """Commit all chunks of new tokens but the last, which is returned."""
        size = NEXT_CHUNK if state.length else FIRST_CHUNK
        while len(token_ids) > size:
            chunk, token_ids = token_ids[:size], token_ids[size:]
            self._forward([(state, chunk)], [False])
            self._commit([(state, _whole(chunk))])
            size = NEXT_CHUNK
        return token_ids

    def _forward(self, rows: Sequence[Rows], wanted: Sequence[bool]) -> tuple[Tensor, list[int]]:
        """One forward pass over all texts.

        Returns:
            Logits of all nodes of trees and of the last of new tokens, if they are wanted; and how
            many rows of them each text has.
        """
        trees = [(state, tree) for state, tree in rows if isinstance(tree, DraftTree)]
        if len(trees) == len(rows) and (found := self.static.run(trees)) is not None:
            return found
        device = self.target.device
        sizes = [len(tokens) for _, tokens in rows]
        arrays: list[NDArray[Any]] = []
        for state, tokens in rows:
            if isinstance(tokens, DraftTree):
                arrays += [tokens.tokens, tokens.positions(state.length), tokens.ancestor_mask()]
            else:
                arrays += [np.array(tokens), state.length + np.arange(len(tokens))]
        counts = [
            (size if isinstance(tokens, DraftTree) else 1) if want else 0
            for (_, tokens), size, want in zip(rows, sizes, wanted, strict=True)
        ]
        ends = np.cumsum(sizes)
        kept = np.concatenate(
            [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
        )
        uploaded = iter(upload_all([*arrays, kept], device))
        token_ids, texts = [], []
        for state, tokens in rows:
            token_ids.append(next(uploaded).long())
            positions = next(uploaded).long()
            ancestors = next(uploaded).bool() if isinstance(tokens, DraftTree) else None
            texts.append(self.target.context(state.length, positions, ancestors))
        cache = self.target.new_cache(rows, [text.ancestors for text in texts])
        context = PackedContext(texts, cache) if len(texts) > 1 else texts[0]
        everything = len(kept) == ends[-1]
        logits, outputs = self.target.forward(
            torch.cat(token_ids),
            context,
            cache,
            logits_to_keep=0 if everything else next(uploaded).long() if len(kept) else 1,
        )
        for (state, _), end, size in zip(rows, ends, sizes, strict=True):
            state.outputs, state.first_row = outputs, int(end) - size
        return logits[: len(kept)], counts

    def _commit(self, paths: Sequence[tuple[State, NDArray[np.int32]]]) -> None:
        """Keep paths. What may fail comes first: a call that fails must change no text."""
        moved = [(state, path) for state, path in paths if not np.array_equal(path, _whole(path))]
        # Texts that were run together share the outputs of one forward pass.
        passes: dict[int, list[tuple[State, NDArray[np.int32]]]] = {}
        for state, path in paths:
            if state.drafter is not None:
                passes.setdefault(id(state.outputs), []).append((state, path))
        recurrent = [(state, path) for state, path in paths if state.recurrent is not None]
        moved = [(state, path) for state, path in moved if state.key_values.region is not None]
        columns = [state.length + path for state, path in moved]
        rows = [
            np.concatenate([state.first_row + path for state, path in texts])
            for texts in passes.values()
        ]
        nodes = [path for _, path in recurrent]
        uploaded = iter(upload_all([*columns, *rows, *nodes], self.target.device))
        kept = {id(state): state.key_values.gather(next(uploaded)) for state, _ in moved}
        context = []
        for texts in passes.values():
            features = self._project(texts[0][0].outputs, next(uploaded))
            parts = features.split([len(path) for _, path in texts])
            context += [(state, part) for (state, _), part in zip(texts, parts, strict=True)]
        committed = [(state, state.recurrent.after(next(uploaded))) for state, _ in recurrent]
        for state, path in paths:
            state.key_values.commit(len(path), kept.get(id(state)))
        for state, states in committed:
            state.recurrent.go_on(states)
        for state, part in context:
            state.context.append(part)

    def _project(self, outputs: dict[int, Tensor], rows: Tensor) -> Tensor:
        """(n, hidden_size) features of n rows of a forward pass."""
        assert self.drafter is not None
        layers = [outputs[i].index_select(0, rows) for i in self.drafter.config.target_layer_ids]
        # Projected at once: the outputs of five layers take five times the memory.
        return self.drafter.project(torch.cat(layers, -1))


def _is_text(tokens: DraftTree | Sequence[int]) -> bool:
    return not isinstance(tokens, DraftTree)


def _whole(tokens: DraftTree | Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
    return np.arange(len(tokens), dtype=np.int32)
