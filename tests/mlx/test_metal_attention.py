"""Attention of the nodes of draft trees: the Metal kernels, and how they are chosen."""

import math

import numpy as np
import pytest
from recordings import recording

from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from metal_executor import DESCENDING, install
from mlx_lm.models.base import scaled_dot_product_attention
from stand_ins import stand_in
from treeflash_mlx import attention as attention_of_layers
from treeflash_mlx import metal_kernels
from treeflash_mlx.attention import TreePass
from treeflash_mlx.attention import attend as attend_nodes
from treeflash_mlx.backend import MlxBackend
from treeflash_mlx.metal_kernels import attention
from treeflash_mlx.metal_kernels.attention import Shape
from treeflash_mlx.target import Target

TREES = [
    DraftTree.from_parents(np.zeros(len(x), np.int32), np.array(x, np.int32))
    for x in ([-1, 0, 0, 1, 2, 2, 4], [-1, 0, 1])
]


@pytest.fixture(autouse=True)
def _short_contexts(monkeypatch):
    stand_in(monkeypatch, attention, SPANS={0: 16}, TIMED_COLUMNS=(attention.TIMED_NODES + 1,))


@pytest.fixture
def win_from(monkeypatch):
    """Let the kernel win from a number of columns on."""

    def win(columns):
        stand_in(monkeypatch, attention_of_layers, winning_columns=lambda *_, few: columns)

    return win


def attend(rng, shape, starts, window=None, sinks=None):
    """Outputs by the kernel and by NumPy, for `TREES` after committed positions."""
    n, columns = 7, max(start + len(tree) for tree, start in zip(TREES, starts, strict=True))
    first = 0 if window is None else max(min(starts) - window + 1, 0)
    width, groups = shape.head_dim, shape.heads // shape.key_heads
    shapes = [(2, shape.heads, n, width), *[(2, shape.key_heads, 64, width)] * 2]
    q, *pair = (mx.array(rng.normal(size=x).astype(np.float32)).astype(shape.dtype) for x in shapes)
    q = q.reshape(2, n, shape.heads, width).swapaxes(1, 2)  # as models split heads
    sizes = shape.group_size, shape.bits
    stored = [mx.quantize(x, *sizes) if shape.bits else [x] for x in pair]
    # A part of a longer storage, as in a forward pass.
    k, v = ([x[:, :, first:columns] for x in parts] for parts in stored)
    ancestors, positions = np.zeros((2, n, n), bool), np.zeros((2, n), np.int32)
    visible = np.zeros((2, 1, n, columns), bool)
    for i, (tree, start) in enumerate(zip(TREES, starts, strict=True)):
        ancestors[i, : len(tree), : len(tree)] = tree.ancestor_mask()
        ancestors[i, len(tree) :, 0] = True
        positions[i] = start
        positions[i, : len(tree)] = tree.positions(start)
        visible[i, 0, :, :start] = True
        visible[i, 0, :, start : start + n] = ancestors[i][:, : columns - start]
        if window is not None:
            keys = np.concatenate([np.arange(start), positions[i], np.zeros(columns, int)])
            visible[i, 0] &= positions[i][:, None] - keys[:columns] < window
    nodes = attention.Nodes(
        attention.ancestor_words(mx.array(ancestors)), mx.array(positions),
        mx.array(starts, mx.int32), int(positions.max()) + 1,
    )  # fmt: skip
    options = {"window": window, "first": first, "sinks": sinks, "bits": shape.bits}
    found = attention.tree_attention(q, k, v, nodes, 0.3, **options)
    if shape.bits:
        pair = [
            mx.dequantize(x, *(part.astype(mx.float32) for part in parts), *sizes)
            for x, *parts in stored
        ]
    q, k, v = (np.array(x.astype(mx.float32)) for x in (q, *pair))
    k, v = (np.repeat(x[:, :, :columns], groups, 1) for x in (k, v))
    scores = np.where(visible, 0.3 * q @ k.swapaxes(2, 3), -np.inf)
    if sinks is not None:
        sunk = np.broadcast_to(
            np.array(sinks.astype(mx.float32))[None, :, None, None], (*scores.shape[:3], 1)
        )
        scores = np.concatenate([scores, sunk], -1)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return found, (shares / shares.sum(-1, keepdims=True))[..., :columns] @ v


