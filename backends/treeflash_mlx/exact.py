"""Exact mode: whether what is computed for a token depends on the tokens up to it alone.

MLX's CPU device adds the terms of each sum in one order, whatever rows and keys are beside it, and
zeros between them change no bit. So exact mode replaces nothing there: a pair is exact if it passes
`check_exact`. On Metal MLX's kernels change with the number of rows and keys. There exact mode uses
two of this project's kernels for everything that they can compute, one geometry each:

| operation | on Metal |
| --- | --- |
| products | `products.use_everywhere`: sums in one order for any number of rows |
| attention | `attention.BY_POSITION`: tiles of positions, along the path of each node |
| norms, rotations, activations | MLX's kernels, which compute each row alone |

The operations of a layer are checked first, in the target's sizes: a row alone, among few and among
many rows, and a token's attention where keys that it does not see lie between its keys, as the
siblings of its ancestors do in a draft tree. Then `treeflash.decoding.probe` compares the logits of
the whole target. Whatever differs is named, and exact mode refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import mlx.core as mx
import numpy as np
from mlx import nn

from treeflash.decoding.probe import INEXACT
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash_mlx.attention import TreePass
from treeflash_mlx.metal_kernels.attention import runs_shape, tree_attention
from treeflash_mlx.target import Target

ALL_ROWS = 320
COUNTS = (1, 2, 5, 8, 9, 16, 33, 130)
"""Numbers of rows that are compared with `ALL_ROWS` rows, as chunks of prompts have; kernels change
between them."""
FEW_COUNTS = (1, 9)
MANY_OUTPUTS = 1 << 14
"""A product with more outputs, such as the output head's, is compared for few numbers of rows."""
KEYS = (300, 2500)
"""Keys of the attention that is checked: sums over many keys may be split."""
DEFAULT_HEADS = 8
"""Heads that are checked of a target whose configuration has another name for their number."""

RowFunction: TypeAlias = Callable[[int], mx.array]
"""(n, ...) results of the first n of `ALL_ROWS` rows."""


def check_operations(target: Target) -> None:
    """Raise an UnsupportedModelError that names the operations whose rows depend on others."""
    if found := [name for name, rows, counts in operations(target) if differing(rows, counts)]:
        raise UnsupportedModelError(
            f"{INEXACT}: on this device a row's bits depend on the rows or keys beside it in "
            f"{', '.join(found)}"
        )


def operations(target: Target) -> Iterator[tuple[str, RowFunction, Sequence[int]]]:
    """Return operations of a target's layers: name, results by row, numbers of rows to compare."""
    by_shape: dict[tuple[int, ...], nn.Module] = {}
    norms: dict[int, nn.Module] = {}
    for module in target.model.modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            by_shape.setdefault(tuple(module.weight.shape), module)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm) and "weight" in module:
            norms.setdefault(module.weight.size, module)
    for module in by_shape.values():
        quantised = isinstance(module, nn.QuantizedLinear)
        outputs, width = module.weight.shape
        width = module.scales.shape[1] * module.group_size if quantised else width
        x = normal(ALL_ROWS, width, dtype=target.dtype)
        counts = FEW_COUNTS if outputs > MANY_OUTPUTS else COUNTS
        yield f"products {width} x {outputs}", partial(computed_rows, module, x), counts
    for width, module in norms.items():
        x = normal(ALL_ROWS, width, dtype=target.dtype)
        yield f"norms of {width}", partial(computed_rows, module, x), COUNTS
    width = target.head_dim
    if not width:
        return  # there is no attention
    heads = key_heads = DEFAULT_HEADS
    if "num_attention_heads" in target.config:
        heads = target.config["num_attention_heads"]
        key_heads = target.config.get("num_key_value_heads") or heads
    if target.exact and runs_shape(width):
        yield from _kernel_operations(target, heads, key_heads)
        return
    for keys in KEYS:
        q = normal(1, heads, ALL_ROWS, width, dtype=target.dtype)
        k, v = normal(2, 1, key_heads, keys, width, dtype=target.dtype)
        for name, function in (("", attend), (" with others between them", attend_beside)):
            rows = partial(_attention, function, q, k, v)
            yield f"attention to {keys} keys{name}", rows, FEW_COUNTS


