"""Recurrent heads against the layers that they were trained as."""

import pytest

from treeflash.testing import require

require("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from treeflash_cuda.backend import load  # noqa: E402

from treeflash.config import LoadConfig  # noqa: E402
from treeflash.testing.dialects import write_dialect  # noqa: E402
from treeflash.testing.models import write_target  # noqa: E402


@pytest.fixture
def domino(tmp_path):
    write_target(tmp_path / "target", "qwen3", seed=1)
    write_dialect(tmp_path / "drafter", tmp_path / "target", "specforge-domino", seed=2)
    config = LoadConfig(device="cpu", dtype="float32")
    return load(tmp_path / "target", tmp_path / "drafter", config)


@torch.inference_mode()
def test_the_state_of_domino_is_that_of_a_gru(domino):
    """One step at a time, of three paths at once; the head leaves the first depth alone."""
    config, cell, weights = domino.drafter_config, domino.head.cell, domino.head.module
    gru = nn.GRU(config.hidden_size, config.head_state_size, bias=False, batch_first=True)
    gru.load_state_dict(weights.prefix_gru.state_dict())
    tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [3, 1, 4, 2]])
    expected, _ = gru(domino.head.output.embed(tokens))
    state = torch.zeros(3, config.head_state_size)
    normed = torch.zeros(1, config.hidden_size)
    for step in range(4):
        state, queries = cell.step(state, normed, tokens[:, step], step + 1)
        torch.testing.assert_close(state, expected[:, step])
        assert bool(queries.any()) == (step + 1 >= config.head_from_depth)
