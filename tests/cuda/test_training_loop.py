"""What one optimiser step does: gradients, accumulation, random draws."""

from dataclasses import replace
from statistics import fmean

import pytest
from small_training import CPU, TINY_RUN, random_texts

from treeflash.config import LoadConfig
from treeflash.errors import NumericalError
from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda.training import loop
from treeflash_cuda.training.entry import train


@pytest.fixture
def steps(target, tmp_path):
    """Train a drafter of a tiny target on random texts; returns the records of the steps."""

    def steps(lengths=(15,), load=CPU, **changes):
        config = replace(TINY_RUN, **({"steps": 3, "validation_sequences": 0} | changes))
        cut = [
            replace(text, response_ids=text.response_ids[: lengths[n % len(lengths)]])
            for n, text in enumerate(random_texts())
        ]
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        records = train(target, cut, output, config, load)
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


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_applied(
    steps, monkeypatch, tmp_path
):
    def spoiled(*arguments):
        loss, parts = objective(*arguments)
        loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss, parts

    objective = loop.objective
    monkeypatch.setattr(loop, "objective", spoiled)
    with pytest.raises(NumericalError, match="the gradient of step 1 is not finite; try a lower"):
        steps(save_every=1)
    assert not list(tmp_path.glob("out*/state"))


@pytest.mark.parametrize("position_weights", ["exponential", "prefix-product"])
def test_forwards_of_uneven_texts_count_by_their_tokens(position_weights, steps, forwards):
    """All texts in one forward pass give the same loss and gradient as in several."""
    options = {"steps": 1, "anchors": 16, "lengths": (2, 15, 3, 9)}
    options["position_weights"] = position_weights
    (whole,) = steps(sequences=8, **options)
    (parts,) = steps(sequences=2, accumulation=4, **options)
    # The weights of prefix-product depend on the predictions too.
    tolerance = 1e-5 if position_weights == "exponential" else 1e-2
    for name in ("loss", "marginal", "gradient_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=tolerance)
    mean = fmean(loss for loss, _ in forwards[1:])
    assert abs(mean - whole["loss"]) > 2 * tolerance * whole["loss"], "an equal share does as well"


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "bf16"), ("float32", "no")])
def test_training_has_the_precision_of_the_target(dtype, precision, steps, monkeypatch):
    """A GPU chooses the dtype of the checkpoint if none is named."""
    load_target, stop = loop.load_target, RuntimeError("the rest of the run")
    monkeypatch.setattr(
        loop,
        "load_target",
        lambda x, load, pack: load_target(x, replace(load, dtype=dtype), pack=pack),
    )
    found = []

    def accelerator(*, mixed_precision, **_):
        found.append(mixed_precision)
        raise stop

    monkeypatch.setattr(loop, "Accelerator", accelerator)
    with pytest.raises(RuntimeError, match=str(stop)):
        steps(load=LoadConfig(device="cpu"))
    assert found == [precision]


def test_the_loss_of_a_step_is_the_mean_of_its_forwards(steps, forwards):
    records = steps(accumulation=2, anchors=16)  # all positions, so that both have as many tokens
    losses = [loss for loss, _ in forwards]
    assert len(losses) == 6
    assert len(set(losses)) == 6
    expected = [fmean(losses[n : n + 2]) for n in range(0, 6, 2)]
    assert [record["loss"] for record in records] == pytest.approx(expected)


def test_every_forward_has_its_own_random_numbers(steps, forwards):
    steps(accumulation=2)
    draws = [draw for _, draw in forwards]
    assert len(draws) == len(set(draws)) == 6
