"""The KV caches of sequences: regions of an arena, committed in place.

Keys and values may be stored in 8 bits. Everything that moves columns (commits, forks, batches)
moves bytes and does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import GIB
from treeflash.decoding.interfaces import StateArrays
from treeflash.errors import ConfigError, MemoryInUseError, UnsupportedModelError
from treeflash_cuda.gpu.host_copies import host_copies

KV_BITS = 8
MAX_INT8 = 127
SCALE_BYTES = 4
"""A float32, which must begin at a multiple of its size: so must the head's width."""

WIDE_ALIGNMENT = 8
"""Elements: products of other widths have kernels for their edges, which add in another order."""

SLAB_BYTES = 64 << 20
"""The least that is allocated at once, so that short sequences share an allocation."""


DIFFERENT_SHAPES = (
    "their layers have keys and values of different shapes, which the cuda backend's cache does "
    "not support"
)

Span: TypeAlias = tuple[torch.device, int]
"""A device, and its number of consecutive layers."""

Columns: TypeAlias = list[tuple[Tensor, Tensor]]
"""Views of some columns of every layer, (1, kv_heads, n, width) keys and values each."""


def to_host(x: Tensor) -> NDArray[Any]:
    """Copy the bits of a tensor; see `StateArrays`. From a GPU it is a copy of `host_copies`."""
    x = x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
    if x.device.type == "cuda":
        return host_copies().begin(x).numpy()
    return x.clone(memory_format=torch.contiguous_format).numpy()


def from_host(x: NDArray[Any]) -> Tensor:
    """Return the tensor, on the CPU, that `to_host` read."""
    tensor = torch.from_numpy(x)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def quantise(x: Tensor) -> Tensor:
    """Return the (..., head_dim + 4) int8 from (..., head_dim) keys or values.

    The scale lies behind the numbers, so that a column is read, moved and stored as one. Columns of
    132 or 260 bytes are aligned to 4 bytes alone, which loads of a GPU then have; 16 bytes would
    take 9 or 5 % more memory.
    """
    least = torch.finfo(x.dtype).tiny
    scale = (x.abs().amax(-1, keepdim=True) / MAX_INT8).clamp(min=least).float()
    numbers = (x.float() / scale).round().clamp(-MAX_INT8, MAX_INT8).to(torch.int8)
    return torch.cat([numbers, scale.view(torch.int8)], -1)


def dequantise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (..., head_dim) keys or values of a dtype, from the result of `quantise`."""
    numbers, scale = x.split([x.shape[-1] - SCALE_BYTES, SCALE_BYTES], -1)
    # One kernel reads bytes and writes floats.
    return numbers * scale.view(torch.float32).to(dtype)


def decoded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (..., head_dim) keys or values of a dtype, which may be the result of `quantise`."""
    return dequantise(x, dtype) if x.dtype == torch.int8 else x


def widen(x: Tensor) -> Tensor:
    """Return (..., width) float32 keys or values, filled up with ones, as exact mode reads them.

    The width is the next multiple of `WIDE_ALIGNMENT` above head_dim.
    """
    missing = WIDE_ALIGNMENT - x.shape[-1] % WIDE_ALIGNMENT
    return F.pad(x.float(), (0, missing), value=1.0)


def check_quantisation(width: int, family: str) -> None:
    """Raise a ConfigError if keys of this width cannot be stored in `KV_BITS` bits."""
    if width % SCALE_BYTES:
        raise ConfigError(
            f"kv_bits needs attention heads whose width is a multiple of {SCALE_BYTES}, but "
            f"{family} has heads of width {width}; remove kv_bits"
        )


