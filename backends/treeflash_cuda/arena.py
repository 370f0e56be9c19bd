"""Storage for the keys and values of many texts. A text's region never moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor

SLAB_BYTES = 64 << 20
"""The least that is allocated at once, so that short texts share an allocation."""


@dataclass(eq=False)
class Region:
    """The columns of one text.

    Attributes:
        storage: (layers, 2, kv_heads, capacity, head_dim).
        slab: the allocation that it is part of.
        first: its first column there.
        static_forwards: forward passes with static shapes that are bound to these addresses.
    """

    storage: Tensor
    slab: Slab
    first: int
    static_forwards: dict[Any, Any] = field(default_factory=dict)


class Slab:
    """One allocation, and which columns of it are free."""

    def __init__(self, storage: Tensor) -> None:
        """Start with every column free."""
        self.storage = storage
        self.columns = storage.shape[3]
        self.free = [(0, self.columns)]  # first column and number of columns, ascending

    @property
    def is_free(self) -> bool:
        """Whether no text uses it."""
        return self.free == [(0, self.columns)]

    def take(self, capacity: int) -> Region | None:
        """A region in the first gap that is large enough."""
        for i, (first, size) in enumerate(self.free):
            if size >= capacity:
                rest = [(first + capacity, size - capacity)] if size > capacity else []
                self.free[i : i + 1] = rest
                return Region(self.storage[:, :, :, first : first + capacity], self, first)
        return None

    def give_back(self, region: Region) -> None:
        """Make a region's columns free."""
        gaps: list[tuple[int, int]] = []
        for first, size in sorted([*self.free, (region.first, region.storage.shape[3])]):
            if gaps and sum(gaps[-1]) == first:
                gaps[-1] = gaps[-1][0], gaps[-1][1] + size
            else:
                gaps.append((first, size))
        self.free = gaps


class Arena:
    """Hands out regions. The first keys that are stored fix their shape."""

    def __init__(self, layers: int, column_nbytes: int = 0) -> None:
        """Start without memory.

        Args:
            layers: of the model.
            column_nbytes: size of a column, if it is known already.
        """
        self.layers = layers
        self.column_nbytes = column_nbytes
        self.lock = Lock()
        self.slabs: list[Slab] = []

    def nbytes(self, capacity: int) -> int:
        """Size of a region for so many columns, bytes; 0 before any keys were stored."""
        return capacity * self.column_nbytes

    def take(self, capacity: int, like: Tensor) -> Region:
        """A region for so many columns.

        Args:
            capacity: columns.
            like: (1, kv_heads, n, head_dim) keys of a layer.
        """
        with self.lock:
            return self._take(capacity, like)

    def give_back(self, region: Region) -> None:
        """Take a region back; of the slabs that are free afterwards the smallest is kept."""
        with self.lock:
            region.slab.give_back(region)
            free = sorted((slab for slab in self.slabs if slab.is_free), key=lambda x: x.columns)
            for slab in free[1:]:
                self.slabs.remove(slab)

    def _take(self, capacity: int, like: Tensor) -> Region:
        self.column_nbytes = 2 * self.layers * like.shape[1] * like.shape[3] * like.element_size()
        for slab in self.slabs:
            if region := slab.take(capacity):
                return region
        columns = max(capacity, SLAB_BYTES // self.column_nbytes)
        shape = self.layers, 2, like.shape[1], columns, like.shape[3]
        with torch.inference_mode():
            self.slabs.append(Slab(torch.empty(shape, dtype=like.dtype, device=like.device)))
        region = self.slabs[-1].take(capacity)
        assert region is not None
        return region


class StaticArena(Arena):
    """An arena for static shapes: a text leaves its region, with the graphs for it, to the next.

    Capacities are rounded up to powers of two, so that regions have few sizes.

    Attributes:
        spare: regions that no text uses.
    """

    def __init__(self, layers: int, column_nbytes: int = 0) -> None:
        """See `Arena`."""
        super().__init__(layers, column_nbytes)
        self.spare: list[Region] = []

    def nbytes(self, capacity: int) -> int:
        """See `Arena.nbytes`; a region that a larger text left may be larger."""
        return super().nbytes(_power_of_two(capacity))

    def take(self, capacity: int, like: Tensor) -> Region:
        """See `Arena.take`; the smallest spare region that is large enough, if there is one."""
        size = _power_of_two(capacity)
        with self.lock:
            fitting = [region for region in self.spare if region.storage.shape[3] >= size]
            if fitting:
                region = min(fitting, key=lambda region: region.storage.shape[3])
                self.spare.remove(region)
            else:
                region = self._take(size, like)
        with torch.inference_mode():
            region.storage.zero_()  # masked columns take part too, and must not be NaN
        return region

    def give_back(self, region: Region) -> None:
        """Keep a region for another text."""
        with self.lock:
            self.spare.append(region)


def _power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()
