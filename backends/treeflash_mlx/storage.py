"""Device arrays for the keys and values of texts that run together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash_mlx.recurrent_states import RecurrentStates, Row

STEP = 256


def columns_for(capacity: int) -> int:
    """Columns for so many positions and one more, in steps: memory of few sizes is reused."""
    return -(-(capacity + 1) // STEP) * STEP


class Storage:
    """A row for each of several texts. While the same texts run together, none is copied.

    Attributes:
        texts: how many rows there are.
        left: how many texts have left their rows.
        columns: of every row. No text reaches the last one: it takes the padding of a pass.
        layers: per layer, arrays of shape (texts, heads, columns, width): the keys and the values,
            or the three parts of both if they are quantised; none before the first pass.
        latest: per layer, (texts, heads, n, width) as the latest pass wrote them.
        states: of the recurrent layers.
    """

    def __init__(self, layers: int, texts: int, columns: int, states: RecurrentStates) -> None:
        """Start without arrays; the first pass makes them."""
        self.texts = texts
        self.left = 0
        self.columns = columns
        self.layers: list[list[mx.array]] = [[] for _ in range(layers)]
        self.latest: list[Sequence[mx.array]] = [()] * layers
        self.states = states

    @classmethod
    def copy(
        cls, texts: Sequence[Sequence[Sequence[mx.array]]], states: Sequence[Row], columns: int
    ) -> Storage:
        """Copy texts into the rows of a new storage.

        Args:
            texts: per text and layer, arrays of shape (1, heads, n, width); none if it is empty.
            states: of their recurrent layers, per text.
            columns: of the storage.
        """
        new = cls(len(texts[0]), len(texts), columns, RecurrentStates.copy(states))
        for layer, arrays in enumerate(new.layers):
            parts = [text[layer] for text in texts]
            for i, x in enumerate(next((part for part in parts if part), ())):
                array = mx.zeros((len(texts), x.shape[1], columns, x.shape[3]), x.dtype)
                for row, part in enumerate(parts):
                    if part:
                        array[row : row + 1, :, : part[i].shape[2]] = part[i]
                arrays.append(array)
        # Evaluated now: the old arrays could not be written in place while these depend on them.
        mx.eval(new.layers)
        return new

    @property
    def nbytes(self) -> int:
        """Of all rows, bytes."""
        return self.columns_nbytes + self.states.nbytes

    @property
    def columns_nbytes(self) -> int:
        """Of the keys and values of all rows, bytes."""
        return sum(array.nbytes for arrays in self.layers for array in arrays)

    def write(
        self, layer: int, new: Sequence[mx.array], start: int, index: mx.array | None = None
    ) -> None:
        """Write keys and values in place.

        Args:
            layer: index.
            new: (texts, heads, n, width) each.
            start: the first column, for one text.
            index: (texts, 1, n, 1) columns, for several texts.
        """
        arrays = self.layers[layer]
        if not arrays:
            arrays += [mx.zeros((*x.shape[:2], self.columns, x.shape[3]), x.dtype) for x in new]
        for i, rows in enumerate(new):
            if index is None:
                stop = start + rows.shape[2]
                assert stop < self.columns, "the text has outgrown its capacity"
                arrays[i][:, :, start:stop] = rows
            else:
                columns = mx.broadcast_to(index, rows.shape)
                arrays[i] = mx.put_along_axis(arrays[i], columns, rows, 2)

    def until(self, layer: int, stop: int, first: int = 0) -> list[mx.array]:
        """The columns of a layer before `stop`, of all texts."""
        return [array[:, :, first:stop] for array in self.layers[layer]]

    def keep(self, paths: Mapping[int, tuple[int, NDArray[np.int32]]]) -> None:
        """Keep paths that the latest pass ran.

        Args:
            paths: by row, the first column to write, and the nodes to keep, ascending.
        """
        self._move(paths)
        self.states.commit({row: path for row, (_, path) in paths.items()}, self.texts)

    def _move(self, paths: Mapping[int, tuple[int, NDArray[np.int32]]]) -> None:
        """Move the keys and values of paths to where their texts continue."""
        if all(path[-1] == len(path) - 1 for _, path in paths.values()):
            return  # they are there already
        # Taken from the rows as they were written: reading the storage before writing to it would
        # force a copy.
        if self.texts == 1:
            ((start, path),) = paths.values()
            nodes = mx.array(path)
            for layer, rows in enumerate(self.latest):
                self.write(layer, [mx.take(x, nodes, axis=2) for x in rows], start)
            return
        longest = max(len(path) for _, path in paths.values())
        nodes_, columns = np.zeros((2, self.texts, 1, longest, 1), np.int32)
        columns += self.columns - 1
        for row, (start, path) in paths.items():
            nodes_[row, 0, : len(path), 0] = path
            columns[row, 0, : len(path), 0] = start + np.arange(len(path))
        source, target = mx.array(nodes_), mx.array(columns)
        for layer, rows in enumerate(self.latest):
            kept = []
            for x in rows:
                shape = *x.shape[:2], longest, x.shape[3]
                kept.append(mx.take_along_axis(x, mx.broadcast_to(source, shape), 2))
            self.write(layer, kept, 0, target)
