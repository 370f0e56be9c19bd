"""The systems of the throughput benchmark answer alike, in float32 and in the order of prompts."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from treeflash.language_model import load
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_drafter, write_target
from treeflash.testing.tokenizer import SPECIAL, save_tokenizer

PROMPTS = [[7, 9, 11], [5, 6, 7, 8, 9, 10, 11, 12, 13], [40], [8, 3, 200, 90, 17]]
SYSTEMS = {
    "cuda": ["ar", "treeflash", "generate", "generate_batch"],
    "mlx": ["ar", "treeflash", "batch_generate"],
}


@pytest.fixture
def module(monkeypatch):
    """Import a module of the throughput benchmark."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return lambda name: importlib.import_module(f"benchmarks.throughput.{name}")


@pytest.mark.parametrize("backend", SYSTEMS)
def test_every_system_gives_the_same_texts(backend, module, tmp_path):
    require({"cuda": "torch", "mlx": "mlx_lm"}[backend])
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    write_target(target, "llama", seed=3, vocab_size=len(SPECIAL) + 256)
    edit_config(target, lambda config: config.pop("eos_token_id"))
    save_tokenizer(target)
    write_drafter(drafter, target, seed=4)
    model = load(target, drafter, backend=backend, device="cpu", dtype="float32")
    throughput = module("__main__")
    args = throughput.parser().parse_args(["a", "--methods", "ar,treeflash"])
    systems, skipped = throughput.load_systems(model, args)
    assert not skipped
    assert [method for _, method in systems] == SYSTEMS[backend]
    answers = {method: run(PROMPTS, 12) for (_, method), run in systems.items()}
    expected = [answer.token_ids for answer in answers["ar"]]
    assert [len(tokens) for tokens in expected] == [12] * len(PROMPTS)
    for method, found in answers.items():
        assert [answer.token_ids for answer in found] == expected, method
        assert all(0 < answer.first_s < answer.last_s for answer in found)
