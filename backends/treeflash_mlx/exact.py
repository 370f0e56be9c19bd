"""Exact mode: whether what is computed for a token depends on the tokens up to it alone.

MLX's CPU device adds the terms of each sum in one order, whatever rows and keys are beside it, and
zeros between them change no bit. So exact mode replaces nothing there: a pair is exact if it passes
`check_exact`. On a GPU kernels change with the number of rows and keys, and the check says which.

The operations of a layer are checked first, in the target's sizes: a row alone, among few and among
many rows, and a token's attention where keys that it does not see lie between its keys, as the
siblings of its ancestors do in a draft tree. Then `treeflash.decoding.probe` compares the logits of
the whole target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import mlx.core as mx
from mlx import nn

from treeflash.decoding.probe import INEXACT
from treeflash.errors import UnsupportedModelError
from treeflash_mlx.target import Target

ROWS = 320
COUNTS = (1, 2, 5, 8, 9, 16, 33, 130)
"""Numbers of rows that are compared with `ROWS` rows, as chunks of prompts have; kernels change
between them."""
FEW_COUNTS = (1, 9)
MANY_OUTPUTS = 1 << 14
"""A product with more outputs, such as the output head's, is compared for few numbers of rows."""
KEYS = (300, 2500)
"""Keys of the attention that is checked: sums over many keys may be split."""

RowFunction: TypeAlias = Callable[[int], mx.array]
"""(n, ...) results of the first n of `ROWS` rows."""


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
    for module in target.model.modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            by_shape.setdefault(tuple(module.weight.shape), module)
    for module in by_shape.values():
        quantised = isinstance(module, nn.QuantizedLinear)
        outputs, width = module.weight.shape
        width = module.scales.shape[1] * module.group_size if quantised else width
        x = normal(ROWS, width, dtype=target.dtype)
        counts = FEW_COUNTS if outputs > MANY_OUTPUTS else COUNTS
        yield f"products {width} x {outputs}", partial(_product, module, x), counts
    heads, width = target.config.get("num_attention_heads"), target.head_dim
    if heads is None or not width:
        return
    key_heads = target.config.get("num_key_value_heads") or heads
    for keys in KEYS:
        q = normal(1, heads, ROWS, width, dtype=target.dtype)
        k, v = normal(2, 1, key_heads, keys, width, dtype=target.dtype)
        for name, function in (("", attend), (" with others between them", attend_beside)):
            rows = partial(_attention, function, q, k, v)
            yield f"attention to {keys} keys{name}", rows, FEW_COUNTS


def _product(module: nn.Module, x: mx.array, rows: int) -> mx.array:
    out: mx.array = module(x[:rows])
    return out


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
    """Attend to four of five keys; for fewer than `ROWS` rows the others are not there."""
    keys = k.shape[2]
    if q.shape[2] == ROWS:
        return attend(q, k, v, mx.broadcast_to(mx.arange(keys) % 5 < 4, (ROWS, keys)))
    seen = mx.array([i for i in range(keys) if i % 5 < 4])
    return attend(q, mx.take(k, seen, axis=2), mx.take(v, seen, axis=2))


def differing(function: RowFunction, counts: Sequence[int] = COUNTS) -> list[int]:
    """List the numbers of rows whose results are not the first of `ROWS` rows, bit for bit."""
    expected = function(ROWS)
    return [n for n in counts if not mx.array_equal(function(n), expected[:n]).item()]
