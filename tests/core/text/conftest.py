"""Tiny tokenizers."""

from pathlib import Path

import pytest
from tiny_tokenizers import BUILDERS, byte_level, save_folder

from treeflash.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=BUILDERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Each kind of tokenizer in turn."""
    folder = tmp_path_factory.mktemp(request.param)
    return Tokenizer.from_folder(save_folder(folder, BUILDERS[request.param]()))


@pytest.fixture
def plain(tmp_path: Path) -> Tokenizer:
    """A byte-level tokenizer without a chat template."""
    return Tokenizer.from_folder(save_folder(tmp_path / "plain", byte_level()))
