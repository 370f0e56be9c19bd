"""What the trainer makes works in both backends."""

import json

import numpy as np
import pytest
from small_training import write_predictable_target

from treeflash.commands import adapt
from treeflash.config import DecodeConfig, LoadConfig
from treeflash.testing import require
from treeflash.testing.comparisons import steps_of
from treeflash.testing.models import write_drafter, write_target
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response

require("torch")
require("mlx")

from treeflash_cuda.backend import load as load_cuda
from treeflash_cuda.training.entry import train
from treeflash_mlx.backend import load as load_mlx

CPU = LoadConfig(device="cpu", dtype="float32")
VOCAB = 40


@pytest.mark.sample(1)
@pytest.mark.parametrize("head", ["swiglu", "linear", "none"])
def test_a_trained_drafter_decodes_alike_everywhere(head, tmp_path):
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    write_target(target, "llama", seed=1, vocab_size=VOCAB)
    random = np.random.default_rng(2)
    responses = [
        Response(
            prompt_ids=tuple(random.integers(0, VOCAB, 5).tolist()),
            response_ids=tuple(random.integers(0, VOCAB, 20).tolist()),
        )
        for _ in range(6)
    ]
    config = TrainConfig(
        layers=2, block_size=5, head=head, steps=3, sequences=2, anchors=8, validation_sequences=1
    )
    list(train(target, responses, drafter, config, CPU))
    method = "ddtree" if head == "none" else "treeflash"
    steps = [
        steps_of(
            load(target, drafter, CPU),
            [1, 2, 3],
            DecodeConfig(method=method, budget=64, max_tokens=24),
        )
        for load in (load_cuda, load_mlx)
    ]
    assert sum(step.tree is not None for step in steps[0]) > 1
    for left, right in zip(*steps, strict=True):
        assert left.tokens == right.tokens
        if left.tree is not None:
            np.testing.assert_array_equal(left.path, right.path)


def test_a_drafter_is_adapted_where_mlx_answers(tmp_path, capsys):
    """PyTorch trains, on the CPU where it has no GPU; `--backend` and `--device` are MLX's."""
    target, drafter = write_predictable_target(tmp_path / "target", "llama"), tmp_path / "drafter"
    write_drafter(drafter, target, seed=2, block_size=5, layers=2)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": n, "prompt": "abcde"[n:]}) + "\n" for n in range(4))
    )
    folders = ["--target", target, "--drafter", drafter, "--prompts", prompts]
    options = "--backend mlx --device cpu --dtype float32 --max-tokens 12 --steps 1 --sequences 1"
    options += " --measured 1 --validation-sequences 1 --anchors 4 --top-tokens 8"
    arguments = [*map(str, folders), "--output", str(tmp_path / "out"), *options.split()]
    assert adapt.main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()
