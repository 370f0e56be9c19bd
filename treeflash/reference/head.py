"""The head that makes a block autoregressive, approximately (TreeFlash, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.one_by_one import OneByOneHead
from treeflash.decoding.transitions import TransitionTable
from treeflash.reference.drafter import Block
from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.numerics import Array, log_softmax, rms_norm, silu, top

NORM_EPS = 1e-6


def swiglu(tensors: Mapping[str, Array], x: Array) -> Array:
    """D(silu(G(x)) * U(x)); x is (..., 2 * hidden_size)."""
    up_gate = x @ tensors["ug.weight"].T + tensors["ug.bias"]
    up, gate = np.split(up_gate, 2, -1)
    correction: Array = (up * silu(gate)) @ tensors["d.weight"].T
    return correction


def linear(tensors: Mapping[str, Array], x: Array) -> Array:
    """D(x), the ablation of the paper; x is (..., 2 * hidden_size)."""
    correction: Array = x @ tensors["d.weight"].T
    return correction


HEADS: dict[str | None, Callable[[Mapping[str, Array], Array], Array]] = {
    "swiglu": swiglu,
    "linear": linear,
}
"""By the name that a checkpoint's `ar_approximation` gives."""


class ARHead(OneByOneHead):
    """`treeflash.decoding.interfaces.ARHead` in NumPy: h' = h + correction([embedding; u])."""

    def __init__(self, model: DrafterModel) -> None:
        """Take the `ar_approximation` tensors of a drafter."""
        self.model = model
        self.correction = HEADS[model.config.head]

    def transitions_one(
        self,
        block: Block,
        m: int,
        k: int,
        temperature: float,
        *,
        shortlist: int | None,
        rows: int | None,
    ) -> TransitionTable:
        """See `ARHead.transitions`."""
        hidden = block.hidden[1:]
        marginal = log_softmax(self.model.logits(hidden) / np.float32(temperature))
        vocab = np.arange(marginal.shape[1], dtype=np.int32)
        if shortlist is not None:
            vocab = np.sort(np.argsort(-marginal.max(0), kind="stable")[:shortlist])
            vocab = vocab.astype(np.int32)
        marginal = marginal[:, vocab]
        best, weights = top(marginal[:-1], m)
        previous = vocab[best]
        first = np.full((1, previous.shape[1]), block.root, np.int32)
        corrected = self._correct(hidden, np.concatenate([first, previous]))
        logits = self.model.logits(corrected)[..., vocab] / np.float32(temperature)
        children, log_probs = top(logits, k)
        if shortlist is not None:
            log_probs = log_probs + np.log(np.exp(marginal).sum(-1))[:, None, None]
        if rows is not None:
            order = np.argsort(-weights, axis=None, kind="stable")
            previous.flat[order[rows:]] = -1
        return TransitionTable.from_candidates(previous, vocab[children], log_probs)

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> Array:
        """See `ARHead.log_probs`."""
        corrected = self._correct(block.hidden[1:], previous[:, None])[:, 0]
        return log_softmax(self.model.logits(corrected))

    def _correct(self, hidden: Array, previous: NDArray[np.int32]) -> Array:
        """(D, M, hidden_size) corrected outputs; hidden is (D, hidden_size), previous (D, M)."""
        tensors = self.model.head_tensors
        embedded = self.model.target.embed(previous)
        embedded = rms_norm(embedded, tensors["norm.weight"], NORM_EPS)
        normed = np.broadcast_to(self.model.normed("norm", hidden)[:, None], embedded.shape)
        return hidden[:, None] + self.correction(tensors, np.concatenate([embedded, normed], -1))
