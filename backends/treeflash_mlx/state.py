"""The state of one text."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.snapshots import Snapshots
from treeflash_mlx.cache import KeyValues
from treeflash_mlx.recurrent_states import Row, arrays_of


@dataclass(frozen=True, eq=False)
class Ahead:
    """A forward pass that was submitted before its turn.

    Attributes:
        start: committed positions before it.
        token: that it runs.
        logits: (1, vocab).
        outputs: (1, layers * hidden_size) of the captured layers.
    """

    start: int
    token: int
    logits: mx.array
    outputs: mx.array | None


class State:
    """`treeflash.decoding.text_state.TextState` in MLX.

    Attributes:
        key_values: the target's, and the states of its recurrent layers.
        drafter: the drafter's keys and values; None if the text is not drafted for.
        context: (n, hidden_size) each; projected features of positions that the drafter has not
            read yet, in order.
        outputs: (rows, layers * hidden_size) of the captured layers, in the forward pass that ran
            the text last.
        first_row: of the text in that pass.
        single_until: positions until the end of the last pass over a single node.
        ahead: the pass after it, if it has been submitted.
        snapshots: of the states of recurrent layers.
    """

    def __init__(self, key_values: KeyValues, drafter: KeyValues | None) -> None:
        """Start with the keys and values of a new text."""
        self.key_values = key_values
        self.drafter = drafter
        self.context: list[mx.array] = []
        self.outputs: mx.array | None = None
        self.first_row = 0
        self.single_until = -1
        self.ahead: Ahead | None = None
        self.snapshots: Snapshots[Row] = Snapshots()

    @property
    def length(self) -> int:
        """See `TextState.length`."""
        return self.key_values.length

    @property
    def nbytes(self) -> int:
        """See `TextState.nbytes`."""
        parts = [*self.context, *(x for states in self.snapshots for x in arrays_of(states))]
        drafter = self.drafter.nbytes if self.drafter else 0
        return self.key_values.nbytes + drafter + sum(part.nbytes for part in parts)

    @property
    def needs_snapshots(self) -> bool:
        """See `TextState.needs_snapshots`."""
        return bool(self.key_values.recurrent)

    def snapshot(self) -> None:
        """See `TextState.snapshot`."""
        if self.needs_snapshots:
            states = self.key_values.states()
            mx.eval(arrays_of(states))  # now: rows of a batch would keep those of other texts
            self.snapshots.take(self.length, states)

    def restorable(self, length: int) -> int:
        """See `TextState.restorable`."""
        if not self.needs_snapshots or length >= self.length:
            return min(length, self.length)
        return self.snapshots.longest(length)

    def fork(self, length: int, capacity: int) -> State:
        """See `TextState.fork`."""
        drafter = None
        if self.drafter:
            block = self.drafter.capacity - self.key_values.capacity
            drafter = self.drafter.copy(length, capacity + block)
        new = State(self.key_values.copy(length, capacity, self._states_at(length)), drafter)
        new.snapshots = self.snapshots.until(length)
        if self.drafter:
            new.context = [mx.contiguous(part) for part in self._context_until(length)]
            mx.eval(new.context)
        return new

    def truncate(self, length: int) -> None:
        """See `TextState.truncate`."""
        self.restore(length, self._states_at(length))

    def restore(self, length: int, states: Row) -> None:
        """Go back to a length at which the recurrent layers had these states."""
        self.key_values.truncate(length, states)
        self.single_until, self.ahead = -1, None
        self.snapshots.truncate(length)
        if self.drafter:
            self.context = self._context_until(length)
            self.drafter.length = min(self.drafter.length, length)

    def close(self) -> None:
        """See `TextState.close`."""
        self.key_values.close()
        if self.drafter:
            self.drafter.close()
        self.context, self.outputs, self.snapshots = [], None, Snapshots()
        self.ahead = None

    def keys_values(self) -> NDArray[np.float32]:
        """See `TextState.keys_values`."""
        return self.key_values.read()

    def states(self) -> list[NDArray[np.float32]]:
        """See `TextState.states`."""
        return self.key_values.read_states()

    def drafter_keys_values(self) -> NDArray[np.float32]:
        """See `TextState.drafter_keys_values`."""
        assert self.drafter is not None
        return self.drafter.read()

    def _states_at(self, length: int) -> Row:
        """The states of recurrent layers after so many positions; zeros are not kept."""
        if length >= self.length or not self.needs_snapshots:
            return self.key_values.states()
        return self.snapshots.at(length) if length else self.key_values.no_states()

    def _context_until(self, length: int) -> list[mx.array]:
        """The context of positions below `length`."""
        assert self.drafter is not None
        parts, first = [], self.drafter.length
        for part in self.context:
            if first < length:
                parts.append(part[: length - first])
            first += len(part)
        return parts
