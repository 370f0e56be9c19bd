"""How well a drafter predicts the texts that its target writes, depth by depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.interfaces import ARHead, Backend, Block, Drafter
from treeflash.errors import NumericalError, PromptError

EVERY = 4  # tokens from one root to the next: the blocks of neighbours say much the same
ERRORS = 3.0  # standard errors that a gain is above what chance brings


@dataclass(frozen=True)
class Text:
    """A prompt and the target's greedy answer to it, as token ids."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]


@dataclass(frozen=True, eq=False)
class Scores:
    """What a drafter says of the true tokens; nan beyond the end of a text.

    Attributes:
        log_probs: (blocks, S - 1) nats of the true token.
        hits: (blocks, S - 1) 1 where it is the most probable one, 0 where it is not.
    """

    log_probs: NDArray[np.float64]
    hits: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Agreement:
    """A drafter's scores over the same texts, in four ways.

    Attributes:
        marginal: each row of a block for the token at its own depth.
        earlier: each row for the token one depth before.
        later: each row for the token one depth after.
        corrected: the AR head's after the true previous tokens; None where it was not asked for.
        texts: (blocks,) which text a block is of.
    """

    marginal: Scores
    earlier: Scores
    later: Scores
    corrected: Scores | None
    texts: NDArray[np.int64]

    def gain_of(self, other: Scores) -> Gain:
        """How much better other scores of the same blocks are than the marginal ones."""
        return Gain.between(self.marginal.log_probs, other.log_probs)

    def by_text(self, count: int) -> NDArray[np.float64]:
        """(count, 1) mean marginal log probability of each text; nan of one without a block."""
        means = [self.marginal.log_probs[self.texts == number] for number in range(count)]
        return np.array([[np.nanmean(each) if each.size else np.nan] for each in means])


@dataclass(frozen=True)
class Gain:
    """How much more probable one way of drafting makes the true tokens than another.

    Attributes:
        nats: mean difference of their log probabilities.
        error: its standard error.
    """

    nats: float
    error: float

    @classmethod
    def between(cls, base: NDArray[np.float64], other: NDArray[np.float64]) -> Gain:
        """From (blocks, depths) log probabilities; nan entries are left out."""
        difference = other - base
        difference = difference[~np.isnan(difference).all(1)]
        if len(difference) < 2:
            return cls(0.0, math.inf)
        each = np.nanmean(difference, 1)
        return cls(float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))))

    def is_clear(self, least: float) -> bool:
        """Whether it is at least so many nats, and more than chance brings."""
        return self.nats >= max(least, ERRORS * self.error)

    def __str__(self) -> str:
        return f"{math.exp(self.nats):.2f} times as probable"


def answer(
    backend: Backend, prompt_ids: Sequence[int], max_tokens: int, stop_token_ids: frozenset[int]
) -> Text:
    """Decode a text plainly."""
    config = DecodeConfig(method="ar", max_tokens=max_tokens, stop_token_ids=stop_token_ids)
    steps = decode(backend, prompt_ids, config)
    return Text(prompt_ids, [token for step in steps for token in step.tokens])


def measure(backend: Backend, texts: Sequence[Text], head: ARHead | None = None) -> Agreement:
    """Draft a block at every few tokens of some texts and compare it with what follows.

    Args:
        backend: a pair.
        texts: of its target.
        head: the pair's, where its scores are wanted too.

    Raises:
        PromptError: the texts are too short to compare anything.
        NumericalError: a model produced values that are not finite.
    """
    rows: dict[str, list[NDArray[np.float64]]] = {}
    numbers: list[int] = []
    for number, text in enumerate(texts):
        for tokens, drafter, block in _blocks(backend, text):
            marginal = drafter.log_probs(block)
            tables = {"marginal": (marginal, 1), "earlier": (marginal, 0), "later": (marginal, 2)}
            if head is not None:
                previous = np.resize(np.array(tokens, np.int32), len(marginal))
                tables["corrected"] = head.log_probs(block, previous), 1
            for name, (table, first) in tables.items():
                rows.setdefault(name, []).append(_score(table, tokens[first:]))
            numbers.append(number)
    if not numbers:
        raise PromptError("the target's answers are too short to judge a drafter by; give others")
    scores = {name: Scores(*np.stack(each, 1)) for name, each in rows.items()}
    return Agreement(
        marginal=scores["marginal"],
        earlier=scores["earlier"],
        later=scores["later"],
        corrected=scores.get("corrected"),
        texts=np.array(numbers),
    )


def by_depth(values: NDArray[np.float64]) -> list[float]:
    """Means over the blocks, one a depth, for as many depths as the texts reach."""
    reached = ~np.isnan(values).all(0)
    means: list[float] = np.nanmean(values[:, reached], 0).tolist()
    return means


def _blocks(backend: Backend, text: Text) -> Iterator[tuple[Sequence[int], Drafter, Block]]:
    """The true tokens of each block, the root first, and the block."""
    verifier, drafter = backend.verifier(features=True), backend.drafter()
    unseen = text.prompt_ids
    for start in range(0, len(text.answer_ids) - 1, EVERY):
        _, features = verifier.prefill(unseen, SamplingConfig(), None)
        tokens = text.answer_ids[start:]
        yield tokens, drafter, drafter.draft(features, tokens[0])
        unseen = tokens[:EVERY]


def _score(table: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    """(2, S - 1) log probabilities and hits of (S - 1, vocab) rows, row i against token i."""
    if np.isnan(table).any():
        raise NumericalError("the drafter's output is not a number (NaN): its weights are damaged")
    count = min(len(table), len(tokens))
    true = np.array(tokens[:count], np.int64)
    scores = np.full((2, len(table)), np.nan)
    scores[0, :count] = table[np.arange(count), true]
    scores[1, :count] = table[:count].argmax(-1) == true
    return scores