SHAPES = [
    (Shape(4, 2, 32, mx.float32), (33, 16)),  # splits end in a tree, and before one
    (Shape(6, 1, 64, mx.bfloat16), (0, 20)),  # 42 rows are two threadgroups
    (Shape(2, 2, 128, mx.float16), (14, 47)),
    (Shape(4, 2, 64, mx.float32, 8, 32), (33, 16)),
    (Shape(2, 1, 64, mx.bfloat16, 4, 64), (14, 47)),
    (Shape(6, 2, 256, mx.bfloat16), (33, 16)),  # two simdgroups for a row
    (Shape(4, 1, 192, mx.bfloat16, 8, 64), (14, 47)),
    (Shape(4, 2, 512, mx.float16), (14, 47)),  # four
]


@pytest.mark.sample(2)
@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize(("shape", "starts"), SHAPES)
def test_attention_is_exact_up_to_rounding(runner, rng, shape, starts, window):
    """With a window, also of layers with sinks."""
    sinks = None if window is None else mx.array(rng.normal(size=shape.heads)).astype(shape.dtype)
    found, expected = attend(rng, shape, starts, window, sinks)
    assert found.dtype == shape.dtype
    error = np.abs(np.array(found.astype(mx.float32)) - expected).max() / np.abs(expected).max()
    limit = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[shape.dtype]
    assert error < max(limit, runner.rounding[shape.dtype])
    first = "treeflash_attention_parts" + "_shared" * (shape.head_dim > 128)
    first += "_quantised" * (shape.bits > 0)
    assert runner.launches == {first: 1, "treeflash_attention_merge": 1}


def test_sinks_are_not_converted(metal, monkeypatch, rng):
    """As every layer would do in every pass."""
    taken, make = [], attention.make_kernel

    def make_kernel(*args, **options):
        kernel = make(*args, **options)
        return lambda **call: taken.append(call["inputs"]) or kernel(**call)

    stand_in(monkeypatch, attention, make_kernel=make_kernel)
    sinks = mx.array(rng.normal(size=6)).astype(mx.bfloat16)
    attend(rng, SHAPES[1][0], (0, 20), None, sinks)
    assert taken[1][2] is sinks


FAULTS = {
    "positions beyond the committed": ("min(stop, start)", "stop"),
    "nodes beyond the last": (
        "min(start + int(nodes), k_shape[2] + offset)",
        "start + int(nodes) + 1",
    ),
    "all nodes": ("(seen[i] >> (key - start) & 1)", "true"),
    "the nodes of another row": ("seen[i] >>", "seen[0] >>"),
    "nodes in every split": ("position >= first && position < stop", "true"),
    "keys beyond the last": ("at = min(key, end - 1)", "at = (key + 64 * int(on_tree))"),
    "queries in the order of outputs": (
        "from = q + b * q_strides[0] + head * q_strides[1] + node * q_strides[2];",
        "from = q + place[i] * D;",
    ),
    "no new maximum": ("max(top, highest[i])", "top"),
    "the largest key of some lanes": ("top = max(top, simd_shuffle_xor(top, 16));", ""),
    "the sum of some lanes": ("sum[i] += simd_shuffle_xor(sum[i], 4);", ""),
    "outputs of an older maximum": ("output[d].thread_elements()[i] *= factor;", ";"),
    "the values of a transposed matrix": ("8 * u + column);", "8 * u + row);"),
    "another key head": ("key_head * v_strides[1]", "0 * v_strides[1]"),
    "positions before the window": ("position < oldest[i]", "false"),
    "another row's window": ("position < oldest[i]", "position < oldest[0]"),
    "a window of one position more": ("- window + 1;", "- window;"),
    "the tree's columns as positions": (
        "position = positions[b * nodes + key - start];",
        "position += 0 * positions[0];",
    ),
    "splits from the first position on": ("(split + offset / SPAN)", "split"),
    "keys from the first position on": (
        "at = min(key, end - 1) - offset",
        "at = min(key, end - 1)",
    ),
    "rows beyond the last": ("min(first_row + column + i, rows - 1)", "first_row + column + i"),
}


