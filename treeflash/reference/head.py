"""The conditional head: a block's tables, from the scores of whichever head the drafter has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.gumbel import Noise
from treeflash.decoding.one_by_one import OneByOneHead
from treeflash.decoding.transitions import TransitionTable
from treeflash.reference.drafter import Block
from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.numerics import Array, log_softmax, top
from treeflash.reference.scores import Scores


class ARHead(OneByOneHead):
    """`treeflash.decoding.interfaces.ARHead` in NumPy."""

    def __init__(self, model: DrafterModel, scores: Scores) -> None:
        """Use the scores of a drafter's head."""
        self.model = model
        self.scores = scores

    def transitions_one(
        self,
        block: Block,
        m: int,
        k: int,
        temperature: float,
        *,
        noise: Noise | None,
        shortlist: int | None,
        rows: int | None,
    ) -> TransitionTable:
        """See `ARHead.transitions`."""
        hidden = block.hidden
        raw = self.model.logits(hidden)
        added = np.zeros_like(raw) if noise is None else noise.of(self.model.token_ids)
        marginal = log_softmax((raw + added) / np.float32(temperature))
        vocab = self._support(marginal, shortlist)
        marginal = np.take_along_axis(marginal, vocab, -1)
        best, _ = top(marginal[:-1], m)
        weights = np.take_along_axis(marginal[:-1], best, -1)
        previous = self.model.token_ids[np.take_along_axis(vocab[:-1], best, -1)]
        first = np.full((1, previous.shape[1]), block.root, np.int32)
        before = np.concatenate([first, previous])
        scores = self.scores.score(hidden, raw, before, vocab)
        scores = scores + np.take_along_axis(added, vocab, -1)[:, None]
        best, log_probs = top(scores / np.float32(temperature), k)
        children = np.take_along_axis(vocab[:, None], best, -1)
        if vocab.shape[1] < raw.shape[1]:
            log_probs = log_probs + np.log(np.exp(marginal).sum(-1))[:, None, None]
        if rows is not None:
            order = np.argsort(-weights, axis=None, kind="stable")
            previous.flat[order[rows:]] = -1
        confidences = self.scores.confidence(hidden, before)
        return TransitionTable.from_candidates(
            previous, self.model.token_ids[children], log_probs, confidences
        )

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> Array:
        """See `ARHead.log_probs`."""
        logits = self.model.logits(block.hidden)
        vocab = self._support(logits, None)
        scores = self.scores.score(block.hidden, logits, previous[:, None], vocab)[:, 0]
        scores = log_softmax(scores)
        if vocab.shape[1] < logits.shape[1]:
            marginal = np.take_along_axis(log_softmax(logits), vocab, -1)
            scores = scores + np.log(np.exp(marginal).sum(-1, keepdims=True))
        wide = np.full(logits.shape, -np.inf, np.float32)
        np.put_along_axis(wide, vocab, scores, -1)
        return self.model.over_target_vocabulary(wide)

    def _support(self, marginal: Array, shortlist: int | None) -> NDArray[np.int32]:
        """(D, v) tokens of the drafter's vocabulary that are scored at each depth, ascending."""
        if self.scores.candidates is not None:
            best = np.argsort(-marginal, axis=-1, kind="stable")[:, : self.scores.candidates]
        else:
            best = np.argsort(-marginal.max(0), kind="stable")[None, :shortlist]
            best = best.repeat(len(marginal), 0)
        return np.sort(best, -1).astype(np.int32)
