"""No code of a model folder runs when its model is loaded, and no pickle is read."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hostile_folders import plant_code
from transformers import AutoConfig, AutoModelForCausalLM
from treeflash_cuda.backend import load

from treeflash.config import LoadConfig
from treeflash.errors import CheckpointError, TreeflashError
from treeflash.testing.models import write_target

CPU = LoadConfig(device="cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")
    folder = tmp_path / "model"
    folder.mkdir()
    write_target(folder, "llama", seed=1)
    return folder


@pytest.mark.parametrize("new_type", [False, True])
def test_code_of_a_folder_is_not_run(folder: Path, new_type: bool):
    ran = plant_code(folder, new_type=new_type)
    with suppress(TreeflashError):
        load(folder, None, CPU)
    assert not ran.exists()


@pytest.mark.parametrize("kind", [AutoConfig, AutoModelForCausalLM])
def test_the_code_would_run_if_it_were_trusted(folder: Path, kind: type):
    ran = plant_code(folder, new_type=True)
    with suppress(Exception):
        kind.from_pretrained(str(folder), trust_remote_code=True)
    assert ran.exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_in_pickles_are_not_read(folder: Path):
    """Reading a pickle runs what it names."""
    weights, *others = folder.glob("*.safetensors")
    assert not others
    weights.unlink()
    ran = folder / "ran"
    torch.save({"model.norm.weight": Evil(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        load(folder, None, CPU)
    assert not ran.exists()
