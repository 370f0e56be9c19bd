"""Top tokens and log probabilities of logits, and Gumbel noise."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.decoding import sampling as definition

SEARCH_BLOCK = 256


def top_indices(logits: mx.array, k: int) -> mx.array:
    """Return the (n, k) int32 columns of the k largest entries of (n, vocab) logits, largest first.

    The k blocks with the highest maxima contain them, so only these blocks are sorted. This is many
    times faster than partitioning the rows, which Metal implements by sorting them. Equal entries
    are in the order of their columns, but entries equal to the last one may be missing.
    """
    n, vocab = logits.shape
    size = 2 ** round(math.log2(vocab / k) / 2)  # sorts the fewest block maxima and entries
    count = vocab // size
    if count <= k:
        return mx.argsort(-logits, axis=-1)[:, :k].astype(mx.int32)
    blocks = logits[:, : count * size].reshape(n, count, size)
    best = mx.sort(mx.argsort(-blocks.max(-1), axis=-1)[:, :k], axis=-1)
    rest = mx.arange(count * size, vocab, dtype=mx.uint32)
    columns = mx.concatenate(
        [
            (best[:, :, None] * size + mx.arange(size, dtype=mx.uint32)).reshape(n, k * size),
            mx.broadcast_to(rest, (n, rest.shape[0])),
        ],
        axis=1,
    )
    order = mx.argsort(-mx.take_along_axis(logits, columns, axis=1), axis=-1)[:, :k]
    return mx.take_along_axis(columns, order, axis=1).astype(mx.int32)


def top_log_probs(logits: mx.array, k: int, temperature: float) -> tuple[mx.array, mx.array]:
    """Return (n, k) int32 most probable tokens of (n, vocab) logits, and their (n, k) float32 nats.

    The temperature divides the logits; k is at most vocab.
    """
    tokens = top_indices(logits, k)
    scaled = logits.astype(mx.float32) / temperature
    # One normaliser per row replaces a log-softmax over the vocabulary.
    return tokens, mx.take_along_axis(scaled, tokens, axis=1) - logsumexp(scaled)


def log_softmax(logits: mx.array) -> mx.array:
    """Return the (n, vocab) float32 nats of (n, vocab) logits."""
    logits = logits.astype(mx.float32)
    return logits - logsumexp(logits)


def logsumexp(x: mx.array) -> mx.array:
    """Return (n, 1) log-sum-exp of (n, vocab) rows, by one kernel on a GPU.

    On a CPU `mx.logsumexp` adds the entries one by one, with an error of about 1e-4 nats: enough
    to order the nodes of a tree differently from another backend.
    """
    if mx.default_device().type == mx.gpu:
        return mx.logsumexp(x, -1, keepdims=True)
    count = x.shape[1] // SEARCH_BLOCK
    highest = x.max(-1, keepdims=True)
    shares = mx.exp(x - highest)
    blocks = shares[:, : count * SEARCH_BLOCK].reshape(len(x), count, SEARCH_BLOCK).sum(-1).sum(-1)
    rest = shares[:, count * SEARCH_BLOCK :].sum(-1)
    return highest + mx.log(blocks + rest)[:, None]


def gumbel(keys: NDArray[np.uint32], vocab_size: int) -> mx.array:
    """Return the (n, vocab) float32 noise of (n, 2) keys."""
    if mx.default_device().type == mx.cpu:
        return mx.array(definition.vocabulary_noise(keys, vocab_size))
    return gumbel_on_device(mx.array(keys), vocab_size)


def gumbel_on_device(keys: mx.array, vocab_size: int) -> mx.array:
    """Return the (n, vocab) float32 noise of (n, 2) keys, computed on the device."""
    x = _mix(mx.arange(vocab_size, dtype=mx.uint32) ^ keys[:, :1])
    x = _mix(x ^ keys[:, 1:])
    shares = ((x >> 1).astype(mx.float32) + 0.5) * 2.0**-31
    return -mx.log(-mx.log1p(-mx.minimum(shares, definition.MAX_SHARE)))


def _mix(x: mx.array) -> mx.array:
    """Return one step of the hash; uint32 products wrap around."""
    for shift, multiplier in zip(definition.SHIFTS, (*definition.MULTIPLIERS, 1), strict=True):
        x = (x ^ (x >> shift)) * mx.array(multiplier, mx.uint32)
    return x
