"""Attention of the nodes of draft trees: the Metal kernels, and how they are chosen."""

import math

import numpy as np
import pytest

from treeflash.decoding.tree import DraftTree
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from metal_executor import MetalKernelError, require_compiler
from treeflash_mlx import metal_kernels
from treeflash_mlx.attention import TreePass
from treeflash_mlx.attention import attend as attend_nodes
from treeflash_mlx.metal_kernels import attention

require_compiler()

TREES = [
    DraftTree.from_parents(np.zeros(len(x), np.int32), np.array(x, np.int32))
    for x in ([-1, 0, 0, 1, 2, 2, 4], [-1, 0, 1])
]


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch):
    monkeypatch.setattr(attention, "SPAN", 16)


def attend(rng, dtype, heads, key_heads, width, starts):
    """Outputs by the kernel and by NumPy, for `TREES` after committed positions."""
    n, columns = 7, max(start + len(tree) for tree, start in zip(TREES, starts, strict=True))
    shapes = [(2, heads, n, width), *[(2, key_heads, 64, width)] * 2]
    q, k, v = (mx.array(rng.normal(size=x).astype(np.float32)).astype(dtype) for x in shapes)
    q = q.reshape(2, n, heads, width).swapaxes(1, 2)  # as models split heads
    ancestors, positions = np.zeros((2, n, n), bool), np.zeros((2, n), np.int32)
    visible = np.zeros((2, 1, n, columns), bool)
    for i, (tree, start) in enumerate(zip(TREES, starts, strict=True)):
        ancestors[i, : len(tree), : len(tree)] = tree.ancestor_mask()
        ancestors[i, len(tree) :, 0] = True
        positions[i] = start
        positions[i, : len(tree)] = tree.positions(start)
        visible[i, 0, :, :start] = True
        visible[i, 0, :, start : start + n] = ancestors[i][:, : columns - start]
    words = attention.ancestor_words(mx.array(ancestors))
    # A part of a longer storage, as in a forward pass.
    found = attention.tree_attention(
        q, k[:, :, :columns], v[:, :, :columns], words, mx.array(positions),
        mx.array(starts, mx.int32), 0.3, int(positions.max()) + 1,
    )  # fmt: skip
    q, k, v = (np.array(x.astype(mx.float32)) for x in (q, k, v))
    k, v = (np.repeat(x[:, :, :columns], heads // key_heads, 1) for x in (k, v))
    scores = np.where(visible, 0.3 * q @ k.swapaxes(2, 3), -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return found, shares / shares.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize(
    ("dtype", "heads", "key_heads", "width", "starts"),
    [
        (mx.float32, 4, 2, 32, (33, 16)),  # splits end in a tree, and before one
        (mx.bfloat16, 6, 1, 64, (0, 20)),  # 42 rows are two threadgroups
        (mx.float16, 2, 2, 128, (14, 47)),
    ],
)
def test_attention_is_exact_up_to_rounding(metal, rng, dtype, heads, key_heads, width, starts):
    found, expected = attend(rng, dtype, heads, key_heads, width, starts)
    assert found.dtype == dtype
    error = np.abs(np.array(found.astype(mx.float32)) - expected).max() / np.abs(expected).max()
    assert error < {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    assert metal.launches == {"treeflash_attention_parts": 1, "treeflash_attention_merge": 1}


FAULTS = {
    "positions beyond the committed": ("min(stop, start)", "stop"),
    "nodes beyond the last": ("min(start + int(nodes), k_shape[2])", "start + int(nodes) + 1"),
    "all nodes": ("(seen[i] >> (key - start) & 1)", "true"),
    "the nodes of another row": ("seen[i] >>", "seen[0] >>"),
    "nodes in every split": ("position >= first && position < stop", "true"),
    "keys beyond the last": ("keys + min(key, end - 1)", "keys + (key + 64 * int(on_tree))"),
    "no new maximum": ("max(top, highest[i])", "top"),
    "the largest key of some lanes": ("top = max(top, simd_shuffle_xor(top, 16));", ""),
    "the sum of some lanes": ("sum[i] += simd_shuffle_xor(sum[i], 4);", ""),
    "outputs of an older maximum": ("output[d].thread_elements()[i] *= factor;", ";"),
    "the values of a transposed matrix": ("8 * u + column);", "8 * u + row);"),
    "another key head": ("key_head * v_strides[1]", "0 * v_strides[1]"),
    "rows beyond the last": ("min(first_row + column + i, rows - 1)", "first_row + column + i"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_noticed(metal, monkeypatch, recwarn, fault):
    """By the executor, or by the check at load."""
    right, wrong = FAULTS[fault]
    assert right in attention.PARTS
    monkeypatch.setattr(attention, "PARTS", attention.PARTS.replace(right, wrong))
    try:
        assert attention.winning_columns(6, 2, 32, mx.float32) == math.inf
    except MetalKernelError:
        return
    assert "attention of draft trees run without" in str(recwarn.pop().message)


def test_a_fault_in_the_merge_is_noticed(metal, monkeypatch):
    monkeypatch.setattr(attention, "MERGE", attention.MERGE.replace("factor =", "factor = 1.0f +"))
    with pytest.warns(UserWarning, match="its relative error is"):
        assert attention.winning_columns(6, 2, 32, mx.float32) == math.inf


def test_the_kernel_runs_from_the_context_on_where_it_wins(metal, monkeypatch):
    monkeypatch.setattr(attention, "RACED_COLUMNS", (30, 40, 50))
    races = []

    def speedup(kernel, plain, start):
        assert mx.allclose(kernel(start, 0), plain(start, 0), atol=1e-5)
        races.append(start.shape)
        return 1.2 if len(races) == 2 else 1.1

    monkeypatch.setattr(metal_kernels, "speedup", speedup)
    assert attention.winning_columns(4, 2, 32, mx.float32) == 40
    assert races == [(1, 4, attention.RACED_NODES, 32)] * 2


def test_layers_that_the_kernel_does_not_run_keep_their_function(metal, monkeypatch, rng):
    """Windows, sinks, masks that a model has changed, quantised keys, and short contexts."""
    monkeypatch.setattr("treeflash_mlx.attention.winning_columns", lambda *_: 20)
    made = [
        TreePass.build(trees, starts, 63)
        for trees, starts in ((TREES, (33, 16)), (TREES, (4, 5)), ([random_tree(65)], [40]))
    ]
    for tree, usual in zip(made, (True, False, False), strict=True):
        batch, n = tree.positions.shape
        shapes = [(batch, 4, n, 32), *[(batch, 2, tree.columns, 32)] * 2]
        q, k, v = (mx.array(rng.normal(size=x).astype(np.float32)) for x in shapes)
        mask, windowed = tree.mask(None), tree.mask(6)
        found = attend_nodes(tree, q, k, v, None, scale=0.2, mask=mask)
        assert (found is not NotImplemented) == usual
        if usual:
            expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask=mask)
            assert mx.allclose(found[0], expected[0], atol=1e-5)
        others = [
            ((q, k, v, None, 0.2, windowed), {}),
            ((q, k, v, None, 0.2, mask & mask), {}),
            ((q, k, v, None, 0.2, mask), {"sinks": mx.zeros(4)}),
            ((q, (k, k, k), (v, v, v), None, 0.2, mask), {}),
            ((q, k, v[..., :16], None, 0.2, mask), {}),
            ((q, k.astype(mx.float16), v, None, 0.2, mask), {}),
        ]
        assert all(attend_nodes(tree, *a, **b) is NotImplemented for a, b in others)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert TreePass.build(TREES, (33, 16), 63).words is None


def random_tree(nodes):
    parents = np.maximum(np.arange(nodes) // 2 - 1, 0) - (np.arange(nodes) == 0)
    return DraftTree.from_parents(np.zeros(nodes, np.int32), parents.astype(np.int32))
