"""Exact arithmetic on a CPU: what is computed for a position depends on the tokens up to it alone.

Floating-point sums depend on their order, so a token that is computed beside others is usually
rounded differently from the same token alone. In exact mode it is not, bit for bit:

- A linear layer never runs with a single row, for which oneDNN has another kernel (`pad_products`).
- Attention sums over groups of `GROUP` positions, which begin at multiples of `GROUP`, one group
  after the other, in float32 (`ExactContext`). Within a group the kernel of a batched product adds
  one key after the other in the order of the columns, up to `MAX_KEYS` of them. Keys that a row
  does not see add an exact zero. On a draft tree a node's ancestors come before it, in the order
  of their positions, so its sum has the terms of plain decoding in the order of plain decoding.
- Scores are sums over the head's width, and the largest score does not depend on an order. The
  denominator is summed like the numerator: a column of ones is stored beside the values.
- Activations read contiguous numbers: PyTorch has another kernel of GELU for the others
  (`pack_activations`).

Everything else computes each row by itself. None of this is promised by the libraries underneath,
so `check_products`, `check_activations`, `check_attention` and
`treeflash.decoding.probe.check_exact` test it on each machine at load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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
    additive_mask,
    evaluate,
)
from treeflash_cuda.cache import widen
from treeflash_cuda.linear import FusedPart, PackedLinear, is_subclass

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

Columns = slice | Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """A product of the weights of some rows with the values of keys of one group."""

    first: int  # the rows' first token
    end: int  # the token after the rows' last one
    columns: Columns  # of the keys, counted from `Rows.first_column`


@dataclass(frozen=True, eq=False)
class Rows:
    """The keys that some consecutive tokens of a pass see in the layers with one mask function."""

    first: int  # the first token
    end: int  # the token after the last one
    first_column: int  # a multiple of `GROUP`; no token sees a column before it
    visible: Tensor  # (tokens, columns) bool, from `first_column` on
    parts: list[Part]  # in the order of their groups
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask(self, groups: int, width: int) -> Tensor:
        """(rows, columns) additive: each token once for each head of a group, padded."""
        if (groups, width) not in self.masks:
            mask = additive_mask(self.visible, torch.float32).repeat_interleave(groups, 0)
            missing = max(MIN_COLUMNS - mask.shape[1], 0)
            mask = F.pad(mask, (0, missing), value=float("-inf"))
            self.masks[groups, width] = F.pad(mask, (0, 0, 0, _missing_rows(len(mask), width)))
        return self.masks[groups, width]


class ExactContext(AttentionContext):
    """`AttentionContext` over float32 keys and values, with the order of sums described above."""

    def __init__(self, committed: int, positions: Tensor, ancestors: Tensor | None) -> None:
        super().__init__(committed, positions, ancestors)
        self._layouts: dict[int, tuple[Tensor, list[Rows]]] = {}

    @property
    def attends_alone(self) -> bool:
        return True

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor:
        """A tensor that stands for the layers' mask function."""
        placeholder = self.positions.new_empty(1, 1, 1, 1)
        self._layouts[id(placeholder)] = placeholder, list(self._layout(function))
        return placeholder

    def _layout(self, function: MaskFunction) -> Iterator[Rows]:
        n, device = len(self.positions), self.positions.device
        is_tree = self.ancestors is not None and n > 1
        step = n if is_tree else PROMPT_ROWS
        for first in range(0, n, step):
            end = min(first + step, n)
            columns = torch.arange(self.committed + end, device=device)
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
            shared = (self.committed if is_tree else self.committed + end) - start
            parts = [
                Part(first, end, slice(column, min(column + GROUP, shared)))
                for column in range(0, shared // GROUP * GROUP if is_tree else shared, GROUP)
            ]
            if is_tree:
                parts += self._tree_parts(visible, columns, shared // GROUP * GROUP)
            yield Rows(first, end, start, visible, parts)

    def _tree_parts(self, visible: Tensor, columns: Tensor, start: int) -> Iterator[Part]:
        """The parts from the last group on that has a committed position, or begins after them."""
        groups = columns[start:] // GROUP
        first, last = int(groups.min()), int(groups.max())
        if first == last and len(groups) <= MAX_KEYS:
            yield Part(0, len(visible), slice(start, len(columns)))
            return
        for group in range(first, last + 1):
            places = start + (groups == group).nonzero()[:, 0]
            yield from _bounded_parts(visible, 0, len(visible), places)

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend; key and value have float32 columns of the committed positions and the block.

        Raises an UnsupportedModelError if the layer changes its mask, or uses a variant of
        attention whose order of sums is not known.
        """
        if id(inputs.mask) not in self._layouts or inputs.softcap or inputs.sinks is not None:
            raise UnsupportedModelError(
                f"{type(inputs.module).__name__} changes its mask or its scores, which exact mode "
                "does not support"
            )
        query, keys, values = inputs.query[0], inputs.key[0], inputs.value[0]
        (heads, n, width), kv_heads = query.shape, keys.shape[0]
        groups = heads // kv_heads
        queries = query.unflatten(0, (kv_heads, groups)).transpose(1, 2)
        output = query.new_empty(n, kv_heads, groups, width)
        for rows in self._layouts[id(inputs.mask)][1]:
            last = rows.first_column + rows.visible.shape[1]
            k, v = (x[:, rows.first_column : last] for x in (keys, values))
            sums = _sums(queries[:, rows.first : rows.end], k[..., :width], v, rows, inputs.scale)
            sums = sums[:, : (rows.end - rows.first) * groups].unflatten(1, (-1, groups))
            place = output[rows.first : rows.end].transpose(0, 1)
            torch.div(sums[..., :width], sums[..., width : width + 1], out=place)
        return output.view(1, n, heads, width)


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
    """(kv_heads, tokens * groups or more, columns of values) sums of the values, by row.

    The queries are (kv_heads, tokens, groups, width), the keys (kv_heads, columns, width) in
    float32. The values are (kv_heads, columns, more than width) in float32, with ones after the
    values. `rows` are the keys that each token sees; `scale` multiplies the scores.
    """
    kv_heads, tokens, groups, width = queries.shape
    if (missing := MIN_COLUMNS - keys.shape[1]) > 0:
        keys = F.pad(keys, (0, 0, 0, missing))
    count, wide = tokens * groups, values.shape[2]
    mask = rows.mask(groups, wide)
    padded = keys.new_zeros(kv_heads, len(mask), width)
    padded[:, :count].unflatten(1, (tokens, groups)).copy_(queries)
    weights = torch.baddbmm(mask[None], padded, keys.transpose(1, 2), alpha=scale)
    weights.sub_(weights.amax(-1, keepdim=True)).exp_()
    sums = values.new_zeros(kv_heads, len(mask), wide)
    for part in rows.parts:
        if isinstance(part.columns, slice):
            p, v = weights[:, :, part.columns], values[:, part.columns]
        else:
            p, v = (
                weights.index_select(2, part.columns),
                values.index_select(1, part.columns),
            )
        first, end = ((x - rows.first) * groups for x in (part.first, part.end))
        if end - first == count:
            sums.baddbmm_(p, v)
        else:
            missing = _missing_rows(end - first, wide)
            p, old = (F.pad(x[:, first:end], (0, 0, 0, missing)) for x in (p, sums))
            sums[:, first:end] = torch.baddbmm(old, p, v)[:, : end - first]
    return sums


def _missing_rows(count: int, width: int) -> int:
    """Rows to add to products with `width` columns and any number of keys."""
    return -max(count, -(-MIN_SIZE // width)) // ROWS * -ROWS - count


def pad_products(model: nn.Module, least: int = LINEAR_ROWS) -> None:
    """Let every linear layer of a loaded model run with at least `least` rows.

    Raises an UnsupportedModelError if a module computes products in another way.
    """
    for name, module in model.named_modules():
        if isinstance(module, FusedPart):
            fused = module.fused
            fused.product = _padded(fused.product, least)
        elif isinstance(module, nn.Linear | PackedLinear) and not is_subclass(module.weight):
            setattr(module, "forward", _padded(module.forward, least))  # noqa: B010
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


def pack_activations(model: nn.Module) -> None:
    """Let the activations of a loaded model read contiguous numbers."""
    for module in activations(model):
        module.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))


def check_activations(model: nn.Module, dtype: torch.dtype) -> None:
    """Compare activations of all 65,536 numbers bit for bit, in rows of other lengths and strides.

    Raises an UnsupportedModelError if an activation depends on a number's place.
    """
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers.view(dtype) if dtype.itemsize == 2 else numbers.to(dtype)
    numbers = numbers[numbers.isfinite()]
    for module in {type(x): x for x in activations(model)}.values():
        expected = module(numbers)
        strided = module(torch.stack([numbers, numbers], 1)[:, 0])
        shifted = [module(numbers[place:].clone()) for place in (1, 3, 7)]
        if any(not torch.equal(x, expected[-len(x) :]) for x in (strided, *shifted)):
            raise UnsupportedModelError(
                f"{INEXACT}: {type(module).__name__} depends on a number's place on this machine"
            )


CHECKED_ROWS = (*range(1, 18), 24, 31, 32, 33, 48, 63, 64)


def check_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Compare products of 1 to 64 random rows bit for bit, for each shape of a linear layer.

    Raises an UnsupportedModelError if a product's rows depend on the number of rows.
    """
    random = torch.Generator().manual_seed(0)
    products: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}
    for module in model.modules():
        if isinstance(module, FusedPart):
            products[sum(module.fused.sizes), module.weight.shape[1]] = module.fused.product
        elif isinstance(module, nn.Linear | PackedLinear):
            products[tuple(module.weight.shape)] = module.forward
    for (size, width), product in products.items():
        x = torch.randn(1, CHECKED_ROWS[-1], width, generator=random).to(dtype)
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
