"""Random numbers keyed by position, and the sampler that defines every backend's choices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.errors import NumericalError

NOT_FINITE = (
    "the target's output is not finite (NaN or infinity): its weights are damaged, or the dtype "
    "overflows; try --dtype float32"
)


def check_finite(finite: object) -> None:
    """Raise `NumericalError` unless the largest logit of every row was found to be finite."""
    if not finite:
        raise NumericalError(NOT_FINITE)


def uniforms(seed: int, positions: NDArray[np.int32]) -> NDArray[np.float64]:
    """The random numbers that decide the tokens at `positions`.

    A number depends on the seed and the position alone: not on the method, the budget, or what
    else is drawn. That is what makes a seed's output the same for all of them.

    Args:
        seed: below 2**64.
        positions: (n,) int32 absolute positions, 0 or more.

    Returns:
        (n,) float64 in [0, 1): number `p` of the Philox stream of the seed (Salmon et al. 2011).
    """
    # One counter step of NumPy's Philox makes four numbers, so any of them is reached in O(1).
    first = int(positions.min()) // 4
    count = int(positions.max()) - 4 * first + 1
    stream = np.random.Generator(np.random.Philox(key=seed, counter=first)).random(count)
    return stream[positions - 4 * first]


def choose(
    logits: NDArray[np.float32],
    sampling: SamplingConfig,
    uniforms: NDArray[np.float64] | None = None,
) -> NDArray[np.int32]:
    """The target's token for each row of logits: the definition that backends must match.

    Sampling inverts the cumulative distribution of the filtered probabilities in the order of
    token ids: the first token whose cumulative mass exceeds `u` times the total.

    Args:
        logits: (n, vocab) float32.
        sampling: temperature and filters.
        uniforms: (n,) in [0, 1); may be None when greedy.

    Returns:
        (n,) int32 token ids.

    Raises:
        NumericalError: a row's largest logit is not finite.
    """
    check_finite(np.isfinite(logits.max(-1)).all())
    if sampling.greedy:
        return np.asarray(np.argmax(logits, -1), np.int32)
    assert uniforms is not None
    probs = filtered_probs(logits, sampling)
    cumulative = probs.cumsum(-1)
    beyond = cumulative > uniforms[:, None] * cumulative[:, -1:]
    return np.asarray(np.argmax(beyond, -1), np.int32)


def filtered_probs(logits: NDArray[np.float32], sampling: SamplingConfig) -> NDArray[np.float64]:
    """Probabilities after temperature and filters, not normalised again.

    A filter keeps or drops tokens of equal probability together, so that the result does not
    depend on how a sort breaks ties.

    Args:
        logits: (n, vocab) float32.
        sampling: not greedy.

    Returns:
        (n, vocab) float64; dropped tokens are 0.
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
