"""Parts of drafters' heads against what they stand for."""

from types import SimpleNamespace

import pytest

from treeflash.testing import require

require("torch")

import torch
from torch import nn
from treeflash_cuda.backend import load
from treeflash_cuda.drafter_loading import pack_drafter
from treeflash_cuda.drafter_operations import Experts
from treeflash_cuda.operations import Operations

from treeflash.config import LoadConfig
from treeflash.drafters.heads.operations import Slots
from treeflash.testing.models import write_dialect, write_target


@pytest.fixture
def domino(tmp_path):
    write_target(tmp_path / "target", "qwen3", seed=1)
    write_dialect(tmp_path / "drafter", tmp_path / "target", "specforge-domino", seed=2)
    config = LoadConfig(device="cpu", dtype="float32")
    return load(tmp_path / "target", tmp_path / "drafter", config)


@torch.inference_mode()
def test_the_state_of_domino_is_that_of_a_gru(domino):
    """One step at a time, of three paths at once; the head leaves the first depth alone."""
    config, cell = domino.drafter_config, domino.head.module
    gru = nn.GRU(config.hidden_size, config.head_state_size, bias=False, batch_first=True)
    gru.load_state_dict(cell.prefix_gru.state_dict())
    tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [3, 1, 4, 2]])
    expected, _ = gru(domino.head.output.embed(tokens))
    state = torch.zeros(3, config.head_state_size)
    hidden = torch.zeros(4, config.hidden_size)
    slots = Slots(domino.head.output, hidden, hidden)
    for step in range(4):
        state, queries = cell.step(slots, state, tokens[:, step], step)
        torch.testing.assert_close(state, expected[:, step])
        assert bool(queries.any()) == (step + 1 >= config.head_from_depth)


@torch.inference_mode()
def test_experts_of_heads_compute_what_a_loop_over_experts_does():
    """One expert of five has no rows."""
    torch.manual_seed(0)
    experts = Experts(size=12, width=8, count=5)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    chosen = torch.tensor([[0, 3], [3, 4], [1, 0], [3, 1]])
    x, weights = torch.randn(4, 12), torch.rand(4, 2)
    expected = experts(x, chosen, weights)
    layer = nn.ModuleList([experts])
    layer.operations = Operations()  # as a drafter has them on a GPU
    pack_drafter(
        layer, None, SimpleNamespace(dtype=torch.float32, device=experts.gate_proj.device), None
    )
    assert experts.operations is layer.operations
    torch.testing.assert_close(experts(x, chosen, weights), expected)