def _kernel_operations(
    target: Target, heads: int, key_heads: int
) -> Iterator[tuple[str, RowFunction, Sequence[int]]]:
    """Return the attention of layers by the kernel: tokens one by one, or many in one pass."""
    width = target.head_dim
    q = normal(1, heads, ALL_ROWS, width, dtype=target.dtype)
    for keys in KEYS:
        k, v = normal(2, 1, key_heads, keys + ALL_ROWS, width, dtype=target.dtype)
        for window in sorted({x or 0 for x in (None, *target.layout.windows)}):
            name = f"attention to {keys} keys" + f" in a window of {window}" * (window > 0)
            for beside, others in (("", 0), (" with others between them", 5)):
                rows = partial(attend_by_kernel, q, k, v, window, others)
                yield name + beside, rows, FEW_COUNTS


def attend_by_kernel(
    q: mx.array, k: mx.array, v: mx.array, window: int, others: int, rows: int
) -> mx.array:
    """Return (rows, heads, head_dim) attention of tokens that follow each other.

    `ALL_ROWS` rows are computed in one pass, and fewer one by one. Every `others`-th node of the
    pass, if there are any, is a sibling of the token after it.
    """
    committed = k.shape[2] - ALL_ROWS
    if rows < ALL_ROWS:
        alone = [
            _run_tree(q[:, :, i : i + 1], k, v, window, DraftTree.root_only(0), committed + i)
            for i in range(rows)
        ]
        return mx.concatenate(alone)
    siblings = np.arange(ALL_ROWS) % others == 1 if others else np.zeros(ALL_ROWS, np.bool_)
    tokens = np.flatnonzero(~siblings)
    place = np.cumsum(~siblings) - 1  # place of each node among the tokens, or of its parent
    parents = np.append(-1, tokens[np.where(siblings, place, place - 1)[1:]]).astype(np.int32)
    tree = DraftTree.from_parents(np.zeros(ALL_ROWS, np.int32), parents)
    # A sibling has the query, key and value of the token before it.
    columns = mx.array(np.concatenate([np.arange(committed), committed + place]))
    k, v = (mx.take(x, columns, axis=2) for x in (k, v))
    found = _run_tree(mx.take(q, mx.array(place), axis=2), k, v, window, tree, committed)
    return found[mx.array(tokens)]


def _run_tree(
    q: mx.array, k: mx.array, v: mx.array, window: int, tree: DraftTree, start: int
) -> mx.array:
    """Return (n, heads, head_dim) attention of a tree after `start` positions.

    In float32, because rounding to half precision hides most sums in another order.
    """
    made = TreePass.build([tree], [start], 0, exact=True)
    assert made is not None
    assert made.nodes is not None
    first = max(start - window + 1, 0) if window else 0
    keys, values = (x[:, :, first : start + len(tree)] for x in (k, v))
    out = tree_attention(
        q,
        [keys],
        [values],
        made.nodes,
        q.shape[3] ** -0.5,
        window=window or None,
        first=first,
        dtype=mx.float32,
    )
    return out.transpose(0, 2, 1, 3)[0]


def computed_rows(module: nn.Module, x: mx.array, rows: int) -> mx.array:
    out: mx.array | list[mx.array] = module(x[:rows])  # a list of a layer with several outputs
    return out if isinstance(out, mx.array) else mx.concatenate(out, -1)


def _attention(
    function: Callable[..., mx.array], q: mx.array, k: mx.array, v: mx.array, rows: int
) -> mx.array:
    return function(q[:, :, :rows], k, v)


def normal(*shape: int, dtype: mx.Dtype) -> mx.array:
    """Return random numbers, the same for the same shape."""
    return mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)


def attend(q: mx.array, k: mx.array, v: mx.array, visible: mx.array | None = None) -> mx.array:
    """Return the (n, heads, head_dim) attention of (1, heads, n, head_dim) rows to all keys.

    With `visible` (n, keys) bool, to some of them.
    """
    scale = q.shape[3] ** -0.5
    if visible is None:
        visible = mx.ones((q.shape[2], k.shape[2]), mx.bool_)
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=visible)
    return out.transpose(0, 2, 1, 3)[0]


def attend_beside(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attend to four of five keys; for fewer than `ALL_ROWS` rows the others are not there."""
    keys = k.shape[2]
    if q.shape[2] == ALL_ROWS:
        return attend(q, k, v, mx.broadcast_to(mx.arange(keys) % 5 < 4, (ALL_ROWS, keys)))
    seen = mx.array([i for i in range(keys) if i % 5 < 4])
    return attend(q, mx.take(k, seen, axis=2), mx.take(v, seen, axis=2))


def differing(function: RowFunction, counts: Sequence[int]) -> list[int]:
    """List the numbers of rows whose results are not the first of `ALL_ROWS` rows, bit for bit."""
    expected = function(ALL_ROWS)
    return [n for n in counts if not mx.array_equal(function(n), expected[:n]).item()]
