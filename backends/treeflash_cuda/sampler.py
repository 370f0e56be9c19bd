"""The target's choices, made on the device."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import SamplingConfig
from treeflash.errors import NumericalError
from treeflash.sampling import NOT_FINITE

SHORTLIST = 64
"""Tokens among which the edge of a nucleus is looked for first."""
BLOCK = 256
"""Tokens whose probabilities are summed first, to find the one that is drawn."""


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
    best, tokens = logits.max(-1)
    covered = best.isfinite().all()
    draws = None
    if not sampling.greedy:
        assert uniforms is not None
        draws = torch.from_numpy(uniforms).to(logits.device)
        tokens, in_shortlist = _sample(logits, sampling, draws, SHORTLIST)
        covered = torch.stack([covered, in_shortlist])
    read = torch.cat([tokens, covered.flatten()]).cpu().numpy()
    if not read[len(tokens)]:
        raise NumericalError(NOT_FINITE)
    if draws is not None and not read[-1]:
        tokens, _ = _sample(logits, sampling, draws, logits.shape[-1])
        read = tokens.cpu().numpy()
    return read[: len(tokens)].astype(np.int32)


def _sample(
    logits: Tensor, sampling: SamplingConfig, uniforms: Tensor, shortlist: int
) -> tuple[Tensor, Tensor]:
    """(n,) tokens, and whether every nucleus lay within the shortlist."""
    probs = torch.softmax(logits.float() / sampling.temperature, -1)
    covered = torch.ones((), dtype=torch.bool, device=probs.device)
    if 0 < sampling.top_k < probs.shape[-1]:
        kth = probs.topk(sampling.top_k).values[:, -1:]
        probs = torch.where(probs >= kth, probs, 0)
    if sampling.top_p < 1:
        edge, covered = _nucleus_edge(probs, sampling.top_p, shortlist)
        probs = torch.where(probs >= edge, probs, 0)
    if sampling.min_p > 0:
        probs = torch.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), probs, 0)
    return _invert(probs, uniforms[:, None]), covered


def _nucleus_edge(probs: Tensor, top_p: float, shortlist: int) -> tuple[Tensor, Tensor]:
    """The smallest probability kept by top-p, and whether that is sure of every row.

    Args:
        probs: (n, vocab); the rows need not sum to 1.
        top_p: share of a row's mass.
        shortlist: how many of the best to look at.

    Returns:
        (n, 1), and a bool.
    """
    wanted = top_p * probs.sum(-1, keepdim=True, dtype=torch.float64)
    ranked = probs.topk(min(shortlist, probs.shape[-1])).values
    mass = ranked.cumsum(-1, dtype=torch.float64)
    # At least the best one; a row that is not finite has none, and is reported by the caller.
    last = ((mass - ranked) < wanted).sum(-1, keepdim=True).clamp(min=1) - 1
    return ranked.gather(-1, last), (mass[:, -1:] >= wanted).all()


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