QUANTISED_FAULTS = {
    "no biases": ("(BITS * j) & ((1 << BITS) - 1)) + bias", "(BITS * j) & ((1 << BITS) - 1))"),
    "the first group's scales": ("uint g = (begin + 32 * d + 4 * column) / GROUP", "uint g = 0"),
    "another order of keys": ("4 * d + column / 2", "4 * d + (column / 2 ^ 1)"),
    "the other half of a word": ("16 * (row & 1)", "0"),
    "one value twice": ("values[at[i] *", "values[at[0] *"),
    "scales of another value": ("values_scales[at[i]", "values_scales[at[0]"),
    "the first half of a word twice": ("BITS == 4 ? 16 : 0", "0"),
}
WORD_FAULTS = {
    "the first word twice": ("*(const device uint2*)from", "uint2(*from)"),
    "half of the second word": ("BITS == 4 ? 16 : 0", "16"),
}
SHARED_FAULTS = {
    "no barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    "one place for two tiles": ("turn ^= 1;", ""),
    "simdgroups that have left": (
        "uint turn = 0;",
        "uint turn = 0;\n if (first_row >= rows) return;",
    ),
    "half of the scores": ("s < SHARES", "s < SHARES / 2"),
    "the scores of other rows": ("tile * SHARES + s]", "s]"),
    "the other half of the queries": ("from + begin", "from"),
    "the other half of the keys": ("k_strides[2] + begin", "k_strides[2]"),
    "the other half of the values": ("values + begin", "values"),
    "outputs in the same half": ("part * D + begin", "part * D"),
    "the scale once for each half": ("score += ", "score += scale[0] * "),
}
CASES = [
    *((*fault, Shape(6, 2, 256, mx.float32)) for fault in SHARED_FAULTS.values()),
    *((*fault, Shape(6, 2, 32, mx.float32)) for fault in FAULTS.values()),
    *((*fault, Shape(6, 2, 64, mx.float32, 4, 32)) for fault in QUANTISED_FAULTS.values()),
    *((*fault, Shape(6, 2, 64, mx.float32, 8, 32)) for fault in WORD_FAULTS.values()),
]
FAULT_NAMES = [*SHARED_FAULTS, *FAULTS, *QUANTISED_FAULTS, *WORD_FAULTS]


@pytest.mark.parametrize(("right", "wrong", "shape"), CASES, ids=FAULT_NAMES)
def test_a_fault_in_the_kernel_is_noticed(finds_fault, right, wrong, shape):
    assert finds_fault(
        "treeflash_attention_parts",
        *(right, wrong, lambda: attention.winning_columns(shape) == math.inf),
        "attention of draft trees run without",
    )


MERGE_FAULTS = {
    "a weight": ("factor =", "factor = 1.0f +"),
    "the sink of another head": ("row / nodes %", "row %"),
    "no sink": ("sum += exp(sink - highest);", ""),
}


@pytest.mark.parametrize("fault", MERGE_FAULTS.values(), ids=MERGE_FAULTS)
def test_a_fault_in_the_merge_is_noticed(finds_fault, fault):
    shape = Shape(6, 2, 32, mx.float32)
    assert finds_fault(
        "treeflash_attention_merge",
        *(*fault, lambda: attention.winning_columns(shape) == math.inf),
        "its relative error is",
    )


def test_splits_are_longer_in_long_contexts(metal, monkeypatch, rng):
    """Both lengths are checked at load."""
    stand_in(monkeypatch, attention, SPANS={0: 16, 40: 24}, TIMED_COLUMNS=(60,))
    for starts in ((33, 16), (47, 30)):
        found, expected = attend(rng, SHAPES[0][0], starts)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [attention.span_of(n) for n in (39, 40)] == [16, 24]
    with recording(attention._Benchmark, "error") as checks:
        attention.winning_columns(Shape(4, 2, 32, mx.float32))
    lengths = [benchmark.nodes.length for benchmark, _ in checks]
    assert min(lengths) < 40 <= max(lengths)


@pytest.mark.parametrize(
    ("width", "runs"),
    [(32, True), (80, False), (160, False), (192, True), (512, True), (576, False)],
)
def test_widths_that_the_kernel_runs(width, runs):
    assert attention.runs_shape(width) == runs


