"""Gumbel noise over the vocabulary, as `treeflash.decoding.gumbel` defines it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.decoding import gumbel as definition


def gumbel(keys: NDArray[np.uint32], vocab_size: int) -> mx.array:
    """(n, vocab) float32 noise of (n, 2) keys."""
    if mx.default_device().type == mx.cpu:
        return mx.array(definition.over_vocabulary(keys, vocab_size))
    return on_device(mx.array(keys), vocab_size)


def on_device(keys: mx.array, vocab_size: int) -> mx.array:
    """The same, computed on the device."""
    x = _mix(mx.arange(vocab_size, dtype=mx.uint32) ^ keys[:, :1])
    x = _mix(x ^ keys[:, 1:])
    shares = ((x >> 1).astype(mx.float32) + 0.5) * 2.0**-31
    return -mx.log(-mx.log1p(-mx.minimum(shares, definition.HIGHEST)))


def _mix(x: mx.array) -> mx.array:
    """The hash's step; uint32 products wrap."""
    for shift, multiplier in zip(definition.SHIFTS, (*definition.MULTIPLIERS, 1), strict=True):
        x = (x ^ (x >> shift)) * mx.array(multiplier, mx.uint32)
    return x
