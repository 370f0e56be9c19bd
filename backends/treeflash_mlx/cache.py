"""Keys and values of texts, and what mlx-lm's layers see of them in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from numpy.typing import NDArray

from treeflash_mlx.recurrent_states import Row, arrays_of, row_of
from treeflash_mlx.storage import Storage, columns_for
from treeflash_mlx.tree_hooks import TreePass


def release_freed_memory() -> None:
    """Return freed GPU memory to the system; MLX keeps it, and the sizes needed keep changing."""
    if mx.default_device().type == mx.gpu:
        mx.clear_cache()


@dataclass(frozen=True)
class Quantisation:
    """How keys and values are quantised; see `mx.quantize`."""

    bits: int
    group_size: int


class KeyValues:
    """Keys and values of all layers of one text: committed positions, then one tree.

    Attributes:
        layers: how many.
        recurrent: how many states each recurrent layer has.
        keys_first: whether matrix states are (key_dim, value_dim).
        capacity: positions.
        quantisation: None if keys and values are not quantised.
        storage: shared by texts that run together; None before the first pass, and after the text
            is closed.
        row: of the text in it.
        length: committed positions.
    """

    def __init__(
        self,
        layers: int,
        capacity: int,
        quantisation: Quantisation | None = None,
        *,
        recurrent: Sequence[int] = (),
        keys_first: bool = False,
    ) -> None:
        """Start empty."""
        self.layers = layers
        self.recurrent = recurrent
        self.keys_first = keys_first
        self.capacity = capacity
        self.quantisation = quantisation
        self.storage: Storage | None = None
        self.row = 0
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Device memory that it holds, bytes: its share of the storage."""
        if self.storage is None:
            return 0
        return self.storage.nbytes // (self.storage.texts - self.storage.left)

    def until(self, length: int) -> list[list[mx.array]]:
        """Per layer, the first columns as arrays of shape (1, heads, length, width)."""
        if self.storage is None or not length:
            return [[] for _ in range(self.layers)]
        row = slice(self.row, self.row + 1)
        return [[x[row, :, :length] for x in arrays] for arrays in self.storage.layers]

    def states(self) -> Row:
        """Those of the recurrent layers; a commit makes new ones and leaves these as they are."""
        if self.storage is None:
            return self.no_states()
        return row_of(self.storage.states.layers, self.row, self.storage.texts)

    def no_states(self) -> Row:
        """Those of a new text."""
        return [[None] * size for size in self.recurrent]

    def copy(self, length: int, capacity: int, states: Row | None = None) -> KeyValues:
        """A new text with the first committed positions of this one, as many as it has.

        Args:
            length: of the new text.
            capacity: of the new text.
            states: of the recurrent layers after so many positions; None if there are none.
        """
        new = KeyValues(
            self.layers,
            capacity,
            self.quantisation,
            recurrent=self.recurrent,
            keys_first=self.keys_first,
        )
        new.length = min(length, self.length)
        columns = columns_for(capacity)
        new.move(Storage.copy([self.until(new.length)], [states or []], columns), 0)
        return new

    def truncate(self, length: int, states: Row | None = None) -> None:
        """Drop the positions from `length` on; see `copy`."""
        if length < self.length:
            self.length = length
            if states and self.storage is not None:
                self.storage.states.replace(self.row, self.storage.texts, states)

    def move(self, storage: Storage | None, row: int) -> None:
        """Leave the storage for another that has a copy in a row; None for no other."""
        if self.storage is not None:
            self.storage.left += 1
        self.storage, self.row = storage, row

    def read(self) -> NDArray[np.float32]:
        """The committed part, (layers, 2, heads, length, width)."""
        layers = self.until(self.length)
        if not layers:
            return np.zeros((0, 2, 0, self.length, 0), np.float32)
        if self.quantisation is not None:
            bits, size = self.quantisation.bits, self.quantisation.group_size
            layers = [
                [mx.dequantize(*parts, size, bits) for parts in (arrays[:3], arrays[3:])]
                for arrays in layers
            ]
        return np.array(mx.stack([mx.stack(pair)[:, 0].astype(mx.float32) for pair in layers]))

    def read_states(self) -> list[NDArray[np.float32]]:
        """The states of recurrent layers, as `TextState.states` describes them."""
        found = []
        for state in arrays_of(self.states()):
            if state.ndim == 4 and not self.keys_first:
                state = state.swapaxes(2, 3)
            found.append(np.array(state[0].astype(mx.float32)))
        return found

    def close(self) -> None:
        """Leave the storage; its memory is freed when the last text has left."""
        self.move(None, 0)


