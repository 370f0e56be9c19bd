"""Recurrent states of all sequences in one place, as CUDA graphs need them.

The problem. A graph reads fixed addresses, but each pass runs other sequences. Their states are
far too large to be copied into the inputs of every graph.

The idea. The states lie in the slots of an arena, and the numbers of the slots are an input.
States are never changed in place: a commit writes to a free slot, and the slot of the states before
is free again as soon as nothing refers to them. So snapshots and forks share slots, and a pass that
fails has changed nothing.

An example. Sequences a and b are in the slots 1 and 2. A pass reads both, and its commit writes the
states of a to slot 3. Slot 1 is free then, unless a snapshot keeps it.

The rule: slot 0 has zeros, the states of empty sequences, and is never written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.hybrid import convolution_tail
from treeflash_cuda.operations import Operations
from treeflash_cuda.recurrence import PATH_COLUMNS
from treeflash_cuda.recurrent_states import MATRIX, TAIL, CommittedStates, Key, RecurrentStates

MIN_SLOTS = 8


class StateArena:
    """Hands out slots, each with the states of all recurrent layers of one sequence.

    States of one shape form a group, which has a tensor. The groups of tails come before the groups
    of matrices.
    """

    def __init__(self, states: CommittedStates, transposed: frozenset[int]) -> None:
        """Take the shapes from the states of any sequence; see `RecurrentStates.transposed`."""
        groups: dict[tuple[int, torch.Size, torch.dtype, bool], list[Key]] = {}
        for key in sorted(states):
            kind, layer, _ = key
            dtype = torch.float32 if kind == MATRIX else states[key].dtype
            shape = kind, states[key].shape[1:], dtype, layer in transposed
            groups.setdefault(shape, []).append(key)
        self.groups = list(groups.values())
        self.tails = sum(keys[0][0] == TAIL for keys in self.groups)  # groups of tails
        self.is_transposed = [keys[0][1] in transposed for keys in self.groups]
        # A state has a group, and an index in the group.
        self.places = {
            key: (g, i) for g, keys in enumerate(self.groups) for i, key in enumerate(keys)
        }
        # (slots, layers, ...) of each group.
        self.tensors = [
            states[keys[0]].new_zeros((1, len(keys), *shape), dtype=dtype)
            for (_, shape, dtype, _), keys in groups.items()
        ]
        self.free: list[int] = []
        self._lock = Lock()

    @property
    def slots(self) -> int:
        return len(self.tensors[0])

    def matrices(self, group: int) -> Tensor:
        """Return the (slots, layers, heads, key_dim, value_dim) of a group."""
        x = self.tensors[group]
        return x.mT if self.is_transposed[group] else x

    @property
    def matrix_shapes(self) -> tuple[tuple[int, int, int, bool], ...]:
        """The heads, key_dim and value_dim of each group, and whether it is transposed."""
        groups = range(self.tails, len(self.groups))
        return tuple((*self.matrices(g).shape[2:], self.is_transposed[g]) for g in groups)

    @property
    def tail_shapes(self) -> tuple[tuple[int, int], ...]:
        """The channels and the kernel of each group of tails."""
        return tuple((x.shape[2], x.shape[3] + 1) for x in self.tensors[: self.tails])

    def reserve(self, count: int) -> None:
        """Make room for `count` states, so that the arena does not have to grow for them."""
        with self._lock:
            if (more := count + 1 - self.slots) > 0:
                self._grow(more)

    def take(self, count: int) -> list[SlotStates]:
        """Take free slots, whose states the caller must write."""
        with self._lock:
            if (missing := count - len(self.free)) > 0:
                self._grow(max(missing, self.slots, MIN_SLOTS - 1))
            return [SlotStates(self, self.free.pop()) for _ in range(count)]

    def adopt(self, states: RecurrentStates) -> SlotStates | None:
        """Put the committed states of a sequence in a slot; return None if it is empty."""
        committed = states.committed
        if not committed:
            return None
        if not isinstance(committed, SlotStates):
            (new,) = self.take(1)
            for key, state in committed.items():
                new[key].copy_(state)
            states.committed = committed = new
        return committed

    def _grow(self, count: int) -> None:
        first, grown = self.slots, []
        for x in self.tensors:
            new = x.new_zeros((first + count, *x.shape[1:]))
            new[:first] = x
            grown.append(new)
        self.tensors = grown  # all groups or none: memory may run out for the last one
        self.free += reversed(range(first, first + count))


class SlotStates(Mapping[Key, Tensor]):
    """The states in a slot, which is free again when this is deleted."""

    def __init__(self, arena: StateArena, slot: int) -> None:
        self.arena = arena
        self.slot = slot

    def __getitem__(self, key: Key) -> Tensor:
        group, i = self.arena.places[key]
        return self.arena.tensors[group][self.slot, i][None]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.arena.places)

    def __len__(self) -> int:
        return len(self.arena.places)

    def __del__(self) -> None:
        self.arena.free.append(self.slot)


class WrittenTree(NamedTuple):
    """What one of the trees of a pass wrote."""

    writes: TreeWrites
    tree: int  # its index among the trees


@dataclass(frozen=True, eq=False)
class TreeWrites:
    """What the trees of several sequences write to the states of all layers, n nodes each."""

    arena: StateArena
    operations: Operations
    nodes: int  # n
    before: Sequence[SlotStates | None]  # the states of the sequences; None of an empty one
    # (layers, trees, kernel - 1 + n, channels) inputs of convolutions for each group of tails; and
    # the first three arguments of `commit_recurrence` for each group of matrices.
    outputs: Sequence[Tensor]

    def rows(
        self, paths: Mapping[int, NDArray[np.int32]], after: Sequence[SlotStates]
    ) -> NDArray[np.int32]:
        """Return the (paths, ...) int32 argument of `commit`.

        A row is an argument of `commit_recurrence`, and then the rows of each group's tail.
        """
        widths = [x.shape[3] for x in self.arena.tensors[: self.arena.tails]]
        rows = np.zeros((len(paths), PATH_COLUMNS + self.nodes + sum(widths)), np.int32)
        for row, (tree, path), new in zip(rows, paths.items(), after, strict=True):
            old = self.before[tree]
            row[:PATH_COLUMNS] = tree, 0 if old is None else old.slot, new.slot, len(path)
            row[PATH_COLUMNS : PATH_COLUMNS + len(path)] = path
            tails = [convolution_tail(path, width + 1) for width in widths]
            row[PATH_COLUMNS + self.nodes :] = np.concatenate([path[:0], *tails])
        return rows

    def commit(self, rows: Tensor) -> None:
        """Write the states of sequences after their paths, from the result of `rows`."""
        arena, first = self.arena, PATH_COLUMNS + self.nodes
        trees, _, after, _ = rows[:, :PATH_COLUMNS].long().unbind(1)
        for group in range(arena.tails):
            tails, inputs = arena.tensors[group], self.outputs[group]
            index = rows[:, first : first + tails.shape[3]].long()
            first += tails.shape[3]
            last = inputs[:, trees[:, None], index]  # (layers, sequences, kernel - 1, channels)
            tails.index_copy_(0, after, last.permute(1, 0, 3, 2))
        paths = rows[:, : PATH_COLUMNS + self.nodes]
        for group in range(arena.tails, len(arena.groups)):
            tape = self.outputs[arena.tails + 3 * (group - arena.tails) :][:3]
            self.operations.commit_recurrence(*tape, arena.matrices(group), paths)
