"""Keys and values of texts in their regions of an arena, committed in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from treeflash.errors import UnsupportedModelError
from treeflash_cuda.arena import Arena, Region, Slab


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for the copy."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def upload_all(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """int32 tensors of several arrays, in one copy."""
    if not arrays:
        return []
    flat = np.concatenate([np.asarray(array, np.int32).ravel() for array in arrays])
    parts = upload(flat, device).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


DIFFERENT_SHAPES = (
    "their layers have keys and values of different shapes, which the cuda backend's cache does "
    "not support"
)

Columns: TypeAlias = list[tuple[Tensor, Tensor]]
"""Views of some columns of every layer, (1, kv_heads, n, width) keys and values each."""


class KeyValues:
    """Keys and values of all layers of one text: committed positions, then one block.

    Attributes:
        arena: gives the region.
        capacity: columns.
        region: None before the first block, and after the text is closed.
        length: committed positions.
    """

    def __init__(self, arena: Arena, capacity: int) -> None:
        """Start empty; the region is taken with the first block."""
        self.arena = arena
        self.capacity = capacity
        self.region: Region | None = None
        self.length = 0

    @property
    def taken(self) -> Region:
        """Its region."""
        assert self.region is not None
        return self.region

    @property
    def nbytes(self) -> int:
        """Device memory that it holds, bytes."""
        return 0 if self.region is None else self.region.nbytes

    def write(self, layer: int, first: int, k: Tensor, v: Tensor) -> None:
        """Write keys and values, (1, kv_heads, n, head_dim) each, from a column on.

        Raises:
            UnsupportedModelError: the layers' keys and values differ in shape.
        """
        end = first + k.shape[2]
        k, v = self.arena.stored(k), self.arena.stored(v)
        for kept, x in zip(self.reserve(k, v, end).layer(layer), (k[0], v[0]), strict=True):
            kept[:, first:end] = x

    def reserve(self, k: Tensor, v: Tensor, end: int) -> Region:
        """The region, which can hold such stored keys and values in its columns before `end`.

        Raises what `write` does.
        """
        if self.region is None:
            self.region = self.arena.take(self.capacity, k)
        region = self.region
        if k.shape != v.shape or k.shape[1::2] != region.parts[0].shape[2::2]:
            raise UnsupportedModelError(DIFFERENT_SHAPES)
        assert end <= region.columns, "the text has outgrown its capacity"
        return region

    def until(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """The first columns of a layer, (1, kv_heads, end, head_dim) each: views if they can be."""
        k, v = self.taken.layer(layer)[:, None, :, :end]
        return self.arena.read(k), self.arena.read(v)

    def columns(self, first: int, end: int) -> Columns:
        """Views of the columns from `first` to `end` as they are stored, made at once."""
        parts = [x[:, :, None, :, first:end].flatten(0, 1).unbind(0) for x in self.taken.parts]
        views = [view for part in parts for view in part]
        return list(zip(views[::2], views[1::2], strict=True))

    def gather(self, columns: Tensor) -> list[Tensor]:
        """A copy of n columns of every part, (layers, 2, kv_heads, n, head_dim) each."""
        return [x.index_select(3, columns.to(x.device)) for x in self.taken.parts]

    def commit(self, count: int, kept: Sequence[Tensor] | None = None) -> None:
        """Keep so many rows of the block: the first ones, or others that `gather` copied."""
        first, end = self.length, self.length + count
        if kept is not None:
            for part, rows in zip(self.taken.parts, kept, strict=True):
                part[:, :, :, first:end] = rows
        self.length = end

    def copy_from(self, other: KeyValues, length: int) -> None:
        """Take over the first committed positions of another text, as many as it has."""
        length = min(length, other.length)
        if length:
            parts = other.taken.parts
            self.region = self.arena.take(self.capacity, parts[0][0, :1])
            for part, theirs in zip(self.region.parts, parts, strict=True):
                part[:, :, :, :length] = theirs[:, :, :, :length]
        self.length = length

    def read(self) -> NDArray[np.float32]:
        """The committed part, (layers, 2, kv_heads, length, head_dim)."""
        parts = [self.arena.read(x[:, :, :, : self.length]) for x in self.taken.parts]
        return np.concatenate([part.float().cpu().numpy() for part in parts])

    def close(self) -> None:
        """Give the region back."""
        if self.region is not None:
            self.arena.give_back(self.region)
        self.region, self.length = None, 0


Segment: TypeAlias = tuple[KeyValues, int, int]
"""Rows of a text that follow one another: the text, their first column, and how many they are."""


class PackedRows:
    """Where the rows of several texts are stored: one copy writes all texts of a slab.

    Attributes:
        slabs: each with the rows that belong to it, None for all of them, and their columns.
    """

    def __init__(self, segments: Sequence[Segment], keys: Tensor) -> None:
        """Reserve the rows' columns.

        Args:
            segments: that follow one another.
            keys: (1, kv_heads, rows, width) of a layer, as they are stored.
        """
        parts: dict[Slab, list[tuple[Tensor, Tensor]]] = {}
        row = 0
        for text, first, n in segments:
            text.reserve(keys, keys, first + n)
            assert text.region is not None
            starts = row, text.region.first + first
            rows, columns = (torch.arange(i, i + n, device=keys.device) for i in starts)
            parts.setdefault(text.region.slab, []).append((rows, columns))
            row += n
        self.slabs: list[tuple[Slab, Tensor | None, Tensor]] = []
        for slab, pairs in parts.items():
            rows, columns = (torch.cat(x) for x in zip(*pairs, strict=True))
            self.slabs.append((slab, rows if len(parts) > 1 else None, columns))

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values of all rows, (1, kv_heads, rows, width) each, as stored."""
        for slab, rows, columns in self.slabs:
            for kept, x in zip(slab.layer(layer), (k[0], v[0]), strict=True):
                own = x if rows is None else x.index_select(1, rows.to(x.device))
                kept.index_copy_(1, columns.to(x.device), own)


