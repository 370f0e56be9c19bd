"""The model card of a trained drafter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from treeflash.drafters.folder import read_config
from treeflash.testing.models import write_drafter, write_target
from treeflash.training.config import TrainConfig
from treeflash.training.interfaces import model_card


@pytest.mark.parametrize("layers", [1, 2])
def test_one_layer_is_not_layers(tmp_path: Path, layers: int):
    write_target(tmp_path / "target", "qwen3", seed=0)
    shape = {"layers": layers, "target_layer_ids": tuple(range(layers))}
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=1, **shape)
    identity = {**asdict(TrainConfig()), "data": "0"}
    card = " ".join(model_card(read_config(tmp_path / "drafter"), identity, []).split())
    expected = {
        1: ("1 layer, hidden", "target layer 0."),
        2: ("2 layers, h", "target layers 0, 1."),
    }
    assert all(part in card for part in expected[layers])
