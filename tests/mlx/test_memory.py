"""Memory of the MLX backend over many sequences."""

from memory import check_memory

from treeflash.config import LoadConfig
from treeflash.testing import require
from treeflash.testing.models import write_drafter, write_target

require("mlx_lm")

from treeflash_mlx.backend import load
from treeflash_mlx.state import State


def test_no_state_stays_open_over_500_sequences(monkeypatch, tmp_path):
    write_target(tmp_path / "target", "qwen3", seed=1, vocab_size=40)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=2)
    backend = load(tmp_path / "target", tmp_path / "drafter", LoadConfig(dtype="float32"))
    check_memory(monkeypatch, backend, State, lambda: 0)
