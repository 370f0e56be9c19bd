"""What one optimiser step does: gradients, accumulation, random draws."""

from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.errors import NumericalError
from treeflash.testing import require
from treeflash.testing.models import write_target
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response

require("torch")

import torch
from treeflash_cuda.training import loop
from treeflash_cuda.training.entry import train

CPU = LoadConfig(device="cpu", dtype="float32")
VOCAB = 40
TINY = TrainConfig(
    layers=2,
    block_size=5,
    top_tokens=8,
    steps=3,
    sequences=2,
    anchors=8,
    validation_sequences=0,
)


@pytest.fixture
def steps(tmp_path):
    """Train a drafter of a tiny target on random texts; returns the records of the steps."""
    write_target(tmp_path / "target", "llama", seed=1, vocab_size=VOCAB)
    ids = np.random.default_rng(2).integers(0, VOCAB, (8, 20))
    texts = [
        Response(prompt_ids=tuple(row[:5]), response_ids=tuple(row[5:])) for row in ids.tolist()
    ]

    def steps(**changes):
        config = replace(TINY, **changes)
        records = train(tmp_path / "target", texts, tmp_path / "out", config, CPU)
        return [record for record in records if "step" in record]

    return steps


@pytest.fixture
def forwards(monkeypatch):
    """The loss and a random number of every forward pass, in order."""
    found = []

    def recorded(blocks, batch, vocab_size, config, generator):
        loss, parts = objective(blocks, batch, vocab_size, config, generator)
        found.append((parts["loss"], float(torch.rand((), generator=generator))))
        return loss, parts

    objective = loop.objective
    monkeypatch.setattr(loop, "objective", recorded)
    return found


def test_the_gradient_is_clipped(steps, monkeypatch):
    norms = []

    def observed(blocks, config):
        optimizer = make_optimizer(blocks, config)

        def keep_norm(*_):
            gradients = [p.grad for p in blocks.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

        optimizer.register_step_pre_hook(keep_norm)
        return optimizer

    make_optimizer = loop.make_optimizer
    monkeypatch.setattr(loop, "make_optimizer", observed)
    records = steps(clip=0.01)
    assert min(record["gradient_norm"] for record in records) > 0.02
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


def test_a_loss_that_is_not_finite_ends_the_run(steps):
    with pytest.raises(NumericalError, match=r"the loss of step \d is not finite; try a lower"):
        steps(learning_rate=1e30)


def test_the_loss_of_a_step_is_the_mean_of_its_forwards(steps, forwards):
    records = steps(accumulation=2)
    losses = [loss for loss, _ in forwards]
    assert len(losses) == 6
    assert len(set(losses)) == 6
    expected = [fmean(losses[n : n + 2]) for n in range(0, 6, 2)]
    assert [record["loss"] for record in records] == pytest.approx(expected)


def test_every_forward_has_its_own_random_numbers(steps, forwards):
    steps(accumulation=2)
    draws = [draw for _, draw in forwards]
    assert len(draws) == len(set(draws)) == 6
