"""A target that lacks the vocabulary of its tokenizer is refused by every command."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from byte_tokens import save_tokenizer

from treeflash.__main__ import main
from treeflash.testing.models import write_drafter, write_target

COMMANDS = {
    "generate": ["hi"],
    "serve": ["--port", "0"],
    "evaluate": ["--prompts", "prompts.jsonl"],
    "doctor": [],
    "distill": ["--prompts", "prompts.jsonl", "--output", "answers.jsonl"],
    "train": ["--responses", "responses.jsonl", "--output", "trained"],
    "adapt": ["--prompts", "prompts.jsonl", "--validation-sequences", "2", "--output", "adapted"],
}
NEEDED = {"serve": "fastapi", "train": "torch", "adapt": "torch"}
"""Packages that commands need before they look at the target."""
DRAFTED = ("generate", "serve", "evaluate", "doctor", "adapt")
"""Commands with the option `--drafter`."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a target without `tokenizer.json`, a drafter, prompts and responses are."""
    write_target(tmp_path / "target", "qwen2", seed=1)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=2)
    save_tokenizer(tmp_path / "target")
    (tmp_path / "target" / "tokenizer.json").unlink()
    prompts = [{"id": n, "prompt": f"hi {n}"} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (tmp_path / "responses.jsonl").write_text('{"prompt_ids": [5], "response_ids": [6, 7]}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_target_without_a_vocabulary_is_refused(command, folder, capsys):
    if find_spec(NEEDED.get(command, "numpy")) is None:
        pytest.skip(f"{command} needs {NEEDED[command]}")
    options = ["--target", "target", "--backend", "cuda" if command == "train" else "reference"]
    options += ["--drafter", "drafter"] if command in DRAFTED else []
    assert main([command, *COMMANDS[command], *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: target has no usable tokenizer (its vocabulary is missing)" in err
