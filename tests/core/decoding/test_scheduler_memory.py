"""Memory of the reference over many sequences."""

from memory import check_memory

from treeflash.config import LoadConfig
from treeflash.reference.backend import load
from treeflash.reference.verifier import State


def test_no_state_stays_open_over_500_texts(monkeypatch, tiny_pair):
    check_memory(monkeypatch, load(*tiny_pair, LoadConfig()), State, lambda: 0)
