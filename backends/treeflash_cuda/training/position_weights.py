"""Weights of the loss at each depth of a block."""

from __future__ import annotations

import torch
from torch import Tensor

SMOOTHING = 0.5
"""D-PACE's lower bound of an acceptance, so that late depths count while early ones are bad."""


def exponential(valid: Tensor, gamma: float) -> Tensor:
    """(n,) exp(-(d - 1) / gamma) at depth d (DFlash, arXiv 2602.06036).

    Args:
        valid: (rows, A, D) bool, the n tokens to predict by depth.
        gamma: in tokens.
    """
    depth = torch.arange(valid.shape[-1], device=valid.device)
    return torch.exp(-depth / gamma).expand_as(valid)[valid]


def prefix_product(valid: Tensor, acceptance: Tensor) -> Tensor:
    """(n,) how much the expected accepted length depends on each depth (D-PACE, equation 8).

    The expected length is the sum over depths of the product of the acceptances up to there. A
    depth's weight is the part of that sum that has its acceptance as a factor. D-PACE takes the
    probability of the text's token for the acceptance; here it is that of the whole distribution.

    Args:
        valid: (rows, A, D) bool, the n tokens to predict by depth; each block's are its first.
        acceptance: (n,) from 0 to 1; no gradient flows through it.
    """
    smoothed = acceptance.new_zeros(valid.shape)
    smoothed[valid] = SMOOTHING + (1 - SMOOTHING) * acceptance.detach()
    reached = smoothed.cumprod(-1)
    return reached.flip(-1).cumsum(-1).flip(-1)[valid]
