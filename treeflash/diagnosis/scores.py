"""Drafter scores: how well a drafter predicts the texts of its target, by depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.config import DecodeConfig
from treeflash.decoding import decode
from treeflash.decoding.interfaces import ARHead, Backend
from treeflash.decoding.session import draft_anchors
from treeflash.errors import NumericalError, PromptError

SIGNIFICANT = 3.0
"""Standard errors from which a gain is not noise."""


@dataclass(frozen=True)
class Text:
    """A prompt and the target's greedy answer to it, as token ids."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of the target's tokens; nan after the end of a text.

    Attributes:
        log_probs: (blocks, D) log probability of the target's token, nats.
        hits: (blocks, D) 1 if the target's token is the drafter's most probable one, else 0.
    """

    log_probs: NDArray[np.float64]
    hits: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DrafterScores:
    """A drafter's scores on some blocks, computed in four ways.

    Attributes:
        marginal: each row of a block, compared with the token at the depth of the row.
        earlier: each row, compared with the token one depth earlier.
        later: each row, compared with the token one depth later.
        corrected: the rows of the AR head after the target's previous tokens; None if not
            requested.
        texts: (blocks,) index of the text of each block.
    """

    marginal: TokenScores
    earlier: TokenScores
    later: TokenScores
    texts: NDArray[np.int64]
    corrected: TokenScores | None = None

    def compare(self, other: TokenScores) -> Gain:
        """The gain of other scores of these blocks over the marginal scores."""
        return Gain.between(self.marginal.log_probs, other.log_probs)

    def text_means(self, count: int) -> NDArray[np.float64]:
        """(count, 1) mean marginal log probability of each text; nan for a text without a block."""
        texts = [self.marginal.log_probs[self.texts == number] for number in range(count)]
        return np.array([[np.nanmean(text) if text.size else np.nan] for text in texts])


@dataclass(frozen=True)
class Gain:
    """How much more probable the target's tokens are with one way of drafting than with another.

    Attributes:
        nats: mean difference of log probabilities.
        error: standard error of `nats`.
    """

    nats: float
    error: float

    @classmethod
    def between(cls, base: NDArray[np.float64], other: NDArray[np.float64]) -> Gain:
        """The gain from `base` to `other`, (blocks, depths) log probabilities; nan is ignored."""
        difference = other - base
        difference = difference[~np.isnan(difference).all(1)]
        if len(difference) < 2:
            return cls(0.0, math.inf)
        means = np.nanmean(difference, 1)
        return cls(float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means))))

    def is_clear(self, least: float) -> bool:
        """Whether the gain is statistically significant and at least `least` nats."""
        return self.nats >= max(least, SIGNIFICANT * self.error)

    def __str__(self) -> str:
        return f"{math.exp(self.nats):.2f}x"


def answer(
    backend: Backend, prompt_ids: Sequence[int], max_tokens: int, stop_token_ids: frozenset[int]
) -> Text:
    """Decode an answer without drafting."""
    config = DecodeConfig(method="ar", max_tokens=max_tokens, stop_token_ids=stop_token_ids)
    steps = decode(backend, prompt_ids, config)
    return Text(prompt_ids, [token for step in steps for token in step.tokens])


def measure(backend: Backend, texts: Sequence[Text], head: ARHead | None = None) -> DrafterScores:
    """Score the tokens after every fourth token of some texts; a PromptError if they are short."""
    assert backend.drafter is not None
    rows: dict[str, list[NDArray[np.float64]]] = {}
    numbers: list[int] = []
    for number, text in enumerate(texts):
        for anchor in draft_anchors(backend, text.prompt_ids, text.answer_ids):
            marginal = backend.drafter.log_probs(anchor.block)
            tables = {"marginal": (marginal, 1), "earlier": (marginal, 0), "later": (marginal, 2)}
            if head is not None:
                previous = np.resize(np.array(anchor.tokens, np.int32), len(marginal))
                tables["corrected"] = head.log_probs(anchor.block, previous), 1
            for name, (table, first) in tables.items():
                rows.setdefault(name, []).append(_score(table, anchor.tokens[first:]))
            numbers.append(number)
    if not numbers:
        raise PromptError(
            "the target's answers are too short to score a drafter; use other prompts"
        )
    scores = {name: TokenScores(*np.stack(blocks, 1)) for name, blocks in rows.items()}
    return DrafterScores(texts=np.array(numbers), **scores)


def depth_means(values: NDArray[np.float64]) -> list[float]:
    """Means over the blocks, for each depth that the texts reach."""
    reached = ~np.isnan(values).all(0)
    return [float(mean) for mean in np.nanmean(values[:, reached], 0)]


def _score(table: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    """(2, D) log probabilities and hits of tokens in (D, vocab) rows, one token per row."""
    if np.isnan(table).any():
        raise NumericalError("the drafter's output is not a number (NaN): its weights are damaged")
    count = min(len(table), len(tokens))
    expected = np.array(tokens[:count], np.int64)
    scores = np.full((2, len(table)), np.nan)
    scores[0, :count] = table[np.arange(count), expected]
    scores[1, :count] = table[:count].argmax(-1) == expected
    return scores
