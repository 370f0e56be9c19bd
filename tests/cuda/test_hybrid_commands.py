"""A hybrid target all the way: distill, train, evaluate, generate and doctor as commands."""

import json

import pytest

from treeflash import distill, doctor, evaluate, generate, train
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.testing import require
from treeflash.testing.models import edit_config, save, write_target
from treeflash.testing.tokenizer import SPECIAL, save_tokenizer

require("torch")

ON_CPU = ["--backend", "cuda", "--device", "cpu", "--dtype", "float32"]
SMALL = """\
layers = 2
block_size = 6
head_size = 64
top_tokens = 8
sequences = 4
anchors = 16
learning_rate = 4e-3
validation_sequences = 4
gamma = 4.0
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    write_target(folder, "qwen3_5", seed=3, vocab_size=len(SPECIAL) + 256)
    edit_config(folder, lambda config: config.pop("eos_token_id"))
    tensors = read_tensors(folder)
    tensors["lm_head.weight"] *= 6  # samples that a drafter can predict
    save(folder, read_config(folder), tensors)
    return save_tokenizer(folder)


def test_from_prompts_to_drafted_text(target, tmp_path, capsys):
    pair = ["--target", str(target), *ON_CPU]
    prompts, responses = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": n, "prompt": f"word {n}"}) + "\n" for n in range(48))
    )
    writing = ["--prompts", str(prompts), "--output", str(responses), "--max-tokens", "32"]
    assert distill.main([*writing, "--temperature", "1", *pair]) == 0
    records = responses.read_text().splitlines()
    assert len(records) == 48

    kept, held_out = tmp_path / "kept.jsonl", tmp_path / "held_out.jsonl"
    kept.write_text("\n".join(records[:40]) + "\n")
    held_out.write_text("\n".join(records[40:]) + "\n")
    config, drafter = tmp_path / "train.toml", tmp_path / "drafter"
    config.write_text(SMALL)
    learning = ["--responses", str(kept), "--validation", str(held_out), "--config", str(config)]
    learning += ["--output", str(drafter), "--steps", "60", "--init", "random"]
    assert train.main([*learning, *pair]) == 0
    capsys.readouterr()

    pair += ["--drafter", str(drafter)]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"id": n, "prompt": f"new {n}"}) + "\n" for n in range(3)))
    measuring = [
        "--prompts",
        str(few),
        "--max-tokens",
        "24",
        "--budgets",
        "16",
        "--methods",
        "treeflash",
    ]
    assert evaluate.main([*measuring, *pair]) == 0
    capsys.readouterr()
    texts = []
    for method in ("ar", "treeflash"):
        options = ["hello", "--max-tokens", "24", "--method", method, *pair]
        assert generate.main(options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert doctor.main([*pair, "--max-tokens", "24"]) in (0, 1)
