"""The largest of many numbers, without looking for them among all."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

BLOCK = 64


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest elements of each row, largest first, and their places.

    The k largest lie in the k blocks with the largest maxima, and maxima are found fast.

    Args:
        x: (n, size).
        k: at most `size` are found.

    Returns:
        (n, k) each.
    """
    block = math.gcd(x.shape[1], BLOCK)
    blocks = x.unflatten(1, (-1, block))
    if k >= blocks.shape[1]:
        return x.topk(min(k, x.shape[1]))
    numbers = blocks.amax(-1).topk(k).indices
    inside = blocks.gather(1, numbers[:, :, None].expand(-1, -1, block)).flatten(1)
    values, places = inside.topk(k)
    return values, numbers.gather(1, places // block) * block + places % block


def largest(x: Tensor, k: int) -> Tensor:
    """(k,) places of the largest elements of (size,) float32 numbers, in ascending order."""
    if x.device.type != "cpu":
        return x.topk(k).indices.sort().values
    # NumPy selects with vector instructions, torch does not.
    return torch.from_numpy(np.sort(np.argpartition(x.numpy(), -k)[-k:]))
