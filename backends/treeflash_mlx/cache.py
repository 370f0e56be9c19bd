"""Keys and values of committed positions, and of a tree that is not committed yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from numpy.typing import NDArray

from treeflash_mlx.tree_hooks import TreeHooks

STEP = 256


def release_freed_memory() -> None:
    """Return freed GPU memory to the system; MLX keeps it, and the sizes needed keep changing."""
    if mx.default_device().type == mx.gpu:
        mx.clear_cache()


class KeyValues:
    """Arrays of shape (1, heads, rows, width) with room for more rows, which grows by steps."""

    def __init__(self) -> None:
        """Start empty; the first `put` fixes the number of arrays and their shapes."""
        self.arrays: list[mx.array] = []

    def put(self, first: int, new: Sequence[mx.array]) -> None:
        """Write rows from `first` on, over the rows that are there."""
        stop = first + new[0].shape[2]
        if not self.arrays or stop > self.arrays[0].shape[2]:
            self._grow(-(-stop // STEP) * STEP, new)
        for array, rows in zip(self.arrays, new, strict=True):
            array[:, :, first:stop] = rows

    def until(self, stop: int) -> list[mx.array]:
        """The rows before `stop`."""
        return [array[:, :, :stop] for array in self.arrays]

    def _grow(self, capacity: int, like: Sequence[mx.array]) -> None:
        held = self.arrays[0].shape[2] if self.arrays else 0
        room = [mx.zeros((*x.shape[:2], capacity - held, x.shape[3]), x.dtype) for x in like]
        self.arrays = (
            [mx.concatenate([a, b], 2) for a, b in zip(self.arrays, room, strict=True)]
            if held
            else room
        )


class TreeCache:
    """The cache of one layer, with the interface of mlx-lm's caches; it never rotates or trims.

    A layer with a sliding window keeps all positions: which of them are in the window depends on
    the branch of the tree, and the mask tells.
    """

    def __init__(self, hooks: TreeHooks, window: int | None) -> None:
        """Start empty.

        Args:
            hooks: the hooks of the model.
            window: the layer's sliding window, in positions; None if it attends to everything.
        """
        self.hooks = hooks
        self.window = window
        self.offset = 0
        self.rows = KeyValues()
        self.latest: Sequence[mx.array] = ()

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The attention mask of n new rows, in a form that mlx-lm takes."""
        window = window_size or self.window
        if window is not None and window >= self.offset + n:
            window = None  # the window reaches back to the start
        if self.hooks.tree is not None:
            return self.hooks.tree.mask(self.offset, window)
        if window is None and n == 1:
            return None
        if window is None and not return_array:
            return "causal"
        mask: mx.array = create_causal_mask(n, self.offset, window_size=window)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append (1, heads, n, width) keys and values; returns those of all positions."""
        self._append([keys, values])
        return self.keys_and_values()

    def keys_and_values(self) -> Any:
        """The keys and values of all positions, in the form that mlx-lm attends to."""
        return tuple(self.rows.until(self.offset))

    def commit(self, start: int, path: NDArray[np.int32]) -> None:
        """Keep the rows of a path of the tree appended last, after the first `start` rows."""
        if self.latest and path[-1] != len(path) - 1:
            # Taken from the rows as they were appended: reading the storage before writing to it
            # would force a copy.
            index = mx.array(path)
            self.rows.put(start, [mx.take(rows, index, axis=2) for rows in self.latest])
        self.offset = start + len(path)

    def read(self) -> list[mx.array]:
        """The keys and the values, (1, heads, offset, width) each."""
        return list(self.keys_and_values())

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate."""
        return self.rows.arrays

    def _append(self, new: Sequence[mx.array]) -> None:
        self.rows.put(self.offset, new)
        self.latest = new if self.hooks.tree is not None else ()
        self.offset += new[0].shape[2]


class QuantisedTreeCache(TreeCache):
    """A `TreeCache` in fewer bits. Its attribute `bits` tells mlx-lm that it is quantised."""

    def __init__(self, hooks: TreeHooks, window: int | None, bits: int, group_size: int) -> None:
        """See `TreeCache`, and `mx.quantize` for the bits and the group size."""
        super().__init__(hooks, window)
        self.bits = bits
        self.group_size = group_size

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """See `TreeCache`."""
        self._append(
            [part for x in (keys, values) for part in mx.quantize(x, self.group_size, self.bits)]
        )
        return self.keys_and_values()

    def keys_and_values(self) -> Any:
        """Quantised values, scales and biases of the keys, and of the values."""
        parts = self.rows.until(self.offset)
        return tuple(parts[:3]), tuple(parts[3:])

    def read(self) -> list[mx.array]:
        """See `TreeCache`."""
        return [
            mx.dequantize(values, scales, biases, self.group_size, self.bits)
            for values, scales, biases in self.keys_and_values()
        ]
