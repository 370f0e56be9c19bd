"""The KV caches of sequences, and the caches that mlx-lm's layers see in one forward pass.

A `KVCache` belongs to one sequence. Its arrays lie in a row of a `BatchStorage`, together with the
sequences that run in the same passes; `share_storage` brings sequences together. A `TreeCache` is
one layer of a storage during one pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from numpy.typing import NDArray

from treeflash.config import SINK
from treeflash.decoding.interfaces import StateArrays
from treeflash_mlx.attention import TreePass
from treeflash_mlx.hybrid import BatchStates, RecurrentStates, RecurrentTreeCache, state_arrays

STEP = 256
SMALL_COLUMNS = 1024
"""Sequences with at most this number of columns share a storage, whatever their capacities."""


def allocated_columns(capacity: int) -> int:
    """Return columns for `capacity` positions and a few more, in steps, to reuse freed memory.

    They are the copies of the first positions, see `BatchStorage.copies`, and one for padding.
    """
    return -(-(capacity + SINK + 1) // STEP) * STEP


def size_class(columns: int) -> int:
    """Return the class of sequences that may share a storage: padding at most doubles it.

    The largest of any sequences of a class has the most columns of all sequences that contain them:
    a storage of some never needs more than a storage of all.
    """
    return (max(columns, SMALL_COLUMNS) - 1).bit_length()


class BatchStorage:
    """All arrays of the sequences that run together, a row per sequence.

    While the same sequences run together, nothing is copied. No sequence reaches the last column,
    which takes the padding of a pass. Sequences that have left free their rows.

    Attributes:
        layers: per layer, arrays of shape (batch, heads, columns, width): the keys and the values,
            or the three parts of both if they are quantised; empty before the first pass.
        copies: by layer, (batch, heads, SINK, width) of the first columns; see `first_copies`.
        states: of the recurrent layers.
    """

    def __init__(self, states: Sequence[RecurrentStates], num_layers: int, columns: int) -> None:
        """Create a storage without keys and values, for sequences with these recurrent states."""
        self.batch_size, self.free_rows, self.columns = len(states), 0, columns
        self.layers: list[list[mx.array]] = [[] for _ in range(num_layers)]
        self.copies: dict[int, list[mx.array]] = {}
        self.states = BatchStates(states)

    def fill(self, layer: int, rows: Sequence[Sequence[mx.array]]) -> None:
        """Copy arrays of shape (1, heads, n, width), or none, into each row of an empty layer."""
        arrays = []
        for i, x in enumerate(next((row for row in rows if row), ())):
            array = mx.zeros((self.batch_size, x.shape[1], self.columns, x.shape[3]), x.dtype)
            for number, row in enumerate(rows):
                if row:
                    array[number : number + 1, :, : row[i].shape[2]] = row[i]
            arrays.append(array)
        # New arrays are evaluated now: the old ones could not be written in place while these
        # depend on them.
        mx.eval(arrays)
        self.layers[layer] = arrays

    @property
    def nbytes(self) -> int:
        """Size of all rows, bytes."""
        return self.columns_nbytes + self.states.nbytes

    @property
    def columns_nbytes(self) -> int:
        """Size of the keys and values of all rows, bytes."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """The keys and values of all layers."""
        return [array for arrays in self.layers for array in arrays]

    def write(
        self, layer: int, new: Sequence[mx.array], start: int, index: mx.array | None = None
    ) -> None:
        """Write (batch, heads, n, width) keys and values in place.

        One sequence is written from column `start` on, several to the (batch, 1, n, 1) `index`.
        """
        arrays = self.layers[layer]
        if not arrays:
            arrays += [mx.zeros((*x.shape[:2], self.columns, x.shape[3]), x.dtype) for x in new]
        for i, rows in enumerate(new):
            if index is None:
                stop = start + rows.shape[2]
                assert stop < self.columns, "the sequence has outgrown its capacity"
                arrays[i][:, :, start:stop] = rows
            else:
                columns = mx.broadcast_to(index, rows.shape)
                arrays[i] = mx.put_along_axis(arrays[i], columns, rows, 2)

    def read(self, layer: int, stop: int, first: int = 0) -> list[mx.array]:
        """Return a layer's columns from `first` to `stop`, of all sequences."""
        return [array[:, :, first:stop] for array in self.layers[layer]]

    def first_copies(self, layer: int) -> list[mx.array]:
        """Return copies of a layer's first columns, made once.

        A write after a read of the storage in the same pass would copy all of it.
        """
        if layer not in self.copies:
            self.copies[layer] = [1 * x[:, :, :SINK] for x in self.layers[layer]]
        return self.copies[layer]

    def read_row(self, layer: int, row: int, stop: int) -> list[mx.array]:
        """Return a layer's columns before `stop`, of one sequence."""
        return [array[row : row + 1, :, :stop] for array in self.layers[layer]]

    def commit(
        self, written: PassWrites, paths: Mapping[int, tuple[int, NDArray[np.int32]]]
    ) -> None:
        """Keep paths of a pass: by row, the first column to write, and the nodes."""
        self._move_columns(written.columns, paths)
        self.states.commit(written.recurrent, {row: path for row, (_, path) in paths.items()})

    def _move_columns(
        self,
        written: Sequence[Sequence[mx.array]],
        paths: Mapping[int, tuple[int, NDArray[np.int32]]],
    ) -> None:
        """Move the keys and values of paths to where their sequences continue."""
        if all(path[-1] == len(path) - 1 for _, path in paths.values()):
            return  # they are there already
        # The rows are taken as they were written: reading the storage before writing to it would
        # force a copy.
        if self.batch_size == 1:
            [(first, path)] = paths.values()
            nodes = mx.array(path)
            for layer, rows in enumerate(written):
                self.write(layer, [mx.take(x, nodes, 2) for x in rows], first)
            return
        longest = max(len(path) for _, path in paths.values())
        sources, targets = np.zeros((2, self.batch_size, 1, longest, 1), np.int32)
        targets += self.columns - 1
        for row, (start, path) in paths.items():
            sources[row, 0, : len(path), 0] = path
            targets[row, 0, : len(path), 0] = start + np.arange(len(path))
        source, index = mx.array(sources), mx.array(targets)
        for layer, rows in enumerate(written):
            moved = [
                mx.take_along_axis(
                    x, mx.broadcast_to(source, (*x.shape[:2], longest, x.shape[3])), 2
                )
                for x in rows
            ]
            self.write(layer, moved, 0, index)