def share_storage(texts: Sequence[KeyValues]) -> Storage:
    """The storage of exactly these texts; they are copied to a new one if there is none."""
    storage = texts[0].storage
    if (
        storage is None
        or storage.texts != len(texts)
        or any(text.storage is not storage for text in texts)
    ):
        columns = max(columns_for(text.capacity) for text in texts)
        rows = [text.until(text.length) for text in texts]
        storage = Storage.copy(rows, [text.states() for text in texts], columns)
        for row, text in enumerate(texts):
            text.move(storage, row)
        release_freed_memory()
    return storage


class TreeCache:
    """One layer in one forward pass, with the interface of mlx-lm's caches; it never rotates.

    A layer with a sliding window keeps all positions: which of them are in the window depends on
    the branch of the tree, and the mask tells. It fetches those that any node's window reaches.
    """

    def __init__(
        self,
        storage: Storage,
        layer: int,
        window: int | None,
        start: int,
        tree: TreePass | None,
        first: dict[int, int],
    ) -> None:
        """Describe the pass.

        Args:
            storage: of the texts of the pass.
            layer: index.
            window: the layer's sliding window, in positions; None if it attends to everything.
            start: committed positions, for one text.
            tree: None for one text that continues without branches.
            first: by window, the first column that such layers fetch: what the mask of one of them
                leaves out, all of them leave out.
        """
        self.storage = storage
        self.layer = layer
        self.window = window
        self.offset = start
        self.tree = tree
        self.first = first

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The attention mask of n new rows, in a form that mlx-lm takes."""
        window, first = window_size or self.window, 0
        if self.window is not None and window is not None:
            # A model's window may be another than its cache's, which only has the size of a ring.
            start = self.offset if self.tree is None else self.tree.start
            first = self.first[self.window] = max(start - window + 1, 0)
        if self.tree is not None:
            return self.tree.mask(window, first)
        before = self.offset - first
        if window is not None and window >= before + n:
            window = None  # every node's window reaches back to the first column
        if window is None and n == 1:
            return None
        if window is None and not return_array:
            return "causal"
        mask: mx.array = create_causal_mask(n, before, window_size=window)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append (texts, heads, n, width) keys and values.

        Returns:
            Those of all positions that the nodes see, in the form that mlx-lm attends to.
        """
        self._append([keys, values])
        return self.keys_and_values()

    def keys_and_values(self) -> Any:
        """Those of all positions again, for layers that share them."""
        return tuple(self._until())

    def _append(self, new: Sequence[mx.array]) -> None:
        index = None if self.tree is None else self.tree.index
        self.storage.write(self.layer, new, self.offset, index)
        self.storage.latest[self.layer] = new if self.tree is not None else ()
        self.offset += new[0].shape[2]

    def _until(self) -> list[mx.array]:
        stop = self.offset if self.tree is None else self.tree.columns
        first = 0 if self.window is None else self.first.get(self.window, 0)
        return self.storage.until(self.layer, stop, first)


class QuantisedTreeCache(TreeCache):
    """A `TreeCache` in fewer bits. Its attribute `bits` tells mlx-lm that it is quantised."""

    def __init__(self, quantisation: Quantisation, *args: Any) -> None:
        """See `TreeCache`."""
        super().__init__(*args)
        self.bits = quantisation.bits
        self.group_size = quantisation.group_size

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """See `TreeCache`; quantised values, scales and biases of the keys, and of the values."""
        new = [part for x in (keys, values) for part in mx.quantize(x, self.group_size, self.bits)]
        self._append(new)
        return self.keys_and_values()

    def keys_and_values(self) -> Any:
        """See `TreeCache`."""
        parts = self._until()
        return tuple(parts[:3]), tuple(parts[3:])
