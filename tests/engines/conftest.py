"""Each test here runs with every engine whose packages are installed."""

import importlib

import pytest
from engines import PACKAGES

from treeflash.testing import require
from treeflash.testing.models import write_pair


@pytest.fixture(scope="session", params=PACKAGES)
def engine(request):
    """A module of `engines`."""
    require(PACKAGES[request.param])
    return importlib.import_module(f"engines.{request.param}")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a tiny Qwen3 and of a drafter for it, wide enough to be quantised."""
    folder = tmp_path_factory.mktemp("pair")
    return write_pair(folder, "qwen3", hidden_size=128, vocab_size=64, layers=3)
