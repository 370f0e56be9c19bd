"""States of recurrent layers, and what mlx-lm's layers see of them in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache
from numpy.typing import NDArray

from treeflash.decoding.recurrence import convolution_tail
from treeflash_mlx.recurrence import NodePaths, Writes

Row: TypeAlias = list[list[mx.array | None]]
"""The states of one text: per layer and state, (1, ...); None before its first pass."""


class RecurrentStates:
    """The states of texts that run together: a row for each. A pass changes none; a commit does.

    Attributes:
        layers: per layer and state, an array (texts, ...) after the committed positions; None
            before the first pass.
        latest: per layer, its part of the latest pass.
    """

    def __init__(self, layers: Sequence[Sequence[mx.array | None]]) -> None:
        """Hold the states."""
        self.layers = [list(states) for states in layers]
        self.latest: list[RecurrentCache | None] = [None] * len(layers)

    @classmethod
    def copy(cls, texts: Sequence[Row]) -> RecurrentStates:
        """The states of texts that did not run together."""
        layers = zip(*texts, strict=True)
        new = cls([[_stack(parts) for parts in zip(*layer, strict=True)] for layer in layers])
        mx.eval(new.arrays)  # now: rows of a batch would keep those of other texts
        return new

    @property
    def arrays(self) -> list[mx.array]:
        """All of them that there are."""
        return arrays_of(self.layers)

    @property
    def nbytes(self) -> int:
        """Of all texts, bytes."""
        return sum(x.nbytes for x in self.arrays)

    @property
    def is_complete(self) -> bool:
        """Whether the latest pass can be committed."""
        return all(cache is not None and cache.is_complete for cache in self.latest)

    def replace(self, row: int, texts: int, states: Row) -> None:
        """Give one text other states; see `row_of`."""
        if texts == 1:
            self.layers = [list(layer) for layer in states]
            return
        chosen = mx.arange(texts) == row
        self.layers = [
            [
                x if x is None else _where(chosen, mx.zeros_like(x) if new is None else new, x)
                for x, new in zip(*layers, strict=True)
            ]
            for layers in zip(self.layers, states, strict=True)
        ]

    def commit(self, paths: Mapping[int, NDArray[np.int32]], texts: int) -> None:
        """Go on to the states after paths of the latest pass.

        Args:
            paths: by row, the nodes to keep, the root first.
            texts: how many there are.
        """
        if self.layers:
            commit = _Commit(paths, texts)
            self.layers = [
                commit.after(states, latest)
                for states, latest in zip(self.layers, self.latest, strict=True)
            ]


class RecurrentCache(ArraysCache):
    """One layer in one forward pass. Some models write to no other class of cache.

    Attributes:
        paths: of the nodes; None if every text goes on by the same tokens or by one.
        written: by state, what the pass wrote: the state after all tokens, or what a commit needs.
        inputs: (texts, W - 1 + n, channels) of the short convolutions over trees, in order: the
            last inputs of the committed text, and those of the nodes.
    """

    def __init__(
        self,
        states: RecurrentStates,
        layer: int,
        paths: NodePaths | None,
        reads: Callable[[RecurrentCache], None],
    ) -> None:
        """Describe the pass.

        Args:
            states: of the texts of the pass.
            layer: index among the recurrent ones.
            paths: as above.
            reads: is told when the layer reads its states.
        """
        super().__init__(len(states.layers[layer]))
        self._states = states
        self._layer = layer
        self._reads = reads
        self.paths = paths
        self.written: dict[int, mx.array | Writes] = {}
        self.inputs: list[mx.array] = []
        states.latest[layer] = self

    @property
    def states(self) -> list[mx.array | None]:
        """Those after the committed positions."""
        return self._states.layers[self._layer]

    def __getitem__(self, i: int) -> mx.array | None:
        self._reads(self)
        return self.states[i]

    def __setitem__(self, i: int, value: mx.array | Writes) -> None:
        self.written[i] = value

    def make_mask(self, n: int, **_: Any) -> None:
        """Masks are for padding on the left, which there is none of."""

    def advance(self, n: int) -> None:
        """Only padding would have to know."""

    @property
    def tails(self) -> list[int]:
        """The states that are last inputs of convolutions, in a pass over trees."""
        return [i for i, value in self.written.items() if not isinstance(value, Writes)]

    @property
    def is_complete(self) -> bool:
        """Whether every state was written, in a pass over trees with what a commit needs."""
        if len(self.written) < len(self.states):
            return False
        if self.paths is None:
            return True
        rows = self.paths.rows
        seen = [(x.shape[1] - rows, x.shape[2]) for x in self.inputs]
        return [self.written[i].shape[1:] for i in self.tails] == seen


class _Commit:
    """A path for each of some texts that ran together."""

    def __init__(self, paths: Mapping[int, NDArray[np.int32]], texts: int) -> None:
        """Take the paths, by row."""
        nodes = np.zeros((texts, max(map(len, paths.values()))), np.int32)
        kept = np.zeros(nodes.shape, np.bool_)
        for row, path in paths.items():
            nodes[row, : len(path)], kept[row, : len(path)] = path, True
        self.paths, self.texts = paths, texts
        self.nodes, self.kept = mx.array(nodes), mx.array(kept)
        self.chosen = mx.array(kept[:, 0])
        self._tails: dict[int, mx.array] = {}

    def after(
        self, states: Sequence[mx.array | None], latest: RecurrentCache | None
    ) -> list[mx.array | None]:
        """The states of one layer after the paths."""
        assert latest is not None, "nothing was run that could be committed"
        inputs = iter(latest.inputs)
        new = list(states)
        for i in sorted(latest.written):
            value, old = latest.written[i], states[i]
            if isinstance(value, Writes):
                new[i] = value.after(old, self.nodes, self.kept)
            elif latest.paths is None:
                new[i] = self._replace(old, value)
            else:
                rows = next(inputs)
                tail = mx.broadcast_to(
                    self._tail(value.shape[1] + 1), (self.texts, value.shape[1], value.shape[2])
                )
                new[i] = self._replace(old, mx.take_along_axis(rows, tail, 1))
        return new

    def _replace(self, old: mx.array | None, new: mx.array) -> mx.array:
        """The new states of the texts that have a path, and the old ones of others."""
        if len(self.paths) == self.texts:
            return new
        return _where(self.chosen, new, mx.zeros_like(new) if old is None else old)

    def _tail(self, kernel: int) -> mx.array:
        """(texts, W - 1, 1) int32 rows of a convolution's inputs; made once for all layers."""
        if kernel not in self._tails:
            empty = np.zeros(0, np.int32)
            tails = [
                convolution_tail(self.paths.get(row, empty), kernel) for row in range(self.texts)
            ]
            self._tails[kernel] = mx.array(np.stack(tails)[..., None])
        return self._tails[kernel]


def arrays_of(layers: Sequence[Sequence[mx.array | None]]) -> list[mx.array]:
    """All states that there are, layer by layer."""
    return [x for states in layers for x in states if x is not None]


def row_of(layers: Sequence[Sequence[mx.array | None]], row: int, texts: int) -> Row:
    """The states of one of several texts that run together.

    Args:
        layers: of all, as in `RecurrentStates`.
        row: of the text.
        texts: how many there are.
    """
    if texts == 1:
        return [list(states) for states in layers]
    return [
        [x if x is None else mx.contiguous(x[row : row + 1]) for x in states] for states in layers
    ]


def _where(chosen: mx.array, new: mx.array, old: mx.array) -> mx.array:
    """`new` for the chosen texts; arrays have a row for each text, or one for all."""
    return mx.where(chosen.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def _stack(parts: Sequence[mx.array | None]) -> mx.array | None:
    """(texts, ...) states of texts, with zeros for those that have not been run."""
    known = next((x for x in parts if x is not None), None)
    if known is None or len(parts) == 1:
        return known
    return mx.concatenate([mx.zeros_like(known) if x is None else x for x in parts])