@dataclass(frozen=True, eq=False)
class PassWrites:
    """What the layers write in a pass over the sequences of a storage; a commit reads it.

    Attributes:
        columns: per layer, (batch, heads, n, width) keys and values, or the three parts of both;
            empty in a pass without trees.
        recurrent: the caches of the recurrent layers.
    """

    columns: list[Sequence[mx.array]]
    recurrent: list[RecurrentTreeCache] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether every state of the recurrent layers was written."""
        return all(cache.is_complete for cache in self.recurrent)


@dataclass(frozen=True)
class Quantisation:
    """How keys and values are quantised; see `mx.quantize`."""

    bits: int
    group_size: int


@dataclass(eq=False)
class KVCache:
    """Keys and values of all layers of one sequence: committed positions, then one tree.

    The storage is shared by sequences that run together. There is none before the first pass, and
    after the sequence is closed.
    """

    layers_without_keys: ClassVar[int] = 0  # the last layers of a storage, which `read` leaves out

    num_layers: int  # the layers of its storage
    capacity: int  # positions
    quantisation: Quantisation | None = None
    state_counts: Sequence[int] = ()  # per recurrent layer
    keys_first: bool = False  # whether matrix states have the shape (key_dim, value_dim)
    storage: BatchStorage | None = None
    row: int = 0  # in the storage
    length: int = 0  # committed positions

    @property
    def nbytes(self) -> int:
        """Device memory that the sequence holds, bytes: its share of the storage."""
        if self.storage is None:
            return 0
        return self.storage.nbytes // (self.storage.batch_size - self.storage.free_rows)

    @property
    def columns(self) -> int:
        """Columns that the sequence needs, whatever the sequences that it shares a storage with."""
        return allocated_columns(self.capacity)

    def first_columns(self, layer: int, end: int) -> list[mx.array]:
        """Return a layer's columns before `end` as arrays of shape (1, heads, end, width)."""
        if self.storage is None or not end:
            return []
        return self.storage.read_row(layer, self.row, end)

    def recurrent_states(self) -> RecurrentStates:
        if self.storage is None:
            return self.initial_states()
        return self.storage.states.sequence_states(self.row)

    def initial_states(self) -> RecurrentStates:
        return [[None] * count for count in self.state_counts]

    def copy(self, length: int, capacity: int, states: RecurrentStates | None = None) -> KVCache:
        """Fork a sequence with the first `length` committed positions, or all if there are fewer.

        `states` of the recurrent layers follow these positions; None without such layers.
        """
        length = min(length, self.length)
        storage = BatchStorage([states or []], self.num_layers, allocated_columns(capacity))
        for layer in range(self.num_layers):
            storage.fill(layer, [self.first_columns(layer, length)])
        return replace(self, capacity=capacity, storage=storage, row=0, length=length)

    def export(self, first: int, stop: int) -> StateArrays:
        return {
            f"{layer}.{n}": to_host(x[:, :, first:])
            for layer in range(self.num_layers)
            for n, x in enumerate(self.first_columns(layer, stop))
        }

    def load(self, arrays: StateArrays, length: int) -> None:
        storage = share_storage([self])
        for layer, parts in by_numbers(arrays).items():
            columns = [parts[n] for n in range(len(parts))]
            if columns[0].shape[2]:
                storage.write(layer, columns, self.stored_columns(layer))
        mx.eval(storage.layers)
        self.length = length

    def stored_columns(self, layer: int) -> int:
        """Return a layer's columns that depend on the committed tokens alone."""
        return self.length

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)
        if self.storage is not None:
            self.storage.copies.clear()

    def attach(self, storage: BatchStorage, row: int) -> None:
        """Move to a row of a storage that has a copy of the sequence."""
        self.close()
        self.storage, self.row = storage, row

    def close(self) -> None:
        """Leave the storage, whose memory is freed when the last sequence has left."""
        if self.storage is not None:
            self.storage.free_rows += 1
        self.storage, self.row = None, 0

    def read(self) -> NDArray[np.float32]:
        """Read the (layers, 2, heads, length, width) committed keys and values."""
        kv_layers = self.num_layers - self.layers_without_keys
        layers = [self.first_columns(layer, self.length) for layer in range(kv_layers)]
        if self.quantisation is not None:
            bits, size = self.quantisation.bits, self.quantisation.group_size
            layers = [
                [mx.dequantize(x, scales, biases, size, bits) for x, scales, biases in parts]
                for parts in ((arrays[:3], arrays[3:]) for arrays in layers)
            ]
        return np.array(mx.stack([mx.stack(pair)[:, 0].astype(mx.float32) for pair in layers]))

    def read_states(self) -> list[NDArray[np.float32]]:
        """Read the recurrent states as `Inspectable.read_recurrent_states` describes."""
        states = [x[0].astype(mx.float32) for x in state_arrays(self.recurrent_states())]
        if not self.keys_first:
            states = [x.swapaxes(1, 2) if x.ndim == 3 else x for x in states]
        return [np.array(x) for x in states]