def test_the_kernel_runs_from_the_context_on_where_it_wins(metal, monkeypatch):
    stand_in(monkeypatch, attention, TIMED_COLUMNS=(30, 40, 50))
    timed = []

    def speedup(kernel, plain, start):
        assert mx.allclose(kernel(start, 0), plain(start, 0), atol=1e-5)
        timed.append(start.shape)
        return 1.2 if len(timed) == 2 else 1.1

    metal.speedup = speedup
    assert attention.winning_columns(Shape(4, 2, 32, mx.float32)) == 40
    assert timed == [(1, 4, attention.TIMED_NODES, 32)] * 2
    assert metal_kernels.VERDICTS["attention of draft trees, 4 heads of 32"] == {
        "12 nodes, 30 columns": "not used, 1.10 times as fast as MLX's operation",
        "12 nodes, 40 columns": "used, 1.20 times as fast as MLX's operation",
    }


class Storage:
    """The cache of a layer with quantised keys, as mlx-lm sees it."""

    bits, group_size = 8, 32


def layer_inputs(rng, tree, first=0, bits=0):
    """Queries, keys and values of a pass."""
    batch, n = tree.positions.shape
    shapes = [(batch, 4, n, 32), *[(batch, 2, tree.columns - first, 32)] * 2]
    q, *pair = (mx.array(rng.normal(size=x).astype(np.float32)) for x in shapes)
    return q, *(mx.quantize(x, 32, bits) if bits else x for x in pair)


@pytest.mark.parametrize("trees", [(TREES, (33, 16)), (TREES[:1], (33,))])
def test_layers_that_the_kernel_runs(metal, win_from, rng, trees):
    """With and without windows, sinks, and quantised keys."""
    win_from(20)
    tree = TreePass.build(*trees, 63)
    first, sinks = 16 - 6 + 1, mx.arange(4) / 2
    for mask, start in ((tree.mask(None), 0), (tree.mask(6, first), first)):
        q, k, v = layer_inputs(rng, tree, start)
        for options in ({}, {"sinks": sinks}):
            found = attend_nodes(tree, q, k, v, None, scale=0.2, mask=mask, **options)
            expected = mx.fast.scaled_dot_product_attention(
                q, k, v, scale=0.2, mask=mask, **options
            )
            assert mx.allclose(found[0], expected[0], atol=1e-5)
        q, k, v = layer_inputs(rng, tree, start, bits=8)
        found = attend_nodes(tree, q, k, v, Storage, 0.2, mask)
        expected = scaled_dot_product_attention(q, k, v, Storage, 0.2, mask)
        assert mx.allclose(found[0], expected[0], atol=1e-5)


def test_layers_that_the_kernel_does_not_run_keep_their_function(metal, see_device, win_from, rng):
    """Short contexts, large trees, and masks and widths that a model has changed."""
    win_from(20)
    made = [
        TreePass.build(trees, starts, 63)
        for trees, starts in ((TREES, (33, 16)), (TREES, (4, 5)), ([random_tree(65)], [40]))
    ]
    for tree, usual in zip(made, (True, False, False), strict=True):
        q, k, v = layer_inputs(rng, tree)
        mask = tree.mask(None)
        found = attend_nodes(tree, q, k, v, None, scale=0.2, mask=mask)
        assert (found is not NotImplemented) == usual
        quantised = layer_inputs(rng, tree, bits=8)[1:]
        others = [
            ((q, k, v, None, 0.2, mask & mask), {}),
            ((q, k, v, None, 0.2, tree.mask(6, 2)), {}),
            ((q, *quantised, Storage, 0.2, mask), {"sinks": mx.zeros(4)}),
            ((q, k, v[..., :16], None, 0.2, mask), {}),
            ((q, k.astype(mx.float16), v, None, 0.2, mask), {}),
        ]
        assert all(attend_nodes(tree, *a, **b) is NotImplemented for a, b in others)
    see_device(mx.cpu)
    assert TreePass.build(TREES, (33, 16), 63).nodes is None


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("family", "kv_bits"), [("gpt_oss", None), ("gemma3_text", None), ("llama", 4), ("llama", 8)]
)
def test_models_run_trees_by_the_kernel(
    executor, families, tmp_path, monkeypatch, rng, family, kv_bits
):
    """Models with windows, with sinks, or with quantised keys have MLX's logits."""
    executor.schedules = (DESCENDING,)
    families.write(tmp_path, family, head_dim=32)
    tokens = rng.integers(0, 96, 30).tolist()

    def logits():
        backend = MlxBackend(Target(tmp_path, mx.float32, kv_bits), None, None)
        sequence = SequenceSession(backend)
        sequence.extend(tokens)
        return sequence.logits(TREES[0])

    expected = logits()
    executor.speedup = lambda *_: 2
    with monkeypatch.context() as patch:
        install(executor, patch)
        found = logits()
    np.testing.assert_allclose(found, expected, atol=2e-4)
    kernel = "treeflash_attention_parts" + "_quantised" * (kv_bits is not None)
    assert executor.launches[kernel] == 4 + 3  # layers, and the check at load


