"""Attention whose sums have an order that depends on positions alone; see `exact`.

The attention of a pass is prepared once and used in every layer. A `TokenBlock` has the new tokens
of a sequence, and `VisibleRows` are consecutive tokens of them with the columns that they see; its
`Part`s are groups. `Sums` has the views that compute the attention of some `VisibleRows`; a `Run`
has `Sums` of equally many tokens, one for each sequence; an `AttentionPlan` has the runs of a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from treeflash.decoding.probe import INEXACT
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.attention import TokenBlock, additive_mask
from treeflash_cuda.cache import widen

SUM_SIZE = 128
"""Number of positions whose sum is computed by one product."""
MAX_KEYS = 192
"""Most keys of a product: kernels split longer sums, in places that depend on columns."""
MIN_COLUMNS = 16
"""Least keys of a product: fewer keys take other kernels."""
QUERY_ROWS = 8
"""Queries are padded to a multiple of it, as the edges of products are summed in another order."""
WIDE = 192
WIDE_ROWS = 16
"""Least queries of heads that are as wide as `WIDE`: MKL splits their sums for 8 rows alone."""
MIN_SIZE = 400
"""Least multiplications of a product: PyTorch computes smaller ones with other loops."""
PROMPT_ROWS = 128
"""Number of a prompt's tokens that attend at once, which bounds the memory of scores."""

