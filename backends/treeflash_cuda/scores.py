"""The conditional heads: how they score the tokens of a slot, given the token before each.

A head is a first-order conditional: its scores depend on the slot and on one previous token. All
scores are logits before the temperature. What all texts share is computed for all of them together
(`queries`), what differs with a text's tokens text by text (`score`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from treeflash.drafter_config import DrafterConfig
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.head_weights import MarkovWeights, SelectorWeights
from treeflash_cuda.linear import RowIndex, take
from treeflash_cuda.output_stage import OutputStage


class Scores(Protocol):
    """A conditional head."""

    module: Any
    """Its weights."""
    candidates: int | None
    """It scores so many tokens of a slot, those with the highest marginals; None for all."""

    def queries(self, hidden: Tensor, normed: Tensor, previous: Tensor, rows: RowIndex) -> Tensor:
        """(n, size) what `score` compares with tokens.

        Args:
            hidden: (D, hidden_size) outputs of the last layer.
            normed: (D, hidden_size) the same, normalised.
            previous: (n,) tokens of the target's vocabulary.
            rows: (n,) the output that each one belongs to.
        """

    def score(self, queries: Tensor, logits: Tensor, rows: RowIndex, tokens: Tensor | None) -> Any:
        """(n, v) scores in float32, or in the dtype of the output head.

        Args:
            queries: (n, size).
            logits: (D, Vd) of the marginals.
            rows: (n,) as in `queries`.
            tokens: of the drafter's vocabulary: (v,), or (D, v) of a head with candidates; None
                for all.
        """

    def confidence(self, normed: Tensor, previous: Tensor, rows: RowIndex) -> Tensor | None:
        """(n,) how much of a row is expected to be right, 0 to 1; None if it does not say."""


class Corrected:
    """TreeFlash: h' = h + correction([embedding; u]), read by the output head."""

    candidates: int | None = None

    def __init__(self, correction: nn.Module, model: DrafterModel, output: OutputStage) -> None:
        """Use the head's weights with the drafter's norm and output stage."""
        self.module = correction
        self.model = model
        self.output = output

    def queries(self, hidden: Tensor, normed: Tensor, previous: Tensor, rows: RowIndex) -> Tensor:
        """See `Scores.queries`: the normalised corrected outputs."""
        correction = self.module(self.output.embed(previous), normed, rows)
        return self.model.norm(take(hidden, rows) + correction)

    def score(self, queries: Tensor, logits: Tensor, rows: RowIndex, tokens: Tensor | None) -> Any:
        """See `Scores.score`."""
        return self.output.logits(queries, tokens)

    def confidence(self, normed: Tensor, previous: Tensor, rows: RowIndex) -> Tensor | None:
        """See `Scores.confidence`."""
        return None


class Selector:
    """DFlash2: U(b) + <A[a] * W u, B[b]> for the candidates b of a slot."""

    def __init__(self, weights: SelectorWeights, config: DrafterConfig) -> None:
        """Take the weights."""
        self.module = weights
        self.candidates: int | None = config.selector_top_k

    def queries(self, hidden: Tensor, normed: Tensor, previous: Tensor, rows: RowIndex) -> Tensor:
        """See `Scores.queries`."""
        projected = self.module.hidden_projection(normed)
        return take(self.module.predecessor_codebook, previous) * take(projected, rows)

    def score(self, queries: Tensor, logits: Tensor, rows: RowIndex, tokens: Tensor | None) -> Any:
        """See `Scores.score`."""
        assert tokens is not None
        own = take(tokens, rows)
        keys = self.module.successor_codebook[own]
        terms = (keys.float() @ queries.float()[:, :, None])[..., 0]
        return terms + take(logits.gather(1, tokens), rows).float()

    def confidence(self, normed: Tensor, previous: Tensor, rows: RowIndex) -> Tensor | None:
        """See `Scores.confidence`."""
        return None


class Markov:
    """DSpark: z(b) + <W2[b], e>, where e = W1[a], or a gated form of it."""

    candidates: int | None = None

    def __init__(self, weights: MarkovWeights, config: DrafterConfig) -> None:
        """Take the weights."""
        self.module = weights
        self.config = config

    def queries(self, hidden: Tensor, normed: Tensor, previous: Tensor, rows: RowIndex) -> Tensor:
        """See `Scores.queries`."""
        row = self.module.markov_w1(previous)
        if self.config.head == "gated":
            gate = self.module.gate_proj(torch.cat([take(normed, rows), row], -1))
            row = row * gate.sigmoid()
        return row

    def score(self, queries: Tensor, logits: Tensor, rows: RowIndex, tokens: Tensor | None) -> Any:
        """See `Scores.score`."""
        keys = self.module.markov_w2.weight
        if tokens is not None:
            keys, logits = take(keys, tokens), logits.index_select(1, tokens)
        return (queries @ keys.T).float() + take(logits, rows).float()

    def confidence(self, normed: Tensor, previous: Tensor, rows: RowIndex) -> Tensor | None:
        """See `Scores.confidence`."""
        if not self.config.confidence_head:
            return None
        x = take(normed, rows)
        if self.config.confidence_with_markov:
            x = torch.cat([x, self.module.markov_w1(previous)], -1)
        logits: Tensor = self.module.confidence_head["proj"](x)
        return logits[:, 0].float().sigmoid()


def scores_of(module: Any, model: DrafterModel, output: OutputStage) -> Scores:
    """The head with these weights."""
    if isinstance(module, SelectorWeights):
        return Selector(module, model.config)
    if isinstance(module, MarkovWeights):
        return Markov(module, model.config)
    return Corrected(module, model, output)
