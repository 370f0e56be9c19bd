"""Which keys the rows of a forward pass see, and how the work of attention is divided.

The problem. A pass has rows of several sequences: nodes of draft trees, and tokens of prompts. Each
sequence has its own number of rows and its own length, and a CUDA graph has fixed shapes.

The idea. A pass is a list of rows, whose number is all that fixes its shapes. Each row says by
numbers what it sees. Rows of one sequence see the same positions up to a point, so a block of rows
reads those together, one chunk of positions after another: a list of such items is the work, and
programs of a kernel take items until none is left.

An example. A tree of 3 rows follows 600 committed positions, and one row follows 100 positions.
Blocks have 2 rows, and chunks 512 positions:

    row       0    1    2    3
    sequence  a    a    a    b
    items     (rows 0-1, chunk 0), (rows 0-1, chunk 1), (row 2, chunk 0), (row 2, chunk 1),
              (row 3, chunk 0)
    place     0    2    4    6      of a row's sum over chunk 0

The rule: a row has a place for each chunk, so its sum over chunk c is at its place + c.

Keys lie in pages of `PAGE` columns. The pages of a sequence need not follow one another: a table
has their numbers, by which offsets in the sequence become columns. The key of a committed position
has its number as the offset, and the keys of a pass's rows have the offsets behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.tree import DraftTree
from treeflash_cuda.gpu.graphs import power_of_two

CHUNK = 512
"""Positions of an item of shared work."""
PAGE = 64
"""Columns of a page: a multiple of every tile of keys, which so needs one look-up. Sequences that
begin alike share whole pages, and in larger ones they would share less."""
MIN_PAGES = 2048
"""Pages that every graph has room for in the tables of its sequences: 131,072 positions."""
MIN_PLACES = 4096
"""Places that every graph has for sums: enough for 64 rows over 32,768 positions."""
PLACES_EACH = 4
"""Places for each item that a graph has room for; an item takes one for each row of its block."""
BLOCK_QUERIES = 32
"""Queries of a block of rows, counting all heads that share a key head. They share the keys that a
program loads. With 64, compilers spilled registers for heads of 64 and 128, with 4 warps and
with 8."""

BY_ROW = "positions", "table", "shared", "places"
"""The arrays of a `RowPlan` that have a number for each row."""

Integers: TypeAlias = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class SharedWork:
    """The items in which blocks of rows attend to positions that their sequence shares."""

    items: Tensor  # (capacity, 3) int32 first row, row after the last one, and chunk
    count: Tensor  # (1,) int32 items that are used, which come first
    places: Tensor  # (rows,) int32 place of each row's sum over chunk 0

    def to(self, device: torch.device) -> SharedWork:
        """Copy all tensors to a device."""
        return SharedWork(*(x.to(device) for x in (self.items, self.count, self.places)))


@dataclass(frozen=True, eq=False)
class VisibleKeys:
    """The keys that the rows of a pass see; rows of a sequence follow one another.

    A row sees the positions from `start` to `end`, and those before `sink`. Positions before
    `shared` are offsets, and common to all rows of a sequence. A later position has another key for
    each branch of a draft tree: `paths` names its offset. All positions are common to rows without
    branches.
    """

    pages: Tensor  # (n,) int32 tables of all sequences, one after another: numbers of pages
    table: Tensor  # (rows,) int32 index in `pages` of the first page of the row's sequence
    shared: Tensor  # (rows,) int32 positions that are common to all rows of the sequence
    start: Tensor  # (rows,) int32 first visible position
    end: Tensor  # (rows,) int32 position after the last visible one
    # (rows, depths) int32 offsets of the keys at positions `shared`, `shared` + 1, ..., less
    # `shared`. There are at least `end` - `shared` of them.
    paths: Tensor
    work: SharedWork
    sink: Tensor | None = None  # (rows,) int32 positions that are always visible, if any are

    @classmethod
    def of_rows(cls, *arrays: Tensor) -> VisibleKeys:
        """Let rows see all positions up to their own, from `RowPlan.arrays` as int32 tensors."""
        positions, table, shared, places, paths, count, items, pages = arrays
        work = SharedWork(items, count, places)
        start = torch.zeros_like(positions)
        return cls(pages, table, shared, start, positions + 1, paths, work)

    def within(self, window: int) -> VisibleKeys:
        """Return what rows see that see the last `window` positions, their own included."""
        return replace(self, start=torch.maximum(self.start, self.end - window))

    def sees(self, positions: Tensor) -> Tensor:
        """Return the (rows, m) whether rows see (m,) or (rows, m) positions."""
        visible = positions >= self.start[:, None]
        if self.sink is not None:
            visible = visible | (positions < self.sink[:, None])
        return visible & (positions < self.end[:, None])

    def to(self, device: torch.device) -> VisibleKeys:
        """Copy all tensors to a device."""
        parts = (getattr(self, part.name) for part in fields(self))
        moved: list[Any] = [x if x is None else x.to(device) for x in parts]
        return VisibleKeys(*moved)

    def columns(self, offsets: Tensor) -> Tensor:
        """Return the (rows, m) int64 columns at (rows, m) offsets, and any behind the tables."""
        index = (self.table[:, None] + offsets // PAGE).clamp(max=len(self.pages) - 1)
        return self.pages[index].long() * PAGE + offsets % PAGE


def block_rows(groups: int) -> int:
    """Return the rows of a block, for key heads that `groups` heads share."""
    return max(1, BLOCK_QUERIES // groups)


def plan_work(
    starts: Integers, sizes: Integers, shared: Integers, block: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the (n, 3) items and the (rows,) places of `SharedWork`.

    Sequences have (t,) first rows, at least one row each, and common positions. Every
    row has a place, sequence by sequence.
    """
    blocks = -(-sizes // block)
    sequence = np.repeat(np.arange(len(sizes)), blocks)
    index = np.arange(len(sequence)) - np.repeat(blocks.cumsum() - blocks, blocks)
    first = starts[sequence] + block * index
    end = np.minimum(first + block, (starts + sizes)[sequence])
    chunks = -(-shared[sequence] // CHUNK)
    before = chunks.cumsum() - chunks
    owner = np.repeat(np.arange(len(sequence)), chunks)
    items = np.stack([first[owner], end[owner], np.arange(len(owner)) - before[owner]], 1)
    each = np.repeat(chunks, end - first)
    places = each.cumsum() - each
    return items.astype(np.int32), places.astype(np.int32)


def equal_work(
    shared: Integers, rows: int, order: Sequence[int], groups: int
) -> list[NDArray[np.int32]]:
    """Return the items, their number, and places of sequences that have equally many rows.

    The sequences have (t,) common positions. A pass has them in an `order`, in which later entries
    may be copies of the first one; a graph has the sizes of the arrays. See `block_rows` for the
    groups.
    """
    starts = rows * np.arange(len(shared))
    items, places = plan_work(starts, np.full_like(starts, rows), shared, block_rows(groups))
    return [*padded_items(items), places.reshape(-1, rows)[order].ravel()]


def padded_items(items: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the result of `plan_work` in a size that a graph has, and (1,) how many are used."""
    places = int((items[:, 1] - items[:, 0]).sum())
    capacity = power_of_two(max(places, PLACES_EACH * len(items), MIN_PLACES)) // PLACES_EACH
    padded = np.zeros((capacity, 3), np.int32)
    padded[: len(items)] = items
    return padded, np.array([len(items)], np.int32)


def page_tables(tables: Sequence[Integers]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return tables of pages, one after another in a size that a graph has, and their (t,) starts.

    A table has the numbers of a sequence's pages.
    """
    sizes = np.array([len(table) for table in tables])
    starts = sizes.cumsum() - sizes
    pages = np.zeros(power_of_two(max(int(sizes.sum()), MIN_PAGES)), np.int32)
    pages[: sizes.sum()] = np.concatenate(tables)
    return pages, starts


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Rows of several sequences, in NumPy: all of one sequence, then all of the next one."""

    starts: Integers  # (t,) first row of each sequence in the pass
    positions: Integers  # (n,)
    pages: NDArray[np.int32]  # as in `VisibleKeys`
    table: Integers  # (n,) as in `VisibleKeys`
    shared: Integers  # (n,) as in `VisibleKeys`
    paths: NDArray[np.int32]  # (n, depths) as in `VisibleKeys`
    places: NDArray[np.int32]  # see `plan_work`
    items: NDArray[np.int32]  # see `padded_items`
    count: NDArray[np.int32]  # see `padded_items`

    @classmethod
    def of(
        cls,
        tables: Sequence[Integers],  # numbers of the pages of each sequence
        lengths: Integers,  # (t,) committed positions
        trees: Sequence[DraftTree | int],  # their rows: a tree, or a number of next tokens
        groups: int,  # see `block_rows`
        stride: int | None = None,  # rows between the first rows of sequences; None for no gaps
    ) -> RowPlan:
        sizes = np.array([x if isinstance(x, int) else len(x) for x in trees])
        before = sizes.cumsum() - sizes
        starts = before if stride is None else stride * np.arange(len(sizes))
        owner = np.repeat(np.arange(len(sizes)), sizes)
        nodes = np.arange(len(owner)) - before[owner]
        branched = [isinstance(x, DraftTree) and not x.is_chain for x in trees]
        depths = nodes.copy()
        parents = np.maximum(np.arange(len(owner)) - 1, before[owner])
        for tree, is_branched, row in zip(trees, branched, before.tolist(), strict=True):
            if is_branched and isinstance(tree, DraftTree):
                depths[row : row + len(tree)] = tree.depths
                parents[row + 1 : row + len(tree)] = row + tree.parents[1:]
        in_tree = np.array(branched)[owner]
        shared = lengths + np.where(branched, 0, sizes)
        items, places = plan_work(starts, sizes, shared, block_rows(groups))
        items, count = padded_items(items)
        pages, firsts = page_tables(tables)
        return cls(
            starts=starts,
            positions=lengths[owner] + depths,
            pages=pages,
            table=firsts[owner],
            shared=shared[owner],
            paths=_paths(nodes, depths, parents, in_tree),
            places=places,
            items=items,
            count=count,
        )

    def arranged(self, order: Integers, depths: int) -> RowPlan:
        """Return the plan of rows of this one, each any number of times, with wider paths."""
        paths = np.zeros((len(order), depths), np.int32)
        paths[:, : self.paths.shape[1]] = self.paths[order]
        return replace(self, paths=paths, **{x: getattr(self, x)[order] for x in BY_ROW})

    def arrays(self) -> list[Integers]:
        """Return the numbers that `VisibleKeys.of_rows` takes as tensors."""
        rows = self.positions, self.table, self.shared, self.places
        return [*rows, self.paths, self.count, self.items, self.pages]


def _paths(
    nodes: Integers, depths: Integers, parents: Integers, in_tree: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """Return the (n, depths) nodes on the paths of rows in trees; 0 of other rows."""
    deepest = int(depths[in_tree].max(initial=-1))
    paths = np.zeros((len(nodes), deepest + 1), np.int32)
    order = np.flatnonzero(in_tree)
    order = order[depths[order].argsort(kind="stable")]
    ends = np.searchsorted(depths[order], np.arange(1, deepest + 1))
    for depth, rows in enumerate(np.split(order, ends)[1:], 1):
        paths[rows] = paths[parents[rows]]
        paths[rows, depth] = nodes[rows]
    return paths
