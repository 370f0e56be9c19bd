"""What backends write to train on, and what the trainer makes, in all of them."""

import json

import numpy as np
import pytest
from byte_tokens import save_tokenizer
from published_drafters import BACKENDS
from small_training import (
    CPU,
    TINY_VOCAB,
    VOCAB,
    train_steps,
    write_predictable_target,
    write_prompts,
)

from treeflash.commands import adapt, distill
from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.language_model import load
from treeflash.registry import loader
from treeflash.testing import require
from treeflash.testing.comparisons import generate, steps_of
from treeflash.testing.models import write_drafter, write_target


@pytest.mark.parametrize(
    ("backend", "family", "parallel"),
    [
        *(("reference", "llama", parallel) for parallel in (1, 3, 8)),
        *(("cuda", "llama", 1), ("cuda", "mistral", 20), ("cuda", "qwen3_moe", 3)),
        ("mlx", "qwen3", 3),
    ],
)
def test_distilled_responses_are_those_of_plain_decoding(backend, family, parallel, tmp_path):
    """Of several lengths and sampling settings; each is decoded again alone."""
    require(BACKENDS[backend])
    target, output = tmp_path / "target", tmp_path / "responses.jsonl"
    write_target(target, family, seed=3, vocab_size=VOCAB)
    save_tokenizer(target)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(60, 90)]}))
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": n, "turns": ["a" * (1 + 3 * n), "b"][: 1 + n % 2]} for n in range(6)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    files = ["--prompts", str(prompts), "--output", str(output), "--target", str(target)]
    options = "--temperature 0 0.9 --top-p 0.9 --max-tokens 12 --seed 5 --device cpu"
    options += f" --dtype float32 --backend {backend} --parallel {parallel}"
    assert distill.main([*files, *options.split()]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert {(record["id"], record["turn"]) for record in records} == {
        (n, turn) for n in range(6) for turn in range(1 + n % 2)
    }
    model = load(target, False, backend=backend, device="cpu", dtype="float32")
    for record in records:
        identity = record["target"], record["backend"], record["dtype"]
        assert identity == (target.name, model.backend.name, "float32")
        settings = {name: record[name] for name in ("temperature", "top_p", "seed")}
        config = DecodeConfig(
            method="ar",
            max_tokens=12,
            stop_token_ids=model.tokenizer.stop_token_ids,
            sampling=SamplingConfig(**settings),
        )
        assert record["response_ids"] == generate(model.backend, record["prompt_ids"], config)
    assert {record["seed"] for record in records} == {5 + n for n in range(6)}
    assert len({len(record["response_ids"]) for record in records}) > 1, "slots free up together"


@pytest.mark.sample(1)
@pytest.mark.parametrize("head", ["swiglu", "linear", "none"])
def test_a_trained_drafter_decodes_alike_everywhere(head, tmp_path):
    require("torch")
    require("mlx")
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    write_target(target, "llama", seed=1, vocab_size=TINY_VOCAB)
    train_steps(target, drafter, head=head, steps=3)
    method = "ddtree" if head == "none" else "treeflash"
    config = DecodeConfig(method=method, budget=64, max_tokens=24)
    steps = [
        steps_of(loader(name)(target, drafter, CPU), [1, 2, 3], config) for name in ("cuda", "mlx")
    ]
    assert sum(step.tree is not None for step in steps[0]) > 1
    for left, right in zip(*steps, strict=True):
        assert left.tokens == right.tokens
        if left.tree is not None:
            np.testing.assert_array_equal(left.path, right.path)


def test_a_drafter_is_adapted_where_mlx_answers(tmp_path, capsys):
    """PyTorch trains, on the CPU where it has no GPU; `--backend` and `--device` are MLX's."""
    require("torch")
    require("mlx")
    target, drafter = write_predictable_target(tmp_path / "target", "llama"), tmp_path / "drafter"
    write_drafter(drafter, target, seed=2, block_size=5, layers=2)
    prompts = write_prompts(tmp_path / "prompts.jsonl", ("abcde"[n:] for n in range(4)))
    folders = ["--target", target, "--drafter", drafter, "--prompts", prompts]
    options = "--backend mlx --device cpu --dtype float32 --max-tokens 12 --steps 1 --sequences 1"
    options += " --measured 1 --validation-sequences 1 --anchors 4 --top-tokens 8"
    arguments = [*map(str, folders), "--output", str(tmp_path / "out"), *options.split()]
    assert adapt.main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()
