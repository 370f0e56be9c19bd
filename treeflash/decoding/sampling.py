"""The sampler that defines every backend's choices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.gumbel import over_vocabulary
from treeflash.errors import NumericalError

NOT_FINITE = (
    "the target's output is not finite (NaN or infinity): its weights are damaged, or the dtype "
    "overflows; try --dtype float32"
)


def check_finite(finite: object) -> None:
    """Raise `NumericalError` unless the largest logit of every row was found to be finite."""
    if not finite:
        raise NumericalError(NOT_FINITE)


def choose(
    logits: NDArray[np.float32],
    sampling: SamplingConfig,
    keys: NDArray[np.uint32] | None = None,
) -> NDArray[np.int32]:
    """The target's token for each row of logits: the definition that backends must match.

    Sampling takes the largest of `noisy_logits`, the first of equal ones (Gumbel-max).

    Args:
        logits: (n, vocab) float32.
        sampling: temperature and filters.
        keys: (n, 2) of the positions that the tokens will take; may be None when greedy.

    Returns:
        (n,) int32 token ids.

    Raises:
        NumericalError: a row's largest logit is not finite.
    """
    check_finite(np.isfinite(logits.max(-1)).all())
    if sampling.greedy:
        return np.asarray(np.argmax(logits, -1), np.int32)
    assert keys is not None
    return np.asarray(np.argmax(noisy_logits(logits, sampling, keys), -1), np.int32)


def noisy_logits(
    logits: NDArray[np.float32], sampling: SamplingConfig, keys: NDArray[np.uint32]
) -> NDArray[np.float64]:
    """(n, vocab) logits plus noise, of which the largest is sampled; dropped tokens have -inf.

    Args:
        logits: (n, vocab).
        sampling: not greedy.
        keys: (n, 2) as in `choose`.
    """
    noise = over_vocabulary(keys, logits.shape[-1]).astype(np.float64)
    kept = filtered_probs(logits, sampling) > 0
    return np.where(kept, logits + sampling.temperature * noise, -np.inf)


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
