"""The conditional heads: how they score the tokens of a slot, given the token before each.

A head is a first-order conditional: its scores depend on the slot and on one previous token. All
scores are logits before the temperature.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.numerics import Array, rms_norm, sigmoid, silu

NORM_EPS = 1e-6


class Scores(Protocol):
    """A conditional head."""

    candidates: int | None
    """It scores so many tokens of a slot, those with the highest marginals; None for all."""

    def score(
        self, hidden: Array, logits: Array, previous: NDArray[np.int32], tokens: NDArray[np.int32]
    ) -> Array:
        """(D, M, n) scores.

        Args:
            hidden: (D, hidden_size) outputs of the last layer.
            logits: (D, Vd) of the marginals.
            previous: (D, M) tokens of the target's vocabulary.
            tokens: (D, n) of the drafter's vocabulary.
        """

    def confidence(self, hidden: Array, previous: NDArray[np.int32]) -> Array | None:
        """(D, M) how much of a row is expected to be right, 0 to 1; None if it does not say."""


class Corrected:
    """TreeFlash: h' = h + correction([embedding; u]), read by the output head."""

    candidates: int | None = None

    def __init__(self, model: DrafterModel) -> None:
        """Take the `ar_approximation` tensors of a drafter."""
        self.model = model
        self.tensors = model.head_tensors

    def correction(self, x: Array) -> Array:
        """D(silu(G(x)) * U(x)), or D(x), the ablation of the paper; of (..., 2 * hidden_size)."""
        if self.model.config.head == "swiglu":
            up_gate = x @ self.tensors["ug.weight"].T + self.tensors["ug.bias"]
            up, gate = np.split(up_gate, 2, -1)
            x = up * silu(gate)
        correction: Array = x @ self.tensors["d.weight"].T
        return correction

    def score(
        self, hidden: Array, logits: Array, previous: NDArray[np.int32], tokens: NDArray[np.int32]
    ) -> Array:
        """See `Scores.score`."""
        embedded = self.model.embed(previous)
        embedded = rms_norm(embedded, self.tensors["norm.weight"], NORM_EPS)
        normed = np.broadcast_to(self.model.normed("norm", hidden)[:, None], embedded.shape)
        x = hidden[:, None] + self.correction(np.concatenate([embedded, normed], -1))
        return np.take_along_axis(self.model.logits(x), tokens[:, None], -1)

    def confidence(self, hidden: Array, previous: NDArray[np.int32]) -> Array | None:
        """See `Scores.confidence`."""
        return None


class Selector:
    """DFlash2: U(b) + <A[a] * W u, B[b]> for the candidates b of a slot."""

    def __init__(self, model: DrafterModel) -> None:
        """Take the `candidate_selector` tensors of a drafter."""
        self.model = model
        self.tensors = model.head_tensors
        self.candidates: int | None = model.config.selector_top_k

    def score(
        self, hidden: Array, logits: Array, previous: NDArray[np.int32], tokens: NDArray[np.int32]
    ) -> Array:
        """See `Scores.score`."""
        projected = self.model.normed("norm", hidden) @ self.tensors["hidden_projection.weight"].T
        query = self.tensors["predecessor_codebook"][previous] * projected[:, None]
        keys = self.tensors["successor_codebook"][tokens]
        scores: Array = query @ keys.swapaxes(-1, -2)
        return scores + np.take_along_axis(logits, tokens, -1)[:, None]

    def confidence(self, hidden: Array, previous: NDArray[np.int32]) -> Array | None:
        """See `Scores.confidence`."""
        return None


class Markov:
    """DSpark: z(b) + <W2[b], e>, where e = W1[a], or a gated form of it."""

    candidates: int | None = None

    def __init__(self, model: DrafterModel) -> None:
        """Take the `markov_head` and `confidence_head` tensors of a drafter."""
        self.model = model
        self.tensors = model.head_tensors

    def score(
        self, hidden: Array, logits: Array, previous: NDArray[np.int32], tokens: NDArray[np.int32]
    ) -> Array:
        """See `Scores.score`."""
        query = self.tensors["markov_w1.weight"][previous]
        if self.model.config.head == "gated":
            gate = self._with_hidden(hidden, query) @ self.tensors["gate_proj.weight"].T
            query = query * sigmoid(gate + self.tensors["gate_proj.bias"])
        keys = self.tensors["markov_w2.weight"][tokens]
        scores: Array = query @ keys.swapaxes(-1, -2)
        return scores + np.take_along_axis(logits, tokens, -1)[:, None]

    def confidence(self, hidden: Array, previous: NDArray[np.int32]) -> Array | None:
        """See `Scores.confidence`."""
        if not self.model.config.confidence_head:
            return None
        x = self._with_hidden(hidden, self.tensors["markov_w1.weight"][previous])
        weight = self.tensors["confidence_head.proj.weight"][0]
        x = x[..., : len(weight)]  # the hidden part alone, if it does not read the token
        return sigmoid(x @ weight + self.tensors["confidence_head.proj.bias"])

    def _with_hidden(self, hidden: Array, rows: Array) -> Array:
        """(D, M, hidden_size + r): the normed outputs, then (D, M, r) rows of previous tokens."""
        normed = self.model.normed("norm", hidden)[:, None]
        return np.concatenate(
            [np.broadcast_to(normed, (*rows.shape[:2], normed.shape[-1])), rows], -1
        )


HEADS: dict[str | None, type[Corrected | Selector | Markov]] = {
    "swiglu": Corrected,
    "linear": Corrected,
    "selector": Selector,
    "vanilla": Markov,
    "gated": Markov,
}
"""By `DrafterConfig.head`."""


def scores_of(model: DrafterModel) -> Scores:
    """The conditional head of a drafter that has one."""
    return HEADS[model.config.head](model)
