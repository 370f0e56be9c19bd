"""Storage for the keys and values of many texts. A text's region never moves."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from treeflash_cuda.graphs import Store
from treeflash_cuda.quantised import dequantise, quantise

SLAB_BYTES = 64 << 20
"""The least that is allocated at once, so that short texts share an allocation."""


@dataclass(eq=False)
class Region:
    """The columns of one text.

    Attributes:
        storage: (layers, 2, kv_heads, capacity, head_dim), or `quantise`'s width.
        slab: the allocation that it is part of.
        first: its first column there.
    """

    storage: Tensor
    slab: Slab
    first: int


class Slab:
    """One allocation, and which columns of it are free.

    Attributes:
        storage: (layers, 2, kv_heads, columns, head_dim), or `quantise`'s width.
        graphs: functions that are bound to its address.
    """

    def __init__(self, storage: Tensor) -> None:
        """Start with every column free."""
        self.storage = storage
        self.graphs: Store = {}
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
    """Hands out regions. The first keys that are stored fix their shape.

    Attributes:
        least_nbytes: the least that is allocated at once; None is `SLAB_BYTES`.
        dtype: that keys and values are read in if they are kept in 8 bits; None keeps them as they
            are.
    """

    def __init__(
        self, layers: int, column_nbytes: int = 0, dtype: torch.dtype | None = None
    ) -> None:
        """Start without memory.

        Args:
            layers: of the model.
            column_nbytes: size of a column, if it is known already.
            dtype: see `dtype`.
        """
        self.layers = layers
        self.column_nbytes = column_nbytes
        self.dtype = dtype
        self.least_nbytes: int | None = None
        self.lock = Lock()
        self.slabs: list[Slab] = []

    def nbytes(self, capacity: int) -> int:
        """Size of a region for so many columns, bytes; 0 before any keys were stored."""
        return capacity * self.column_nbytes

    def stored(self, x: Tensor) -> Tensor:
        """Keys or values, as they are stored."""
        return x if self.dtype is None else quantise(x)

    def read(self, x: Tensor) -> Tensor:
        """Stored keys or values, as they are read."""
        return x if self.dtype is None else dequantise(x, self.dtype)

    def take(self, capacity: int, like: Tensor) -> Region:
        """A region for so many columns.

        Args:
            capacity: columns.
            like: (1, kv_heads, n, width) stored keys of a layer.
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
        least = SLAB_BYTES if self.least_nbytes is None else self.least_nbytes
        columns = max(capacity, least // self.column_nbytes)
        shape = self.layers, 2, like.shape[1], columns, like.shape[3]
        with torch.inference_mode():
            self.slabs.append(Slab(torch.empty(shape, dtype=like.dtype, device=like.device)))
        region = self.slabs[-1].take(capacity)
        assert region is not None
        return region
