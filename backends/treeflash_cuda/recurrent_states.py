"""States of the recurrent layers of one text: committed ones, and what a block leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.snapshots import Snapshots
from treeflash_cuda.recurrence import Writes

Key: TypeAlias = tuple[int, int]
"""A layer, and which of its states."""


@dataclass(frozen=True, eq=False)
class Committed:
    """States after the last committed position. No tensor is ever changed in place.

    Attributes:
        tails: (1, channels, kernel - 1) the last inputs of each short convolution.
        matrices: (1, heads, key_dim, value_dim) or, of Mamba-2, (1, heads, value_dim, key_dim).
    """

    tails: Mapping[Key, Tensor] = field(default_factory=dict)
    matrices: Mapping[Key, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """All states."""
        return [*self.tails.values(), *self.matrices.values()]


class RecurrentStates:
    """The states of one text.

    Attributes:
        committed: after the last committed position.
        snapshots: of them at earlier lengths.
        inputs: of convolutions, and kernel - 1: the tail and the block that was run last, (1,
            channels, kernel - 1 + n), or their end alone if the whole block will be committed.
        pending: matrices after that block, or what its nodes write.
    """

    def __init__(self) -> None:
        """Start before the first token."""
        self.committed = Committed()
        self.snapshots: Snapshots[Committed] = Snapshots()
        self.begin()

    @property
    def nbytes(self) -> int:
        """Device memory of the committed states and the snapshots, bytes."""
        held = (tensor for states in (self.committed, *self.snapshots) for tensor in states.tensors)
        return sum({id(tensor): tensor.nbytes for tensor in held}.values())

    def begin(self) -> None:
        """Forget the last block."""
        self.inputs: dict[Key, tuple[Tensor, int]] = {}
        self.pending: dict[Key, Tensor | Writes] = {}

    def after(self, path: Tensor) -> Committed:
        """The states once a path of the last block is committed; path: (a,) nodes."""
        matrices = {
            key: value.commit(path) if isinstance(value, Writes) else value
            for key, value in self.pending.items()
        }
        return Committed(
            {key: _tail(x, path, width) for key, (x, width) in self.inputs.items()},
            matrices,
        )

    def at(self, length: int, present: int) -> Committed:
        """The states at a length that can be restored; `present` is the committed one."""
        if length == present:
            return self.committed
        return self.snapshots.at(length) if length else Committed()

    def go_on(self, committed: Committed) -> None:
        """Replace the states by those that `after` returned."""
        self.committed = committed
        self.begin()

    def go_back(self, length: int, committed: Committed) -> None:
        """Replace the states by those of a smaller length."""
        self.committed = committed
        self.snapshots.truncate(length)
        self.begin()

    def read(self, transposed: frozenset[int]) -> list[NDArray[np.float32]]:
        """See `TextState.states`; `transposed`: layers whose matrices have values first."""
        states = [(layer, 0, n, x[0].T) for (layer, n), x in self.committed.tails.items()]
        for (layer, n), x in self.committed.matrices.items():
            states.append((layer, 1, n, x[0].transpose(1, 2) if layer in transposed else x[0]))
        states.sort(key=lambda state: state[:3])
        return [state.float().cpu().numpy() for *_, state in states]


def _tail(inputs: Tensor, path: Tensor, width: int) -> Tensor:
    """The last inputs once a path is committed; see `convolution_tail` of the core."""
    if inputs.shape[2] == width:
        return inputs
    rows = torch.cat([torch.arange(width, device=path.device), path + width])
    return inputs.index_select(2, rows[len(path) :])
