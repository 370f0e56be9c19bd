"""The target's choices, made on the device."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.errors import NumericalError
from treeflash.sampling import NOT_FINITE
from treeflash_mlx.topk import top

SHORTLIST = 256


def choose(
    logits: mx.array, sampling: SamplingConfig, uniforms: NDArray[np.float64] | None
) -> NDArray[np.int32]:
    """What `treeflash.sampling.choose` defines, with one read from the device; two for top-p alone.

    On a CPU in float64, like the definition. A GPU has no float64: a number that falls within
    float32 rounding of a boundary between two tokens may there choose the other one.

    Args:
        logits: (n, vocab).
        sampling: temperature and filters.
        uniforms: (n,) in [0, 1); None when greedy.

    Raises:
        NumericalError: a row's largest logit is not finite.
    """
    best = logits.max(-1, keepdims=True)
    if sampling.greedy:
        tokens = mx.argmax(logits, axis=-1)
    else:
        assert uniforms is not None
        wide = mx.float64 if mx.default_device().type == mx.cpu else mx.float32
        scaled = (logits.astype(wide) - best.astype(wide)) / sampling.temperature
        probs = _filter(mx.exp(scaled), sampling)
        tokens = _invert(probs, mx.array(uniforms, dtype=wide)[:, None])
    finite = mx.isfinite(best).all()
    read = np.array(mx.concatenate([tokens.astype(mx.int32), finite[None].astype(mx.int32)]))
    if not read[-1]:
        raise NumericalError(NOT_FINITE)
    return read[:-1]


def _filter(probs: mx.array, sampling: SamplingConfig) -> mx.array:
    """Set dropped tokens to 0; (n, vocab) probabilities, the largest of a row being 1."""
    ranked = None
    if 0 < sampling.top_k < probs.shape[-1]:
        # What ties with the last of these is kept as well.
        ranked = _best(probs, sampling.top_k)
        probs = mx.where(probs >= ranked[:, -1:], probs, 0)
    if sampling.top_p < 1:
        wanted = sampling.top_p * probs.sum(-1, keepdims=True)
        if ranked is None:
            ranked = _best(probs, min(SHORTLIST, probs.shape[-1]))
            if not (ranked.sum(-1, keepdims=True) >= wanted).all():  # a flat distribution
                ranked = mx.sort(probs, axis=-1)[:, ::-1]
        before = ranked.cumsum(-1) - ranked
        last = (before < wanted).sum(-1, keepdims=True) - 1
        probs = mx.where(probs >= mx.take_along_axis(ranked, last, axis=-1), probs, 0)
    if sampling.min_p > 0:
        probs = mx.where(probs >= sampling.min_p * probs.max(-1, keepdims=True), probs, 0)
    return probs


def _best(probs: mx.array, k: int) -> mx.array:
    """(n, k) the largest of each row, largest first."""
    return mx.take_along_axis(probs, top(probs, k), axis=-1)


def _invert(probs: mx.array, uniforms: mx.array) -> mx.array:
    """(n,) the first token whose cumulative mass exceeds a share of the total.

    Dropped tokens are left out, for a parallel sum may rise a little on them; and the share stays
    below the whole, for a number next to 1 becomes 1 in float32.
    """
    cumulative = mx.where(probs > 0, probs.cumsum(-1), 0)
    total = cumulative.max(-1, keepdims=True)
    below = total * (1 - mx.finfo(probs.dtype).eps)
    return mx.argmax(cumulative > mx.minimum(uniforms * total, below), axis=-1)
