"""The KV caches of sequences: pages of an arena, committed in place.

The problem. Sequences begin alike: several answers to one prompt, conversations with one system
prompt, a text and its continuation. Memory is set aside once, and sequences of all lengths come and
go in it.

The idea. Memory consists of pages. A sequence has a table of pages, so it needs no pages that
follow one another, and a fork has the pages of what it shares, which are counted. Committed
positions never change, so only the last page is copied, when one of its owners writes behind them.

An example. Pages have 4 columns. A sequence of 6 positions has room for 12, and so has its fork:

    sequence     0 1 2
    fork at 6    0 1 4     the pages 0 and 1 have two owners, and page 3 is the spare of page 1
    it writes    0 3 4     page 3 has what page 1 has, which is the sequence's alone again

The rule: a sequence takes all its pages when it starts, and a fork also the spare of the page that
it shares in part. So no pass runs out of memory.

Each further answer to one prompt runs the prompt's last token again, for its logits. If its key is
the last one of a page, the fork goes on to share the page, and its own key goes nowhere.

On a CPU, whose kernels read keys in one piece, a page is one column. Then the pages of a sequence
follow one another, and a fork copies them.

Keys and values may be stored in 8 bits. Everything that moves columns (commits, forks, batches)
moves bytes and does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import GIB
from treeflash.decoding.interfaces import StateArrays
from treeflash.errors import ConfigError, MemoryInUseError
from treeflash_cuda.gpu.host_copies import host_copies
from treeflash_cuda.numerics import upload
from treeflash_cuda.visible_keys import PAGE

KV_BITS = 8
MAX_INT8 = 127
SCALE_BYTES = 4
"""A float32, which must begin at a multiple of its size: so must the head's width."""

WIDE_ALIGNMENT = 8
"""Elements: products of other widths have kernels for their edges, which add in another order."""

SLAB_BYTES = 64 << 20
"""The least that is allocated at once, so that short sequences share an allocation."""


Span: TypeAlias = tuple[torch.device, int]
"""A device, and its number of consecutive layers."""

Columns: TypeAlias = list[tuple[Tensor, Tensor]]
"""Views of some columns of every layer, (1, kv_heads, n, width) keys and values each."""

Pages: TypeAlias = NDArray[np.int64]
"""Numbers of pages of a slab: page n has the columns from n times the size of a page on."""

Index: TypeAlias = slice | Tensor
"""Columns of a slab: a slice if they follow one another, else (n,) int64 on a device."""


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