def to_host(x: mx.array) -> NDArray[Any]:
    """Return the bits of an array; see `StateArrays`."""
    return np.array(mx.contiguous(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x))


def from_host(x: NDArray[Any]) -> mx.array:
    array = mx.array(x)
    return array.view(mx.bfloat16) if array.dtype == mx.uint16 else array


def by_numbers(arrays: StateArrays) -> dict[int, dict[int, mx.array]]:
    """Group arrays with names FIRST.SECOND by both numbers."""
    numbered: dict[int, dict[int, mx.array]] = {}
    for name, x in arrays.items():
        first, second = map(int, name.split("."))
        numbered.setdefault(first, {})[second] = from_host(x)
    return numbered


def share_storage(sequences: Sequence[KVCache]) -> BatchStorage:
    """Return the storage of exactly these sequences, which move into a new one if necessary.

    They move layer by layer, and each layer of an old storage that is left by all is freed at once:
    there are never two copies of everything.
    """
    storage, size = sequences[0].storage, len(sequences)
    shared = all(sequence.storage is storage for sequence in sequences)
    if storage is not None and storage.batch_size == size and shared:
        return storage
    columns = max(sequence.columns for sequence in sequences)
    states = [sequence.recurrent_states() for sequence in sequences]
    new = BatchStorage(states, sequences[0].num_layers, columns)
    leaving = Counter(sequence.storage for sequence in sequences if sequence.storage is not None)
    left = [old for old, rows in leaving.items() if rows == old.batch_size - old.free_rows]
    for layer in range(len(new.layers)):
        try:
            new.fill(
                layer, [sequence.first_columns(layer, sequence.length) for sequence in sequences]
            )
        except Exception:
            for row, sequence in enumerate(sequences):
                _separate(sequence, new, row, layer)
            raise
        for old in left:
            old.layers[layer] = []
    for row, sequence in enumerate(sequences):
        sequence.attach(new, row)
    return new


