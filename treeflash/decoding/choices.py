"""Choices of the target's token at each node, and their results."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding import sampling as sampler
from treeflash.decoding.gumbel import position_keys

MASK_BITS = 32
"""Tokens in one word of a bitmask."""


@dataclass(frozen=True, eq=False)
class LogitEdits:
    """Sparse changes of logits: `x / factor` if x > 0, else `x * factor`; then `+ addition`.

    A pair of row and token occurs at most once.

    Attributes:
        rows: (m,) int64 node indices.
        tokens: (m,) int64 token ids.
        factors: (m,) float32, above 0; 1 changes nothing.
        additions: (m,) float32.
    """

    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]
    factors: NDArray[np.float32]
    additions: NDArray[np.float32]

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, vocab) edited logits; the definition that backends are held to."""
        edited = logits.copy()
        found = edited[self.rows, self.tokens]
        scaled = np.where(found > 0, found / self.factors, found * self.factors)
        edited[self.rows, self.tokens] = scaled + self.additions
        return edited


@dataclass(frozen=True, eq=False)
class Choice:
    """How to choose the token that follows each of n nodes.

    Attributes:
        sampling: temperature and filters.
        keys: (n, 2) of the noise at the position after each node; None if greedy.
        edits: changes of the logits, before everything else; None for none.
        allowed: (n, ceil(vocab / 32)) uint32; bit t % 32 of word t // 32 says whether token t may
            be chosen. It takes effect after the edits. None allows every token.
        log_probs: how many of the best tokens' log probabilities to return beside the chosen
            token's; None returns none at all.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    keys: NDArray[np.uint32] | None = None
    edits: LogitEdits | None = None
    allowed: NDArray[np.uint32] | None = None
    log_probs: int | None = None

    @classmethod
    def at(cls, sampling: SamplingConfig, positions: NDArray[np.int32]) -> Choice:
        """The choice of the tokens at these positions, with the noise of the seed."""
        return cls(sampling, None if sampling.greedy else position_keys(sampling.seed, positions))


@dataclass(frozen=True, eq=False)
class LogProbs:
    """Log probabilities of the target at temperature 1, before edits, masks and filters; nats.

    Attributes:
        chosen: (n,) float32 of the chosen tokens.
        tokens: (n, k) int32 the best tokens, best first.
        values: (n, k) float32 of those.
    """

    chosen: NDArray[np.float32]
    tokens: NDArray[np.int32]
    values: NDArray[np.float32]

    def rows(self, rows: NDArray[np.int32]) -> LogProbs:
        """Those of some nodes."""
        return LogProbs(self.chosen[rows], self.tokens[rows], self.values[rows])


@dataclass(frozen=True, eq=False)
class Chosen:
    """What the target chose.

    Attributes:
        tokens: (n,) int32 the token that follows each node.
        log_probs: if they were asked for.
    """

    tokens: NDArray[np.int32]
    log_probs: LogProbs | None = None


def choose(logits: NDArray[np.float32], choice: Choice) -> Chosen:
    """Choose a token for each row of logits: the definition that backends are held to.

    Args:
        logits: (n, vocab) float32.
        choice: for n nodes.

    Raises:
        NumericalError: a row's largest logit is not finite.
    """
    edited = logits if choice.edits is None else choice.edits.apply(logits)
    if choice.allowed is not None:
        edited = np.where(unpack(choice.allowed, logits.shape[-1]), edited, -np.inf)
    tokens = sampler.choose(edited, choice.sampling, choice.keys)
    if choice.log_probs is None:
        return Chosen(tokens)
    log_probs = logits - np.logaddexp.reduce(logits.astype(np.float64), -1, keepdims=True)
    best = np.argsort(-logits, -1, kind="stable")[:, : choice.log_probs]
    return Chosen(
        tokens,
        LogProbs(
            np.take_along_axis(log_probs, tokens[:, None], -1)[:, 0].astype(np.float32),
            best.astype(np.int32),
            np.take_along_axis(log_probs, best, -1).astype(np.float32),
        ),
    )


def unpack(allowed: NDArray[np.uint32], vocab_size: int) -> NDArray[np.bool_]:
    """(n, vocab) bool of a bitmask."""
    bits = np.unpackbits(allowed.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    return bits[:, :vocab_size].astype(np.bool_)


def shared_sampling(choice: Choice) -> SamplingConfig:
    """What the choices of several texts must share to be made together; seeds may differ."""
    return replace(choice.sampling, seed=0)
