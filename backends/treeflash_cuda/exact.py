"""Exact arithmetic: what is computed for a position depends on the tokens up to it alone.

Floating-point sums depend on their order, so a token that is computed beside others is usually
rounded differently from the same token alone. In exact mode it is not, bit for bit. On a GPU the
Triton kernels see to that, with one more for products (`use_kernel_for_products`). On a CPU:

- A linear layer never runs with a single row, for which oneDNN has another kernel: a pass of one
  token has two rows of it (`ExactContext.repeat`), and other products are padded (`pad_products`).
- Attention sums over groups of `GROUP` positions, which begin at multiples of `GROUP`, one group
  after the other, in float32 (`ExactContext`). Within a group the kernel of a batched product adds
  one key after the other in the order of the columns, up to `MAX_KEYS` of them. Keys that a row
  does not see add an exact zero. On a draft tree a node's ancestors come before it, in the order
  of their positions, so its sum has the terms of plain decoding in the order of plain decoding.
- Scores are sums over the head's width, and the largest score does not depend on an order. The
  denominator is summed like the numerator: a column of ones is stored beside the values.
- Activations whose result depends on a number's place read contiguous numbers, as PyTorch's GELU
  does (`pack_activations`).

Everything else computes each row by itself. None of this is promised by the libraries underneath,
so `check_products`, `check_activations`, `check_attention` and
`treeflash.decoding.probe.check_exact` test it on each machine at load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

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
from treeflash_cuda.cache import Columns, PackedRows, TreeCache, widen
from treeflash_cuda.linear import FusedPart, PackedLinear, is_subclass
from treeflash_cuda.operations import TOLERANCES

GROUP = 128
"""Positions whose sum is computed by one product."""
MAX_KEYS = 192
"""Longer sums are split by the kernels, in places that depend on columns."""
MIN_COLUMNS = 16
"""Fewer keys take other kernels."""
ROWS = 8
"""Queries are padded to a multiple of it: the edges of products are summed in another order."""
MIN_SIZE = 400
"""Multiplications; PyTorch computes smaller products with loops of its own."""
PROMPT_ROWS = 128
"""Tokens of a prompt that attend at once, to bound the memory of scores."""
LINEAR_ROWS = 2


@dataclass(frozen=True, eq=False)
class Part:
    """A product of the weights of some rows with the values of keys of one group."""

    first: int  # the rows' first token
    end: int  # the token after the rows' last one
    columns: slice | Tensor  # of the keys, counted from the first of `Rows.columns`


@dataclass(frozen=True, eq=False)
class Rows:
    """The keys that some consecutive tokens of a pass see in the layers with one mask function."""

    first: int  # the first token
    end: int  # the token after the last one
    columns: slice  # of the keys; begins at a multiple of `GROUP`, before which no token sees a key
    visible: Tensor | None  # (tokens, columns) bool; None if every column is visible
    parts: list[Part]  # in the order of their groups
    # Numbers of columns of the parts, if these follow each other and have the weights of all rows.
    sizes: list[int] | None = None
    inputs: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def prepared(self, kv_heads: int, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """What all layers with these heads share.

        Returns:
            A (kv_heads, rows, width) float32 buffer of queries, with zeros in the rows that are
            padding; its (kv_heads, tokens, groups, width) rows of the tokens; and the additive mask
            of (rows or 1, columns), padded.
        """
        key = kv_heads, groups, width
        if key not in self.inputs:
            tokens, columns = self.end - self.first, self.columns.stop - self.columns.start
            rows = tokens * groups
            padding = _missing_rows(rows, width)
            queries = torch.zeros(kv_heads, rows + padding, width)
            if self.visible is None:
                mask = torch.zeros(1, columns)
            else:
                mask = additive_mask(self.visible, torch.float32).repeat_interleave(groups, 0)
                mask = F.pad(mask, (0, 0, 0, padding))
            mask = F.pad(mask, (0, max(MIN_COLUMNS - columns, 0)), value=float("-inf"))
            own = queries[:, :rows].unflatten(1, (tokens, groups))
            self.inputs[key] = queries, own, mask
        return self.inputs[key]


class ExactContext(AttentionContext):
    """`AttentionContext` over float32 keys and values, with the order of sums described above."""

    def __init__(self, committed: int, positions: Tensor, ancestors: Tensor | None) -> None:
        super().__init__(committed, positions, ancestors)
        self.tokens = len(positions)  # of the block, without those that `repeat` adds
        self._layouts: dict[int, tuple[Tensor, list[Rows]]] = {}

    def repeat(self, times: int) -> None:
        """Attend with several equal rows for a block of one token, which stays one column."""
        assert self.tokens == 1
        self.positions = self.positions.repeat(times)

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor:
        """A tensor that stands for the layers' mask function."""
        placeholder = self.positions.new_empty(1, 1, 1, 1)
        self._layouts[id(placeholder)] = placeholder, list(self._layout(function))
        return placeholder

    def _layout(self, function: MaskFunction) -> Iterator[Rows]:
        n, device = len(self.positions), self.positions.device
        if self.tokens == 1 and function is causal_mask_function:
            yield _consecutive_parts(0, n, slice(0, self.committed + 1), None)
            return
        is_tree = self.ancestors is not None and self.tokens > 1
        step = n if is_tree else PROMPT_ROWS
        for first in range(0, n, step):
            end = min(first + step, n)
            last = self.committed + min(end, self.tokens)
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
            start = int(visible.any(0).int().argmax()) // GROUP * GROUP
            visible, columns = visible[:, start:], columns[start:]
            if is_tree:
                yield self._tree_rows(slice(start, last), visible, columns)
            else:
                yield _consecutive_parts(first, end, slice(start, last), visible)

    def _tree_rows(self, place: slice, visible: Tensor, columns: Tensor) -> Rows:
        """The rows of a tree, whose (columns,) positions are not in the order of the columns."""
        shared = (self.committed - place.start) // GROUP * GROUP
        groups = columns[shared:] // GROUP
        first, last = int(groups.min()), int(groups.max())
        if first == last and len(groups) <= MAX_KEYS:
            sizes = [GROUP] * (shared // GROUP) + [len(groups)]
            return _consecutive_parts(0, self.tokens, place, visible, sizes)
        parts = [
            Part(0, self.tokens, slice(column, column + GROUP))
            for column in range(0, shared, GROUP)
        ]
        for group in range(first, last + 1):
            places = shared + (groups == group).nonzero()[:, 0]
            parts += _bounded_parts(visible, 0, self.tokens, places)
        return Rows(0, self.tokens, place, visible, parts)

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend; key and value have float32 columns of the committed positions and the block.

        Raises an UnsupportedModelError if the layer changes its mask, or uses a variant of
        attention whose order of sums is not known.
        """
        query = inputs.query[0]
        output = query.new_empty(query.shape[1], *_heads(query, inputs.key))
        self.attend_to(inputs, query, inputs.key[0], inputs.value[0], inputs.mask, output)
        return output.view(1, len(output), -1, query.shape[2])

    def attend_to(
        self,
        inputs: AttentionInputs,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        output: Tensor,
    ) -> None:
        """Write the attention of the block.

        Args:
            inputs: of the layer, which may have other sequences too.
            query: (heads, tokens, width) of the block.
            keys: (kv_heads, columns, width or more), float32.
            values: (kv_heads, columns, more than width), float32, with ones after the values.
            mask: the result of `mask` for the layer's mask function.
            output: (tokens, kv_heads, groups, width).
        """
        if id(mask) not in self._layouts or inputs.softcap or inputs.sinks is not None:
            raise UnsupportedModelError(
                f"{type(inputs.module).__name__} changes its mask or its scores, which exact mode "
                "does not support"
            )
        _, kv_heads, groups, width = output.shape
        queries = query.unflatten(0, (kv_heads, groups)).transpose(1, 2)
        layout = self._layouts[id(mask)][1]
        for rows in layout:
            tokens = slice(rows.first, rows.end)
            q, k, v = queries, keys[:, rows.columns, :width], values[:, rows.columns]
            out = output.transpose(0, 1)
            if len(layout) > 1:
                q, out = q[:, tokens], out[:, tokens]
            sums = _sums(q, k, v, rows, inputs.scale)
            torch.div(sums[..., :width], sums[..., width : width + 1], out=out)


class PackedExactContext(PackedContext):
    """`Context` of several sequences, which attend one by one."""

    sequences: Sequence[ExactContext]
    cache: ExactCache

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend sequence by sequence to the new rows' key and value; see `ExactContext`."""
        query, place = inputs.query[0], id(inputs.mask)
        output = query.new_empty(query.shape[1], *_heads(query, inputs.key))
        _, masks = self._sequence_masks.get(place, (None, [None] * len(self.sequences)))
        first = 0
        for sequence, columns, mask in zip(self.sequences, self.cache.columns, masks, strict=True):
            block = slice(first, first + sequence.tokens)
            keys, values = columns[self.cache.layer]
            parts = query[:, block], keys[0], values[0], mask, output[block]
            sequence.attend_to(inputs, *parts)
            first = block.stop
        return output.view(1, len(output), -1, query.shape[2])


class ExactCache(TreeCache):
    """Stores keys and values in float32, beside the ones that the arena has after them."""

    columns: Sequence[Columns] = ()
    """Of each sequence, once a layer has been updated."""

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `TreeCache.update` does it; rows that `ExactContext.repeat` adds are not stored."""
        self.layer, width = layer_idx, key_states.shape[3]
        states = key_states, value_states
        if not self.columns:
            self._reserve(widen(key_states[:, :, :1]), width)
        if self._packed is None:
            (n,) = self.rows
            for storage, x in zip(self._new[layer_idx], states, strict=True):
                storage.copy_(x if x.shape[2] == n else x[:, :, :n])
            return self.columns[0][layer_idx]
        wide = [x[0].float() for x in states]
        for slab, rows, columns in self._packed.slabs:
            for storage, x in zip(slab.layer(layer_idx), wide, strict=True):
                x = x if rows is None else x.index_select(1, rows)
                storage[..., :width].index_copy_(1, columns, x)
        return key_states, value_states

    def _reserve(self, like: Tensor, width: int) -> None:
        """Reserve columns for stored keys like these, whose first `width` numbers are written."""
        segments = [(x, x.length, n) for x, n in zip(self.sequences, self.rows, strict=True)]
        if len(segments) > 1:
            self._packed = PackedRows(segments, like)
        else:
            ((sequence, first, n),) = segments
            sequence.reserve(like, like, first + n)
            new = sequence.columns(first, first + n)
            self._new = [(k[..., :width], v[..., :width]) for k, v in new]
        self.columns = [x.columns(0, first + n) for x, first, n in segments]


def _heads(query: Tensor, keys: Tensor) -> tuple[int, int, int]:
    """Key heads, query heads of each, and the width, of (heads, n, width) queries."""
    kv_heads = keys.shape[1]
    return kv_heads, query.shape[0] // kv_heads, query.shape[2]


def _consecutive_parts(
    first: int, end: int, columns: slice, visible: Tensor | None, sizes: list[int] | None = None
) -> Rows:
    """Rows whose parts follow each other in the columns; None splits these at groups."""
    count = columns.stop - columns.start
    if sizes is None:
        sizes = [min(GROUP, count - column) for column in range(0, count, GROUP)]
    return Rows(first, end, columns, visible, [], sizes)


def _bounded_parts(visible: Tensor, first: int, end: int, places: Tensor) -> Iterator[Part]:
    """Parts of at most `MAX_KEYS` keys: rows that see more of them are halved."""
    used = places[visible[first:end, places].any(0)]
    if len(used) <= MAX_KEYS:
        yield Part(first, end, used)
    else:
        middle = (first + end) // 2
        yield from _bounded_parts(visible, first, middle, places)
        yield from _bounded_parts(visible, middle, end, places)


def _sums(queries: Tensor, keys: Tensor, values: Tensor, rows: Rows, scale: float) -> Tensor:
    """(kv_heads, tokens, groups, columns of values) sums of the values, by row.

    The queries are (kv_heads, tokens, groups, width), the keys (kv_heads, columns, width) in
    float32. The values are (kv_heads, columns, more than width) in float32, with ones after the
    values. `rows` are the keys that each token sees; `scale` multiplies the scores.
    """
    kv_heads, tokens, groups, width = queries.shape
    if (missing := MIN_COLUMNS - keys.shape[1]) > 0:
        keys = F.pad(keys, (0, 0, 0, missing))
    padded, own, mask = rows.prepared(kv_heads, groups, width)
    own.copy_(queries)
    weights = torch.baddbmm(mask[None], padded, keys.transpose(1, 2), alpha=scale)
    weights.sub_(weights.amax(-1, keepdim=True)).exp_()
    if rows.sizes is not None:
        sums = _add_consecutive(weights, values, rows.sizes)
    else:
        sums = _add_parts(weights, values, rows, groups)
    return sums[:, : tokens * groups].unflatten(1, (tokens, groups))


def _add_consecutive(weights: Tensor, values: Tensor, sizes: list[int]) -> Tensor:
    """(kv_heads, rows, columns of values) sums over parts that follow each other."""
    if weights.shape[2] > values.shape[1]:  # padding
        weights = weights[..., : values.shape[1]]
    pairs = zip(weights.split(sizes, 2), values.split(sizes, 1), strict=True)
    sums = torch.bmm(*next(pairs))
    for p, v in pairs:
        sums.baddbmm_(p, v)
    return sums


def _add_parts(weights: Tensor, values: Tensor, rows: Rows, groups: int) -> Tensor:
    """(kv_heads, rows, columns of values) sums over parts with columns and rows of their own."""
    sums = values.new_zeros(*weights.shape[:2], values.shape[2])
    for part in rows.parts:
        if isinstance(part.columns, slice):
            p, v = weights[:, :, part.columns], values[:, part.columns]
        else:
            p = weights.index_select(2, part.columns)
            v = values.index_select(1, part.columns)
        if (part.first, part.end) == (rows.first, rows.end):
            sums.baddbmm_(p, v)
        else:
            first, end = ((x - rows.first) * groups for x in (part.first, part.end))
            missing = _missing_rows(end - first, values.shape[2])
            p, old = (F.pad(x[:, first:end], (0, 0, 0, missing)) for x in (p, sums))
            sums[:, first:end] = torch.baddbmm(old, p, v)[:, : end - first]
    return sums


def _missing_rows(count: int, width: int) -> int:
    """Rows to add to products with `width` columns and any number of keys."""
    return -max(count, -(-MIN_SIZE // width)) // ROWS * -ROWS - count


def pad_products(model: nn.Module, least: int = LINEAR_ROWS) -> None:
    """Let every linear layer of a loaded model run with at least `least` rows.

    Passes of one token have two rows anyway; this is for the output head of a longer pass. Raises
    an UnsupportedModelError if a module computes products in another way.
    """
    for owner, name in _products(model):
        setattr(owner, name, _padded(getattr(owner, name), least))


def use_kernel_for_products(model: nn.Module) -> None:
    """Let a Triton kernel compute the linear layers of a loaded model; see `triton_kernels`.

    Raises an UnsupportedModelError if a module computes products in another way, or the kernel's
    results differ from PyTorch's.
    """
    from treeflash_cuda.triton_kernels.products import linear

    random = torch.Generator().manual_seed(0)
    for owner, name in _products(model):
        product = getattr(owner, name)
        if isinstance(product, partial):
            weight, bias = product.keywords["weight"], product.keywords["bias"]
        elif isinstance(owner, nn.Linear):
            weight, bias = owner.weight, owner.bias
        else:
            raise UnsupportedModelError(f"{INEXACT}: the products of its layers are packed")
        x = torch.randn(CHECKED_TOKENS, weight.shape[1], generator=random).to(weight)
        actual, expected = linear(x, weight, bias).float(), F.linear(x, weight, bias).float()
        difference = float((actual - expected).square().mean().sqrt() / expected.std())
        if not difference <= TOLERANCES[weight.dtype]:
            raise UnsupportedModelError(
                f"{INEXACT}: the results of the kernel for products differ by {difference:.2%}"
            )
        setattr(owner, name, partial(linear, weight=weight, bias=bias))


def _products(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """The objects that compute products of a model, and the names of the functions that do it."""
    for name, module in model.named_modules():
        if isinstance(module, FusedPart):
            yield module.fused, "product"
        elif isinstance(module, nn.Linear | PackedLinear) and not is_subclass(module.weight):
            yield module, "forward"
        elif not isinstance(module, nn.Embedding) and any(
            x.ndim > 1 for x in module.parameters(recurse=False)
        ):
            raise UnsupportedModelError(
                f"{INEXACT}: it does not support the products of {type(module).__name__} ({name})"
            )


class _Padded:
    """A product whose input is padded with rows of zeros; a class so that it is padded once."""

    def __init__(self, product: Callable[[Tensor], Tensor], least: int) -> None:
        self.product = product
        self.least = least

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[-2]
        if rows >= self.least or not rows:
            return self.product(x)
        return self.product(F.pad(x, (0, 0, 0, self.least - rows)))[..., :rows, :]


def _padded(product: Callable[[Tensor], Tensor], least: int) -> Callable[[Tensor], Tensor]:
    return product if isinstance(product, _Padded) else _Padded(product, least)


def activations(model: nn.Module) -> Iterator[nn.Module]:
    modules = "transformers.activations", "torch.nn.modules.activation"
    return (x for x in model.modules() if type(x).__module__ in modules)


def pack_activations(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the activations of a loaded model read contiguous numbers, where that matters.

    In half precision all numbers tell whether it does.
    """
    for module in activations(model):
        if dtype.itemsize > 2 or _depends_on_place(module, dtype):
            module.register_forward_pre_hook(lambda _, x: tuple(part.contiguous() for part in x))


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
CHECKED_ROWS = (*range(1, 18), 24, 31, 32, 33, 48, 63, 64)


def check_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Compare products of 1 to 64 random rows bit for bit, for each shape of a linear layer.

    Raises an UnsupportedModelError if a product's rows depend on the number of rows.
    """
    random, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    products: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}
    for module in model.modules():
        if isinstance(module, FusedPart):
            products[sum(module.fused.sizes), module.weight.shape[1]] = module.fused.product
        elif isinstance(module, nn.Linear | PackedLinear):
            products[tuple(module.weight.shape)] = module.forward
    for (size, width), product in products.items():
        x = torch.randn(1, CHECKED_ROWS[-1], width, generator=random).to(device, dtype)
        expected = product(x)
        for rows in CHECKED_ROWS:
            if not torch.equal(product(x[:, :rows]), expected[:, :rows]):
                raise UnsupportedModelError(
                    f"{INEXACT}: {dtype} products of {width} x {size} weights depend on the number "
                    f"of rows on this machine ({rows} rows differ from {CHECKED_ROWS[-1]})"
                )


CHECKED_NODES = 64


def check_attention(heads: int, kv_heads: int, width: int) -> None:
    """Compare attention over a random tree and over a prompt with single tokens, in float32.

    The tree crosses the end of a group. Raises an UnsupportedModelError if a row's sum depends on
    the rows or keys beside it.
    """
    random = torch.Generator().manual_seed(0)
    committed, nodes = 2 * GROUP - 7, CHECKED_NODES
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
    # The deepest path of the tree, and some tokens of the prompt.
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
