"""Keys and values of committed positions, and of a tree not yet committed."""

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
    """Let MLX give back what was freed on a GPU: it keeps all, and sizes change all the time."""
    if mx.default_device().type == mx.gpu:
        mx.clear_cache()


class KeyValues:
    """Arrays of (1, heads, rows, width) each, with room for more rows; the room grows by steps."""

    def __init__(self) -> None:
        """Start empty; what is put first fixes the number of arrays and their shapes."""
        self.arrays: list[mx.array] = []

    def put(self, first: int, new: Sequence[mx.array]) -> None:
        """Write rows from `first` on, over those that are there."""
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
    """The cache of one layer, as mlx-lm's models use it; it never rotates and never trims.

    A layer with a sliding window keeps all positions: which of them a branch still sees depends
    on the branch, and a mask says it.
    """

    def __init__(self, hooks: TreeHooks, window: int | None) -> None:
        """Start empty.

        Args:
            hooks: the hooks of the model.
            window: the layer's, in positions; None where it sees all.
        """
        self.hooks = hooks
        self.window = window
        self.offset = 0
        self.rows = KeyValues()
        self.latest: Sequence[mx.array] = ()

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What n new rows see of themselves and of those before, in the forms mlx-lm takes."""
        window = window_size or self.window
        if window is not None and window >= self.offset + n:
            window = None  # it reaches back to the start
        if self.hooks.tree is not None:
            return self.hooks.tree.mask(self.offset, window)
        if window is None and n == 1:
            return None
        if window is None and not return_array:
            return "causal"
        mask: mx.array = create_causal_mask(n, self.offset, window_size=window)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append (1, heads, n, width) keys and values; returns all that there are now."""
        self._append([keys, values])
        return self.keys_and_values()

    def keys_and_values(self) -> Any:
        """All that there are, in the form that mlx-lm attends to."""
        return tuple(self.rows.until(self.offset))

    def commit(self, start: int, path: NDArray[np.int32]) -> None:
        """Keep those rows of the tree appended last, after the first `start` rows."""
        if self.latest and path[-1] != len(path) - 1:
            # From the rows as they were appended: reading them out of the storage would force a
            # copy of it before it is written.
            index = mx.array(path)
            self.rows.put(start, [mx.take(rows, index, axis=2) for rows in self.latest])
        self.offset = start + len(path)

    def read(self) -> list[mx.array]:
        """The keys and the values, (1, heads, offset, width) each."""
        return list(self.keys_and_values())

    @property
    def state(self) -> list[mx.array]:
        """What is to be evaluated."""
        return self.rows.arrays

    def _append(self, new: Sequence[mx.array]) -> None:
        self.rows.put(self.offset, new)
        self.latest = new if self.hooks.tree is not None else ()
        self.offset += new[0].shape[2]


class QuantisedTreeCache(TreeCache):
    """The same in fewer bits. That it has `bits` makes mlx-lm attend to the quantised arrays."""

    def __init__(self, hooks: TreeHooks, window: int | None, bits: int, group_size: int) -> None:
        """See `TreeCache`; bits and group size as in `mx.quantize`."""
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
