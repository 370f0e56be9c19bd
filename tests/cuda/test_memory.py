"""Memory of the arenas over many texts."""

import pytest
from memory import check_memory
from parts import load_with_parts

from treeflash.config import LoadConfig
from treeflash.testing import require
from treeflash.testing.models import write_drafter, write_target

require("torch")

from treeflash_cuda import arena as arena_module  # noqa: E402
from treeflash_cuda.backend import load  # noqa: E402
from treeflash_cuda.state import State  # noqa: E402


@pytest.fixture
def folders(tmp_path):
    write_target(tmp_path / "target", "qwen3", seed=1, vocab_size=40)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=2)
    return tmp_path / "target", tmp_path / "drafter"


@pytest.mark.parametrize("static", [False, True], ids=["", "static shapes"])
def test_no_state_stays_open_over_500_texts(monkeypatch, folders, static):
    monkeypatch.setattr(arena_module, "SLAB_BYTES", 1 << 16)  # several of them
    if static:
        backend = load_with_parts(monkeypatch, *folders)
    else:
        backend = load(*folders, LoadConfig(device="cpu"))
    arenas = backend.target.arena, backend.drafter_arena

    def held():
        return sum(slab.storage.nbytes for arena in arenas for slab in arena.slabs)

    check_memory(monkeypatch, backend, State, held)
    for arena in arenas:
        assert [slab.is_free for slab in arena.slabs] == [True]
