"""Stored states of the number formats in which backends keep keys, values and features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from treeflash.config import LoadConfig
from treeflash.registry import loader
from treeflash.testing.models import write_drafter, write_target
from treeflash.testing.states import check_storage

PACKAGES = {"cuda": "torch", "mlx": "mlx_lm"}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "half precision": ("cuda", {"dtype": "bfloat16", "exact": False}),
    "exact mode": ("cuda", {"dtype": "bfloat16", "exact": True}),
    "exact mode in float16": ("cuda", {"dtype": "float16", "exact": True}),
    "8 bits": ("cuda", {"dtype": "bfloat16", "kv_bits": 8}),
    "half precision on mlx": ("mlx", {"dtype": "bfloat16"}),
    "4 bits on mlx": ("mlx", {"dtype": "bfloat16", "kv_bits": 4}),
}


@pytest.mark.parametrize("read", [0, 11])
@pytest.mark.parametrize("name", FORMATS)
def test_a_stored_state_continues_bit_for_bit(name: str, read: int, tmp_path: Path) -> None:
    backend, settings = FORMATS[name]
    pytest.importorskip(PACKAGES[backend])
    # Groups of quantised numbers have 32 of them: the width of a head.
    write_target(tmp_path / "target", "qwen3", seed=1, hidden_size=64)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=2)
    config = LoadConfig(device="cpu", **settings)
    pair = loader(backend)(tmp_path / "target", tmp_path / "drafter", config)
    assert (pair.inexact is None) == bool(settings.get("exact"))
    check_storage(pair, read=read)
