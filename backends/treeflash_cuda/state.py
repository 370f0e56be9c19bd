"""The state of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.backend_base import BaseState, Unprojected, distinct, with_rows
from treeflash.decoding.interfaces import StateArrays
from treeflash_cuda.cache import Arena, KVCache, from_host, to_host
from treeflash_cuda.gpu.host_copies import host_copies
from treeflash_cuda.recurrent_states import CommittedStates, Key, RecurrentStates

MAX_UNPROJECTED = 32
"""Positions of a sequence that are projected at once while drafting pauses. Several layers have
several times as many numbers as features, so that more would take memory and save little."""

ContextPart: TypeAlias = Tensor | Unprojected
"""Projected features of n positions, or what they are computed from."""


class State(BaseState[KVCache, CommittedStates]):
    """`treeflash.decoding.interfaces.SequenceState` in PyTorch.

    The context are `ContextPart`s, (n, hidden_size) if they are projected. The outputs of a pass
    are by layer.
    """

    def __init__(
        self,
        target: Arena,  # for the target's keys and values
        drafter: Arena | None,  # for the drafter's; None if the sequence is not drafted for
        capacity: int,  # positions
        block: int = 0,  # rows that a draft writes after the committed positions
        recurrent: RecurrentStates | None = None,  # empty; None if the target has none
        takes_room: bool = True,  # whether it has its memory at once, where memory is reserved
    ) -> None:
        super().__init__(
            KVCache(target, capacity),
            drafter.new_cache(capacity + block) if drafter else None,
            None if recurrent is None else {},
        )
        self.arenas = target, drafter
        self.block = block
        self.recurrent = recurrent
        try:
            # Where memory is reserved, a sequence without room must not start.
            for cache in self._caches if takes_room else ():
                if cache.arena.is_reserved:
                    cache.allocate()
        except BaseException:
            super().close()
            raise

    @torch.inference_mode()
    def copy(self, length: int, capacity: int, recurrent: CommittedStates | None) -> State:
        states = None if self.recurrent is None else RecurrentStates(self.recurrent.transposed)
        new = type(self)(*self.arenas, capacity, self.block, states, False)
        try:
            if recurrent is not None:
                new.restore_recurrent(recurrent)
            following = self.tokens[length] if length < self.length else None
            new.kv_cache.copy_from(self.kv_cache, length, following)
            if self.drafter and new.drafter:
                new.drafter.copy_from(self.drafter, length)
                parts = self.context_before(length)
                new.context = [with_rows(part, torch.clone) for part in parts]
        except BaseException:
            new.close()  # pages of the arena are not given back by themselves
            raise
        return new

    @torch.inference_mode()
    def append(self, token_ids: Sequence[int], arrays: StateArrays) -> None:
        super().append(token_ids, arrays)

    @property
    def _caches(self) -> list[KVCache]:
        return [self.kv_cache, *([] if self.drafter is None else [self.drafter])]

    @property
    def shared_nbytes(self) -> int:
        return sum(cache.shared_nbytes for cache in self._caches)

    def shareable_nbytes(self, length: int) -> int:
        return sum(cache.shareable_nbytes(length) for cache in self._caches)

    def to_host(self, x: Tensor) -> NDArray[Any]:
        return to_host(x)

    def copies_end(self) -> Callable[[], None]:
        return host_copies().end()

    def from_host(self, x: NDArray[Any]) -> Tensor:
        return from_host(x).to(self.kv_cache.arena.device)

    def export_recurrent(self, states: CommittedStates) -> StateArrays:
        return {".".join(map(str, key)): to_host(x) for key, x in states.items()}

    def load_recurrent(self, arrays: StateArrays) -> CommittedStates:
        states: dict[Key, Tensor] = {}
        for name, x in arrays.items():
            kind, layer, n = map(int, name.split("."))
            states[kind, layer, n] = self.from_host(x)
        return states

    def recurrent_states(self) -> CommittedStates | None:
        return None if self.recurrent is None else self.recurrent.committed

    def restore_recurrent(self, states: CommittedStates) -> None:
        assert self.recurrent is not None
        self.recurrent.committed = states

    def recurrent_arrays(self) -> list[Tensor]:
        if self.recurrent is None:
            return []
        held = distinct((self.recurrent.committed, *self.snapshots))
        return [x for states in held for x in states.values()]

    def read_recurrent_states(self) -> list[NDArray[np.float32]]:
        return [] if self.recurrent is None else self.recurrent.read()


def has_many_unprojected(state: State) -> bool:
    """Return whether so many of the latest positions wait that they are better projected now."""
    context = state.context
    return len(context) >= MAX_UNPROJECTED and isinstance(context[-MAX_UNPROJECTED], Unprojected)
