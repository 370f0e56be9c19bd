"""Storage for the keys and values of many texts. A text's region never moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TypeAlias

import torch
from torch import Tensor

from treeflash.errors import ConfigError
from treeflash_cuda.graphs import Store
from treeflash_cuda.quantised import KV_BITS, SCALE_BYTES, dequantise, quantise

SLAB_BYTES = 64 << 20
"""The least that is allocated at once, so that short texts share an allocation."""

Span: TypeAlias = tuple[torch.device, int]
"""A device, and how many layers in a row it has."""


class Stored:
    """Keys and values of all layers.

    Attributes:
        parts: (layers, 2, kv_heads, columns, head_dim) each, or `quantise`'s width; one for each
            device that has layers, in their order.
    """

    parts: Sequence[Tensor]

    @property
    def storage(self) -> Tensor:
        """The only part of a model on one device."""
        (part,) = self.parts
        return part

    def layer(self, n: int) -> Tensor:
        """(2, kv_heads, columns, head_dim) of a layer."""
        for part in self.parts:
            if n < len(part):
                return part[n]
            n -= len(part)
        raise IndexError("there is no such layer")

    @property
    def columns(self) -> int:
        """How many there are."""
        return self.parts[0].shape[3]

    @property
    def nbytes(self) -> int:
        """Of all parts, bytes."""
        return sum(part.nbytes for part in self.parts)


@dataclass(eq=False)
class Region(Stored):
    """The columns of one text.

    Attributes:
        parts: see `Stored`.
        slab: the allocation that it is part of.
        first: its first column there.
    """

    parts: Sequence[Tensor]
    slab: Slab
    first: int


class Slab(Stored):
    """One allocation on each device, and which columns are free.

    Attributes:
        graphs: functions that are bound to its address.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        """Start with every column free."""
        self.parts = parts
        self.graphs: Store = {}
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
                columns = slice(first, first + capacity)
                return Region([x[:, :, :, columns] for x in self.parts], self, first)
        return None

    def give_back(self, region: Region) -> None:
        """Make a region's columns free."""
        gaps: list[tuple[int, int]] = []
        for first, size in sorted([*self.free, (region.first, region.columns)]):
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
        spans: devices, and how many layers in a row each one has; None is one device.
    """

    def __init__(
        self,
        layers: int,
        column_nbytes: int = 0,
        dtype: torch.dtype | None = None,
        spans: Sequence[Span] | None = None,
    ) -> None:
        """Start without memory.

        Args:
            layers: of the model.
            column_nbytes: size of a column, if it is known already.
            dtype: see `dtype`.
            spans: see `spans`.
        """
        self.layers = layers
        self.column_nbytes = column_nbytes
        self.dtype = dtype
        self.spans = spans
        self.least_nbytes: int | None = None
        self.lock = Lock()
        self.slabs: list[Slab] = []

    def resized(self, layers: int, like: Region | None, dtype: torch.dtype | None) -> Arena:
        """An empty arena for so many layers whose keys have the shape of these; see `dtype`."""
        if like is None:
            return Arena(layers)
        _, _, heads, _, width = like.parts[0].shape
        size = width * like.parts[0].itemsize if dtype is None else width + SCALE_BYTES
        return Arena(layers, 2 * layers * heads * size, dtype, self.spans)

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
        shape = 2, like.shape[1], columns, like.shape[3]
        spans = self.spans or [(like.device, self.layers)]
        with torch.inference_mode():
            parts = [torch.empty((n, *shape), dtype=like.dtype, device=x) for x, n in spans]
        self.slabs.append(Slab(parts))
        region = self.slabs[-1].take(capacity)
        assert region is not None
        return region


def check_quantisation(bits: int, like: Region | None, family: str) -> None:
    """Raise for keys and values that cannot be kept in so many bits.

    Args:
        bits: for a number.
        like: keys and values as they are; None if there are none.
        family: the type of the model, for the message.
    """
    if bits != KV_BITS:
        raise ConfigError(f"the cuda backend has --kv-bits {KV_BITS} alone, got {bits}")
    if like is not None and (width := like.parts[0].shape[4]) % SCALE_BYTES:
        raise ConfigError(
            f"quantised keys and values need heads whose width is a multiple of {SCALE_BYTES}, "
            f"{family} has {width}; leave --kv-bits out"
        )