def storages_of(sequences: Iterable[KVCache]) -> set[BatchStorage]:
    return {x.storage for x in sequences if x.storage is not None}


def _separate(sequence: KVCache, new: BatchStorage, row: int, moved: int) -> None:
    """Give a sequence its own storage, after a move of its storage has failed.

    The first `moved` layers are in a row of the new storage, the others still in the old one.
    Nothing is copied before the next pass: memory has just run out.
    """
    if sequence.storage is None:
        return
    own = BatchStorage([sequence.recurrent_states()], sequence.num_layers, sequence.columns)
    for layer in range(sequence.num_layers):
        source, place = (new, row) if layer < moved else (sequence.storage, sequence.row)
        own.layers[layer] = source.read_row(layer, place, own.columns)
    sequence.attach(own, 0)


@dataclass(eq=False)
class TreeCache:
    """One attention layer in one forward pass, with the interface of mlx-lm's caches.

    A layer with a sliding window keeps all positions, unlike mlx-lm's ring buffers: which positions
    lie in the window depends on the branch of the tree, so the mask decides. The layer fetches only
    the columns that the window of any node reaches.

    `window_starts` has the first column that layers with a window fetch. The pass has one such
    dictionary: a model makes one mask for all layers with the same window.
    """

    storage: BatchStorage
    written: PassWrites
    layer: int
    window: int | None  # the layer's, in positions; None if it attends to everything
    offset: int  # columns that are filled, for one sequence
    tree: TreePass | None  # None for one sequence that continues without branches
    window_starts: dict[int, int]

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Make the attention mask of n new rows, in a form that mlx-lm takes."""
        window, first = window_size or self.window, 0
        if self.window is not None and window is not None:
            # The window of the model may differ from the size of its cache's ring buffer.
            start = self.offset if self.tree is None else self.tree.start
            first = self.window_starts[self.window] = max(start - window + 1, 0)
        if self.tree is not None:
            return self.tree.mask(window, first)
        before = self.offset - first
        if window is not None and window >= before + n:
            window = None  # every node's window reaches back to the first column
        if window is None and n == 1:
            return None
        if window is None and not return_array:
            return "causal"
        return create_causal_mask(n, before, window_size=window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append (batch, heads, n, width) keys and values, and return `keys_and_values`."""
        new = self._stored(keys, values)
        index = None if self.tree is None else self.tree.index
        self.storage.write(self.layer, new, self.offset, index)
        self.written.columns[self.layer] = new if self.tree is not None else ()
        self.offset += keys.shape[2]
        return self.keys_and_values()

    def keys_and_values(self) -> Any:
        """Return keys and values that the nodes see; layers that share them call without update."""
        stop = self.offset if self.tree is None else self.tree.columns
        first = 0 if self.window is None else self.window_starts.get(self.window, 0)
        return tuple(self.storage.read(self.layer, stop, first))

    def _stored(self, keys: mx.array, values: mx.array) -> Sequence[mx.array]:
        return keys, values


@dataclass(eq=False)
class QuantisedTreeCache(TreeCache):
    """A `TreeCache` with quantised keys and values, which mlx-lm recognises by `bits`."""

    bits: int
    group_size: int

    def keys_and_values(self) -> Any:
        """Return the keys' quantised numbers, scales and biases, and the values'."""
        parts = super().keys_and_values()
        return parts[:3], parts[3:]

    def _stored(self, keys: mx.array, values: mx.array) -> Sequence[mx.array]:
        return [part for x in (keys, values) for part in mx.quantize(x, self.group_size, self.bits)]