Sees: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Whether positions of queries see positions of keys; both broadcast."""


@dataclass(frozen=True, eq=False)
class Part:
    """A product of the weights of some rows with the values of keys of one group."""

    first: int  # the rows' first token
    end: int  # the token after the rows' last one
    columns: slice | Tensor  # the keys' columns, counted from the first of `VisibleRows.columns`


@dataclass(frozen=True, eq=False)
class VisibleRows:
    """The keys that some consecutive tokens of a pass see in the layers with one mask function."""

    first: int  # the first token
    end: int  # the token after the last one
    columns: slice  # begins at a multiple of `SUM_SIZE`, before which no token sees a key
    visible: Tensor | None  # (tokens, columns) bool; None if every column is visible
    parts: list[Part]  # in the order of their groups
    # These are the parts' numbers of columns, if parts follow each other and have the weights of
    # all rows.
    sizes: list[int] | None = None

    @property
    def tokens(self) -> int:
        return self.end - self.first

    @property
    def count(self) -> int:
        """Number of columns."""
        return self.columns.stop - self.columns.start


class Sums:
    """The sums of the values that some `VisibleRows` see, in every layer.

    The number of operations decides how long a pass takes, so all views are made once for it.
    """

    def __init__(
        self,
        rows: VisibleRows,
        stored: Sequence[Tensor],  # `KVCache.parts` of the sequence, as `widen` makes them
        queries: Tensor,  # (kv_heads, padded rows, width) float32, scaled, written for each layer
        sums: Tensor,  # (kv_heads, padded rows, columns of values) float32, the result
        groups: int,  # query heads of each key head
        scratch: Tensor,  # float32, room for the weights of all columns, overwritten by every layer
    ) -> None:
        self.rows, self.queries, self.sums, self.groups = rows, queries, sums, groups
        (kv_heads, padded, width), count = queries.shape, rows.count
        self.missing = max(MIN_COLUMNS - count, 0)
        shape = kv_heads, padded, count + self.missing
        self.weights = scratch[: math.prod(shape)].view(shape)
        sizes = rows.sizes or [count]
        self.parts = self.weights[..., :count].split(sizes, 2)
        self.scores = self.weights[:, : rows.tokens * groups]  # scores without padded rows
        self.keys: list[Tensor] = []  # each layer's keys
        self.values: list[tuple[Tensor, ...]] = []  # each layer's values, in parts
        for x in stored:
            keys, values = x[:, 0, :, rows.columns, :width], x[:, 1, :, rows.columns]
            self.keys += keys.transpose(2, 3).unbind(0)
            self.values += zip(*(part.unbind(0) for part in values.split(sizes, 2)), strict=True)
        if rows.visible is None:
            mask = queries.new_zeros(1, count)
        else:
            mask = additive_mask(rows.visible, torch.float32).repeat_interleave(groups, 0)
            mask = F.pad(mask, (0, 0, 0, padded - len(mask)))
        self.mask = F.pad(mask, (0, self.missing), value=float("-inf"))[None]

    def compute(self, layer: int) -> None:
        """Write the sums of a layer."""
        keys, weights = self.keys[layer], self.weights
        if self.missing:
            keys = F.pad(keys.transpose(1, 2), (0, 0, 0, self.missing)).transpose(1, 2)
        torch.baddbmm(self.mask, self.queries, keys, out=weights)
        self.scores.sub_(self.scores.amax(-1, keepdim=True)).exp_()
        if self.rows.sizes is None:
            self._add_parts(*self.values[layer])
            return
        pairs = zip(self.parts, self.values[layer], strict=True)
        torch.bmm(*next(pairs), out=self.sums)
        for p, v in pairs:
            self.sums.baddbmm_(p, v)

    def _add_parts(self, values: Tensor) -> None:
        """Sum over parts that differ in their columns and rows."""
        rows, weights, sums = self.rows, self.weights, self.sums.zero_()
        for part in rows.parts:
            if isinstance(part.columns, slice):
                p, v = weights[:, :, part.columns], values[:, part.columns]
            else:
                p = weights.index_select(2, part.columns)
                v = values.index_select(1, part.columns)
            if (part.first, part.end) == (rows.first, rows.end):
                sums.baddbmm_(p, v)
            else:
                first, end = ((x - rows.first) * self.groups for x in (part.first, part.end))
                missing = _missing_rows(end - first, values.shape[2])
                p, old = (F.pad(x[:, first:end], (0, 0, 0, missing)) for x in (p, sums))
                sums[:, first:end] = torch.baddbmm(old, p, v)[:, : end - first]


Members: TypeAlias = Sequence[tuple[VisibleRows, Sequence[Tensor]]]
"""Rows, each with the `KVCache.parts` of its sequence."""


class Run:
    """Consecutive `VisibleRows` with equally many tokens; one copy reads the queries of all."""

    def __init__(
        self,
        members: Members,
        kv_heads: int,
        width: int,
        # (tokens of all members, kv_heads, groups, width), the result; equal rows for a lone token.
        output: Tensor,
    ) -> None:
        n, groups, tokens = len(members), output.shape[2], members[0][0].tokens
        used = tokens * groups
        padded = used + _missing_rows(used, width)
        queries = torch.zeros(n, kv_heads, padded, width)  # padding stays 0
        sums = torch.empty(n, kv_heads, padded, members[0][1][0].shape[4])
        columns = max(rows.count for rows, _ in members)
        scratch = torch.empty(kv_heads * padded * max(columns, MIN_COLUMNS))
        self.members = [
            Sums(rows, stored, q, out, groups, scratch)
            for (rows, stored), q, out in zip(members, queries, sums, strict=True)
        ]
        own, results = (x[:, :, :used].unflatten(2, (tokens, groups)) for x in (queries, sums))
        # Queries have the order of the model: (kv_heads, groups, members, tokens, width).
        self.queries = own.permute(1, 3, 0, 2, 4)
        # The output's order is (members, tokens, kv_heads, groups, columns of values).
        self.output = output.unflatten(0, (-1, tokens))
        results = results.transpose(1, 2).expand(len(self.output), -1, -1, -1, -1)
        self.numerators, self.denominators = results[..., :width], results[..., width : width + 1]

    def compute(self, query: Tensor, layer: int, scale: float) -> None:
        """Write the attention of a layer, from the (1, heads, tokens, width) queries of the run."""
        # MKL would multiply by a factor of its own before or after the sum, by the number of rows.
        self.queries.copy_(query.view(self.queries.shape)).mul_(scale)
        for member in self.members:
            member.compute(layer)
        torch.div(self.numerators, self.denominators, out=self.output)


class AttentionPlan:
    """The attention of a pass in the layers with one mask function, prepared for all of them."""

    def __init__(
        self,
        members: Members,  # in the order of their tokens
        kv_heads: int,
        query: Tensor,  # (1, heads, tokens, width) of any of the layers
    ) -> None:
        _, heads, tokens, width = query.shape
        output = query.new_empty(tokens, kv_heads, heads // kv_heads, width)
        # Every layer writes it after the layer before has read it.
        self.output = output.view(1, tokens, heads, width)
        self.runs: list[tuple[slice, Run]] = []
        self.is_repeated = sum(rows.tokens for rows, _ in members) < tokens  # a lone token
        first = 0
        for size, group in groupby(members, lambda member: member[0].tokens):
            run = list(group)
            place = slice(first, first + size * len(run))
            own = output if self.is_repeated else output[place]
            self.runs.append((place, Run(run, kv_heads, width, own)))
            first = place.stop

    def attend(self, query: Tensor, layer: int, scale: float) -> Tensor:
        """Return a layer's (1, tokens, heads, width) attention, which the next call overwrites."""
        is_whole = len(self.runs) == 1 and not self.is_repeated
        for place, run in self.runs:
            run.compute(query if is_whole else query[:, :, place], layer, scale)
        return self.output


def visible_rows(block: TokenBlock, sees: Sees | None) -> Iterator[VisibleRows]:
    """Yield the rows of a block in layers with these positions; None for all up to each token's."""
    n, device = len(block), block.positions.device
    if n == 1 and sees is None:
        yield _consecutive_parts(0, n, slice(0, block.committed + 1), None)
        return
    ancestors = block.ancestors if n > 1 else None
    step = PROMPT_ROWS if ancestors is None else n
    for first in range(0, n, step):
        end = min(first + step, n)
        last = block.committed + end
        columns = torch.arange(last, device=device)
        if ancestors is not None:
            columns[block.committed :] = block.positions
        visible = (sees or torch.ge)(block.positions[first:end, None], columns)
        visible = visible.expand(end - first, -1)
        if ancestors is not None:
            visible = visible.clone()
            visible[:, block.committed :] &= ancestors
        # Groups that no token sees, of a sliding window, would add zeros.
        start = int(visible.any(0).int().argmax()) // SUM_SIZE * SUM_SIZE
        place, visible, columns = slice(start, last), visible[:, start:], columns[start:]
        if ancestors is None:
            yield _consecutive_parts(first, end, place, visible)
        else:
            yield _tree_rows(block, place, visible, columns)


