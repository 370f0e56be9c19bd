"""Exact mode on Metal: its kernels give a row the same bits beside any others."""

import math
from contextlib import suppress
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import probe
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.models import write_pair, write_target

require("mlx_lm")

from metal_executor import ASCENDING, DESCENDING, MetalKernelError
from mlx import nn
from scheduled_texts import decode_together
from stand_ins import stand_in
from treeflash_mlx import exact, metal_kernels
from treeflash_mlx.attention import TreePass
from treeflash_mlx.backend import load
from treeflash_mlx.exact import check_operations
from treeflash_mlx.metal_kernels import attention, products
from treeflash_mlx.metal_kernels.attention import tree_attention
from treeflash_mlx.metal_kernels.products import Geometry
from treeflash_mlx.target import Target


@pytest.fixture(autouse=True)
def small_checks(monkeypatch):
    """Contexts of a few splits, and few rows: the executor is slow."""
    stand_in(monkeypatch, attention, EXACT_SPAN=32)
    stand_in(monkeypatch, exact, KEYS=(45,), ALL_ROWS=40, COUNTS=(1, 9, 33), FEW_COUNTS=(1, 3))
    stand_in(monkeypatch, probe, EXACT_PREFIX=27)


@pytest.fixture
def metal(metal):
    metal.schedules = (DESCENDING,)
    return metal


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize(("bits", "group"), [(16, 64), (8, 32), (4, 64)])
def test_a_row_of_a_product_has_the_same_bits_beside_any_others(runner, bits, group, dtype):
    """The last rows of a prompt's chunk, which are another threadgroup, have them too."""
    layer = nn.Linear(192, 40)
    layer.set_dtype(dtype)
    if bits < 16:
        layer = nn.QuantizedLinear.from_linear(layer, group, bits)
    x = exact.normal(70, 192, dtype=dtype)
    plain = layer(x)
    products.use_everywhere(layer)
    expected = layer(x)
    assert products.relative_error(expected, plain) < products.ROUNDING[dtype]
    assert sum(runner.launches.values()) == 2  # one shows that the kernel is right
    for rows in (1, 2, 5, 9, 17, 33, 64):
        assert mx.array_equal(layer(x[-rows:]), expected[-rows:])


LAYERS = [
    (4, 2, 32, mx.bfloat16, None, 70),  # more nodes than a word has bits
    (9, 1, 32, mx.float16, 7, 24),  # two matrices for the heads of a node
    (2, 1, 192, mx.bfloat16, 40, 24),  # two simdgroups for a row
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("heads", "key_heads", "width", "dtype", "window", "nodes"), LAYERS)
def test_a_node_attends_with_the_bits_of_plain_decoding(
    runner, rng, heads, key_heads, width, dtype, window, nodes
):
    """In a tree, beside a longer sequence, and in a prompt."""
    parents = [-1, *(int(rng.integers(max(0, i - 4), i)) for i in range(1, nodes))]
    tree = DraftTree.from_parents(np.zeros(nodes, np.int32), np.array(parents, np.int32))
    path = np.flatnonzero(tree.ancestor_mask()[np.argmax(tree.depths)])
    start, other = 25, 60
    q = exact.normal(2, heads, nodes, width, dtype=dtype)
    k, v = exact.normal(2, 2, key_heads, other + nodes, width, dtype=dtype)
    sinks = None if window is None else exact.normal(heads, dtype=dtype)

    def attend(trees, starts, rows, asked):
        """Attend in the order of a pass, with these rows of queries and of keys."""
        made = TreePass.build(trees, starts, 0, exact=True)
        first = 0 if window is None else max(min(starts) - window + 1, 0)
        stop = made.columns
        keys, values = (x[: len(trees), :, mx.array(rows[first:stop])] for x in (k, v))
        queries = q[: len(trees), :, mx.array(asked)]
        options = {"window": window, "first": first, "sinks": sinks, "dtype": mx.float32}
        return tree_attention(queries, [keys], [values], made.nodes, 0.2, **options)

    every, columns = np.arange(nodes), np.arange(other + nodes)
    found = attend([tree], [start], columns, every)
    both = attend([tree, tree], [start, other], columns, every)
    assert mx.array_equal(both[:1], found)
    # The same path in neighbouring columns: as a prompt, and token by token.
    moved = np.concatenate([columns[:start], start + path])
    chain = DraftTree.chain(np.zeros(len(path), np.int32))
    on_path = found[:, :, mx.array(path)]
    assert mx.array_equal(attend([chain], [start], moved, path), on_path)
    for depth in (0, len(path) - 1):
        alone = attend([DraftTree.root_only(0)], [start + depth], moved, path[depth : depth + 1])
        assert mx.array_equal(alone, on_path[:, :, depth : depth + 1])
    # And it is attention.
    made = TreePass.build([tree], [start], 0)
    first = 0 if window is None else max(start - window + 1, 0)
    keys, values = (x[:1, :, first : start + nodes] for x in (k, v))
    plain = mx.fast.scaled_dot_product_attention(
        q[:1], keys, values, scale=0.2, mask=made.mask(window, first), sinks=sinks
    )
    assert attention.relative_error(found, plain) < attention.ROUNDING[dtype]