class Slab:
    """One allocation on each device: keys and values of all layers, in pages."""

    def __init__(self, parts: Sequence[Tensor], page: int = 1) -> None:
        # (layers, 2, kv_heads, columns, head_dim) each, or `quantise`'s width; one for each device
        # that has layers, in the order of the layers.
        self.parts = parts
        self.page = page  # columns of a page; see `Arena.page`
        self.owners = np.zeros(self.columns // page, np.int32)  # sequences that have each page
        # Free pages, owned by none but taken, by the shared page of which they will be copies; and
        # the forks that may write to such a page.
        self.spares: dict[int, list[int]] = {}
        self.writers: dict[int, set[KVCache]] = {}

    @property
    def columns(self) -> int:
        return self.parts[0].shape[3]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

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

    def read(self, columns: Index) -> list[Tensor]:
        """Return (layers, 2, kv_heads, n, head_dim) columns of every part: views for a slice."""
        if isinstance(columns, slice):
            return [x[:, :, :, columns] for x in self.parts]
        return [x.index_select(3, columns.to(x.device)) for x in self.parts]

    def write(self, columns: Index, parts: Sequence[Tensor]) -> None:
        """Write what `read` returned to other columns."""
        for storage, part in zip(self.parts, parts, strict=True):
            if isinstance(columns, slice):
                storage[:, :, :, columns] = part
            else:
                storage.index_copy_(3, columns.to(storage.device), part.to(storage.device))

    def copy(self, target: Index, other: Slab, source: Index) -> None:
        """Copy columns of a slab, perhaps this one."""
        self.write(target, other.read(source))

    @property
    def is_free(self) -> bool:
        return not self.owners.any()

    def take(self, count: int) -> Pages | None:
        """Take free pages, which follow one another if they can; None if too few are free.

        Pages of one column always follow one another.
        """
        free = np.flatnonzero(self.owners == 0)
        if len(free) < count:
            return None
        first = 0
        if count > 1:
            runs = np.flatnonzero(free[count - 1 :] - free[: 1 - count] == count - 1)
            if not len(runs) and self.page == 1:
                return None
            first = int(runs[0]) if len(runs) else 0
        pages = free[first : first + count]
        self.owners[pages] = 1
        return pages

    def give_back(self, pages: Pages, owner: KVCache) -> None:
        """Take pages back from one of their owners."""
        self.owners[pages] -= 1
        for page in self._spared(pages):
            self.leave(page, owner)

    def add_spare(self, page: int, spare: int, fork: KVCache) -> None:
        """Keep a free page for a copy of a page that a fork shares, and may write to."""
        self.spares.setdefault(page, []).append(spare)
        self.writers.setdefault(page, set()).add(fork)

    def leave(self, page: int, owner: KVCache) -> None:
        """Note that a sequence will not write to a page, and free the spares that none needs.

        Every fork may need one; but the last owner of a page writes to the page itself.
        """
        spares, writers = self.spares[page], self.writers[page]
        writers.discard(owner)
        while len(spares) > max(min(len(writers), int(self.owners[page]) - 1), 0):
            self.owners[spares.pop()] = 0
        if not spares:
            del self.spares[page], self.writers[page]

    def _spared(self, pages: Pages) -> list[int]:
        """Return those among some pages that have spares."""
        return [page for page in self.spares if (pages == page).any()]

    def own(self, page: int, owner: KVCache) -> int | None:
        """Return a copy of a page for one of its owners; None if no page is free for it."""
        if spares := self.spares.get(page):
            new = spares.pop()
        elif (taken := self.take(1)) is not None:
            new = int(taken[0])
        else:
            return None
        source, target = (slice(x * self.page, (x + 1) * self.page) for x in (page, new))
        self.copy(target, self, source)
        self.give_back(np.array([page]), owner)
        return new

    def held_nbytes(self, pages: Pages) -> int:
        """Return the bytes of pages; a page and its spares count for its owners in equal parts."""
        held = float((1 / self.owners[pages]).sum())
        for page in self._spared(pages):
            held += len(self.spares[page]) / self.owners[page]
        return round(held * self.page * (self.nbytes // self.columns))


class Arena:
    """Hands out pages. The first keys that are stored fix their shape."""

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
        # (head_dim,) places of a key's numbers in the checkpoint's order; None where they have it.
        self.key_order: NDArray[np.int64] | None = None
        # Columns of a page: 1, or `PAGE` where passes over rows look them up in tables.
        self.page = 1
        # The only slab has this many bytes and is kept for ever; None or 0 allocates slabs of at
        # least `slab_nbytes` as they are needed.
        self.reserved_nbytes: int | None = None
        self.slab_nbytes = SLAB_BYTES
        self.lock = Lock()
        self.slabs: list[Slab] = []

    @property
    def is_reserved(self) -> bool:
        """Whether all pages lie in one slab, whose size and shape are known."""
        return bool(self.reserved_nbytes) and self.like is not None

    def resized(self, layers: int, dtype: torch.dtype | None) -> Arena:
        """Create an empty arena for such keys in `layers` layers; see `Arena.dtype`."""
        if self.like is None:
            return Arena(layers, device=self.device)
        arena = Arena(layers, dtype=dtype, spans=self.spans, device=self.device)
        arena.set_shape(arena.encode(self.like))
        return arena

    def widened(self) -> Arena:
        """Create an empty arena for such keys and values in the format of exact mode."""
        assert self.like is not None
        arena = Arena(self.layers, dtype=self.like.dtype, spans=self.spans, device=self.device)
        arena.head_dim, arena.key_order = self.like.shape[-1], self.key_order
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
        return Slab(parts, self.page)

    def encode(self, x: Tensor) -> Tensor:
        """Convert keys or values to the format in which they are stored, except in exact mode."""
        return x if self.dtype is None else quantise(x)

    def decode(self, x: Tensor) -> Tensor:
        """Convert keys or values from the format in which they are stored."""
        if self.head_dim is not None:
            return x[..., : self.head_dim].to(self.dtype)
        return x if self.dtype is None else dequantise(x, self.dtype)

    def pages_of(self, columns: int) -> int:
        """Return the number of pages that a number of columns takes."""
        return -(-columns // self.page)

    def take(self, capacity: int, like: Tensor) -> tuple[Slab, Pages]:
        """Take pages with at least `capacity` columns of one slab, for stored keys like these.

        Args:
            capacity: the number of columns.
            like: (1, kv_heads, n, width) stored keys.

        Raises a MemoryInUseError if the reserved memory has too few free pages, and a MemoryError
        if it would not have enough without other sequences.
        """
        count = self.pages_of(capacity)
        with self.lock:
            self.set_shape(like)
            for slab in self.slabs:
                if (pages := slab.take(count)) is not None:
                    return slab, pages
            if self.reserved_nbytes:
                self._refuse(count, self.reserved_nbytes, capacity)
                columns = self.reserved_nbytes // self.column_nbytes
            else:
                columns = max(self.page * count, self.slab_nbytes // self.column_nbytes)
            shape = 2, like.shape[1], columns // self.page * self.page, like.shape[3]
            spans = self.spans or [(like.device, self.layers)]
            with torch.inference_mode():
                parts = [torch.empty((n, *shape), dtype=like.dtype, device=x) for x, n in spans]
                if self.head_dim is not None:
                    for part in parts:  # exact mode writes only what comes before them
                        part[..., self.head_dim :] = 1
                self.slabs.append(self.new_slab(parts))
            taken = self.slabs[-1].take(count)
            assert taken is not None
            return self.slabs[-1], taken

    def share(self, new: KVCache, other: KVCache, length: int) -> tuple[Slab, Pages] | None:
        """Take the pages of a sequence's first positions, and others up to the new capacity.

        A page that either sequence will write to gets a spare. None if pages are not shared here,
        or the slab has too few free ones and others can be allocated. Raises as `take`.
        """
        slab, capacity = other.slab, new.capacity
        if self.page == 1 or slab is None or not length:
            return None
        shared, kept = other.pages[: self.pages_of(length)], (length - other.rewritten) // self.page
        count = self.pages_of(capacity) - kept
        with self.lock:
            if (own := slab.take(count)) is None:
                if self.reserved_nbytes:
                    self._refuse(count, self.reserved_nbytes, capacity)
                return None
            slab.owners[shared] += 1
            for page, spare in zip(shared[kept:].tolist(), own.tolist(), strict=False):
                slab.add_spare(page, spare, new)
        return slab, np.concatenate([shared, own[len(shared) - kept :]])

    def own(self, slab: Slab, page: int, owner: KVCache) -> int:
        """Return a copy of a shared page for one of its owners.

        Raises a MemoryInUseError if no page is free: only a sequence that writes before the
        positions at which it was forked can meet it.
        """
        with self.lock:
            new = slab.own(page, owner)
        if new is None:
            raise MemoryInUseError("memory has no page left for a copy of a shared one")
        return new

    def leave(self, slab: Slab, page: int, owner: KVCache) -> None:
        """Note that an owner of a page will not write to it; see `Slab.leave`."""
        with self.lock:
            if page in slab.spares:
                slab.leave(page, owner)

    def _refuse(self, count: int, reserved: int, capacity: int) -> None:
        """Raise for pages that are not free, or are more than the reserved memory has."""
        needed = count * self.page * self.column_nbytes
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

    def give_back(self, slab: Slab, owner: KVCache) -> None:
        """Take a sequence's pages back; only the smallest slab that nothing owns is kept."""
        with self.lock:
            slab.give_back(owner.pages, owner)
            free = sorted((slab for slab in self.slabs if slab.is_free), key=lambda x: x.columns)
            for slab in free[1:]:
                self.slabs.remove(slab)


NO_PAGES: Pages = np.empty(0, np.int64)


@dataclass(eq=False)
class KVCache:
    """Keys and values of all layers of one sequence: committed positions, then one block.

    A position has its number as the offset, and the rows of a block have the offsets behind.
    """

    arena: Arena  # gives the pages
    capacity: int  # offsets
    slab: Slab | None = None  # None before the first block, and after the sequence is closed
    pages: Pages = field(default_factory=NO_PAGES.copy)  # of the slab, by offset
    length: int = 0  # committed positions
    # The next token, if a page that the sequence shares has its key as the last one.
    shared_token: int | None = None

    rewritten = 0
    """Committed positions at the end whose columns are written again."""

    @property
    def nbytes(self) -> int:
        return 0 if self.slab is None else self.slab.held_nbytes(self.pages)

    @property
    def shared_nbytes(self) -> int:
        """Bytes of the pages that count for other owners."""
        return len(self.pages) * self.arena.page * self.arena.column_nbytes - self.nbytes

    def shareable_nbytes(self, length: int) -> int:
        """Return the bytes of the pages that a fork at this length does not take."""
        page, kept = self.arena.page, max(min(length, self.length) - self.rewritten, 0)
        return 0 if page == 1 else kept // page * page * self.arena.column_nbytes

    def allocate(self) -> Slab:
        """Take the pages, in an arena whose shape is known, and return their slab."""
        if self.slab is None:
            assert self.arena.like is not None
            self.slab, self.pages = self.arena.take(self.capacity, self.arena.like)
        return self.slab

    def reserve(self, like: Tensor, first: int, end: int) -> Slab:
        """Let the sequence alone have the columns of offsets first .. end - 1; return their slab.

        They are for stored (1, kv_heads, any, width) keys like these.
        """
        if self.slab is None:
            self.slab, self.pages = self.arena.take(self.capacity, like)
        slab = self.slab
        assert end <= self.capacity, "the sequence has outgrown its capacity"
        if slab.page > 1:
            written = slice(first // slab.page, self.arena.pages_of(end))
            for n in written.start + np.flatnonzero(slab.owners[self.pages[written]] > 1):
                self.pages[n] = self.arena.own(slab, int(self.pages[n]), self)
            if first <= self.length:
                self.shared_token = None  # another key is written there
        return slab

    def reserve_rows(self, first: int, end: int) -> Slab:
        """Reserve columns in an arena whose shape is known; see `reserve`."""
        assert self.arena.like is not None
        return self.reserve(self.arena.like, first, end)

    def columns_at(self, offsets: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the columns of the slab at some offsets."""
        page = self.arena.page
        return self.pages[offsets // page] * page + offsets % page

    def table(self, end: int) -> Pages:
        """Return the pages of the offsets before `end`, for the look-up of `VisibleKeys`."""
        return self.pages[: self.arena.pages_of(end)] if self.arena.page == PAGE else NO_PAGES

    def index(self, first: int, end: int) -> Index:
        """Return the columns of the offsets first .. end - 1, on the slab's first device."""
        page = self.arena.page
        pages = self.pages[first // page : self.arena.pages_of(end)]
        if page == 1 or bool((np.diff(pages) == 1).all()):
            start = int(pages[0]) * page + first % page if len(pages) else 0
            return slice(start, start + end - first)
        assert self.slab is not None
        return upload(self.columns_at(np.arange(first, end)), self.slab.parts[0].device)

    def index_tensor(self, first: int, end: int, device: torch.device) -> Tensor:
        """Return the columns of the offsets first .. end - 1 as a tensor."""
        index = self.index(first, end)
        if isinstance(index, slice):
            return torch.arange(index.start, index.stop, device=device)
        return index.to(device)

    @property
    def parts(self) -> Sequence[Tensor]:
        """`Slab.parts` with the columns of this sequence alone, where they follow one another."""
        index = self.index(0, self.capacity)
        assert isinstance(index, slice)
        return self.allocate().read(index)

    def commit(self, count: int) -> None:
        """Commit the first `count` rows of the block."""
        if self.shared_token is not None:  # nothing was written to its page
            assert self.slab is not None
            self.arena.leave(self.slab, int(self.pages[self.length // self.arena.page]), self)
            self.shared_token = None
        self.length += count

    def next_offsets(self, token_ids: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the offsets to which the keys of the next tokens, or of a tree, are written.

        The key of `shared_token` goes where the next block is written.
        """
        has_key = self.shared_token is not None and token_ids.tolist() == [self.shared_token]
        return self.length + has_key + np.arange(len(token_ids))

    def copy_from(self, other: KVCache, length: int, token: int | None = None) -> None:
        """Take the committed positions of another sequence, at most `length`.

        Pages are shared; columns that are no pages are copied. The sequence then has all its pages,
        if memory for them is reserved. The other sequence has this token at position `length`.
        """
        length = min(length, other.length)
        if (taken := self.arena.share(self, other, length)) is not None:
            self.slab, self.pages = taken
            if (length + 1) % self.arena.page == 0 and length + 1 < self.capacity:
                self.shared_token = token
        elif length:
            assert other.slab is not None
            self.allocate().copy(self.index(0, length), other.slab, other.index(0, length))
        elif self.arena.is_reserved:
            self.allocate()
        self.length = length

    def export(self, first: int, stop: int) -> StateArrays:
        if self.slab is None:
            return {}
        parts = self.slab.read(self.index(first, stop))
        if self.arena.head_dim is not None:  # half the bytes, and `widen` gives the same bits
            parts = [self.arena.decode(x) for x in parts]
        return {str(n): to_host(part) for n, part in enumerate(parts)}

    def load(self, arrays: StateArrays, length: int) -> None:
        self.write_stored(arrays, self.length)
        self.length = length

    def write_stored(self, arrays: StateArrays, first: int) -> None:
        """Write what `export` copied to the columns of offsets from `first` on."""
        parts = [from_host(arrays[str(n)]) for n in range(len(arrays))]
        if self.arena.head_dim is not None:
            parts = list(map(widen, parts))
        if not parts:  # a model without attention layers has none
            return
        end = first + parts[0].shape[3]
        self.reserve_rows(first, end).write(self.index(first, end), parts)

    def truncate(self, length: int) -> None:
        if length < self.length:
            self.length, self.shared_token = length, None

    def read(self) -> NDArray[np.float32]:
        """Read the (layers, 2, kv_heads, length, head_dim) of the committed positions."""
        assert self.slab is not None
        parts = map(self.arena.decode, self.slab.read(self.index(0, self.length)))
        found = np.concatenate([part.float().cpu().numpy() for part in parts])
        if (order := self.arena.key_order) is not None:
            found[:, 0] = found[:, 0][..., order.argsort()]
        return found

    def close(self) -> None:
        if self.slab is not None:
            self.arena.give_back(self.slab, self)
        self.slab, self.pages, self.length = None, NO_PAGES, 0


class SeenColumns:
    """The stored columns of a sequence before an offset, layer by layer.

    They are views, made for all layers at once, where pages follow one another, else copies.
    """

    def __init__(self, sequence: KVCache, end: int) -> None:
        assert sequence.slab is not None
        self.slab, self.index = sequence.slab, sequence.index(0, end)
        self._views = self.slab.views(self.index) if isinstance(self.index, slice) else []

    def layer(self, n: int) -> tuple[Tensor, Tensor]:
        """Return (1, kv_heads, end, width) keys and values of a layer."""
        if isinstance(self.index, slice):
            return self._views[n]
        storage = self.slab.layer(n)
        k, v = storage.index_select(2, self.index.to(storage.device))[:, None]
        return k, v


Segment: TypeAlias = tuple[KVCache, int, int]
"""Consecutive rows of a sequence: its cache, the first offset, and the number of rows."""


class WrittenRows:
    """The columns that the rows of a pass write: one copy writes all sequences of a slab.

    Columns of a single sequence are a slice, if they follow one another: fewer operations.
    """

    def __init__(self, segments: Sequence[Segment], like: Tensor, width: int | None = None) -> None:
        """Reserve the columns, for stored (1, kv_heads, any, width) keys like these.

        Only the first `width` numbers of a column are written, if it is given.
        """
        self.count = sum(n for *_, n in segments)
        self._views: Columns = []  # the rows of a single sequence, by layer
        # Others stand by slab: all columns by layer, the indices of the slab's rows (None for all
        # of them), and their columns.
        self._slabs: list[tuple[Columns, Tensor | None, Tensor]] = []
        if len(segments) == 1:
            ((sequence, first, n),) = segments
            slab = sequence.reserve(like, first, first + n)
            if isinstance(index := sequence.index(first, first + n), slice):
                self._views = slab.views(index, width)
                return
        parts: dict[Slab, list[tuple[Tensor, Tensor]]] = {}
        row = 0
        for sequence, first, n in segments:
            slab = sequence.reserve(like, first, first + n)
            rows = torch.arange(row, row + n, device=like.device)
            columns = sequence.index_tensor(first, first + n, like.device)
            parts.setdefault(slab, []).append((rows, columns))
            row += n
        for slab, pairs in parts.items():
            rows, columns = (torch.cat(x) for x in zip(*pairs, strict=True))
            views = slab.views(slice(None), width)
            self._slabs.append((views, rows if len(parts) > 1 else None, columns))

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write (kv_heads, n, width) keys and values, of which the first rows are the pass's."""
        if k.shape[1] > self.count:
            k, v = k[:, : self.count], v[:, : self.count]
        if self._views:
            for storage, x in zip(self._views[layer], (k, v), strict=True):
                storage.copy_(x)
        for views, rows, columns in self._slabs:
            for storage, x in zip(views[layer], (k, v), strict=True):
                own = x if rows is None else x.index_select(1, rows.to(x.device))
                places = columns.to(storage.device)
                storage[0].index_copy_(1, places, own.to(storage.dtype))
