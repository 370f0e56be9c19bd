"""The operations of a forward pass, against definitions that look at one row at a time."""

import sys

import numpy as np
import pytest

from treeflash.testing import require

require("torch")

import torch
from attention_cases import Case, attention_case, expected_attention
from torch import nn
from treeflash_cuda.cache import dequantise, quantise
from treeflash_cuda.gpu.tree_recurrences import ancestor_paths
from treeflash_cuda.operations import (
    Operations,
    Shapes,
    gated,
    load_operations,
    rms_norm,
    rotate_and_store,
    tree_attention,
)
from treeflash_cuda.visible_keys import CHUNK, MIN_PLACES, PLACES_EACH, padded_items, plan_work


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "trees": Case(lengths=(5, 0, 70), nodes=7),
    "a chain of prompt tokens": Case(lengths=(4, 9), nodes=6, chunk=True),
    "single tokens": Case(lengths=(3, 64), nodes=1),
    "a window": Case(lengths=(40, 2), nodes=6, window=9),
    "a window inside a tree": Case(lengths=(40, 2), nodes=9, window=2),
    "the first positions and a window": Case(lengths=(40, 2), nodes=6, window=9, sink=3),
    "soft-capping": Case(lengths=(5, 30), nodes=4, softcap=2.0),
    "attention sinks": Case(lengths=(5, 30), nodes=4, sinks=True),
    "blocks that see all of themselves": Case(lengths=(5, 30), nodes=4, block=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_is_the_softmax_over_the_keys_of_each_row(case):
    inputs = attention_case(case)
    found = tree_attention(**inputs)
    torch.testing.assert_close(found, expected_attention(case, inputs), atol=2e-6, rtol=2e-5)


def test_attention_reads_quantised_columns():
    inputs = attention_case(Case(lengths=(5, 30), nodes=4, head_dim=16))
    stored = {name: quantise(inputs[name].nan_to_num()) for name in "kv"}
    read = {name: dequantise(x, torch.float32) for name, x in stored.items()}
    found, expected = tree_attention(**inputs | stored), tree_attention(**inputs | read)
    assert torch.equal(found, expected)


def test_paths_are_the_ancestors_by_depth():
    ancestors = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
    paths = ancestor_paths(ancestors[None])[0]
    assert paths.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 1, 3, 0]]


def test_a_window_keeps_the_last_positions():
    keys = attention_case(Case(lengths=(4,), nodes=2, chunk=True))["keys"]
    assert keys.within(3).start.tolist() == [2, 3]
    assert keys.within(9).start.tolist() == [0, 0]


def test_the_norm_is_pytorchs_after_the_residual():
    x, residual, weight = numbers(5, 24), numbers(5, 24, seed=1), numbers(24, seed=2)
    normed, total = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    expected = nn.functional.rms_norm(total, (24,), weight, 1e-5)
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(rms_norm(total, weight, 1e-5)[0], expected)


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_keys_are_rotated_and_written_to_their_columns(rotary_dim):
    q, k, v = numbers(3, 4, 8), numbers(3, 2, 8, seed=1), numbers(3, 2, 8, seed=2)
    angles = numbers(3, rotary_dim // 2, seed=3)
    cos, sin = (torch.cat([x, x], -1) for x in (angles.cos(), angles.sin()))
    caches = torch.zeros(2, 2, 10, 8)
    slots = torch.tensor([7, 2, 3])
    weights = numbers(2, 8, seed=4)
    found = rotate_and_store(
        q, k, v, cos, sin, *caches, slots, norms=(weights[0], weights[1]), eps=1e-6
    )
    half = rotary_dim // 2
    for x, weight, result in ((q, weights[0], found), (k, weights[1], caches[0][:, slots].mT)):
        x = nn.functional.rms_norm(x, (8,), weight, 1e-6)
        pairs = torch.complex(x[..., :half], x[..., half:rotary_dim])
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        expected = torch.cat([turned.real, turned.imag, x[..., rotary_dim:]], -1)
        result = found if result is found else caches[0][:, slots].transpose(0, 1)
        torch.testing.assert_close(result, expected)
    assert torch.equal(caches[1][:, slots].transpose(0, 1), v)
    unused = [column for column in range(10) if column not in slots.tolist()]
    assert not caches[:, :, unused].any()


def test_keys_are_quantised_for_a_quantised_cache():
    k, v = numbers(3, 2, 8, seed=1), numbers(3, 2, 8, seed=2)
    ones = torch.ones(3, 8)
    caches = torch.zeros(2, 2, 5, 12, dtype=torch.int8)
    rotate_and_store(k, k, v, ones, ones * 0, *caches, torch.tensor([4, 0, 1]))
    assert torch.equal(caches[0][:, [4, 0, 1]].transpose(0, 1), quantise(k))
    assert torch.equal(caches[1][:, [4, 0, 1]].transpose(0, 1), quantise(v))


@pytest.mark.parametrize(
    ("name", "function"), [("silu", nn.SiLU()), ("gelu_tanh", nn.GELU(approximate="tanh"))]
)
def test_gates(name, function):
    gate, up = numbers(3, 5), numbers(3, 5, seed=1)
    assert torch.equal(gated(gate, up, name), function(gate) * up)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_sums_over_chunks_have_separate_places(block):
    """However many rows a block has, and beyond what graphs have by default."""
    sizes, shared = np.array([1, 40, 3, 7, 300]), np.array([5000, 512, 1, 513, 9000])
    items, places = plan_work(sizes.cumsum() - sizes, sizes, shared, block)
    chunks = np.repeat(-(-shared // CHUNK), sizes)
    taken = [place + c for place, n in zip(places, chunks, strict=True) for c in range(n)]
    padded, count = padded_items(items)
    assert count == len(items)
    assert sorted(taken) == list(range(chunks.sum()))
    assert MIN_PLACES < chunks.sum() <= PLACES_EACH * len(padded)
    rows = [(row, chunk) for first, end, chunk in items.tolist() for row in range(first, end)]
    assert sorted(rows) == [(row, c) for row, n in enumerate(chunks.tolist()) for c in range(n)]


def test_operations_without_triton_have_one_line(monkeypatch):
    """PyTorch for Windows has none; only what the model uses is named."""
    monkeypatch.setitem(sys.modules, "treeflash_cuda.gpu.triton_kernels", None)
    shapes = Shapes(heads=4, kv_heads=2, head_dim=8, hidden_size=32)
    operations = load_operations(shapes, torch.device("cpu"), torch.float32)
    assert operations == Operations(reasons=operations.reasons)
    (line,) = operations.fallbacks
    assert line.startswith(
        "tree_attention, rms_norm, rotate_and_store, gated, sample_rows, move_columns, "
        "draft_noise, noisy_log_probs run in PyTorch: import of treeflash_cuda.gpu.triton_kernels"
    )
    assert not operations.runs_trees
