"""PyTorch's definition of attention, the plan of its work, and what is said without Triton."""

import sys

import numpy as np
import pytest

from treeflash.testing import require

require("torch")

import torch
from attention_cases import Case, attention_case, expected_attention
from torch import nn
from treeflash_cuda.operations import Operations, Shapes, gated, load_operations, tree_attention
from treeflash_cuda.visible_keys import CHUNK, MIN_PLACES, PLACES_EACH, padded_items, plan_work

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


@pytest.mark.parametrize(
    ("name", "function"), [("silu", nn.SiLU()), ("gelu_tanh", nn.GELU(approximate="tanh"))]
)
def test_gates(name, function):
    gate, up = torch.randn(2, 3, 5)
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
