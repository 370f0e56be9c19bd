"""Drafters to load: one of each format, for one small target."""

from pathlib import Path

import pytest

from treeflash.testing.models import write_drafter, write_target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A TreeFlash drafter for a target of 4 layers, hidden size 32, vocabulary 24."""
    write_target(tmp_path / "target", "qwen3", seed=0)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=1)
    return tmp_path / "drafter"


@pytest.fixture
def dflash_folder(tmp_path: Path, folder: Path) -> Path:
    write_drafter(tmp_path / "dflash", tmp_path / "target", format="dflash", seed=1)
    return tmp_path / "dflash"
