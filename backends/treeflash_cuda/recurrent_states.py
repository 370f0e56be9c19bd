"""The recurrent states of sequences, their rows in a pass, and what commits after it need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.hybrid import convolution_windows
from treeflash.decoding.tree import DraftTree
from treeflash_cuda.numerics import upload
from treeflash_cuda.recurrence import TreeNodes, state_update

TAIL, MATRIX = 0, 1
"""Kinds of states."""

Key: TypeAlias = tuple[int, int, int]
"""The kind of a state, its layer, and its index among the layer's states of this kind."""
CommittedStates: TypeAlias = Mapping[Key, Tensor]
"""States after the last committed position. No tensor is ever changed in place.

A tail is (1, channels, kernel - 1), the last inputs of a short convolution. A matrix is (1, heads,
key_dim, value_dim) or, if it is transposed, (1, heads, value_dim, key_dim).
"""


@dataclass(frozen=True, eq=False)
class Writes:
    """The updates of a layer's state by the nodes of a tree."""

    state: Tensor  # (1, heads, key_dim, value_dim) before the tree
    u: Tensor  # (1, heads, n, value_dim)
    k: Tensor  # (1, heads, n, key_dim)
    log_g: Tensor  # (1, heads, n, 1) log decays, or (1, heads, n, key_dim) of channels
    transposed: bool = False  # whether states are kept as (1, heads, value_dim, key_dim)

    def commit(self, path: Tensor) -> Tensor:
        """Compute the state after a path of (a,) nodes."""
        u, k, log_g = (x.index_select(2, path) for x in (self.u, self.k, self.log_g))
        update, decay = state_update(u, k, log_g)
        after = torch.addcmul(update, decay, self.state)
        return after.mT.contiguous() if self.transposed else after


@dataclass(frozen=True, eq=False)
class SequenceWrites:
    """What recurrent layers wrote for the rows of one sequence, where sequences run in turn."""

    # Inputs of convolutions, and kernel - 1. The inputs are the tail and the n rows, (1, channels,
    # kernel - 1 + n), or only their end if all rows will be committed.
    inputs: dict[Key, tuple[Tensor, int]] = field(default_factory=dict)
    # matrices after all rows, or the writes of nodes
    matrices: dict[Key, Tensor | Writes] = field(default_factory=dict)

    def states_after(self, path: Tensor) -> CommittedStates:
        """Compute the states after a path of (a,) nodes."""
        tails = {key: _tail(x, path, width) for key, (x, width) in self.inputs.items()}
        return tails | {
            key: value.commit(path) if isinstance(value, Writes) else value
            for key, value in self.matrices.items()
        }


class RecurrentStates:
    def __init__(self, transposed: frozenset[int]) -> None:
        self.transposed = transposed  # layers whose matrices have values before keys
        self.committed: CommittedStates = {}  # after the last committed position

    def read(self) -> list[NDArray[np.float32]]:
        states = []
        for kind, layer, n in sorted(self.committed, key=lambda key: (key[1], key[0], key[2])):
            state = self.committed[kind, layer, n][0]
            if kind == TAIL or layer in self.transposed:
                state = state.mT
            states.append(state.float().cpu().numpy().copy())  # a slot is written again later
        return states


def _tail(inputs: Tensor, path: Tensor, width: int) -> Tensor:
    """Return (1, channels, width) last inputs after (a,) nodes; see `convolution_tail`."""
    if inputs.shape[2] == width:
        return inputs
    rows = torch.cat([torch.arange(width, device=path.device), path + width])
    return inputs.index_select(2, rows[len(path) :])


@dataclass(frozen=True, eq=False)
class SequenceRows:
    """The rows of one sequence in a forward pass."""

    states: RecurrentStates  # the states of the sequence
    first: int  # the first row
    count: int  # number of rows
    # The rows are the nodes of this tree; None if they are the next tokens of the sequence, all of
    # which will be committed.
    tree: DraftTree | None
    ancestors: Tensor | None  # (count, count) bool of the tree
    writes: SequenceWrites = field(default_factory=SequenceWrites)  # what the layers write for them

    @property
    def nodes(self) -> TreeNodes:
        assert self.tree is not None
        assert self.ancestors is not None
        return TreeNodes(self.ancestors[None], self.tree.parents)

    def select(self, x: Tensor, axis: int = 1) -> Tensor:
        """Select the rows of this sequence in a tensor of all rows."""
        return x.narrow(axis, self.first, self.count)


def plan_windows(parts: Sequence[SequenceRows], kernel: int, device: torch.device) -> Tensor:
    """Return the (n, kernel) inputs that each row's convolution reads.

    The inputs are the last inputs of a sequence and the inputs of its rows, sequence by sequence.
    """
    windows, first = [], 0
    for part in parts:
        tree = part.tree or DraftTree.chain(np.zeros(part.count, np.int32))
        windows.append(first + convolution_windows(tree.parents, kernel))
        first += kernel - 1 + part.count
    return upload(np.concatenate(windows), device).long()
