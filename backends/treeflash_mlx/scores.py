"""The conditional heads: how they score the tokens of a slot, given the token before each.

A head is a first-order conditional: its scores depend on the slot and on one previous token. All
scores are logits before the temperature. All texts are computed together.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx
from mlx import nn

from treeflash.drafter_config import DrafterConfig
from treeflash_mlx.drafter_model import DrafterModel
from treeflash_mlx.head_weights import MarkovWeights, SelectorWeights
from treeflash_mlx.output_stage import OutputStage


class Scores(Protocol):
    """A conditional head."""

    module: Any
    """Its weights."""
    candidates: int | None
    """It scores so many tokens of a slot, those with the highest marginals; None for all."""

    def queries(
        self, hidden: mx.array, normed: mx.array, previous: mx.array, rows: mx.array
    ) -> mx.array:
        """(n, size) what `score` compares with tokens.

        Args:
            hidden: (D, hidden_size) outputs of the last layer.
            normed: (D, hidden_size) the same, normalised.
            previous: (n,) tokens of the target's vocabulary.
            rows: (n,) the output that each one belongs to.
        """

    def score(
        self, queries: mx.array, logits: mx.array, rows: mx.array, tokens: mx.array | None
    ) -> mx.array:
        """(texts, n, v) scores in float32, or in the dtype of the output head.

        Args:
            queries: (texts, n, size).
            logits: (texts, D, Vd) of the marginals.
            rows: (texts, n) the depth of each query.
            tokens: of the drafter's vocabulary: (texts, 1, v), or (texts, D, v) of a head with
                candidates; None for all.
        """

    def confidence(self, normed: mx.array, previous: mx.array, rows: mx.array) -> mx.array | None:
        """(n,) how much of a row is expected to be right, 0 to 1; None if it does not say."""


class Corrected:
    """TreeFlash: h' = h + correction([embedding; u]), read by the output head."""

    candidates: int | None = None

    def __init__(self, correction: nn.Module, model: DrafterModel, output: OutputStage) -> None:
        """Use the head's weights with the drafter's norm and output stage."""
        self.module = correction
        self.model = model
        self.output = output

    def queries(
        self, hidden: mx.array, normed: mx.array, previous: mx.array, rows: mx.array
    ) -> mx.array:
        """See `Scores.queries`: the normalised corrected outputs."""
        correction = self.module(self.output.embed(previous), normed, rows)
        corrected: mx.array = self.model.norm(hidden[rows] + correction)
        return corrected

    def score(
        self, queries: mx.array, logits: mx.array, rows: mx.array, tokens: mx.array | None
    ) -> mx.array:
        """See `Scores.score`."""
        return self.output.logits(queries, None if tokens is None else tokens[:, 0])

    def confidence(self, normed: mx.array, previous: mx.array, rows: mx.array) -> mx.array | None:
        """See `Scores.confidence`."""
        return None


class Selector:
    """DFlash2: U(b) + <A[a] * W u, B[b]> for the candidates b of a slot."""

    def __init__(self, weights: SelectorWeights, config: DrafterConfig) -> None:
        """Take the weights."""
        self.module = weights
        self.candidates: int | None = config.selector_top_k

    def queries(
        self, hidden: mx.array, normed: mx.array, previous: mx.array, rows: mx.array
    ) -> mx.array:
        """See `Scores.queries`."""
        projected = self.module.hidden_projection(normed)
        queries: mx.array = self.module.predecessor_codebook[previous] * projected[rows]
        return queries

    def score(
        self, queries: mx.array, logits: mx.array, rows: mx.array, tokens: mx.array | None
    ) -> mx.array:
        """See `Scores.score`."""
        assert tokens is not None
        own = of_rows(tokens, rows)
        keys = self.module.successor_codebook[own].astype(mx.float32)
        terms = (keys @ queries.astype(mx.float32)[..., None])[..., 0]
        return terms + of_rows(mx.take_along_axis(logits, tokens, 2), rows)

    def confidence(self, normed: mx.array, previous: mx.array, rows: mx.array) -> mx.array | None:
        """See `Scores.confidence`."""
        return None


class Markov:
    """DSpark: z(b) + <W2[b], e>, where e = W1[a], or a gated form of it."""

    candidates: int | None = None

    def __init__(self, weights: MarkovWeights, config: DrafterConfig) -> None:
        """Take the weights."""
        self.module = weights
        self.config = config

    def queries(
        self, hidden: mx.array, normed: mx.array, previous: mx.array, rows: mx.array
    ) -> mx.array:
        """See `Scores.queries`."""
        row: mx.array = self.module.markov_w1(previous)
        if self.config.head == "gated":
            gate = self.module.gate_proj(mx.concatenate([normed[rows], row], -1))
            row = row * mx.sigmoid(gate)
        return row

    def score(
        self, queries: mx.array, logits: mx.array, rows: mx.array, tokens: mx.array | None
    ) -> mx.array:
        """See `Scores.score`."""
        if tokens is None:
            terms = self.module.markov_w2.as_linear(queries)
        else:
            terms = queries @ self.module.markov_w2(tokens[:, 0]).swapaxes(-1, -2)
            logits = mx.take_along_axis(logits, tokens, 2)
        return terms.astype(mx.float32) + of_rows(logits, rows)

    def confidence(self, normed: mx.array, previous: mx.array, rows: mx.array) -> mx.array | None:
        """See `Scores.confidence`."""
        if not self.config.confidence_head:
            return None
        x = normed[rows]
        if self.config.confidence_with_markov:
            x = mx.concatenate([x, self.module.markov_w1(previous)], -1)
        logits = self.module.confidence_head["proj"](x)
        return mx.sigmoid(logits[:, 0].astype(mx.float32))


def scores_of(module: Any, model: DrafterModel, output: OutputStage) -> Scores:
    """The head with these weights."""
    if isinstance(module, SelectorWeights):
        return Selector(module, model.config)
    if isinstance(module, MarkovWeights):
        return Markov(module, model.config)
    return Corrected(module, model, output)


def of_rows(x: mx.array, rows: mx.array) -> mx.array:
    """(texts, n, size) from (texts, D, size): the depth that each of (texts, n) rows names."""
    return mx.take_along_axis(x, rows[..., None], 1)