class TreeCache(Cache):
    """The caches of the texts of one forward pass, as transformers' models see them.

    Attributes:
        texts: in the order of their rows.
        rows: how many rows each has.
        layer: that was updated last.
    """

    def __init__(self, texts: Sequence[KeyValues], rows: Sequence[int]) -> None:
        """Describe one forward pass."""
        super().__init__(layers=[])
        self.texts = texts
        self.rows = rows
        self.layer = 0
        self._packed: PackedRows | None = None
        self._new: Columns = []
        self._views: list[Columns] = []

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by a layer with the keys and values of all rows.

        Returns:
            For one text, views of its columns. For several the arguments: `PackedContext` reads
            each text's own columns.
        """
        self.layer = layer_idx
        keys, values = map(self.texts[0].arena.stored, (key_states, value_states))
        if len(self.texts) > 1:
            if self._packed is None:
                parts = list(zip(self.texts, self.rows, strict=True))
                self._packed = PackedRows([(x, x.length, n) for x, n in parts], keys)
                self._views = [x.columns(0, x.length + n) for x, n in parts]
            self._packed.write(layer_idx, keys, values)
            return key_states, value_states
        if not self._views:
            (text,), (n,) = self.texts, self.rows
            text.reserve(keys, values, text.length + n)
            self._new = text.columns(text.length, text.length + n)
            self._views = [text.columns(0, text.length + n)]
        for kept, x in zip(self._new[layer_idx], (keys, values), strict=True):
            if x.shape != kept.shape:
                raise UnsupportedModelError(DIFFERENT_SHAPES)
            kept.copy_(x)
        return self.seen()[0]

    def seen(self) -> list[tuple[Tensor, Tensor]]:
        """The columns of the texts, those of their rows included.

        (1, kv_heads, length + n, head_dim) keys and values of each, in the layer updated last.
        """
        read = self.texts[0].arena.read
        return [(read(k), read(v)) for k, v in (layers[self.layer] for layers in self._views)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed positions; models are given the positions of all rows."""
        return max(text.length for text in self.texts)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The column of the first row."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The columns of the mask for `query_length` rows, and the first of them."""
        return self.get_seq_length() + query_length, 0
