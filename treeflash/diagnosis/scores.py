"""Drafter scores: how well a drafter predicts its target's texts, by depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.config import DecodeConfig
from treeflash.decoding import decode
from treeflash.decoding.interfaces import ARHead, Backend, Block
from treeflash.decoding.text_session import TextSession
from treeflash.errors import NumericalError, PromptError

STRIDE = 4  # tokens from one root to the next: neighbouring blocks are nearly the same
SIGNIFICANT = 3.0  # standard errors from which a gain is not noise


@dataclass(frozen=True)
class Text:
    """A prompt and the target's greedy answer to it, as token ids."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of the target's tokens; nan beyond the end of a text.

    Attributes:
        log_probs: (blocks, D) log probability of the target's token, nats.
        hits: (blocks, D) 1 if it is the most probable token, else 0.
    """

    log_probs: NDArray[np.float64]
    hits: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DrafterScores:
    """A drafter's scores on the same blocks, computed in four ways.

    Attributes:
        marginal: each row of a block scored against the token at its own depth.
        earlier: each row scored against the token one depth before.
        later: each row scored against the token one depth after.
        corrected: the AR head's, given the target's previous tokens; None if not requested.
        texts: (blocks,) index of the text that each block belongs to.
    """

    marginal: TokenScores
    earlier: TokenScores
    later: TokenScores
    corrected: TokenScores | None
    texts: NDArray[np.int64]

    def gain_of(self, other: TokenScores) -> Gain:
        """The gain of other scores of the same blocks over the marginal ones."""
        return Gain.between(self.marginal.log_probs, other.log_probs)

    def by_text(self, count: int) -> NDArray[np.float64]:
        """(count, 1) mean marginal log probability of each text; nan for a text without a block."""
        means = [self.marginal.log_probs[self.texts == number] for number in range(count)]
        return np.array([[np.nanmean(each) if each.size else np.nan] for each in means])


@dataclass(frozen=True)
class Gain:
    """How much more probable one way of drafting makes the target's tokens than another.

    Attributes:
        nats: mean difference of log probabilities.
        error: its standard error.
    """

    nats: float
    error: float

    @classmethod
    def between(cls, base: NDArray[np.float64], other: NDArray[np.float64]) -> Gain:
        """The gain from `base` to `other`, (blocks, depths) log probabilities; nan is left out."""
        difference = other - base
        difference = difference[~np.isnan(difference).all(1)]
        if len(difference) < 2:
            return cls(0.0, math.inf)
        each = np.nanmean(difference, 1)
        return cls(float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))))

    def is_clear(self, least: float) -> bool:
        """Whether it is at least `least` nats and statistically significant."""
        return self.nats >= max(least, SIGNIFICANT * self.error)

    def __str__(self) -> str:
        return f"{math.exp(self.nats):.2f}x"


def answer(
    backend: Backend, prompt_ids: Sequence[int], max_tokens: int, stop_token_ids: frozenset[int]
) -> Text:
    """Decode a text without drafting."""
    config = DecodeConfig(method="ar", max_tokens=max_tokens, stop_token_ids=stop_token_ids)
    steps = decode(backend, prompt_ids, config)
    return Text(prompt_ids, [token for step in steps for token in step.tokens])


def measure(backend: Backend, texts: Sequence[Text], head: ARHead | None = None) -> DrafterScores:
    """Draft a block at every fourth token of some texts and score the tokens that follow.

    Args:
        backend: a loaded pair.
        texts: written by its target.
        head: the pair's AR head, to score it too.

    Raises:
        PromptError: the texts are too short.
        NumericalError: a model produced values that are not finite.
    """
    assert backend.drafter is not None
    rows: dict[str, list[NDArray[np.float64]]] = {}
    numbers: list[int] = []
    for number, text in enumerate(texts):
        for tokens, block in _blocks(backend, text):
            marginal = backend.drafter.log_probs(block)
            tables = {"marginal": (marginal, 1), "earlier": (marginal, 0), "later": (marginal, 2)}
            if head is not None:
                previous = np.resize(np.array(tokens, np.int32), len(marginal))
                tables["corrected"] = head.log_probs(block, previous), 1
            for name, (table, first) in tables.items():
                rows.setdefault(name, []).append(_score(table, tokens[first:]))
            numbers.append(number)
    if not numbers:
        raise PromptError(
            "the target's answers are too short to score a drafter; use other prompts"
        )
    scores = {name: TokenScores(*np.stack(each, 1)) for name, each in rows.items()}
    return DrafterScores(
        marginal=scores["marginal"],
        earlier=scores["earlier"],
        later=scores["later"],
        corrected=scores.get("corrected"),
        texts=np.array(numbers),
    )


def by_depth(values: NDArray[np.float64]) -> list[float]:
    """Means over the blocks for each depth that the texts reach."""
    reached = ~np.isnan(values).all(0)
    means: list[float] = np.nanmean(values[:, reached], 0).tolist()
    return means


def _blocks(backend: Backend, text: Text) -> Iterator[tuple[Sequence[int], Block]]:
    """The target's tokens from each root on, and the drafter's block."""
    unseen = text.prompt_ids
    capacity = len(text.prompt_ids) + len(text.answer_ids)
    with TextSession(backend, drafts=True, capacity=capacity) as state:
        for start in range(0, len(text.answer_ids) - 1, STRIDE):
            state.extend(unseen)
            tokens = text.answer_ids[start:]
            yield tokens, state.draft(tokens[0])
            unseen = tokens[:STRIDE]


def _score(table: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    """(2, D) log probabilities and hits of (D, vocab) rows; row i scores token i."""
    if np.isnan(table).any():
        raise NumericalError("the drafter's output is not a number (NaN): its weights are damaged")
    count = min(len(table), len(tokens))
    true = np.array(tokens[:count], np.int64)
    scores = np.full((2, len(table)), np.nan)
    scores[0, :count] = table[np.arange(count), true]
    scores[1, :count] = table[:count].argmax(-1) == true
    return scores
