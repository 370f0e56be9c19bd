"""Sampling: how the target's token after each node of a tree is chosen.

`sample` is the definition that backends are held to: it edits the logits (`LogitEdits`), masks the
tokens that a constraint forbids, filters, and takes the largest sum of logit and noise
(Gumbel-max). The noise at a position depends on the seed and the position alone. A drafter that
adds the same noise to its own logits drafts the tokens that the target is likely to sample (Daliri
et al. 2024, arXiv 2408.07978), so more of its drafts are accepted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeflash.config import Penalties, SamplingConfig
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError

MASK_BITS = 32
"""Tokens in one word of a bitmask."""


@dataclass(frozen=True, eq=False)
class LogitEdits:
    """Sparse changes of logits: `x / factor` if x > 0, else `x * factor`; then `+ addition`.

    A pair of row and token occurs at most once.
    """

    rows: NDArray[np.int64]  # (m,) int64 node indices
    tokens: NDArray[np.int64]  # (m,) int64 token ids
    factors: NDArray[np.float32]  # (m,) float32, above 0; 1 changes nothing
    additions: NDArray[np.float32]  # (m,) float32

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the (n, vocab) edited logits; the definition that backends are held to."""
        edited = logits.copy()
        x = edited[self.rows, self.tokens]
        scaled = np.where(x > 0, x / self.factors, x * self.factors)
        edited[self.rows, self.tokens] = scaled + self.additions
        return edited


@dataclass(frozen=True, eq=False)
class SamplingParams:
    """How to sample the token that follows each of n nodes."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # temperature and filters
    # (n, 2) of the noise at the position after each node; None if greedy
    keys: NDArray[np.uint32] | None = None
    edits: LogitEdits | None = None  # changes of the logits, before everything else
    # (n, ceil(vocab / 32)) uint32; bit t % 32 of word t // 32 says whether token t may be sampled.
    # It takes effect after the edits. None allows every token
    allowed: NDArray[np.uint32] | None = None
    # number of the best tokens whose log probabilities to return beside the sampled token's; None
    # returns none at all
    log_probs: int | None = None

    @classmethod
    def from_positions(
        cls,
        sampling: SamplingConfig,
        positions: NDArray[np.int32],
        edits: LogitEdits | None = None,
        allowed: NDArray[np.uint32] | None = None,
        log_probs: int | None = None,
    ) -> SamplingParams:
        """Create the parameters for tokens at n positions, with the noise of the seed."""
        keys = None if sampling.greedy else position_keys(sampling.seed, positions)
        return cls(sampling, keys, edits, allowed, log_probs)


@dataclass(frozen=True, eq=False)
class LogProbs:
    """Log probabilities of the target at temperature 1, before edits, masks and filters; nats."""

    sampled: NDArray[np.float32]  # (n,) float32 of the sampled tokens
    tokens: NDArray[np.int32]  # (n, k) int32 the best tokens, best first
    values: NDArray[np.float32]  # (n, k) float32 of the best tokens

    def rows(self, rows: NDArray[np.int32]) -> LogProbs:
        """Return the log probabilities at some nodes."""
        return LogProbs(self.sampled[rows], self.tokens[rows], self.values[rows])

    @classmethod
    def concatenate(cls, parts: Sequence[LogProbs]) -> LogProbs:
        return cls(
            np.concatenate([part.sampled for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.values for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class SampledTokens:
    """The target's tokens."""

    tokens: NDArray[np.int32]  # (n,) int32 the token that follows each node
    log_probs: LogProbs | None = None  # None if they were not asked for


def sample(logits: NDArray[np.float32], params: SamplingParams) -> SampledTokens:
    """Sample a token for each row of (n, vocab) logits: the definition that backends are held to.

    Raises a NumericalError if a row's largest logit is not finite.
    """
    edited = logits if params.edits is None else params.edits.apply(logits)
    if params.allowed is not None:
        edited = np.where(unpack(params.allowed, logits.shape[-1]), edited, -np.inf)
    tokens = sample_tokens(edited, params.sampling, params.keys)
    if params.log_probs is None:
        return SampledTokens(tokens)
    log_probs = logits - np.logaddexp.reduce(logits.astype(np.float64), -1, keepdims=True)
    best = np.argsort(-logits, -1, kind="stable")[:, : params.log_probs]
    return SampledTokens(
        tokens,
        LogProbs(
            np.take_along_axis(log_probs, tokens[:, None], -1)[:, 0].astype(np.float32),
            best.astype(np.int32),
            np.take_along_axis(log_probs, best, -1).astype(np.float32),
        ),
    )


