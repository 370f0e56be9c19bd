"""What the trainer makes works in both backends."""

import numpy as np
import pytest
from small_training import CPU, TINY_VOCAB, train_steps, write_predictable_target, write_prompts

from treeflash.commands import adapt
from treeflash.config import DecodeConfig
from treeflash.testing import require
from treeflash.testing.comparisons import steps_of
from treeflash.testing.models import write_drafter, write_target

require("torch")
require("mlx")

from treeflash_cuda.backend import load as load_cuda
from treeflash_mlx.backend import load as load_mlx


@pytest.mark.sample(1)
@pytest.mark.parametrize("head", ["swiglu", "linear", "none"])
def test_a_trained_drafter_decodes_alike_everywhere(head, tmp_path):
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    write_target(target, "llama", seed=1, vocab_size=TINY_VOCAB)
    train_steps(target, drafter, head=head, steps=3)
    method = "ddtree" if head == "none" else "treeflash"
    config = DecodeConfig(method=method, budget=64, max_tokens=24)
    steps = [
        steps_of(load(target, drafter, CPU), [1, 2, 3], config) for load in (load_cuda, load_mlx)
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
    prompts = write_prompts(tmp_path / "prompts.jsonl", ("abcde"[n:] for n in range(4)))
    folders = ["--target", target, "--drafter", drafter, "--prompts", prompts]
    options = "--backend mlx --device cpu --dtype float32 --max-tokens 12 --steps 1 --sequences 1"
    options += " --measured 1 --validation-sequences 1 --anchors 4 --top-tokens 8"
    arguments = [*map(str, folders), "--output", str(tmp_path / "out"), *options.split()]
    assert adapt.main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()
