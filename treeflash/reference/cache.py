"""Keys and values of committed positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treeflash.reference.numerics import Array


class Cache:
    """Per layer, keys and values of the committed positions and of a block not yet committed."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int) -> None:
        """Start empty."""
        empty = np.zeros((kv_heads, 0, head_dim), np.float32)
        self.committed = [(empty, empty) for _ in range(layers)]
        self.pending = list(self.committed)

    @property
    def length(self) -> int:
        """Committed positions."""
        return self.committed[0][0].shape[1]

    @property
    def nbytes(self) -> int:
        """Size of the committed keys and values, bytes."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.committed)

    def attend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Hold a block's keys and values, and return them after the committed ones.

        Args:
            layer: index.
            k: (kv_heads, n, head_dim).
            v: (kv_heads, n, head_dim).
        """
        self.pending[layer] = (k, v)
        keys, values = self.committed[layer]
        return np.concatenate([keys, k], 1), np.concatenate([values, v], 1)

    def commit(self, rows: NDArray[np.int32]) -> None:
        """Keep these rows of the block held last, in this order."""
        self.committed = [
            (np.concatenate([keys, k[:, rows]], 1), np.concatenate([values, v[:, rows]], 1))
            for (keys, values), (k, v) in zip(self.committed, self.pending, strict=True)
        ]

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on."""
        self.committed = [(k[:, :length], v[:, :length]) for k, v in self.committed]

    def copy_from(self, other: Cache, length: int) -> None:
        """Take over the first positions of another cache."""
        self.committed = [(k[:, :length].copy(), v[:, :length].copy()) for k, v in other.committed]

    def keys_values(self) -> Array:
        """(layers, 2, kv_heads, length, head_dim)."""
        return np.array(self.committed, np.float32)
