"""What the tests of the MLX backend share."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from treeflash.testing.models import write_drafter, write_target


@pytest.fixture(scope="session")
def families():
    """The script `families.py` as a module: it writes random models of any type of mlx-lm."""
    spec = importlib.util.spec_from_file_location("families", Path(__file__).parent / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a tiny Qwen3 and of a TreeFlash drafter for it, 64 wide so that they quantise."""
    folder = tmp_path_factory.mktemp("pair")
    target, drafter = folder / "target", folder / "drafter"
    write_target(target, "qwen3", seed=1, hidden_size=128, vocab_size=64)
    write_drafter(drafter, target, seed=2)
    return target, drafter


@pytest.fixture
def rng():
    """A fresh generator of fixed seed."""
    return np.random.default_rng(0)
