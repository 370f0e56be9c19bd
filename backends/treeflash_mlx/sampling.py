"""Sampling of the target's tokens on the device."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import (
    LogProbs,
    SampledTokens,
    SamplingParams,
    check_finite,
    shared_sampling,
    unpack,
)
from treeflash_mlx.numerics import gumbel, logsumexp, top_indices

SHORTLIST = 256
"""Most probable tokens among which the edge of a nucleus is searched first."""


def sample(
    logits: Sequence[mx.array | None], all_params: Sequence[SamplingParams | None]
) -> list[SampledTokens | None]:
    """Sample as `treeflash.decoding.sampling.sample`, for several (n, vocab) logits.

    Sequences with the same sampling are computed together, with one read from the device. Without
    parameters no token is needed. A NumericalError is raised if a row's largest logit is not
    finite.
    """
    sampled: list[SampledTokens | None] = [None] * len(all_params)
    groups: dict[object, list[tuple[int, mx.array, SamplingParams]]] = {}
    for i, (rows, params) in enumerate(zip(logits, all_params, strict=True)):
        if params is not None:
            assert rows is not None
            groups.setdefault(shared_sampling(params.sampling), []).append((i, rows, params))
    for sequences in groups.values():
        edited = [edit(rows, params) for _, rows, params in sequences]
        sampling = sequences[0][2].sampling
        keys = None
        if not sampling.greedy:
            keys = np.concatenate([p.keys for _, _, p in sequences if p.keys is not None])
        tokens = sample_tokens(mx.concatenate(edited), sampling, keys)
        parts = np.split(tokens, np.cumsum([len(part) for part in edited])[:-1])
        for (i, rows, params), part in zip(sequences, parts, strict=True):
            sampled[i] = with_log_probs(part, rows, params)
    return sampled


def edit(logits: mx.array, params: SamplingParams) -> mx.array:
    """Return the (n, vocab) edited logits, -inf for tokens that are not allowed."""
    if (edits := params.edits) is not None:
        logits = mx.array(logits.astype(mx.float32))  # a copy: its entries are assigned below
        rows, tokens, factors = (mx.array(x) for x in (edits.rows, edits.tokens, edits.factors))
        old = logits[rows, tokens]
        scaled = mx.where(old > 0, old / factors, old * factors)
        logits[rows, tokens] = scaled + mx.array(edits.additions)
    if params.allowed is not None:
        allowed = mx.array(unpack(params.allowed, logits.shape[-1]))
        logits = mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))
    return logits


def with_log_probs(
    tokens: NDArray[np.int32], logits: mx.array, params: SamplingParams
) -> SampledTokens:
    """Return (n,) sampled tokens, with log probabilities of (n, vocab) logits if asked for."""
    if params.log_probs is None:
        return SampledTokens(tokens)
    logits = logits.astype(mx.float32)
    k = min(params.log_probs, logits.shape[-1])
    best = top_indices(logits, k) if k else mx.zeros((len(tokens), 0), mx.int32)
    index = mx.concatenate([mx.array(tokens)[:, None], best], axis=1)
    values = mx.take_along_axis(logits, index, axis=1) - logsumexp(logits)
    mx.eval(best, values)
    read = np.array(values)
    return SampledTokens(tokens, LogProbs(read[:, 0], np.array(best), read[:, 1:]))


def sample_tokens(
    logits: mx.array, sampling: SamplingConfig, keys: NDArray[np.uint32] | None
) -> NDArray[np.int32]:
    """Sample as `treeflash.decoding.sampling.sample_tokens`, with one read.

    A nucleus wider than the shortlist needs a second read. A CPU computes in float64, as the core
    function does; a GPU has no float64.
    """
    return read_tokens(np.array(draw(logits, sampling, keys)), logits, sampling, keys)


def draw(logits: mx.array, sampling: SamplingConfig, keys: NDArray[np.uint32] | None) -> mx.array:
    """Return (2 n + 1,) int32: tokens, whether each is certain, whether logits are finite.

    A token is not certain where its nucleus is wider than the shortlist.
    """
    best = logits.max(-1, keepdims=True)
    finite = mx.isfinite(best).all()
    if sampling.greedy:
        tokens, covered = mx.argmax(logits, axis=-1), mx.ones(len(logits), mx.bool_)
    else:
        tokens, covered = _sample(logits, best, sampling, keys, SHORTLIST)
    return mx.concatenate([x.astype(mx.int32) for x in (tokens, covered, finite[None])])


def read_tokens(
    drawn: NDArray[np.int32],
    logits: mx.array,
    sampling: SamplingConfig,
    keys: NDArray[np.uint32] | None,
) -> NDArray[np.int32]:
    """Read the (n,) tokens of what `draw` returned.

    Rows that are not certain are drawn again from the whole vocabulary, and no others: sums over it
    may be rounded differently, and a row must not depend on its neighbours. Raises a NumericalError
    if the largest logit of a row is not finite.
    """
    check_finite(drawn[-1])
    tokens, covered = np.split(drawn[:-1], 2)
    if len(again := np.flatnonzero(covered == 0)):
        assert keys is not None
        rows = logits[mx.array(again)]
        best = rows.max(-1, keepdims=True)
        found, _ = _sample(rows, best, sampling, keys[again], logits.shape[-1])
        tokens = tokens.copy()  # the caller's array stays what was drawn
        tokens[again] = np.array(found.astype(mx.int32))
    return tokens


def _sample(
    logits: mx.array,
    best: mx.array,
    sampling: SamplingConfig,
    keys: NDArray[np.uint32] | None,
    shortlist: int,
) -> tuple[mx.array, mx.array]:
    """Sample the (n,) tokens, and whether each nucleus lay within the shortlist."""
    assert keys is not None
    wide = mx.float64 if mx.default_device().type == mx.cpu else mx.float32
    scaled = (logits.astype(wide) - best.astype(wide)) / sampling.temperature
    probs, covered = _filter(mx.exp(scaled), sampling, shortlist)
    sums = mx.where(probs > 0, scaled, -mx.inf) + gumbel(keys, logits.shape[-1])
    return mx.argmax(sums, axis=-1), covered


def _filter(probs: mx.array, sampling: SamplingConfig, shortlist: int) -> tuple[mx.array, mx.array]:
    """Set dropped tokens of (n, vocab) to 0; return whether each nucleus lay in the shortlist."""
    ranked, covered = None, mx.ones(len(probs), mx.bool_)
    if 0 < sampling.top_k < probs.shape[-1]:
        # Tokens with the probability of the last one are kept too.
        ranked = _best(probs, sampling.top_k)
        probs = mx.where(probs >= ranked[:, -1:], probs, 0)
    if sampling.top_p < 1:
        wanted = sampling.top_p * probs.sum(-1, keepdims=True)
        if ranked is None:
            ranked = _best(probs, min(shortlist, probs.shape[-1]))
            covered = ranked.sum(-1) >= wanted[:, 0]
        before = ranked.cumsum(-1) - ranked
        # One token is always kept: in float32 a tiny top-p is 0.
        last = mx.maximum((before < wanted).sum(-1, keepdims=True), 1) - 1
        probs = mx.where(probs >= mx.take_along_axis(ranked, last, axis=-1), probs, 0)
    if sampling.min_p > 0:
        probs = mx.where(probs >= sampling.min_p * probs.max(-1, keepdims=True), probs, 0)
    return probs, covered


def _best(probs: mx.array, k: int) -> mx.array:
    """Return the (n, k) largest probabilities of each row, largest first."""
    return mx.take_along_axis(probs, top_indices(probs, k), axis=-1)