@pytest.fixture
def target(metal, tmp_path):
    """A layer of a target, with the kernels of exact mode."""
    write_target(tmp_path, "qwen3", seed=1, vocab_size=96, hidden_size=64, layers=1)
    target = Target(tmp_path, mx.bfloat16, None)
    target.use_exact_kernels()
    return target


FAULTS = {
    "tiles that begin with the window": ("(start - window + 1) / 16 * 16", "start - window + 1"),
    "the path of another node": ("min(first_row / step, nodes - 1)", "0"),
    "columns instead of a path": ("paths[path + min(key, end - 1)]", "min(key, end - 1) - start"),
    "later positions": ("position - oldest[i] >= window", "false"),
    "the heads of two nodes": ("(group + 7) / 8 * 8", "group"),
    "the root alone": ("start + reach", "start + 1"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_the_kernel_of_attention_is_noticed(metal, fault):
    metal.schedules = (ASCENDING,)  # the others are slow
    q = exact.normal(1, 4, exact.ALL_ROWS, 32, dtype=mx.bfloat16)
    k, v = exact.normal(2, 1, 2, 45 + exact.ALL_ROWS, 32, dtype=mx.bfloat16)
    rows = partial(exact.attend_by_kernel, q, k, v, 23, 5)
    expected = rows(2)
    metal.faults.append(("treeflash_attention_parts", *fault))
    with suppress(MetalKernelError):  # a fault may be in single tokens and in trees
        assert exact.differing(rows, (2,)) or not mx.array_equal(rows(2), expected)
    assert metal.planted


def test_a_geometry_that_depends_on_the_number_of_rows_is_noticed(metal, monkeypatch):
    x = exact.normal(exact.ALL_ROWS, 512, dtype=mx.float32)

    def differing():
        layer = nn.QuantizedLinear.from_linear(nn.Linear(512, 40), 32, 4)
        products.use_everywhere(layer)
        return exact.differing(partial(exact.computed_rows, layer, x), exact.COUNTS)

    assert differing() == []
    prepare = products.prepare

    def by_rows(module, x, geometry):
        return prepare(module, x, geometry if len(x) > 8 else Geometry(geometry.tiles, 4))

    monkeypatch.setattr(products, "prepare", by_rows)
    assert differing() == [1]


def test_splits_that_depend_on_the_context_are_named(target, monkeypatch):
    check_operations(target)

    def by_length(q, k, v, nodes, scale, **options):
        stand_in(monkeypatch, attention, EXACT_SPAN=32 if nodes.length < 48 else 64)
        return tree_attention(q, k, v, nodes, scale, **options)

    stand_in(monkeypatch, exact, tree_attention=by_length)
    with pytest.raises(UnsupportedModelError, match="in attention to 45 keys"):
        check_operations(target)


def test_kernels_that_are_wrong_are_not_used(metal, monkeypatch):
    """The check at load then compares MLX's operations."""
    for module in (products, attention):
        stand_in(monkeypatch, module, relative_error=lambda *_: 0.5)
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 8), 32, 4)
    with pytest.warns(UserWarning, match="products in exact mode run without their Metal kernel"):
        products.use_everywhere(layer)
    assert type(layer) is nn.QuantizedLinear
    shape = attention.Shape(4, 2, 32, mx.bfloat16)
    with pytest.warns(UserWarning, match="attention in exact mode run without"):
        assert attention.exact_columns(shape) == math.inf
    assert set(metal_kernels.VERDICTS) == {
        "products in exact mode, 8 x 64 in 4 bits",
        "attention in exact mode, 4 heads of 32",
    }


SAMPLINGS = [SamplingConfig(), SamplingConfig(temperature=0.9, top_p=0.9, seed=3)]


# Its rows of products and of attention have the bits of single tokens in the tests above.
@pytest.mark.nightly
def test_texts_of_trees_are_those_of_plain_decoding(metal, monkeypatch, tmp_path, rng):
    """In bfloat16, alone and together; and the chunks of a prompt change no bit."""
    stand_in(monkeypatch, attention, EXACT_SPAN=16)
    stand_in(monkeypatch, probe, EXACT_PREFIX=11)
    target, drafter = write_pair(tmp_path, "qwen3", vocab_size=64, hidden_size=64, layers=3)
    backend = load(target, drafter, LoadConfig(dtype="bfloat16", exact=True))
    assert backend.inexact is None
    prompts = [rng.integers(0, 64, n).tolist() for n in (3, 12)]

    def texts(method, sampling, parallel):
        config = DecodeConfig(method=method, budget=8, max_tokens=6, sampling=sampling)
        return decode_together(backend, prompts, [config] * len(prompts), parallel=parallel)

    for sampling, parallel in zip(SAMPLINGS, (1, 2), strict=True):
        plain = texts("ar", sampling, 1)
        metal.launches.clear()
        assert texts("treeflash", sampling, parallel) == plain
        assert metal.launches.keys() == {
            "treeflash_products",
            "treeflash_attention_parts_exact",
            "treeflash_attention_merge",
        }
    logits = []
    for size in (1, 5, 1000):
        with SequenceSession(backend, capacity=32) as sequence:
            for begin in range(0, 12, size):
                sequence.extend(prompts[1][begin : begin + size])
            logits.append(sequence.logits(DraftTree.root_only(5)))
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


def test_a_quantised_cache_is_refused(pair):
    with pytest.raises(ConfigError, match="exact mode does not support kv_bits; remove one"):
        load(*pair, LoadConfig(exact=True, kv_bits=8))
