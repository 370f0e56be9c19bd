"""The largest of many numbers, found block by block instead of by a full search."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 64


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest elements of each row, largest first, and their indices.

    The k largest elements lie in the k blocks with the largest maxima, and maxima are fast.

    Args:
        x: (n, size).
        k: at most `size` elements are returned.

    Returns:
        (n, k) each.
    """
    block = math.gcd(x.shape[1], BLOCK)
    blocks = x.unflatten(1, (-1, block))
    if k >= blocks.shape[1]:
        return x.topk(min(k, x.shape[1]))
    best_blocks = blocks.amax(-1).topk(k).indices
    candidates = blocks.gather(1, best_blocks[:, :, None].expand(-1, -1, block)).flatten(1)
    values, places = candidates.topk(k)
    return values, best_blocks.gather(1, places // block) * block + places % block


def largest(x: Tensor, k: int) -> Tensor:
    """(k,) indices of the largest elements of (size,) float32 numbers, ascending.

    NaN counts as larger than any number, as in `Tensor.topk`.
    """
    if x.device.type != "cpu":
        return x.topk(k).indices.sort().values
    numbers = x.numpy()
    # Not `>=`: nothing compares as at least NaN, which the caller has to find.
    candidates = np.flatnonzero(~(numbers < topk_lower_bound(numbers, k)))
    best = np.argpartition(numbers[candidates], -k)[-k:]
    return torch.from_numpy(candidates[np.sort(best)])


def topk_lower_bound(x: NDArray[np.float32], k: int) -> np.float32:
    """A lower bound of the k largest of (size,) numbers, found faster than they are."""
    block = math.gcd(len(x), BLOCK)
    while len(x) < k * block:
        block //= 2
    # NumPy vectorises maxima of a matrix's columns, not of its rows.
    return np.partition(x.reshape(block, -1).max(0), -k)[-k]


def divide_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32, divided by the temperature; 1 saves a pass over them."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def top_log_probs(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The most probable tokens of each row, best first, and their log probabilities.

    Args:
        logits: (n, vocab).
        k: at most the whole vocabulary is returned.
        temperature: divides the logits.

    Returns:
        (n, k) int32, and (n, k) float32 nats.
    """
    scaled = divide_by_temperature(logits, temperature)
    best, tokens = topk(scaled, k)
    return tokens.int(), best - scaled.logsumexp(-1, keepdim=True)