class KVStorage:
    """Keys and values of all layers."""

    # (layers, 2, kv_heads, columns, head_dim) each, or `quantise`'s width; one for each device that
    # has layers, in the order of the layers.
    parts: Sequence[Tensor]

    def gather(self, columns: Tensor) -> list[Tensor]:
        """Copy n columns of every part, (layers, 2, kv_heads, n, head_dim) each."""
        return [x.index_select(3, columns.to(x.device)) for x in self.parts]

    def write(self, columns: Tensor, copies: Sequence[Tensor]) -> None:
        """Write what `gather` copied to n columns."""
        for part, copy in zip(self.parts, copies, strict=True):
            part.index_copy_(3, columns.to(part.device), copy)

    @property
    def storage(self) -> Tensor:
        """The only part of a model on one device."""
        (part,) = self.parts
        return part

    def layer(self, n: int) -> Tensor:
        """Return the (2, kv_heads, columns, head_dim) of a layer."""
        part = 0
        while n >= len(self.parts[part]):
            n -= len(self.parts[part])
            part += 1
        return self.parts[part][n]

    def write_layer(self, columns: Tensor, k: Tensor, v: Tensor, layer: int = 0) -> None:
        """Write (1, kv_heads, n, width) stored keys and values to n columns of a layer."""
        for storage, new in zip(self.layer(layer), (k, v), strict=True):
            storage.index_copy_(1, columns, new[0])

    def views(self, columns: slice, width: int | None = None) -> Columns:
        """View some columns of all layers, without the numbers that follow the first `width`.

        They are made for all layers at once.
        """
        parts = [x[:, :, None, :, columns, :width].flatten(0, 1).unbind(0) for x in self.parts]
        views = [view for part in parts for view in part]
        return list(zip(views[::2], views[1::2], strict=True))

    @property
    def columns(self) -> int:
        return self.parts[0].shape[3]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(eq=False)
class Region(KVStorage):
    """The columns of one sequence."""

    parts: Sequence[Tensor]
    slab: Slab  # the allocation that contains the columns
    first: int  # the first of the columns in the slab


