"""Optimiser steps: texts and anchors of each forward pass, gradients, accumulation, rates."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from small_training import TINY_RUN, texts_of, train_steps

from treeflash.config import LoadConfig
from treeflash.errors import NumericalError
from treeflash.testing import require
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response

require("torch")

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from treeflash_cuda.training import loop
from treeflash_cuda.training.data import Batches, Plan, SequenceFeatures, choose_anchors
from treeflash_cuda.training.loop import learning_rate, make_optimizer


@pytest.fixture
def steps(target, tmp_path):
    """Train a drafter of a tiny target on random texts; return the records of the steps."""

    def steps(texts=None, **changes):
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        return train_steps(target, output, texts, **{"validation_sequences": 0, **changes})

    return steps


def test_the_gradient_is_clipped(steps):
    norms = []

    def observe(optimizer, *_):
        weights = (x for group in optimizer.param_groups for x in group["params"])
        gradients = [x.grad for x in weights if x.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    hook = register_optimizer_step_pre_hook(observe)
    try:
        records = steps(clip=0.01, steps=3)
    finally:
        hook.remove()
    assert min(record["gradient_norm"] for record in records) > 0.02
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


def test_a_loss_that_is_not_finite_ends_the_run(steps):
    with pytest.raises(NumericalError, match=r"the loss of step \d is not finite; try a lower"):
        steps(learning_rate=1e30)


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_applied(steps, tmp_path):
    with pytest.raises(NumericalError, match="the gradient of step 1 is not finite; try a lower"):
        steps(marginal_weight=1e30, save_every=1)
    assert not list(tmp_path.glob("out*/state"))


@pytest.mark.parametrize("position_weights", ["exponential", "prefix-product"])
def test_forwards_of_uneven_texts_count_by_their_tokens(position_weights, steps):
    """All texts in one forward pass give the same loss and gradient as in several."""
    texts = texts_of(*[(5, 2), (5, 15), (5, 3), (5, 9)] * 2)
    options = {"steps": 1, "anchors": 16, "position_weights": position_weights}
    (whole,) = steps(texts, sequences=8, **options)
    (parts,) = steps(texts, sequences=2, accumulation=4, **options)
    # The weights of prefix-product depend on the predictions too.
    tolerance = 1e-5 if position_weights == "exponential" else 1e-2
    for name in ("loss", "marginal", "gradient_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=tolerance)


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


def test_every_forward_has_its_own_random_numbers(steps):
    """The loss of equal texts, whose drafter hardly moves, differs by the sampled tokens alone."""
    same = texts_of((5, 15)) * 8
    options = {"anchors": 16, "negatives": 3, "learning_rate": 1e-30, "sequences": 1}
    alone = [record["loss"] for record in steps(same, steps=4, **options)]
    assert len(set(alone)) == 4
    pairs = [record["loss"] for record in steps(same, steps=2, accumulation=2, **options)]
    assert pairs == pytest.approx([sum(alone[:2]) / 2, sum(alone[2:]) / 2])


def test_a_linear_warm_up_then_a_cosine_to_zero():
    config = TrainConfig(steps=8, warmup=0.5, learning_rate=2.0)
    rates = [learning_rate(step, config) for step in range(9)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 1.70711, 1.0, 0.29289, 0.0], abs=1e-5)
    assert learning_rate(0, replace(config, warmup=0.0)) == 2.0


def test_matrices_decay_and_norms_and_biases_do_not():
    model = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in model[:2].parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, tensor in model.state_dict().items():
        kept = 0.95 if name == "0.weight" else 1.0
        torch.testing.assert_close(tensor, kept * before[name], msg=name)


class BlankStore:
    """Texts of one length, with features of zeros."""

    target = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, texts, length=40):
        ids = [tuple(range(n, n + length)) for n in range(texts)]
        self.responses = [Response(prompt_ids=i[:2], response_ids=i[2:]) for i in ids]

    def get(self, numbers):
        count = len(self.responses[0].response_ids)
        features = SequenceFeatures(
            torch.zeros(len(self.responses[0]), 2),
            torch.zeros(count, 1, dtype=torch.int32),
            torch.zeros(count, 1, dtype=torch.float16),
        )
        return [features for _ in numbers]


def batches(texts, process=0, processes=1):
    config = replace(TINY_RUN, sequences=1, anchors=4, seed=3)
    return Batches(BlankStore(texts), config, 4, process, processes)


def test_every_epoch_takes_each_text_once_in_another_order():
    plan = Plan(lengths=[5] * 12, batch=3, seed=1)
    epochs = [np.concatenate([plan[4 * epoch + n] for n in range(4)]) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_holds_texts_of_similar_length():
    plan = Plan(lengths=[n // 2 for n in range(12)], batch=2, seed=1)
    for n in range(6):
        first, second = plan[n]
        assert first // 2 == second // 2
    few = Plan(lengths=[5, 5], batch=4, seed=1)
    assert sorted(few[7]) == [0, 0, 1, 1], "fewer texts than a batch are repeated"


def test_a_text_gets_other_anchors_in_every_epoch():
    found = batches(texts=1)
    chosen = [tuple(found[n].anchors[0, :4].tolist()) for n in range(4)]
    assert len(set(chosen)) == 4
    assert chosen[2] == tuple(found[2].anchors[0, :4].tolist())


def test_processes_share_the_texts_out_and_choose_other_anchors():
    first, second = (batches(2, process, processes=2)[0] for process in range(2))
    assert {int(batch.tokens[0, 0]) for batch in (first, second)} == {0, 1}
    assert not torch.equal(first.anchors, second.anchors)


@pytest.mark.parametrize("count", [3, 6, 99])
def test_anchors_are_positions_of_the_response_with_a_token_after_them(count):
    text = Response(prompt_ids=(1, 2, 3), response_ids=tuple(range(7)))
    anchors = choose_anchors(text, count, np.random.default_rng(0)).tolist()
    assert anchors == sorted(set(anchors))
    assert len(anchors) == min(count, 6)
    assert set(anchors) <= set(range(3, 9))