def _tree_rows(block: TokenBlock, place: slice, visible: Tensor, columns: Tensor) -> VisibleRows:
    """Return the rows of a tree, whose (columns,) positions are not in the columns' order."""
    shared = (block.committed - place.start) // SUM_SIZE * SUM_SIZE
    groups = columns[shared:] // SUM_SIZE
    first, last = int(groups.min()), int(groups.max())
    counts = (groups - first).bincount()
    if bool((groups.diff() >= 0).all()) and int(counts.max()) <= MAX_KEYS:
        sizes = [SUM_SIZE] * (shared // SUM_SIZE) + counts.tolist()
        return _consecutive_parts(0, len(block), place, visible, sizes)
    parts = [
        Part(0, len(block), slice(column, column + SUM_SIZE))
        for column in range(0, shared, SUM_SIZE)
    ]
    for group in range(first, last + 1):
        places = shared + (groups == group).nonzero()[:, 0]
        parts += _bounded_parts(visible, 0, len(block), places)
    return VisibleRows(0, len(block), place, visible, parts)


def _consecutive_parts(
    first: int, end: int, columns: slice, visible: Tensor | None, sizes: list[int] | None = None
) -> VisibleRows:
    """Create rows whose parts follow each other; without `sizes` they are split at groups."""
    count = columns.stop - columns.start
    if sizes is None:
        sizes = [min(SUM_SIZE, count - column) for column in range(0, count, SUM_SIZE)]
    return VisibleRows(first, end, columns, visible, [], sizes)


def _bounded_parts(visible: Tensor, first: int, end: int, places: Tensor) -> Iterator[Part]:
    """Yield parts of at most `MAX_KEYS` keys: rows that see more of them are halved."""
    used = places[visible[first:end, places].any(0)]
    if len(used) <= MAX_KEYS:
        yield Part(first, end, used)
    else:
        middle = (first + end) // 2
        yield from _bounded_parts(visible, first, middle, places)
        yield from _bounded_parts(visible, middle, end, places)


def _missing_rows(count: int, width: int) -> int:
    """Return how many rows products with `width` columns and any number of keys need more."""
    least = max(-(-MIN_SIZE // width), WIDE_ROWS if width >= WIDE else QUERY_ROWS)
    return -max(count, least) // QUERY_ROWS * -QUERY_ROWS - count


CHECKED_NODES = 64


def check_attention(heads: int, kv_heads: int, width: int) -> None:
    """Compare attention over a random tree and over a prompt with single tokens, in float32.

    The tree crosses the end of a group. Raises an UnsupportedModelError if a row's sum depends on
    the rows or keys beside it.
    """
    random = torch.Generator().manual_seed(0)
    committed, nodes = 2 * SUM_SIZE - 7, CHECKED_NODES
    query = torch.randn(1, heads, committed + nodes, width, generator=random)
    keys, values = torch.randn(2, 1, kv_heads, committed + nodes, width, generator=random)
    ancestors, depths = torch.eye(nodes, dtype=torch.bool), torch.zeros(nodes, dtype=torch.long)
    for node in range(1, nodes):
        parent = int(torch.randint(max(0, node - 5), node, (), generator=random))
        ancestors[node] |= ancestors[parent]
        depths[node] = depths[parent] + 1

    def attend(columns: Tensor, rows: Tensor, block: TokenBlock) -> Tensor:
        k, v = (widen(x[:, :, columns]) for x in (keys, values))
        stored = [torch.stack([k[0], v[0]])[None]]
        plan = AttentionPlan(
            [(x, stored) for x in visible_rows(block, None)], kv_heads, query[:, :, rows]
        )
        return plan.attend(query[:, :, rows], 0, width**-0.5)[0].clone()

    everything = torch.arange(committed + nodes)
    tree = TokenBlock(committed, committed + depths, ancestors)
    on_tree = attend(everything, everything[committed:], tree)
    prompt = attend(everything, everything, TokenBlock(0, everything, None))
    # Checked are the deepest path of the tree, and some tokens of the prompt.
    path = committed + ancestors[depths.argmax()].nonzero()[:, 0]
    cases = [
        (torch.cat([everything[:committed], path[: i + 1]]), path[i], on_tree[path[i] - committed])
        for i in range(len(path))
    ]
    cases += [(everything[: row + 1], everything[row], prompt[row]) for row in range(0, nodes, 5)]
    cases += [(everything[: row + 1], everything[row], prompt[row]) for row in (127, 128, 250)]
    for columns, row, expected in cases:
        last = len(columns) - 1
        single = TokenBlock(last, torch.tensor([last]), None)
        if not torch.equal(attend(columns, row[None], single)[0], expected):
            raise UnsupportedModelError(
                f"{INEXACT}: attention over a draft tree or a prompt differs from single tokens "
                "on this machine"
            )