class Slab(KVStorage):
    """One allocation on each device."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts
        self.free = [(0, self.columns)]  # first column and size of every gap, ascending

    @property
    def is_free(self) -> bool:
        return self.free == [(0, self.columns)]

    def take(self, capacity: int) -> Region | None:
        """Take a region in the first gap that is large enough."""
        for i, (first, size) in enumerate(self.free):
            if size >= capacity:
                rest = [(first + capacity, size - capacity)] if size > capacity else []
                self.free[i : i + 1] = rest
                return Region([x.narrow(3, first, capacity) for x in self.parts], self, first)
        return None

    def give_back(self, region: Region) -> None:
        gaps: list[tuple[int, int]] = []
        for first, size in sorted([*self.free, (region.first, region.columns)]):
            if gaps and sum(gaps[-1]) == first:
                gaps[-1] = gaps[-1][0], gaps[-1][1] + size
            else:
                gaps.append((first, size))
        self.free = gaps


class Arena:
    """Hands out regions. The first keys that are stored fix their shape."""

    def __init__(
        self,
        layers: int,
        dtype: torch.dtype | None = None,
        spans: Sequence[Span] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.layers = layers  # the layers of the model
        self.column_nbytes = 0  # bytes of a column in all layers; 0 as long as it is unknown
        # Keys and values are stored in this format; None stores them as they are.
        self.dtype = dtype
        self.device = device  # the device of the model's first layer; None of a drafter's
        self.spans = spans  # devices and their numbers of layers; None for one device
        # Keys and values that `widen` makes have this width; it is None for other formats.
        self.head_dim: int | None = None
        # Stored keys have this form, (1, kv_heads, any, width); it is None as long as it is
        # unknown.
        self.like: Tensor | None = None
        # The only slab has this many bytes and is kept for ever; None or 0 allocates slabs of at
        # least `slab_nbytes` as they are needed.
        self.reserved_nbytes: int | None = None
        self.slab_nbytes = SLAB_BYTES
        self.lock = Lock()
        self.slabs: list[Slab] = []

    @property
    def is_reserved(self) -> bool:
        """Whether all regions lie in one slab, whose size and shape are known."""
        return bool(self.reserved_nbytes) and self.like is not None

    def resized(self, layers: int, like: Region | None, dtype: torch.dtype | None) -> Arena:
        """Create an empty arena for `layers` layers of keys like `like`; see `Arena.dtype`."""
        if like is None:
            return Arena(layers, device=self.device)
        keys = like.parts[0][0, :1]
        arena = Arena(layers, dtype=dtype, spans=self.spans, device=self.device)
        arena.set_shape(arena.encode(keys[:, :, :1]))
        return arena

    def widened(self) -> Arena:
        """Create an empty arena for the same keys and values in the format of exact mode."""
        assert self.like is not None
        arena = Arena(self.layers, dtype=self.like.dtype, spans=self.spans, device=self.device)
        arena.head_dim = self.like.shape[-1]
        arena.set_shape(widen(self.like))
        return arena

    def set_shape(self, like: Tensor) -> None:
        """Fix the shape of stored keys, (1, kv_heads, n, width)."""
        _, heads, _, width = like.shape
        self.like = like.new_empty(1, heads, 0, width)
        self.column_nbytes = 2 * self.layers * heads * width * like.element_size()

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(self, capacity)

    def new_slab(self, parts: Sequence[Tensor]) -> Slab:
        return Slab(parts)

    def encode(self, x: Tensor) -> Tensor:
        """Convert keys or values to the format in which they are stored, except in exact mode."""
        return x if self.dtype is None else quantise(x)

    def decode(self, x: Tensor) -> Tensor:
        """Convert keys or values from the format in which they are stored."""
        if self.head_dim is not None:
            return x[..., : self.head_dim].to(self.dtype)
        return x if self.dtype is None else dequantise(x, self.dtype)

    def take(self, capacity: int, like: Tensor) -> Region:
        """Take a region of `capacity` columns for stored keys like these.

        Args:
            capacity: the number of columns.
            like: (1, kv_heads, n, width) stored keys.

        Raises a MemoryInUseError if the reserved memory has no gap of that size, and a MemoryError
        if it would not have one without other regions.
        """
        with self.lock:
            self.set_shape(like)
            for slab in self.slabs:
                if region := slab.take(capacity):
                    return region
            if self.reserved_nbytes:
                self._refuse(capacity, self.reserved_nbytes)
                columns = self.reserved_nbytes // self.column_nbytes
            else:
                columns = max(capacity, self.slab_nbytes // self.column_nbytes)
            shape = 2, like.shape[1], columns, like.shape[3]
            spans = self.spans or [(like.device, self.layers)]
            with torch.inference_mode():
                parts = [torch.empty((n, *shape), dtype=like.dtype, device=x) for x, n in spans]
                if self.head_dim is not None:
                    for part in parts:  # exact mode writes only what comes before them
                        part[..., self.head_dim :] = 1
                self.slabs.append(self.new_slab(parts))
            region = self.slabs[-1].take(capacity)
            assert region is not None
            return region

    def _refuse(self, capacity: int, reserved: int) -> None:
        """Raise for a region that finds no gap, or is larger than the reserved memory."""
        needed = capacity * self.column_nbytes
        if needed > reserved:
            raise MemoryError(
                f"out of memory: a sequence of {capacity} positions needs {needed / GIB:.2f} GiB "
                f"for keys and values, and {reserved / GIB:.2f} GiB are set aside"
            )
        if self.slabs:
            raise MemoryInUseError(
                f"the {reserved / GIB:.2f} GiB for keys and values have no room for another "
                f"{needed / GIB:.2f} GiB until a sequence ends; decode fewer or shorter texts at "
                "once"
            )

    def give_back(self, region: Region) -> None:
        """Take a region back; only the smallest of the slabs without a region is kept."""
        with self.lock:
            region.slab.give_back(region)
            free = sorted((slab for slab in self.slabs if slab.is_free), key=lambda x: x.columns)
            for slab in free[1:]:
                self.slabs.remove(slab)


@dataclass(eq=False)
class KVCache:
    """Keys and values of all layers of one sequence: committed positions, then one block."""

    arena: Arena  # gives the region
    capacity: int  # columns
    region: Region | None = None  # None before the first block, and after the sequence is closed
    length: int = 0  # committed positions

    @property
    def taken(self) -> Region:
        assert self.region is not None
        return self.region

    @property
    def nbytes(self) -> int:
        return 0 if self.region is None else self.region.nbytes

    def allocate(self) -> Region:
        """Return the region, in an arena whose shape is known."""
        if self.region is None:
            assert self.arena.like is not None
            self.region = self.arena.take(self.capacity, self.arena.like)
        return self.region

    def reserve(self, k: Tensor, v: Tensor, end: int) -> Region:
        """Return the region; it holds stored keys and values like `k` and `v` before column `end`.

        Raises an UnsupportedModelError if the layers' keys and values differ in shape.
        """
        if self.region is None:
            self.region = self.arena.take(self.capacity, k)
        region = self.region
        if k.shape != v.shape or k.shape[1::2] != region.parts[0].shape[2::2]:
            raise UnsupportedModelError(DIFFERENT_SHAPES)
        assert end <= region.columns, "the sequence has outgrown its capacity"
        return region

    def first_columns(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the columns of a layer before `end`, (1, kv_heads, end, head_dim) keys and values.

        They are views unless they are stored in 8 bits.
        """
        k, v = self.taken.layer(layer)[:, None, :, :end]
        return self.arena.decode(k), self.arena.decode(v)

    def columns(self, first: int, end: int) -> Columns:
        """View the stored columns from `first` to `end`, for all layers at once."""
        return self.taken.views(slice(first, end))

    def commit(self, count: int) -> None:
        """Commit the first `count` rows of the block."""
        self.length += count

    def copy_from(self, other: KVCache, length: int) -> None:
        """Copy the committed positions of another sequence, at most `length`."""
        length = min(length, other.length)
        if length:
            for storage, part in zip(self.allocate().parts, other.taken.parts, strict=True):
                storage[:, :, :, :length] = part[:, :, :, :length]
        self.length = length

    def export(self, first: int, stop: int) -> StateArrays:
        if self.region is None:
            return {}
        parts = [x[:, :, :, first:stop] for x in self.region.parts]
        if self.arena.head_dim is not None:  # half the bytes, and `widen` gives the same bits
            parts = [self.arena.decode(x) for x in parts]
        return {str(n): to_host(part) for n, part in enumerate(parts)}

    def load(self, arrays: StateArrays, length: int) -> None:
        self.write_stored(arrays, self.length)
        self.length = length

    def write_stored(self, arrays: StateArrays, first: int) -> None:
        """Write what `export` copied to the columns from `first` on."""
        parts = [from_host(arrays[str(n)]) for n in range(len(arrays))]
        if self.arena.head_dim is not None:
            parts = list(map(widen, parts))
        if parts:  # a model without attention layers has none
            for storage, part in zip(self.allocate().parts, parts, strict=True):
                storage[:, :, :, first : first + part.shape[3]] = part

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def read(self) -> NDArray[np.float32]:
        """Read the (layers, 2, kv_heads, length, head_dim) of the committed positions."""
        parts = [self.arena.decode(x[:, :, :, : self.length]) for x in self.taken.parts]
        return np.concatenate([part.float().cpu().numpy() for part in parts])

    def close(self) -> None:
        if self.region is not None:
            self.arena.give_back(self.region)
        self.region, self.length = None, 0


