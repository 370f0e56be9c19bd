"""Choices on a CPU: filters keep few tokens, so NumPy handles sampled rows one by one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import SamplingConfig
from treeflash.decoding import gumbel as definition
from treeflash.decoding.sampling import check_finite
from treeflash_cuda.gumbel import gumbel
from treeflash_cuda.topk import topk_lower_bound

ROWS = 4
"""Rows computed together: few enough to stay in the CPU's caches and in the allocator's pool."""


def choose(
    logits: Tensor, sampling: SamplingConfig, keys: NDArray[np.uint32] | None
) -> NDArray[np.int64]:
    """See `sampler.choose`."""
    if sampling.greedy:
        rows = logits.float().numpy()
        # NumPy's argmax takes a fraction of the time of torch's, and finds NaN before all else.
        tokens = rows.argmax(-1)
        check_finite(np.isfinite(np.take_along_axis(rows, tokens[:, None], -1)).all())
        return tokens
    assert keys is not None
    check_finite(logits.amax(-1).isfinite().all())
    starts = range(0, len(logits), ROWS)
    parts = [(logits[i : i + ROWS], sampling, keys[i : i + ROWS]) for i in starts]
    return np.concatenate([_sample(*part) for part in parts])


def _sample(
    logits: Tensor, sampling: SamplingConfig, keys: NDArray[np.uint32]
) -> NDArray[np.int64]:
    scaled = logits.float() / sampling.temperature
    top_k = sampling.top_k if sampling.top_k < scaled.shape[-1] else 0
    if not top_k and sampling.top_p == 1 and sampling.min_p == 0:
        noise = gumbel(torch.from_numpy(keys.view(np.int32)), scaled.shape[-1])
        return (scaled - scaled.amax(-1, keepdim=True) + noise).numpy().argmax(-1)
    rows = zip(torch.softmax(scaled, -1).numpy(), keys, strict=True)
    return np.array([_sample_row(*row, top_k, sampling.top_p, sampling.min_p) for row in rows])


def _sample_row(
    probs: NDArray[np.float32], key: NDArray[np.uint32], top_k: int, top_p: float, min_p: float
) -> np.int64:
    """One token.

    Args:
        probs: (vocab,).
        key: (2,) of the noise.
        top_k: less than vocab; 0 is off.
        top_p: see `SamplingConfig`.
        min_p: see `SamplingConfig`.
    """
    best = probs.max()
    edge = min_p * best
    if top_k:
        floor = topk_lower_bound(probs, top_k)
    else:
        total = probs.sum()
        # Top-p drops every token below an equal share of the mass that it drops.
        floor = min(max(edge, (1 - top_p) * total / len(probs)), best)
    tokens = np.flatnonzero(probs >= floor)
    kept = probs[tokens]
    if top_k:
        # Ties with the k-th token are kept as well.
        inside = kept >= np.partition(kept, -top_k)[-top_k]
        tokens, kept = tokens[inside], kept[inside]
        total = kept.sum(dtype=np.float64)
    if top_p < 1:
        ranked = np.sort(kept)[::-1]
        before = ranked.cumsum(dtype=np.float64) - ranked
        # At least the best token, even if the mass to keep rounds to 0.
        edge = max(edge, ranked[max(np.count_nonzero(before < top_p * total), 1) - 1])
    inside = kept >= edge
    tokens, kept = tokens[inside], kept[inside]
    noise = definition.gumbel(key[None], tokens.astype(np.int32))[0]
    chosen: np.int64 = tokens[(np.log(kept) + noise).argmax()]
    return chosen
