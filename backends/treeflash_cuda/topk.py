"""The largest of many numbers, without looking for them among all."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
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
    numbers = x.numpy()
    # Not `>=`: no number is at least NaN, and NaN is for the caller to find.
    places = np.flatnonzero(~(numbers < floor_of_top(numbers, k)))
    inside = np.argpartition(numbers[places], -k)[-k:]
    return torch.from_numpy(places[np.sort(inside)])


def floor_of_top(x: NDArray[np.float32], k: int) -> np.float32:
    """What the k largest of (size,) numbers, or more, are not below: found faster than they."""
    block = math.gcd(len(x), BLOCK)
    while len(x) < k * block:
        block //= 2
    # Maxima of a matrix's columns, which NumPy finds with vector instructions, not of its rows.
    return np.partition(x.reshape(block, -1).max(0), -k)[-k]
