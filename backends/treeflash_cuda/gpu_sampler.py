"""Choices on a GPU: all rows at once, with few reads from the device."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import check_finite
from treeflash_cuda.cache import upload
from treeflash_cuda.graphs import Graphs
from treeflash_cuda.gumbel import gumbel
from treeflash_cuda.topk import topk

SHORTLIST = 64
"""Most probable tokens that are searched first for the end of a nucleus."""
BLOCK = 256
"""Tokens reduced together in the first step of an argmax."""


def choose(
    logits: Tensor,
    sampling: SamplingConfig,
    keys: NDArray[np.uint32] | None,
    graphs: Graphs | None = None,
) -> NDArray[np.int64]:
    """See `sampler.choose`."""
    graphs = graphs or Graphs(logits.device)
    if sampling.greedy:
        read = graphs.run("argmax", None, _argmax, logits)[0].cpu().numpy()
        check_finite(read[-1])
        return read[:-1]
    assert keys is not None
    uploaded = upload(keys.view(np.int32), logits.device)
    filters = replace(sampling, seed=0)

    def search(logits: Tensor, keys: Tensor) -> tuple[Tensor]:
        tokens, covered = _sample(logits, filters, keys, SHORTLIST)
        return (torch.cat([tokens, covered, logits.amax(-1).isfinite().all()[None]]),)

    read = graphs.run("sampling", filters, search, logits, uploaded)[0].cpu().numpy()
    check_finite(read[-1])
    chosen, narrow = read[: len(logits)], read[len(logits) : -1].astype(np.bool_)
    if not narrow.all():
        wide = upload(np.flatnonzero(~narrow), logits.device)
        tokens, _ = _sample(logits[wide], sampling, uploaded[wide], logits.shape[-1])
        chosen[~narrow] = tokens.cpu().numpy()
    return chosen


def _argmax(logits: Tensor) -> tuple[Tensor]:
    """(n + 1,) the best token of each row; and whether all are finite."""
    best, tokens = _best(logits)
    return (torch.cat([tokens, best.isfinite().all()[None]]),)


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row, (n,), and its place, the first one in a tie."""
    n, vocab = scores.shape
    block = math.gcd(vocab, BLOCK)
    blocks = scores.view(n, -1, block)
    # A maximum is several times as fast as an argmax: search only the block with the maximum.
    best, best_block = blocks.amax(-1).max(-1)
    candidates = blocks[torch.arange(n, device=scores.device), best_block]
    return best, best_block * block + candidates.argmax(-1)


def _sample(
    logits: Tensor, sampling: SamplingConfig, keys: Tensor, shortlist: int
) -> tuple[Tensor, Tensor]:
    """(n,) tokens, and (n,) whether the shortlist contained the nucleus."""
    probs = torch.softmax(logits.float() / sampling.temperature, -1)
    covered = torch.ones(len(probs), dtype=torch.bool, device=probs.device)
    ranked = None
    if 0 < sampling.top_k < probs.shape[-1]:
        # Ties with the k-th token are kept as well.
        ranked = topk(probs, sampling.top_k)[0]
        probs = torch.where(probs >= ranked[:, -1:], probs, 0)
    if sampling.top_p < 1:
        wanted = sampling.top_p * probs.sum(-1, keepdim=True, dtype=torch.float64)
        if ranked is None:
            ranked = topk(probs, shortlist)[0]
            covered = ranked.sum(-1, dtype=torch.float64) >= wanted[:, 0]
        probs = torch.where(probs >= _nucleus_edge(ranked, wanted), probs, 0)
    if sampling.min_p > 0:
        probs = torch.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), probs, 0)
    return _best(probs.log() + gumbel(keys, probs.shape[-1]))[1], covered


def _nucleus_edge(ranked: Tensor, wanted: Tensor) -> Tensor:
    """(n, 1) the smallest probability that top-p keeps.

    Args:
        ranked: (n, k) largest probabilities of each row, largest first.
        wanted: (n, 1) the mass to keep.
    """
    mass = ranked.cumsum(-1, dtype=torch.float64)
    # Keep at least the best token; the caller reports rows that are not finite.
    last = ((mass - ranked) < wanted).sum(-1, keepdim=True).clamp(min=1) - 1
    return ranked.gather(-1, last)
