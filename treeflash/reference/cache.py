"""Keys and values of committed positions, and states of recurrent layers after the last one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.snapshots import Snapshots
from treeflash.reference.numerics import Array
from treeflash.reference.recurrence import LayerState

States = Mapping[int, LayerState]


class Cache:
    """Per layer, what the committed positions and a block not yet committed leave behind.

    Attributes:
        committed: keys and values of each attention layer.
        pending: those of the block.
        slots: the attention layers' places there, by layer.
        states: of each recurrent layer after the committed positions, by layer.
        node_states: after each row of the block.
        snapshots: of `states`.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, start: States | None = None
    ) -> None:
        """Start empty; `start` holds the first states of the layers that are recurrent."""
        self.start = start or {}
        empty = np.zeros((kv_heads, 0, head_dim), np.float32)
        attending = [n for n in range(layers) if n not in self.start]
        self.slots = {n: slot for slot, n in enumerate(attending)}
        self.committed: list[tuple[Array, Array]] = [(empty, empty) for _ in attending]
        self.pending = list(self.committed)
        self.states = self.start
        self.node_states: dict[int, list[LayerState]] = {}
        self.snapshots: Snapshots[States] = Snapshots()

    @property
    def length(self) -> int:
        """Committed positions."""
        return int(self.committed[0][0].shape[1])

    @property
    def nbytes(self) -> int:
        """Size of the committed keys and values, and of all states, bytes."""
        held = {id(x): x for states in (self.states, *self.snapshots) for x in states.values()}
        states = sum(state.nbytes for state in held.values())
        return int(states + sum(keys.nbytes + values.nbytes for keys, values in self.committed))

    def attend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Hold a block's keys and values, and return them after the committed ones.

        Args:
            layer: index.
            k: (kv_heads, n, head_dim).
            v: (kv_heads, n, head_dim).
        """
        slot = self.slots[layer]
        self.pending[slot] = (k, v)
        keys, values = self.committed[slot]
        return np.concatenate([keys, k], 1), np.concatenate([values, v], 1)

    def commit(self, rows: NDArray[np.int32]) -> None:
        """Keep these rows of the block held last, in this order."""
        self.committed = [
            (np.concatenate([keys, k[:, rows]], 1), np.concatenate([values, v[:, rows]], 1))
            for (keys, values), (k, v) in zip(self.committed, self.pending, strict=True)
        ]
        self.states = {n: states[rows[-1]] for n, states in self.node_states.items()}

    def snapshot(self) -> None:
        """Keep the states at the present length."""
        self.snapshots.take(self.length, self.states)

    def restorable(self, length: int) -> int:
        """See `TextState.restorable`."""
        if not self.start or length >= self.length:
            return min(length, self.length)
        return self.snapshots.longest(length)

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on."""
        self.copy_from(self, min(length, self.length))

    def copy_from(self, other: Cache, length: int) -> None:
        """Take over the first positions of another cache."""
        length = min(length, other.length)
        self.states = other._states_at(length)
        self.snapshots = other.snapshots.until(length)
        self.committed = [(k[:, :length].copy(), v[:, :length].copy()) for k, v in other.committed]

    def keys_values(self) -> Array:
        """(attention layers, 2, kv_heads, length, head_dim)."""
        return np.array(self.committed, np.float32)

    def read_states(self) -> list[Array]:
        """See `TextState.states`."""
        return [x for _, s in sorted(self.states.items()) for x in (s.tail, s.matrix)]

    def _states_at(self, length: int) -> States:
        if not self.start or length == self.length:
            return self.states
        return self.snapshots.at(length) if length else self.start
