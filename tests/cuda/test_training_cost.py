"""The estimate of what training costs."""

import importlib
from pathlib import Path

import pytest

from treeflash.testing import require

require("torch")


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return importlib.import_module("benchmarks.training_cost")


def test_the_cost_grows_linearly_with_the_anchors(module):
    """So that two numbers of anchors give the cost of any."""
    from treeflash.training.config import TrainConfig

    blocks = module.make_blocks(module.SHAPES["tiny"])
    few, more, most = (module.cost(blocks, 64, n, TrainConfig()) for n in (8, 16, 32))
    expected = few.at(more, 32)
    assert most.flops == pytest.approx(expected.flops, rel=1e-6)
    assert most.kept == pytest.approx(expected.kept, rel=0.02)


def test_the_operations_are_those_of_the_products(module):
    """The feed-forward layers and both output heads of one more anchor, by their shapes."""
    from treeflash.training.config import TrainConfig

    shape = module.SHAPES["tiny"]
    h, i, vocab = (shape[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    blocks = module.make_blocks(shape)
    few, more = (module.cost(blocks, 64, n, TrainConfig()) for n in (8, 16))
    found = (more.flops - few.flops) / 8
    slots = module.BLOCK_SIZE
    mlps = 3 * module.DRAFTER_LAYERS * slots * 2 * 3 * h * i
    outputs = 2 * 2 * (slots - 1) * 2 * h * vocab  # no gradient of the target's weights
    assert mlps + outputs < found < 2 * (mlps + outputs)


def test_the_parameters_of_the_target_are_those_of_its_shape(module):
    used, total = module.target_parameters(module.SHAPES["qwen3-4b"])
    assert used == total
    assert total == pytest.approx(4.02e9, rel=0.01)  # as its model card says
