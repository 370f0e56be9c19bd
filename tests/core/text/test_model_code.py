"""No code of a model folder runs when its tokenizer is loaded."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from byte_tokens import save_tokenizer
from hostile_folders import plant_code
from transformers import AutoConfig, AutoTokenizer

from treeflash.errors import CheckpointError
from treeflash.testing.models import write_target
from treeflash.text.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder; code that runs would be copied next to it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")
    folder = tmp_path / "model"
    folder.mkdir()
    write_target(folder, "llama", seed=1)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("new_type", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
def test_code_of_a_folder_is_not_run(folder: Path, new_type: bool, damaged: bool):
    """It is not run either when the configuration is read for the cause of another error."""
    ran = plant_code(folder, new_type=new_type)
    if damaged:
        (folder / "tokenizer.json").write_text("{}")
    with suppress(CheckpointError):
        Tokenizer.from_folder(folder)
    assert not ran.exists()


@pytest.mark.parametrize("kind", [AutoConfig, AutoTokenizer])
def test_the_code_would_run_if_it_were_trusted(folder: Path, kind: type):
    ran = plant_code(folder, new_type=True)
    with suppress(Exception):
        kind.from_pretrained(str(folder), trust_remote_code=True, local_files_only=True)
    assert ran.exists()
