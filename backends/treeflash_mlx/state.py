"""The state of one text."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.one_by_one import WithoutRecurrence
from treeflash_mlx.cache import KeyValues


class State(WithoutRecurrence):
    """`treeflash.decoding.interfaces.TextState` in MLX.

    Attributes:
        key_values: the target's.
        drafter: the drafter's keys and values; None if the text is not drafted for.
        context: (n, hidden_size) each; projected features of positions that the drafter has not
            read yet, in order.
        outputs: (rows, layers * hidden_size) of the captured layers, in the forward pass that ran
            the text last.
        first_row: of the text in that pass.
    """

    def __init__(self, key_values: KeyValues, drafter: KeyValues | None) -> None:
        """Start with the keys and values of a new text."""
        self.key_values = key_values
        self.drafter = drafter
        self.context: list[mx.array] = []
        self.outputs: mx.array | None = None
        self.first_row = 0

    @property
    def length(self) -> int:
        """See `TextState.length`."""
        return self.key_values.length

    @property
    def nbytes(self) -> int:
        """See `TextState.nbytes`."""
        drafter = self.drafter.nbytes if self.drafter else 0
        return self.key_values.nbytes + drafter + sum(part.nbytes for part in self.context)

    def fork(self, length: int, capacity: int) -> State:
        """See `TextState.fork`."""
        drafter = None
        if self.drafter:
            block = self.drafter.capacity - self.key_values.capacity
            drafter = self.drafter.copy(length, capacity + block)
        new = State(self.key_values.copy(length, capacity), drafter)
        if self.drafter:
            new.context = [mx.contiguous(part) for part in self._context_until(length)]
            mx.eval(new.context)
        return new

    def truncate(self, length: int) -> None:
        """See `TextState.truncate`."""
        self.key_values.length = min(self.length, length)
        if self.drafter:
            self.context = self._context_until(length)
            self.drafter.length = min(self.drafter.length, length)

    def close(self) -> None:
        """See `TextState.close`."""
        self.key_values.close()
        if self.drafter:
            self.drafter.close()
        self.context, self.outputs = [], None

    def keys_values(self) -> NDArray[np.float32]:
        """See `TextState.keys_values`."""
        return self.key_values.read()

    def drafter_keys_values(self) -> NDArray[np.float32]:
        """See `TextState.drafter_keys_values`."""
        assert self.drafter is not None
        return self.drafter.read()

    def _context_until(self, length: int) -> list[mx.array]:
        """The context of positions below `length`."""
        assert self.drafter is not None
        parts, first = [], self.drafter.length
        for part in self.context:
            if first < length:
                parts.append(part[: length - first])
            first += len(part)
        return parts
