"""The state of one text."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.one_by_one import WithoutRecurrence
from treeflash_cuda.arena import Arena
from treeflash_cuda.cache import KeyValues


class State(WithoutRecurrence):
    """`treeflash.decoding.interfaces.TextState` in PyTorch.

    Attributes:
        key_values: the target's.
        drafter: the drafter's keys and values; None if the text is not drafted for.
        context: (n, hidden_size) each; projected features of positions that the drafter has not
            read yet, in order.
        outputs: of captured layers in the forward pass that ran the text last, by layer.
        first_row: of the text in that pass.
    """

    def __init__(self, target: Arena, drafter: Arena | None, capacity: int, block: int = 0) -> None:
        """Start empty.

        Args:
            target: for the target's keys and values.
            drafter: for the drafter's; None if the text is not drafted for.
            capacity: positions.
            block: rows that a draft writes after the committed positions.
        """
        self.arenas = target, drafter
        self.block = block
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
        return self.key_values.nbytes + drafter + sum(part.nbytes for part in self.context)

    @torch.inference_mode()
    def fork(self, length: int, capacity: int) -> State:
        """See `TextState.fork`."""
        new = State(*self.arenas, capacity, self.block)
        new.key_values.copy_from(self.key_values, length)
        if self.drafter and new.drafter:
            new.drafter.copy_from(self.drafter, length)
            new.context = [part.clone() for part in self._context_until(length)]
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
        self.context, self.outputs = [], {}

    def keys_values(self) -> NDArray[np.float32]:
        """See `TextState.keys_values`."""
        return self.key_values.read()

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
