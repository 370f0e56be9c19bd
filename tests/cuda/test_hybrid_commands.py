"""A hybrid target all the way: distill, train, evaluate, generate and doctor as commands."""

import json

import pytest
from small_training import ON_CPU, SMALL, write_predictable_target

from treeflash.commands import distill, doctor, evaluate, generate, train
from treeflash.testing import require

require("torch")

TOKENS = "12"
"""New tokens of a text."""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_predictable_target(tmp_path_factory.mktemp("target"), "qwen3_5")


def test_from_prompts_to_drafted_text(target, tmp_path, capsys):
    pair = ["--target", str(target), *ON_CPU]
    prompts, responses = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": n, "prompt": f"word {n}"}) + "\n" for n in range(10))
    )
    writing = ["--prompts", str(prompts), "--output", str(responses), "--max-tokens", TOKENS]
    assert distill.main([*writing, "--temperature", "1", *pair]) == 0
    records = responses.read_text().splitlines()
    assert len(records) == 10

    kept, held_out = tmp_path / "kept.jsonl", tmp_path / "held_out.jsonl"
    kept.write_text("\n".join(records[:6]) + "\n")
    held_out.write_text("\n".join(records[6:]) + "\n")
    config, drafter = tmp_path / "train.toml", tmp_path / "drafter"
    config.write_text(SMALL)
    learning = ["--responses", str(kept), "--validation", str(held_out), "--config", str(config)]
    learning += ["--output", str(drafter), "--steps", "8", "--init", "random"]
    assert train.main([*learning, *pair]) == 0
    capsys.readouterr()

    pair += ["--drafter", str(drafter)]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"id": n, "prompt": f"new {n}"}) + "\n" for n in range(2)))
    measuring = ["--prompts", str(few), "--max-tokens", TOKENS]
    measuring += ["--budgets", "16", "--methods", "treeflash"]
    assert evaluate.main([*measuring, *pair]) == 0
    capsys.readouterr()
    texts = []
    for method in ("ar", "treeflash"):
        options = ["hello", "--max-tokens", TOKENS, "--method", method, *pair]
        assert generate.main(options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert doctor.main([*pair, "--max-tokens", TOKENS]) in (0, 1)