Segment: TypeAlias = tuple[KVCache, int, int]
"""Consecutive rows of a sequence: its cache, the first column, and the number of rows."""


class PackedRows:
    """The columns of the rows of several sequences: one copy writes all sequences of a slab."""

    def __init__(self, segments: Sequence[Segment], keys: Tensor) -> None:
        """Reserve the columns for stored (1, kv_heads, rows, width) keys of a layer."""
        parts: dict[Slab, list[tuple[Tensor, Tensor]]] = {}
        row = 0
        for sequence, first, n in segments:
            region = sequence.reserve(keys, keys, first + n)
            starts = row, region.first + first
            rows, columns = (torch.arange(i, i + n, device=keys.device) for i in starts)
            parts.setdefault(region.slab, []).append((rows, columns))
            row += n
        # Each slab stands with the indices of its rows (None for all of them) and their columns.
        self.slabs: list[tuple[Slab, Tensor | None, Tensor]] = []
        for slab, pairs in parts.items():
            rows, columns = (torch.cat(x) for x in zip(*pairs, strict=True))
            self.slabs.append((slab, rows if len(parts) > 1 else None, columns))

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the stored keys and values of all rows, (1, kv_heads, rows, width) each."""
        for slab, rows, columns in self.slabs:
            for storage, x in zip(slab.layer(layer), (k[0], v[0]), strict=True):
                selected = x if rows is None else x.index_select(1, rows.to(x.device))
                storage.index_copy_(1, columns.to(x.device), selected)
