"""Memory of the arenas over many texts."""

import pytest
from failures import failing
from memory import check_memory
from parts import load_with_parts

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.testing import require
from treeflash.testing.models import write_pair

require("torch")

from treeflash_cuda.backend import load
from treeflash_cuda.cache import KVCache
from treeflash_cuda.state import State


@pytest.fixture
def folders(tmp_path):
    return write_pair(tmp_path, "qwen3", vocab_size=40)


@pytest.mark.parametrize(
    "static",
    [False, pytest.param(True, marks=pytest.mark.nightly)],
    ids=["", "static shapes"],
)
def test_no_state_stays_open_over_many_texts(monkeypatch, folders, static):
    if static:
        backend = load_with_parts(monkeypatch, *folders)
    else:
        backend = load(*folders, LoadConfig(device="cpu"))
    arenas = backend.target.arena, backend.drafter_arena
    for arena in arenas:
        arena.slab_nbytes = 1 << 16  # several of them

    def held():
        return sum(slab.storage.nbytes for arena in arenas for slab in arena.slabs)

    check_memory(monkeypatch, backend, State, held)
    for arena in arenas:
        assert [slab.is_free for slab in arena.slabs] == [True]


def test_a_fork_that_fails_in_the_middle_gives_its_regions_back(folders):
    backend = load(*folders, LoadConfig(device="cpu"))
    session = SequenceSession(backend, drafts=True)
    session.extend([3, 4, 5])
    session.draft(6)
    with failing(KVCache, "copy_from", MemoryError, call=2), pytest.raises(MemoryError):
        session.state.fork(2, 10)
    session.close()
    for arena in (backend.target.arena, backend.drafter_arena):
        assert [slab.is_free for slab in arena.slabs] == [True]
