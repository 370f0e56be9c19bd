"""Memory of the reference over many sequences."""

import pytest
from memory import check_memory

from treeflash.config import LoadConfig
from treeflash.reference.backend import load
from treeflash.reference.verifier import State


@pytest.mark.sample(1)
@pytest.mark.parametrize("texts", [100, 500])
def test_no_state_stays_open_over_many_texts(monkeypatch, tiny_pair, texts):
    check_memory(monkeypatch, load(*tiny_pair, LoadConfig()), State, lambda: 0, texts)
