"""Choosing the target's tokens on the device."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import check_finite
from treeflash_mlx.gumbel import gumbel
from treeflash_mlx.topk import top_indices

SHORTLIST = 256


def choose(
    logits: mx.array, sampling: SamplingConfig, keys: NDArray[np.uint32] | None
) -> NDArray[np.int32]:
    """The tokens that `treeflash.decoding.sampling.choose` defines, with one read from the device.

    A nucleus that is wider than the shortlist takes a second read. A CPU computes in float64, as
    the definition does; a GPU has no float64.

    Args:
        logits: (n, vocab).
        sampling: temperature and filters.
        keys: (n, 2) of the noise; None when greedy.

    Raises:
        NumericalError: a row's largest logit is not finite.
    """
    best = logits.max(-1, keepdims=True)
    finite = mx.isfinite(best).all()
    if sampling.greedy:
        tokens, covered = mx.argmax(logits, axis=-1), mx.array(True)
    else:
        tokens, covered = _sample(logits, best, sampling, keys, SHORTLIST)
    flags = mx.stack([finite, covered])
    read = np.array(mx.concatenate([tokens.astype(mx.int32), flags.astype(mx.int32)]))
    check_finite(read[-2])
    if not read[-1]:
        tokens, _ = _sample(logits, best, sampling, keys, logits.shape[-1])
        return np.array(tokens.astype(mx.int32))
    return read[:-2]


def _sample(
    logits: mx.array,
    best: mx.array,
    sampling: SamplingConfig,
    keys: NDArray[np.uint32] | None,
    shortlist: int,
) -> tuple[mx.array, mx.array]:
    """(n,) tokens, and whether every nucleus lay within the shortlist."""
    assert keys is not None
    wide = mx.float64 if mx.default_device().type == mx.cpu else mx.float32
    scaled = (logits.astype(wide) - best.astype(wide)) / sampling.temperature
    probs, covered = _filter(mx.exp(scaled), sampling, shortlist)
    sums = mx.where(probs > 0, scaled, -mx.inf) + gumbel(keys, logits.shape[-1])
    return mx.argmax(sums, axis=-1), covered


def _filter(probs: mx.array, sampling: SamplingConfig, shortlist: int) -> tuple[mx.array, mx.array]:
    """Set dropped tokens to 0, and say whether every nucleus lay within the shortlist.

    Args:
        probs: (n, vocab), the largest of a row being 1.
        sampling: the filters.
        shortlist: tokens among which to look for the edge of a nucleus.
    """
    ranked, covered = None, mx.array(True)
    if 0 < sampling.top_k < probs.shape[-1]:
        # Tokens that tie with the last of these are kept too.
        ranked = _best(probs, sampling.top_k)
        probs = mx.where(probs >= ranked[:, -1:], probs, 0)
    if sampling.top_p < 1:
        wanted = sampling.top_p * probs.sum(-1, keepdims=True)
        if ranked is None:
            ranked = _best(probs, min(shortlist, probs.shape[-1]))
            covered = (ranked.sum(-1, keepdims=True) >= wanted).all()
        before = ranked.cumsum(-1) - ranked
        # One token is always kept: in float32 a tiny top-p is 0.
        last = mx.maximum((before < wanted).sum(-1, keepdims=True), 1) - 1
        probs = mx.where(probs >= mx.take_along_axis(ranked, last, axis=-1), probs, 0)
    if sampling.min_p > 0:
        probs = mx.where(probs >= sampling.min_p * probs.max(-1, keepdims=True), probs, 0)
    return probs, covered


def _best(probs: mx.array, k: int) -> mx.array:
    """(n, k) largest probabilities of each row, largest first."""
    return mx.take_along_axis(probs, top_indices(probs, k), axis=-1)
