"""The target's choices, made on the device."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import SamplingConfig
from treeflash.errors import NumericalError
from treeflash.sampling import NOT_FINITE
from treeflash_cuda.topk import topk

SHORTLIST = 64
"""Tokens among which the edge of a nucleus is looked for first."""
BLOCK = 256
"""Tokens that are reduced first, to find the one that is chosen."""
CPU_ROWS = 16
"""Rows sampled together on a CPU: intermediate results stay in its caches."""


def choose(
    logits: Tensor, sampling: SamplingConfig, uniforms: NDArray[np.float64] | None
) -> NDArray[np.int32]:
    """What `treeflash.sampling.choose` defines, with one read from the device.

    A second one where a nucleus is wider than the shortlist.

    Args:
        logits: (n, vocab).
        sampling: temperature and filters.
        uniforms: (n,) in [0, 1); None when greedy.
    """
    if sampling.greedy:
        tokens, finite = _argmax(logits)
        read = torch.cat([tokens, finite[None]]).cpu().numpy()
        narrow = np.ones(len(logits), np.bool_)
    else:
        assert uniforms is not None
        draws = torch.from_numpy(uniforms).to(logits.device)
        tokens, covered = _sample_all(logits, sampling, draws, SHORTLIST)
        finite = logits.amax(-1).isfinite().all()
        read = torch.cat([tokens, covered, finite[None]]).cpu().numpy()
        narrow = read[len(logits) : -1].astype(np.bool_)
    if not read[-1]:
        raise NumericalError(NOT_FINITE)
    chosen = read[: len(logits)].astype(np.int32)
    if not narrow.all():
        wide = torch.from_numpy(np.flatnonzero(~narrow)).to(logits.device)
        tokens, _ = _sample_all(logits[wide], sampling, draws[wide], logits.shape[-1])
        chosen[~narrow] = tokens.cpu().numpy()
    return chosen


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) the best token of each row, the first of equal ones, and whether all are finite."""
    n, vocab = logits.shape
    block = math.gcd(vocab, BLOCK)
    # A maximum is found several times as fast as its place, so first of blocks.
    best, number = logits.view(n, -1, block).amax(-1).max(-1)
    inside = logits.view(n, -1, block)[torch.arange(n, device=logits.device), number]
    return number * block + inside.argmax(-1), best.isfinite().all()


def _sample_all(
    logits: Tensor, sampling: SamplingConfig, uniforms: Tensor, shortlist: int
) -> tuple[Tensor, Tensor]:
    """(n,) tokens, and (n,) whether the nucleus lay within the shortlist."""
    rows = CPU_ROWS if logits.device.type == "cpu" else len(logits)
    parts = zip(logits.split(rows), uniforms.split(rows), strict=True)
    tokens, covered = zip(*(_sample(x, sampling, u, shortlist) for x, u in parts), strict=True)
    return torch.cat(tokens), torch.cat(covered)


def _sample(
    logits: Tensor, sampling: SamplingConfig, uniforms: Tensor, shortlist: int
) -> tuple[Tensor, Tensor]:
    """See `_sample_all`."""
    probs = torch.softmax(logits.float() / sampling.temperature, -1)
    covered = torch.ones(len(probs), dtype=torch.bool, device=probs.device)
    ranked = None
    if 0 < sampling.top_k < probs.shape[-1]:
        # What ties with the last of these is kept as well.
        ranked = topk(probs, sampling.top_k)[0]
        probs = torch.where(probs >= ranked[:, -1:], probs, 0)
    if sampling.top_p < 1:
        total = probs.sum(-1, keepdim=True, dtype=torch.float64)
        wanted = sampling.top_p * total
        if ranked is None:
            # Tokens below this one's share of what may be dropped can all be dropped.
            least = (total - wanted) / probs.shape[-1]
            ranked = _largest(probs, shortlist, least)
            covered = ranked.sum(-1, dtype=torch.float64) >= wanted[:, 0]
        probs = torch.where(probs >= _nucleus_edge(ranked, wanted), probs, 0)
    if sampling.min_p > 0:
        probs = torch.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), probs, 0)
    return _invert(probs, uniforms[:, None]), covered


def _largest(probs: Tensor, k: int, least: Tensor) -> Tensor:
    """(n, k) the largest of each row, largest first; those below `least`, (n, 1), may be left out.

    Instead there are zeros, or, where all rows would end in them, fewer columns.
    """
    if k < probs.shape[-1]:
        return topk(probs, k)[0]
    if probs.device.type != "cpu":
        return probs.sort(-1, descending=True).values
    # NumPy sorts with vector instructions, torch does not.
    rows = zip(probs.numpy(), (probs >= least).numpy(), strict=True)
    found = [np.sort(row[kept])[::-1] for row, kept in rows]
    ranked = np.zeros((len(probs), max(map(len, found))), np.float32)
    for row, largest in zip(ranked, found, strict=True):
        row[: len(largest)] = largest
    return torch.from_numpy(ranked)


def _nucleus_edge(ranked: Tensor, wanted: Tensor) -> Tensor:
    """(n, 1) the smallest probability kept by top-p.

    Args:
        ranked: (n, k) largest probabilities of each row, largest first.
        wanted: (n, 1) the mass to keep.
    """
    mass = ranked.cumsum(-1, dtype=torch.float64)
    # At least the best one; a row that is not finite has none, and is reported by the caller.
    last = ((mass - ranked) < wanted).sum(-1, keepdim=True).clamp(min=1) - 1
    return ranked.gather(-1, last)


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """(n,) the first token whose cumulative mass exceeds a share of the total.

    Sums are in double precision: near-ties must fall the same way whether a row is computed alone
    or among the nodes of a tree. To do that for few numbers, whole blocks are summed first.

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
    # The block's sum and this one may differ in the last digit: stay inside.
    below = cumulative[:, -1:] * (1 - torch.finfo(torch.float64).eps)
    wanted = torch.maximum(torch.minimum(wanted, below), before)
    within = torch.searchsorted(cumulative, wanted, right=True)
    return (block * BLOCK + within)[:, 0]