def test_chains_run_by_the_kernel_where_it_wins(metal, families, tmp_path, rng):
    """mlx-lm's function would read the keys once for each row. Trees must have passed a check."""
    metal.schedules, metal.speedup = (DESCENDING,), lambda *_: 2
    families.write(tmp_path, "llama", head_dim=32)
    backend = MlxBackend(Target(tmp_path, mx.float32, None), None, None)
    chain = DraftTree.chain(rng.integers(0, 96, 5).astype(np.int32))
    prompts = [rng.integers(0, 96, n).tolist() for n in (30, 4)]

    def logits():
        found, launches = [], []
        for prompt in prompts:
            sequence = SequenceSession(backend)
            sequence.extend(prompt)
            metal.launches.clear()
            found.append(sequence.logits(chain))
            launches.append(metal.launches.get("treeflash_attention_parts", 0))
            sequence.close()
        return found, launches

    expected, launches = logits()
    assert launches == [0, 0]
    backend.check_trees()
    assert backend.target.chains_from(5) == attention.TIMED_COLUMNS[0]
    found, launches = logits()
    assert launches == [2, 0]  # layers without a window; the other context is too short
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_few_nodes_have_their_own_race(metal):
    """Their rival is MLX's kernel for few rows; large groups run as rows of one head."""
    rows = []

    def speedup(kernel, plain, start):
        assert mx.allclose(kernel(start, 0), plain(start, 0), atol=1e-5)
        rows.append(start.shape[2])
        return 1.2 if start.shape[2] > 8 else 1.0

    metal.speedup = speedup
    shape = Shape(12, 2, 32, mx.float32)  # 6 nodes of 6 heads are 36 rows
    (columns,) = attention.TIMED_COLUMNS
    assert attention.winning_columns(shape, few=True) == math.inf
    assert attention.winning_columns(shape) == columns
    assert rows == [attention.FEW_NODES, attention.TIMED_NODES]


def test_a_tree_of_any_size_runs_the_kernel_of_the_warm_up(metal, win_from, rng):
    """MLX compiles another kernel for inputs with fewer than 8 elements, in mid-answer."""
    metal.speedup = lambda *_: 2
    win_from(0)

    def compiled(nodes, batch=1):
        trees = [random_tree(nodes)] * batch
        tree = TreePass.build(trees, [20] * batch, 63, chains_from=0)
        q, k, v = layer_inputs(rng, tree)
        with recording(metal.compiler, "load") as loads:
            attend_nodes(tree, q, k, v, None, 0.2, tree.mask(None))
        return {source for (source,) in loads}

    expected = compiled(12)
    for nodes, batch in ((2, 1), (3, 1), (7, 1), (2, 3), (9, 9)):
        assert compiled(nodes, batch) == expected


def test_layers_of_one_shape_prepare_a_launch_once(metal, win_from, rng):
    metal.schedules = (DESCENDING,)
    win_from(0)
    tree = TreePass.build(TREES[:1], (33,), 63)
    q, k, v = layer_inputs(rng, tree)
    with recording(attention, "_launch") as made:
        for _ in range(3):
            attend_nodes(tree, q, k, v, None, 0.2, tree.mask(None))
    assert len(made) == 1
    assert metal.launches["treeflash_attention_parts"] == 3


@pytest.mark.sample(1)
@pytest.mark.parametrize(("shape", "starts"), [SHAPES[1], SHAPES[5], SHAPES[7]])
def test_kernels_run_where_threadgroups_have_few_threads(metal, rng, shape, starts):
    """M1 and M2 give some kernels fewer than 256."""
    metal.max_threads = 128
    attend(rng, shape, starts)
    assert len(metal.launches) == 2


def random_tree(nodes):
    parents = np.maximum(np.arange(nodes) // 2 - 1, 0) - (np.arange(nodes) == 0)
    return DraftTree.from_parents(np.zeros(nodes, np.int32), parents.astype(np.int32))
