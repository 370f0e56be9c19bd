"""Choices on a GPU: all rows at once, with few reads from the device."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import check_finite
from treeflash_cuda.cache import upload
from treeflash_cuda.graphs import Graphs
from treeflash_cuda.topk import topk

SHORTLIST = 64
"""Most probable tokens that are searched first for the end of a nucleus."""
BLOCK = 256
"""Tokens reduced together in the first step of an argmax, or of inverting a distribution."""


def choose(
    logits: Tensor,
    sampling: SamplingConfig,
    uniforms: NDArray[np.float64] | None,
    graphs: Graphs | None = None,
) -> NDArray[np.int64]:
    """See `sampler.choose`."""
    graphs = graphs or Graphs(logits.device)
    if sampling.greedy:
        read = graphs.run("argmax", None, _argmax, logits)[0].cpu().numpy()
        check_finite(read[-1])
        return read[:-1]
    assert uniforms is not None
    draws = upload(uniforms, logits.device)
    filters = replace(sampling, seed=0)

    def search(logits: Tensor, draws: Tensor) -> tuple[Tensor]:
        tokens, covered = _sample(logits, filters, draws, SHORTLIST)
        return (torch.cat([tokens, covered, logits.amax(-1).isfinite().all()[None]]),)

    read = graphs.run("sampling", filters, search, logits, draws)[0].cpu().numpy()
    check_finite(read[-1])
    chosen, narrow = read[: len(logits)], read[len(logits) : -1].astype(np.bool_)
    if not narrow.all():
        wide = upload(np.flatnonzero(~narrow), logits.device)
        tokens, _ = _sample(logits[wide], sampling, draws[wide], logits.shape[-1])
        chosen[~narrow] = tokens.cpu().numpy()
    return chosen


def invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """(n,) the first token whose cumulative mass exceeds a share of the total.

    Sums are in float64: near-ties must fall the same way whether a row is computed alone or among
    the nodes of a tree. Summing blocks first keeps the float64 arithmetic short.

    Args:
        probs: (n, vocab).
        uniforms: (n, 1) shares.
    """
    padded = F.pad(probs, (0, -probs.shape[-1] % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK))
    mass = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = uniforms * mass[:, -1:]
    block = torch.searchsorted(mass, wanted, right=True).clamp(max=mass.shape[-1] - 1)
    before = F.pad(mass, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    cumulative = before + inside.cumsum(-1, dtype=torch.float64)
    # The two sums of a block may differ in the last digit: stay inside the block.
    below = cumulative[:, -1:] * (1 - torch.finfo(torch.float64).eps)
    wanted = torch.maximum(torch.minimum(wanted, below), before)
    within = torch.searchsorted(cumulative, wanted, right=True)
    return (block * BLOCK + within)[:, 0]


def _argmax(logits: Tensor) -> tuple[Tensor]:
    """(n + 1,) the best token of each row, the first one in a tie; and whether all are finite."""
    n, vocab = logits.shape
    block = math.gcd(vocab, BLOCK)
    blocks = logits.view(n, -1, block)
    # A maximum is several times as fast as an argmax: search only the block with the maximum.
    best, best_block = blocks.amax(-1).max(-1)
    candidates = blocks[torch.arange(n, device=logits.device), best_block]
    tokens = best_block * block + candidates.argmax(-1)
    return (torch.cat([tokens, best.isfinite().all()[None]]),)


def _sample(
    logits: Tensor, sampling: SamplingConfig, uniforms: Tensor, shortlist: int
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
    return invert(probs, uniforms[:, None]), covered


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
