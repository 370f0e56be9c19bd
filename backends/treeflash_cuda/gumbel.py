"""Gumbel noise over the vocabulary, as `treeflash.decoding.gumbel` defines it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from treeflash.decoding import gumbel as definition


def gumbel(keys: Tensor, vocab_size: int) -> Tensor:
    """(n, vocab) float32 noise of (n, 2) int32 keys."""
    if keys.device.type == "cpu":
        found = definition.over_vocabulary(keys.numpy().view(np.uint32), vocab_size)
        return torch.from_numpy(found)
    return on_device(keys, vocab_size)


def on_device(keys: Tensor, vocab_size: int) -> Tensor:
    """The same, computed on the device."""
    x = torch.arange(vocab_size, device=keys.device, dtype=torch.int32) ^ keys[:, :1]
    _mix(x)
    x ^= keys[:, 1:]
    _mix(x)
    shares = _shifted(x, 1).float().add_(0.5).mul_(2.0**-31).clamp_(max=definition.HIGHEST)
    return shares.neg_().log1p_().neg_().log_().neg_()


def _mix(x: Tensor) -> None:
    """The hash's step in place; int32 products wrap."""
    for shift, multiplier in zip(definition.SHIFTS, (*definition.MULTIPLIERS, 1), strict=True):
        x ^= _shifted(x, shift)
        x *= multiplier - (multiplier >> 31 << 32)


def _shifted(x: Tensor, shift: int) -> Tensor:
    """As of an unsigned number: the sign is not copied."""
    return (x >> shift).bitwise_and_((1 << 32 - shift) - 1)