def unpack(allowed: NDArray[np.uint32], vocab_size: int) -> NDArray[np.bool_]:
    """Return the (n, vocab) bool of a bitmask."""
    bits = np.unpackbits(allowed.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    return bits[:, :vocab_size].astype(np.bool_)


def only(tokens: NDArray[np.int32], vocab_size: int) -> NDArray[np.uint32]:
    """Return the (n, ceil(vocab / 32)) bitmask that allows one of n tokens in each row."""
    allowed = np.zeros((len(tokens), -(-vocab_size // MASK_BITS)), np.uint32)
    bits = np.uint32(1) << (tokens % MASK_BITS).astype(np.uint32)
    allowed[np.arange(len(tokens)), tokens // MASK_BITS] = bits
    return allowed


@lru_cache(maxsize=256)  # every pass asks for each sequence, and a new configuration checks itself
def shared_sampling(sampling: SamplingConfig) -> SamplingConfig:
    """Return the configuration with seed 0: sequences with equal ones can be sampled together."""
    return replace(sampling, seed=0)


TARGET_NOT_FINITE = (
    "the target's output is not finite (NaN or infinity): its weights are damaged, or the dtype "
    "overflows; try dtype float32"
)


def check_finite(finite: object) -> None:
    """Raise `NumericalError` unless `finite`: the largest logit of every row is finite."""
    if not finite:
        raise NumericalError(TARGET_NOT_FINITE)


def sample_tokens(
    logits: NDArray[np.float32], sampling: SamplingConfig, keys: NDArray[np.uint32] | None = None
) -> NDArray[np.int32]:
    """Sample (n,) tokens of the largest of `noisy_logits`, the first of equal ones (Gumbel-max).

    `keys` are (n, 2) of the positions that the tokens will take; they may be None when greedy. A
    NumericalError is raised if a row's largest logit is not finite.
    """
    check_finite(np.isfinite(logits.max(-1)).all())
    if sampling.greedy:
        return np.asarray(np.argmax(logits, -1), np.int32)
    assert keys is not None
    return np.asarray(np.argmax(noisy_logits(logits, sampling, keys), -1), np.int32)


def noisy_logits(
    logits: NDArray[np.float32], sampling: SamplingConfig, keys: NDArray[np.uint32]
) -> NDArray[np.float64]:
    """Add noise of (n, 2) keys to (n, vocab) logits; dropped tokens have -inf."""
    noise = vocabulary_noise(keys, logits.shape[-1]).astype(np.float64)
    kept = filtered_probs(logits, sampling) > 0
    return np.where(kept, logits + sampling.temperature * noise, -np.inf)


def filtered_probs(logits: NDArray[np.float32], sampling: SamplingConfig) -> NDArray[np.float64]:
    """Return (n, vocab) float64 probabilities after temperature and filters, not normalised again.

    A filter keeps or drops tokens of equal probability together, so that the result does not depend
    on how a sort breaks ties. Dropped tokens are 0. The sampling must not be greedy.
    """
    scaled = (logits.astype(np.float64) - logits.max(-1, keepdims=True)) / sampling.temperature
    probs: NDArray[np.float64] = np.exp(scaled)
    if 0 < sampling.top_k < probs.shape[-1]:
        kth = -np.partition(-probs, sampling.top_k - 1)[:, sampling.top_k - 1, None]
        probs = np.where(probs >= kth, probs, 0.0)
    probs /= probs.sum(-1, keepdims=True)
    if sampling.top_p < 1:
        ranked = -np.sort(-probs)
        before = ranked.cumsum(-1) - ranked
        last = (before < sampling.top_p).sum(-1, keepdims=True) - 1
        probs = np.where(probs >= np.take_along_axis(ranked, last, -1), probs, 0.0)
    if sampling.min_p > 0:
        probs = np.where(probs >= sampling.min_p * probs.max(-1, keepdims=True), probs, 0.0)
    return probs


SHIFTS, MULTIPLIERS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)
"""Constants of the hash `lowbias32` (Wellons 2018)."""
MAX_SHARE = float(np.float32(1 - 2.0**-24))
"""The largest number below 1 in float32."""
CACHED_ROWS = 64
"""Positions whose noise is cached: a draft and its verification use the same noise."""


def position_keys(seed: int, positions: NDArray[np.int32]) -> NDArray[np.uint32]:
    """Return the (n, 2) keys of the noise at (n,) int32 absolute positions, for a seed below 2**64.

    A key depends on the seed and the position alone, so that a seed gives the same output with
    every method and budget: it is number `p` of the Philox stream of the seed (Salmon et al. 2011),
    its lower half first.
    """
    # One counter step of NumPy's Philox makes four numbers, so any of them is reached in O(1).
    first = int(positions.min()) // 4
    count = int(positions.max()) - 4 * first + 1
    stream = np.random.Philox(key=seed, counter=first).random_raw(count)
    numbers = stream[positions - 4 * first].astype("<u8")
    return numbers.view("<u4").reshape(-1, 2).astype(np.uint32)


def gumbel(keys: NDArray[np.uint32], tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Draw (n, v) finite float32 noise, standard Gumbel; it is the definition for all backends.

    Each of (v,) or (n, v) tokens is hashed with one half of its (n, 2) key, then with the other
    half.
    """
    x = _mix(tokens.astype(np.uint32) ^ keys[:, :1])
    x = _mix(x ^ keys[:, 1:])
    # Small shares give the large noise that decides, so they have float32's full precision.
    shares = ((x >> np.uint32(1)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31)
    noise: NDArray[np.float32] = -np.log(-np.log1p(-np.minimum(shares, np.float32(MAX_SHARE))))
    return noise


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(multiplier)
    return x


def vocabulary_noise(keys: NDArray[np.uint32], vocab_size: int) -> NDArray[np.float32]:
    """Return (n, vocab) noise of all tokens, for backends on a CPU; the latest rows are cached."""
    return np.stack([_row(*key, vocab_size) for key in keys.tolist()])


@lru_cache(CACHED_ROWS)
def _row(low: int, high: int, vocab_size: int) -> NDArray[np.float32]:
    keys = np.array([[low, high]], np.uint32)
    row: NDArray[np.float32] = gumbel(keys, np.arange(vocab_size, dtype=np.int32))[0]
    return row


@dataclass(frozen=True, eq=False)
class Noise:
    """The noise with which the target will sample, for a drafter."""

    keys: NDArray[np.uint32]  # (n, 2) of the positions of n drafted tokens
    # (n,) float32 factors on the noise: the sampling temperatures, 0 if greedy
    scales: NDArray[np.float32]

    @classmethod
    def from_positions(cls, sequences: Sequence[tuple[SamplingConfig, NDArray[np.int32]]]) -> Noise:
        """Return the noise of several sequences, one after another, from their positions."""
        keys = [
            # The keys are equal, so that their noise is computed once: it is multiplied by 0.
            np.zeros((len(positions), 2), np.uint32)
            if sampling.greedy
            else position_keys(sampling.seed, positions)
            for sampling, positions in sequences
        ]
        scales = [np.full(len(x), sampling.temperature, np.float32) for sampling, x in sequences]
        return cls(np.concatenate(keys), np.concatenate(scales))

    def values(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the (n, v) noise to add to the logits of (v,) or (n, v) tokens."""
        return self.scales[:, None] * gumbel(self.keys, tokens)

    def split(self, parts: int) -> list[Noise]:
        """Split into equal parts, one per sequence."""
        return list(map(Noise, np.split(self.keys, parts), np.split(self.scales, parts)))


class PenaltyState:
    """The counts of a sequence's tokens, and the penalties that follow from them.

    The repetition penalty counts the prompt and the generated tokens, the presence and frequency
    penalties the generated tokens alone, as in vLLM.
    """

    def __init__(self, penalties: Penalties, prompt_ids: Sequence[int]) -> None:
        self.penalties = penalties
        self.is_active = penalties.active  # compared once, not in every iteration
        self.prompt = np.unique(np.array(prompt_ids, np.int64))
        self.generated: Counter[int] = Counter()

    def add(self, tokens: Iterable[int]) -> None:
        """Count newly generated tokens."""
        if self.is_active:
            self.generated.update(tokens)

    def edits(self, tree: DraftTree) -> LogitEdits | None:
        """Return the edits of the logits at each node, or None; the root is counted already."""
        penalties = self.penalties
        if not self.is_active:
            return None
        bias = dict(penalties.logit_bias)
        repeated = self.prompt if penalties.repetition != 1 else self.prompt[:0]
        tokens = np.unique(
            np.concatenate([repeated, tree.tokens, [*self.generated], [*bias]]).astype(np.int64)
        )
        generated = np.array([self.generated[token] for token in tokens.tolist()], np.int64)
        counts = np.tile(generated, (len(tree), 1))
        # Only tokens of the tree have counts by node; all tokens may be the whole vocabulary.
        drafted = np.unique(tree.tokens[1:])
        is_drafted = (tree.tokens[1:, None] == drafted).astype(np.float32)
        on_path = tree.ancestor_mask()[:, 1:].astype(np.float32) @ is_drafted
        counts[:, np.searchsorted(tokens, drafted)] += on_path.astype(np.int64)
        seen = (counts > 0) | np.isin(tokens, self.prompt)
        factors = np.where(seen, penalties.repetition, 1.0)
        additions = (
            np.array([bias.get(token, 0.0) for token in tokens.tolist()])
            - penalties.presence * (counts > 0)
            - penalties.frequency * counts
        )
        rows, columns = np.nonzero((factors != 1) | (additions != 0))
        return LogitEdits(
            rows,
            tokens[columns],
            factors[rows, columns].astype(np.float32),
            additions[rows, columns].astype(np.float32),
        )


class Constraint(Protocol):
    """Restricts the tokens that may follow the generated ones, as a grammar matcher does."""

    @property
    def end_tokens(self) -> Set[int]:
        """Tokens that complete the text, whatever other tokens end it."""

    def allowed(self) -> NDArray[np.uint32]:
        """Return the (ceil(vocab / 32),) uint32 bitmask of the tokens that may come next."""

    def advance(self, token: int) -> None:
        """Append a token that is allowed."""

    def rollback(self, tokens: int) -> None:
        """Take back the last `tokens` tokens."""
