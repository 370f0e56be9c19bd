"""The target's choices, made on the device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import SamplingConfig
from treeflash.errors import NumericalError
from treeflash.sampling import NOT_FINITE

SHORTLIST = 256


def choose(
    logits: Tensor, sampling: SamplingConfig, uniforms: NDArray[np.float64] | None
) -> NDArray[np.int32]:
    """What `treeflash.sampling.choose` defines, with one read from the device.

    Args:
        logits: (n, vocab).
        sampling: temperature and filters.
        uniforms: (n,) in [0, 1); None when greedy.
    """
    best, tokens = logits.max(-1)
    if not sampling.greedy:
        assert uniforms is not None
        tokens = _sample(logits.float(), sampling, torch.from_numpy(uniforms).to(logits.device))
    read = torch.cat([tokens, best.isfinite().all()[None]]).cpu().numpy()
    if not read[-1]:
        raise NumericalError(NOT_FINITE)
    return read[:-1].astype(np.int32)


def _sample(logits: Tensor, sampling: SamplingConfig, uniforms: Tensor) -> Tensor:
    probs = torch.softmax(logits / sampling.temperature, -1)
    if 0 < sampling.top_k < probs.shape[-1]:
        kth = probs.topk(sampling.top_k).values[:, -1:]
        probs = torch.where(probs >= kth, probs, 0)
    if sampling.top_p < 1:
        probs = torch.where(probs >= _nucleus_edge(probs, sampling.top_p), probs, 0)
    if sampling.min_p > 0:
        probs = torch.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), probs, 0)
    # The sum over a vocabulary needs double precision: near-ties must fall the same way
    # whether a row is computed alone or among the nodes of a tree.
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]


def _nucleus_edge(probs: Tensor, top_p: float) -> Tensor:
    """(n, 1) the smallest probability kept by top-p; the rows need not sum to 1."""
    wanted = top_p * probs.sum(-1, keepdim=True, dtype=torch.float64)
    ranked = probs.topk(min(SHORTLIST, probs.shape[-1])).values
    mass = ranked.cumsum(-1, dtype=torch.float64)
    if not bool((mass[:, -1:] >= wanted).all()):  # a flat distribution: rank it whole
        ranked = probs.sort(-1, descending=True).values
        mass = ranked.cumsum(-1, dtype=torch.float64)
    # At least the best one; a row that is not finite has none, and is reported by the caller.
    last = ((mass - ranked) < wanted).sum(-1, keepdim=True).clamp(min=1) - 1
    return ranked.gather(-1, last)
