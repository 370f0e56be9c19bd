"""Recurrent heads against the layers that they were trained as."""

import pytest

from treeflash.testing import require

require("torch")

import torch
from torch import nn
from treeflash_cuda.backend import load

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
