"""Exact arithmetic: what is computed for a position depends on the tokens up to it alone.

The problem. Floating-point sums depend on their order: (0.1 + 0.2) + 0.3 and 0.1 + (0.2 + 0.3)
differ in the last bit. A library chooses the order by the shape of its inputs, so a token that is
computed beside fifteen others is usually rounded differently from the same token alone. Where two
tokens are nearly equally probable, the other one then wins, and the text is another.

The idea. Give each sum an order that depends on positions, never on what shares the pass. Terms
that a token must not see stay in the sum as exact zeros, which change no bit wherever they stand.

An example, with groups of 4 positions instead of `SUM_SIZE`. Five tokens are committed, at the
positions 0 to 4, and the root `a` has the children `b` and `c`, `b` the child `d`:

    column     0 1 2 3 | 4 5 6 7 | 8         `d` sees every column but c's. Its sum of values is
    position   0 1 2 3 | 4 5 6 6 | 7
    token      . . . .   . a b c   d             ((v0 + v1 + v2 + v3) + (v4 + va + vb + 0 + vd))

All these columns are of the groups 0 to 3 and 4 to 7: `d` is at position 7, although its column is
8. Plain decoding, which has `a`, `b`, `d` at the columns 5, 6, 7 and never drafts `c`, computes
((v0 + v1 + v2 + v3) + (v4 + va + vb + vd)): the same terms in the same order. That holds for every
node, because ancestors come before it, in the order of their positions.

The rule, on a CPU:

- A linear layer never runs with a single row where oneDNN has another kernel for it: a pass of one
  token has equal rows of it (`ExactContext.repeat`), and other products are padded. FBGEMM, which
  multiplies float16, has the same kernel for one row with AVX-512; with AVX2 alone it has the same
  kernels for multiples of three rows. Products of more rows than have the same bits are split: on
  Intel's processors with AMX those have at most 32 (`bound_products`).
- Attention sums over groups of `SUM_SIZE` positions, which begin at multiples of it, one group
  after the other, in float32 (`ExactContext`). Within a group the kernel of a batched product adds
  one key after the other in the order of the columns, up to `MAX_KEYS` of them. With AVX2 alone,
  MKL does so on Intel's processors in its strict mode (`MKL_CBWR`).
- Scores are sums over the head's width, and the largest score does not depend on an order. The
  denominator is summed like the numerator: a column of ones is stored beside the values.
- Activations whose result depends on a number's place read contiguous numbers, as PyTorch's GELU
  does (`pack_activations`).

Everything else computes each row separately. On a GPU the Triton kernels keep the rule, with one
more kernel for products (`use_kernel_for_products`). The underlying libraries guarantee none of
this, so `bound_products`, `check_products`, `check_activations`, `check_attention` and
`treeflash.decoding.probe.check_exact` test it on each machine at load.

The attention of a pass is prepared once and used in every layer. `Rows` are consecutive tokens of a
sequence with the columns that they see; its `Part`s are groups. `Sums` has the views that compute
the attention of some `Rows`; a `Run` has `Sums` of equally many tokens, one for each sequence; a
`Plan` has the runs of a pass.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from treeflash.decoding.passed_checks import PassedChecks
from treeflash.decoding.probe import INEXACT
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.attention import (
    AttentionContext,
    AttentionInputs,
    MaskFunction,
    PackedContext,
    additive_mask,
    evaluate,
)
from treeflash_cuda.cache import Columns, KVCache, PackedRows, TreeCache, widen
from treeflash_cuda.linear import (
    FusedLinear,
    FusedPart,
    PackedLinear,
    is_subclass,
    uses_fbgemm,
)
from treeflash_cuda.low_bit_linear import LowBitEmbedding, LowBitLinear
from treeflash_cuda.operations import TOLERANCES, on_its_device

HAS_AVX2_ALONE = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether the processor has AVX2 and no AVX-512."""
if HAS_AVX2_ALONE and "Intel" in torch.cpu.get_capabilities()["cpu_name"]:
    # MKL's AVX2 kernels for Intel's processors sum in another order at the edges of a product, and
    # where threads divide it, unless MKL finds this variable at its first product. For AMD's they
    # do not, but in the strict mode they do.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
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
LINEAR_ROWS = 2
STREAMED_ROWS = 4
"""Rows of a lone token where weights are read from memory: oneDNN reads them faster for 3 or 4 rows
than for 1 or 2. Weights in a cache are read as fast for 2 rows, and 2 rows are less work."""
FBGEMM_ROWS = 3
"""With AVX2 alone FBGEMM computes three rows or more at once; one or two have other bits."""
CACHE_NBYTES = 64 << 20
"""Weights of more bytes than this are read from memory, not from a cache."""


