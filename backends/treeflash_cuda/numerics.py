"""Uploads, the largest of many numbers, log probabilities, and Gumbel noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding import sampling as definition

ALIGNMENT = 4
"""Numbers, 16 bytes: kernels are compiled again for arrays that begin elsewhere."""
SEARCH_BLOCK = 64
"""Numbers whose maximum is found first, in a search for the largest ones."""


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for the copy."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def pack(arrays: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    """Copy integers, or the bits of other numbers of 32 bits, into one array; see `unpack`."""
    sizes = [array.size + -array.size % ALIGNMENT for array in arrays]
    flat, first = np.zeros(sum(sizes), np.int32), 0
    for array, size in zip(arrays, sizes, strict=True):
        flat[first : first + array.size] = array.ravel()
        first += size
    return flat


def unpack(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """View the arrays of these shapes that `pack` copied."""
    views, first = [], 0
    for shape in shapes:
        size = math.prod(shape)
        views.append(flat[first : first + size].view(*shape))
        first += size + -size % ALIGNMENT
    return views


def upload_all(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Upload several arrays in one copy, as int32 tensors."""
    if not arrays:
        return []
    return unpack(upload(pack(arrays), device), [array.shape for array in arrays])


def concatenate(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate tensors; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the (n, k) largest elements of each (size,) row, largest first, and their indices.

    They are found block by block: the k largest elements lie in the k blocks with the largest
    maxima, and maxima are fast. At most `size` elements are returned.
    """
    block = math.gcd(x.shape[1], SEARCH_BLOCK)
    blocks = x.unflatten(1, (-1, block))
    if k >= blocks.shape[1]:
        return x.topk(min(k, x.shape[1]))
    best_blocks = blocks.amax(-1).topk(k).indices
    candidates = blocks.gather(1, best_blocks[:, :, None].expand(-1, -1, block)).flatten(1)
    values, places = candidates.topk(k)
    return values, best_blocks.gather(1, places // block) * block + places % block


def largest(x: Tensor, k: int) -> Tensor:
    """Return the (n, k) indices of the largest elements of (n, size) float32 numbers, ascending.

    NaN counts as larger than any number, as in `Tensor.topk`.
    """
    if x.device.type != "cpu":
        return topk(x, k)[1].sort().values
    return torch.stack([_largest(row.numpy(), k) for row in x])


def _largest(numbers: NDArray[np.float32], k: int) -> Tensor:
    """Return the (k,) indices of the largest elements of (size,) numbers, ascending."""
    # Not `>=`: no comparison with NaN is true, and the caller has to find NaN.
    candidates = np.flatnonzero(~(numbers < topk_lower_bound(numbers, k)))
    best = np.argpartition(numbers[candidates], -k)[-k:]
    return torch.from_numpy(candidates[np.sort(best)])


def topk_lower_bound(x: NDArray[np.float32], k: int) -> np.float32:
    """Return a lower bound of the k largest of (size,) numbers, without searching for them."""
    block = math.gcd(len(x), SEARCH_BLOCK)
    while len(x) < k * block:
        block //= 2
    # NumPy vectorises maxima of a matrix's columns, not of its rows.
    bound: np.float32 = np.partition(x.reshape(block, -1).max(0), -k)[-k]
    return bound


def divide_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits, in float32, by the temperature; 1 saves a pass over them."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def top_log_probs(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the most probable tokens of each row of (n, vocab) logits, best first.

    (n, k) int32, and their (n, k) float32 log probabilities in nats.
    """
    scaled = divide_by_temperature(logits, temperature)
    best, tokens = topk(scaled, k)
    return tokens.int(), best - scaled.logsumexp(-1, keepdim=True)


def gumbel(keys: Tensor, tokens: Tensor | int) -> Tensor:
    """Return the (n, v) float32 noise of (n, 2) int32 keys and (n, v) tokens, or the first v."""
    if keys.device.type != "cpu":
        return gumbel_on_device(keys, tokens)
    numbers = keys.numpy().view(np.uint32)
    if isinstance(tokens, int):
        return torch.from_numpy(definition.vocabulary_noise(numbers, tokens))
    return torch.from_numpy(definition.gumbel(numbers, tokens.numpy().astype(np.int32)))


def gumbel_on_device(keys: Tensor, tokens: Tensor | int) -> Tensor:
    """Compute `gumbel` on the device of the keys."""
    if isinstance(tokens, int):
        tokens = torch.arange(tokens, device=keys.device, dtype=torch.int32)
    x = tokens.int() ^ keys[:, :1]
    _mix(x)
    x ^= keys[:, 1:]
    _mix(x)
    shares = _shifted(x, 1).float().add_(0.5).mul_(2.0**-31).clamp_(max=definition.MAX_SHARE)
    return shares.neg_().log1p_().neg_().log_().neg_()


def _mix(x: Tensor) -> None:
    """Apply the last step of the hash in place; int32 products wrap."""
    *shifts, last = definition.SHIFTS
    for shift, multiplier in zip(shifts, definition.MULTIPLIERS, strict=True):
        x ^= _shifted(x, shift)
        x *= multiplier - (multiplier >> 31 << 32)
    x ^= _shifted(x, last)


def _shifted(x: Tensor, shift: int) -> Tensor:
    """Return the right shift of unsigned numbers: the sign is not copied."""
    return (x >> shift).bitwise_and_((1 << 32 - shift) - 1)
