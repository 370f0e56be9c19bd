"""The state of one text."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash_cuda.arena import Arena
from treeflash_cuda.cache import KeyValues
from treeflash_cuda.recurrent_states import Committed, RecurrentStates


class State:
    """`treeflash.decoding.text_state.TextState` in PyTorch.

    Attributes:
        key_values: the target's.
        recurrent: the states of its recurrent layers; None if it has none.
        drafter: the drafter's keys and values; None if the text is not drafted for.
        context: (n, hidden_size) each; projected features of positions that the drafter has not
            read yet, in order.
        outputs: of captured layers in the forward pass that ran the text last, by layer.
        first_row: of the text in that pass.
    """

    def __init__(
        self,
        target: Arena,
        drafter: Arena | None,
        capacity: int,
        block: int = 0,
        transposed: frozenset[int] | None = None,
    ) -> None:
        """Start empty.

        Args:
            target: for the target's keys and values.
            drafter: for the drafter's; None if the text is not drafted for.
            capacity: positions.
            block: rows that a draft writes after the committed positions.
            transposed: recurrent layers whose states have values before keys; None if the target
                has no recurrent layers.
        """
        self.arenas = target, drafter
        self.block = block
        self.transposed = transposed
        self.recurrent = None if transposed is None else RecurrentStates()
        self.key_values = KeyValues(target, capacity)
        self.drafter = KeyValues(drafter, capacity + block) if drafter else None
        self.context: list[Tensor] = []
        self.outputs: dict[int, Tensor] = {}
        self.first_row = 0

    @property
    def length(self) -> int:
        """See `TextState.length`."""
        return self.key_values.length

    @property
    def nbytes(self) -> int:
        """See `TextState.nbytes`."""
        drafter = self.drafter.nbytes if self.drafter else 0
        recurrent = self.recurrent.nbytes if self.recurrent else 0
        context = sum(part.nbytes for part in self.context)
        return self.key_values.nbytes + recurrent + drafter + context

    @property
    def needs_snapshots(self) -> bool:
        """See `TextState.needs_snapshots`."""
        return self.recurrent is not None

    def snapshot(self) -> None:
        """See `TextState.snapshot`."""
        if self.recurrent:
            self.recurrent.snapshots.take(self.length, self.recurrent.committed)

    def restorable(self, length: int) -> int:
        """See `TextState.restorable`."""
        if not self.recurrent or length >= self.length:
            return min(length, self.length)
        return self.recurrent.snapshots.longest(length)

    @torch.inference_mode()
    def fork(self, length: int, capacity: int) -> State:
        """See `TextState.fork`."""
        new = type(self)(*self.arenas, capacity, self.block, self.transposed)
        if self.recurrent and new.recurrent:
            new.recurrent.committed = self.recurrent.at(length, self.length)
            new.recurrent.snapshots = self.recurrent.snapshots.until(length)
        new.key_values.copy_from(self.key_values, length)
        if self.drafter and new.drafter:
            new.drafter.copy_from(self.drafter, length)
            new.context = [part.clone() for part in self._context_until(length)]
        return new

    def truncate(self, length: int) -> None:
        """See `TextState.truncate`."""
        length = min(self.length, length)
        self.go_back(length, self.recurrent.at(length, self.length) if self.recurrent else None)

    def go_back(self, length: int, recurrent: Committed | None) -> None:
        """Drop the positions from `length` on; the recurrent states were these."""
        if self.recurrent and recurrent is not None:
            self.recurrent.go_back(length, recurrent)
        self.key_values.length = length
        if self.drafter:
            self.context = self._context_until(length)
            self.drafter.length = min(self.drafter.length, length)

    def close(self) -> None:
        """See `TextState.close`."""
        if self.recurrent:
            self.recurrent = RecurrentStates()
        self.key_values.close()
        if self.drafter:
            self.drafter.close()
        self.context, self.outputs = [], {}

    def keys_values(self) -> NDArray[np.float32]:
        """See `TextState.keys_values`."""
        return self.key_values.read()

    def states(self) -> list[NDArray[np.float32]]:
        """See `TextState.states`."""
        return self.recurrent.read(self.transposed or frozenset()) if self.recurrent else []

    def drafter_keys_values(self) -> NDArray[np.float32]:
        """See `TextState.drafter_keys_values`."""
        assert self.drafter is not None
        return self.drafter.read()

    def _context_until(self, length: int) -> list[Tensor]:
        """The context of positions below `length`."""
        assert self.drafter is not None
        parts, first = [], self.drafter.length
        for part in self.context:
            if first < length:
                parts.append(part[: length - first])
            first += len(part)
        return parts