@dataclass(frozen=True, eq=False)
class Part:
    """A product of the weights of some rows with the values of keys of one group."""

    first: int  # the rows' first token
    end: int  # the token after the rows' last one
    columns: slice | Tensor  # the keys' columns, counted from the first one of `Rows.columns`


@dataclass(frozen=True, eq=False)
class Rows:
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
    """The sums of the values that some `Rows` see, in every layer.

    The number of operations decides how long a pass takes, so all views are made once for it.
    """

    def __init__(
        self,
        rows: Rows,
        stored: Sequence[Tensor],  # `KVStorage.parts` of the sequence, as `widen` makes them
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
        self.scores = self.weights[:, : rows.tokens * groups]  # without padded rows
        self.keys: list[Tensor] = []  # by layer
        self.values: list[tuple[Tensor, ...]] = []  # by layer, then by part
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


Members: TypeAlias = Sequence[tuple[Rows, Sequence[Tensor]]]
"""Rows, each with the `KVStorage.parts` of its sequence."""


class Run:
    """Consecutive `Rows` with equal numbers of tokens; one copy reads the queries of them all."""

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


class Plan:
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


class ExactContext(AttentionContext):
    """`AttentionContext` over float32 keys and values, with the order of sums described above."""

    def __init__(self, committed: int, positions: Tensor, ancestors: Tensor | None) -> None:
        super().__init__(committed, positions, ancestors)
        self.tokens = len(positions)  # without the equal rows that `repeat` adds
        # The cache has the keys and values of the layers; None if `attend` is given them.
        self.cache: ExactCache | None = None
        self._layouts: dict[int, tuple[Tensor, list[Rows]]] = {}

    def repeat(self, times: int) -> None:
        """Let a block of one token have several equal rows, of which the first one attends."""
        assert self.tokens == 1
        self.positions = self.positions.repeat(times)

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor:
        """Return a tensor that stands for the layers' mask function."""
        placeholder = self.positions.new_empty(1, 1, 1, 1)
        self._layouts[id(placeholder)] = placeholder, list(self._layout(function))
        return placeholder

    def _layout(self, function: MaskFunction) -> Iterator[Rows]:
        n, device = self.tokens, self.positions.device
        if self.tokens == 1 and function is causal_mask_function:
            yield _consecutive_parts(0, n, slice(0, self.committed + 1), None)
            return
        is_tree = self.ancestors is not None and self.tokens > 1
        step = n if is_tree else PROMPT_ROWS
        for first in range(0, n, step):
            end = min(first + step, n)
            last = self.committed + end
            columns = torch.arange(last, device=device)
            if is_tree:
                columns[self.committed :] = self.positions
            visible = evaluate(function, self.positions[first:end, None], columns)
            visible = visible.expand(end - first, -1)
            if is_tree:
                assert self.ancestors is not None
                visible = visible.clone()
                visible[:, self.committed :] &= self.ancestors
            # Groups that no token sees, of a sliding window, would add zeros.
            start = int(visible.any(0).int().argmax()) // SUM_SIZE * SUM_SIZE
            visible, columns = visible[:, start:], columns[start:]
            if is_tree:
                yield self._tree_rows(slice(start, last), visible, columns)
            else:
                yield _consecutive_parts(first, end, slice(start, last), visible)

    def _tree_rows(self, place: slice, visible: Tensor, columns: Tensor) -> Rows:
        """Return the rows of a tree, whose (columns,) positions are not in the columns' order."""
        shared = (self.committed - place.start) // SUM_SIZE * SUM_SIZE
        groups = columns[shared:] // SUM_SIZE
        first, last = int(groups.min()), int(groups.max())
        counts = (groups - first).bincount()
        if bool((groups.diff() >= 0).all()) and int(counts.max()) <= MAX_KEYS:
            sizes = [SUM_SIZE] * (shared // SUM_SIZE) + counts.tolist()
            return _consecutive_parts(0, self.tokens, place, visible, sizes)
        parts = [
            Part(0, self.tokens, slice(column, column + SUM_SIZE))
            for column in range(0, shared, SUM_SIZE)
        ]
        for group in range(first, last + 1):
            places = shared + (groups == group).nonzero()[:, 0]
            parts += _bounded_parts(visible, 0, self.tokens, places)
        return Rows(0, self.tokens, place, visible, parts)

    def layout(self, inputs: AttentionInputs, mask: Tensor | None) -> list[Rows]:
        """Return the rows of the block in layers with a mask that `mask` made.

        Raises an UnsupportedModelError if the layer changes its mask.
        """
        if id(mask) not in self._layouts:
            raise UnsupportedModelError(
                f"{type(inputs.module).__name__} changes its mask, which exact mode does not "
                "support"
            )
        return self._layouts[id(mask)][1]

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend to the columns of the cache.

        Without a cache, key and value have all columns, as `widen` makes them. Raises what `layout`
        and `ExactCache.attend` raise.
        """
        if self.cache is not None:
            return self.cache.attend(inputs, [self], [inputs.mask])
        stored = [torch.stack([inputs.key[0], inputs.value[0]])[None]]
        members = [(rows, stored) for rows in self.layout(inputs, inputs.mask)]
        plan = Plan(members, inputs.key.shape[1], inputs.query)
        return plan.attend(inputs.query, 0, inputs.scale)


class PackedExactContext(PackedContext):
    """`Context` of several sequences."""

    sequences: Sequence[ExactContext]
    cache: ExactCache

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend to the columns of the cache. Raises what `ExactContext.attend` raises."""
        unknown = None, [None] * len(self.sequences)
        _, masks = self._sequence_masks.get(id(inputs.mask), unknown)
        return self.cache.attend(inputs, self.sequences, masks)


class ExactCache(TreeCache):
    """Stores keys and values in float32, beside the ones that the arena has after them."""

    def __init__(self, sequences: Sequence[KVCache], rows: Sequence[int]) -> None:
        super().__init__(sequences, rows)
        self._keys: Tensor | None = None  # the keys of the layer that was updated last
        # Several sequences have an entry for each slab: the keys and values of all its columns, by
        # layer, the indices of its rows (None for all of them), and their columns.
        self._slabs: list[tuple[Columns, Tensor | None, Tensor]] = []
        self._plans: dict[tuple[int, int], Plan] = {}

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of all rows, and return them: `attend` reads the columns."""
        self.layer, self._keys = layer_idx, key_states
        if not self._new and not self._slabs:
            self._reserve(widen(key_states[:, :, :1]), *key_states.shape[2:])
        states = key_states, value_states
        if self._new:
            for storage, x in zip(self._new[layer_idx], states, strict=True):
                storage.copy_(x if x.shape == storage.shape else x[:, :, : storage.shape[2]])
            return states
        wide = [x.float() for x in states]
        for storages, rows, columns in self._slabs:
            for storage, x in zip(storages[layer_idx], wide, strict=True):
                x = x if rows is None else x.index_select(2, rows)
                storage.index_copy_(2, columns, x)
        return states

    def _reserve(self, like: Tensor, tokens: int, width: int) -> None:
        """Reserve columns for stored keys like these, whose first `width` numbers are written.

        Rows that `ExactContext.repeat` adds are stored in the columns after the last one, which no
        row reads, as far as there is room.
        """
        segments = [(x, x.length, n) for x, n in zip(self.sequences, self.rows, strict=True)]
        if len(segments) > 1:
            for slab, rows, columns in PackedRows(segments, like).slabs:
                self._slabs.append((slab.views(slice(None), width), rows, columns))
        else:
            ((sequence, first, n),) = segments
            region = sequence.reserve(like, like, first + n)
            self._new = region.views(slice(first, min(first + tokens, region.columns)), width)

    def attend(
        self,
        inputs: AttentionInputs,
        sequences: Sequence[ExactContext],
        masks: Sequence[Tensor | None],  # the masks of each sequence, for the layer
    ) -> Tensor:
        """Return the (1, tokens, heads, width) attention of the layer that was updated last.

        Raises an UnsupportedModelError if the layer attends to keys that it did not store, and what
        `ExactContext.layout` raises.
        """
        if inputs.key is not self._keys:
            raise UnsupportedModelError(
                f"{type(inputs.module).__name__} does not attend to the keys that it stores, which "
                "exact mode does not support"
            )
        key = id(inputs.mask), inputs.query.shape[1]
        if key not in self._plans:
            members = [
                (rows, cache.taken.parts)
                for context, mask, cache in zip(sequences, masks, self.sequences, strict=True)
                for rows in context.layout(inputs, mask)
            ]
            self._plans[key] = Plan(members, inputs.key.shape[1], inputs.query)
        return self._plans[key].attend(inputs.query, self.layer, inputs.scale)


def _consecutive_parts(
    first: int, end: int, columns: slice, visible: Tensor | None, sizes: list[int] | None = None
) -> Rows:
    """Create rows whose parts follow each other; without `sizes` they are split at groups."""
    count = columns.stop - columns.start
    if sizes is None:
        sizes = [min(SUM_SIZE, count - column) for column in range(0, count, SUM_SIZE)]
    return Rows(first, end, columns, visible, [], sizes)


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


def token_rows(model: nn.Module, dtype: torch.dtype) -> int:
    """Return how many equal rows give a lone token the bits of more rows in the least time.

    Weights of few bits need one; products with other weights are then padded.
    """
    if any(isinstance(x, LowBitLinear) for x in model.modules()):
        return 1
    if uses_fbgemm(dtype):
        return row_multiple(dtype)
    weights = sum(x.numel() * x.itemsize for x in model.parameters())
    return STREAMED_ROWS if weights > CACHE_NBYTES else LINEAR_ROWS


def row_multiple(dtype: torch.dtype) -> int:
    """Return the number of whose multiples products of a dtype must have rows on this machine."""
    return FBGEMM_ROWS if HAS_AVX2_ALONE and uses_fbgemm(dtype) else 1


def bound_products(
    model: nn.Module, dtype: torch.dtype, undo: ExitStack, least: int, passed: PassedChecks
) -> None:
    """Let the linear layers of a loaded model give a row equal bits, whatever rows are beside it.

    Until `undo` ends, products of fewer than `least` rows are padded, others to `row_multiple`, and
    products of more rows than have the same bits on this machine are split: than `passed` tells
    of shapes that were checked before. Passes of one token have more rows anyway; the least is for
    the output head of a longer pass.

    Raises an UnsupportedModelError if fewer than `LEAST_ROWS` rows have the same bits, or a module
    computes products in another way.
    """
    most: dict[tuple[tuple[int, int], str], int] = {}  # by shape, and dtype or format
    for owner, name, shape in products_of(model):
        product = getattr(owner, name)
        if isinstance(product, _BoundedProduct):  # fused layers share one, and each of them is met
            continue
        # Rows are independent there by construction, and are compared all the same.
        is_low = isinstance(owner, LowBitLinear)
        sizes = (1, 1) if is_low else (least, row_multiple(dtype))
        bounded, kind = _BoundedProduct(product, *sizes), owner.name if is_low else str(dtype)
        if (shape, kind) not in most:
            affordable = CHECKED_MULTIPLICATIONS // math.prod(shape)
            counts = [n for n in MORE_CHECKED_ROWS if n <= affordable]
            counts = [*CHECKED_ROWS, *counts]
            device = next(model.parameters()).device
            check = partial(_equal_rows, bounded, shape, dtype, device, counts, LEAST_ROWS)
            most[shape, kind] = passed.find(f"products of {shape} in {kind}", check)
        bounded.most = most[shape, kind]
        undo.callback(setattr, owner, name, product)
        setattr(owner, name, bounded)


def use_kernel_for_products(model: nn.Module) -> None:
    """Let a Triton kernel compute the linear layers of a loaded model; see `triton_kernels`.

    Raises an UnsupportedModelError if a module computes products in another way, or the kernel's
    results differ from PyTorch's, or a row's results in a prompt from its results in a tree.
    """
    from treeflash_cuda.triton_kernels import products

    linear = on_its_device(products.linear)
    random = torch.Generator().manual_seed(0)
    for owner, name, _ in products_of(model):
        product = getattr(owner, name)
        if isinstance(product, partial):
            weight, bias = product.keywords["weight"], product.keywords["bias"]
        else:
            weight, bias = owner.weight, owner.bias
        x = torch.randn(CHECKED_TOKENS, weight.shape[1], generator=random).to(weight)
        actual, expected = linear(x, weight, bias), F.linear(x, weight, bias).float()
        difference = float((actual.float() - expected).square().mean().sqrt() / expected.std())
        if not difference <= TOLERANCES[weight.dtype]:
            raise UnsupportedModelError(
                f"{INEXACT}: the results of the kernel for products differ by {difference:.2%}"
            )
        of_prompt = linear(x.repeat(CHECKED_REPEATS, 1), weight, bias)
        if not torch.equal(of_prompt[:CHECKED_TOKENS], actual):
            raise UnsupportedModelError(
                f"{INEXACT}: products of many rows have other bits than products of few"
            )
        setattr(owner, name, partial(linear, weight=weight, bias=bias))


def products_of(model: nn.Module) -> Iterator[tuple[Any, str, tuple[int, int]]]:
    """Yield the objects that compute a model's products, the names of their functions, and shapes.

    The shapes are (out, in). Raises an UnsupportedModelError if a module computes products in
    another way.
    """
    for name, module in model.named_modules():
        if isinstance(module, LowBitLinear):
            if not isinstance(module, LowBitEmbedding):
                yield module, "forward", module.shape
        elif isinstance(module, FusedPart):
            if not isinstance(module.fused, FusedLinear):  # its layer is met, too
                continue
            assert module.weight is not None
            yield module.fused, "product", (sum(module.fused.sizes), module.weight.shape[1])
        elif isinstance(module, nn.Linear | PackedLinear) and not is_subclass(module.weight):
            out, width = module.weight.shape
            yield module, "forward", (out, width)
        elif not isinstance(module, nn.Embedding) and any(
            x.ndim > 1 for x in module.parameters(recurse=False)
        ):
            raise UnsupportedModelError(
                f"{INEXACT}: it does not support the products of {type(module).__name__} ({name})"
            )


class _BoundedProduct:
    """A product of at least `least` rows, a multiple that zeros fill up, split at `most` rows."""

    def __init__(self, product: Callable[[Tensor], Tensor], least: int, multiple: int) -> None:
        self.product = product
        self.least = least
        self.multiple = multiple
        self.most = MORE_CHECKED_ROWS[-1]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[-2]
        if rows > self.most:
            return torch.cat([self(part) for part in x.split(self.most, -2)], -2)
        missing = max(self.least - rows, -rows % self.multiple)
        if missing <= 0 or not rows:
            return self.product(x)
        return self.product(F.pad(x, (0, 0, 0, missing)))[..., :rows, :]


def activations(model: nn.Module) -> Iterator[nn.Module]:
    modules = "transformers.activations", "torch.nn.modules.activation"
    return (x for x in model.modules() if type(x).__module__ in modules)


def pack_activations(model: nn.Module, dtype: torch.dtype, undo: ExitStack) -> None:
    """Let the activations of a loaded model read contiguous numbers until `undo` ends.

    Only activations that depend on places do; in half precision all numbers are tried.
    """
    for module in activations(model):
        if dtype.itemsize > 2 or _depends_on_place(module, dtype):
            hook = module.register_forward_pre_hook(
                lambda _, x: tuple(part.contiguous() for part in x)
            )
            undo.callback(hook.remove)


def check_activations(model: nn.Module, dtype: torch.dtype) -> None:
    """Compare activations of all 65,536 numbers bit for bit, in rows of other lengths and strides.

    Raises an UnsupportedModelError if an activation depends on a number's place.
    """
    for module in {type(x): x for x in activations(model)}.values():
        if _depends_on_place(module, dtype):
            raise UnsupportedModelError(
                f"{INEXACT}: {type(module).__name__} depends on a number's place on this machine"
            )


def _depends_on_place(module: nn.Module, dtype: torch.dtype) -> bool:
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers.view(dtype) if dtype.itemsize == 2 else numbers.to(dtype)
    numbers = numbers[numbers.isfinite()]
    expected = module(numbers)
    strided = module(torch.stack([numbers, numbers], 1)[:, 0])
    shifted = [module(numbers[place:].clone()) for place in (1, 3, 7)]
    return any(not torch.equal(x, expected[-len(x) :]) for x in (strided, *shifted))


CHECKED_TOKENS = 4
"""Rows on which the kernel for products is compared with PyTorch."""
CHECKED_REPEATS = 64
"""Times that these rows make a prompt, for which the kernel has other programs."""
CHECKED_ROWS = (*range(1, 18), 24, 31, 32, 33, 48, 63, 64)
MORE_CHECKED_ROWS = (96, 128, 255, 256, 512)
"""Rows of prompts and of batches."""
CHECKED_MULTIPLICATIONS = 1 << 33
"""Most multiplications of a checked product of more rows than `CHECKED_ROWS`: checks of large
weights would take seconds."""
LEAST_ROWS = 16
"""A target is refused if a product of this many rows has to be split: it would be slow."""


def check_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Compare products of 1 to 64 random rows bit for bit, for each shape of a linear layer.

    Raises an UnsupportedModelError if a product's rows depend on the number of rows.
    """
    device = next(model.parameters()).device
    products = {shape: getattr(owner, name) for owner, name, shape in products_of(model)}
    for shape, product in products.items():
        _equal_rows(product, shape, dtype, device, CHECKED_ROWS, CHECKED_ROWS[-1])


def _equal_rows(
    product: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    counts: Sequence[int],
    least: int,
) -> int:
    """Return the largest of some ascending numbers of rows up to which rows have the same bits.

    Raises an UnsupportedModelError if it is smaller than `least`.
    """
    random, (size, width) = torch.Generator().manual_seed(0), shape
    x = torch.randn(1, counts[-1], width, generator=random).to(device, dtype)
    previous = product(x[:, : counts[0]])
    for rows in counts[1:]:
        result, equal = product(x[:, :rows]), previous.shape[1]
        if not torch.equal(result[:, :equal], previous):
            if equal < least:
                raise UnsupportedModelError(
                    f"{INEXACT}: {dtype} products of {width} x {size} weights depend on the number "
                    f"of rows on this machine ({equal} rows differ from {rows})"
                )
            return equal
        previous = result
    return counts[-1]


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

    def attend(columns: Tensor, rows: Tensor, context: ExactContext) -> Tensor:
        mask = context.mask(causal_mask_function, torch.float32, None)
        k, v = (widen(x[:, :, columns]) for x in (keys, values))
        return context.attend(
            AttentionInputs(nn.Module(), query[:, :, rows], k, v, mask, width**-0.5)
        )[0]

    everything = torch.arange(committed + nodes)
    tree = ExactContext(committed, committed + depths, ancestors)
    on_tree = attend(everything, everything[committed:], tree)
    prompt = attend(everything, everything, ExactContext(0, everything, None))
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
        single = ExactContext(last, torch.tensor([last]), None)
        if not torch.equal(attend(columns, row[None], single)[0], expected):
            raise UnsupportedModelError(
                f"{INEXACT}: attention over a draft tree or a prompt differs from single tokens "
                "on this machine"
            )
