"""The state of one sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.backend_base import BaseState, Unprojected, rows_of, with_rows
from treeflash.decoding.interfaces import StateArrays
from treeflash_mlx.cache import KVCache, PassWrites, by_numbers, from_host, to_host
from treeflash_mlx.hybrid import RecurrentStates, state_arrays
from treeflash_mlx.memory import MEMORY


@dataclass(frozen=True, eq=False)
class Ahead:
    """The pass that may follow a pass over a single node, and may be submitted before its turn."""

    start: int  # committed positions before it
    token: int = -1  # its token; -1 if it is not submitted
    logits: mx.array | None = None  # (1, vocab)
    outputs: mx.array | None = None  # (1, layers * hidden_size) of the captured layers
    written: PassWrites | None = None


ContextPart: TypeAlias = mx.array | Unprojected
"""Projected features of n positions, or what they are computed from."""


class State(BaseState[KVCache, RecurrentStates]):
    """`treeflash.decoding.interfaces.SequenceState` in MLX.

    Attributes:
        kv_cache: the target's, with the states of its recurrent layers.
        context: a `ContextPart` of n positions each, (n, hidden_size) if it is projected.
        ahead: the pass that may follow the latest one, if that had a single node.
        size: returns the bytes of a state for a number of positions.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        drafter: KVCache | None,
        size: Callable[[int], int],
        nbytes: int | None = None,
    ) -> None:
        """Take the memory of the sequence, or `nbytes`; raises what `SharedMemory.check` does."""
        initial = kv_cache.initial_states() if kv_cache.state_counts else None
        super().__init__(kv_cache, drafter, initial)
        self.ahead: Ahead | None = None
        self.size = size
        MEMORY.add_sequence(self, size(kv_cache.capacity) if nbytes is None else nbytes)

    def copy(self, length: int, capacity: int, recurrent: RecurrentStates | None) -> State:
        nbytes = self.size(capacity)
        if capacity == length:  # it has no more snapshots than this state
            nbytes = min(nbytes, self.nbytes)
        MEMORY.check(nbytes)
        drafter = None
        if self.drafter:
            block = self.drafter.capacity - self.kv_cache.capacity
            drafter = self.drafter.copy(length, capacity + block)
        new = State(self.kv_cache.copy(length, capacity, recurrent), drafter, self.size, nbytes)
        if self.drafter:
            new.context = [with_rows(x, mx.contiguous) for x in self.context_before(length)]
            mx.eval(new.context_arrays())
        return new

    def context_arrays(self) -> list[mx.array]:
        return [rows_of(part) for part in self.context]

    def recurrent_states(self) -> RecurrentStates | None:
        return self.kv_cache.recurrent_states() if self.kv_cache.state_counts else None

    def restore_recurrent(self, states: RecurrentStates) -> None:
        if (storage := self.kv_cache.storage) is not None:
            storage.states.replace(self.kv_cache.row, states)

    def to_host(self, x: mx.array) -> NDArray[Any]:
        return to_host(x)

    def from_host(self, x: NDArray[Any]) -> mx.array:
        return from_host(x)

    def export_recurrent(self, states: RecurrentStates) -> StateArrays:
        return {
            f"{layer}.{n}": to_host(x)
            for layer, parts in enumerate(states)
            for n, x in enumerate(parts)
            if x is not None
        }

    def load_recurrent(self, arrays: StateArrays) -> RecurrentStates:
        layers = by_numbers(arrays)
        return [
            [layers.get(layer, {}).get(n) for n in range(count)]
            for layer, count in enumerate(self.kv_cache.state_counts)
        ]

    def recurrent_arrays(self) -> list[mx.array]:
        """Return the snapshots: the present states are a part of the KV cache's storage."""
        return [x for states in self.snapshots for x in state_arrays(states)]

    def snapshot(self) -> None:
        super().snapshot()
        # The copies are evaluated now: a slice of a batch would keep the states of the other
        # sequences in memory.
        mx.eval(self.recurrent_arrays())

    def rollback(self, length: int, recurrent: RecurrentStates | None) -> None:
        super().rollback(length, recurrent)
        self.ahead = None

    def close(self) -> None:
        super().close()
        self.ahead = None
        MEMORY.drop_sequence(self)

    def read_recurrent_states(self) -> list[NDArray[np.float32]]:
        return self.kv_cache.read_states()
