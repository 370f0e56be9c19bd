"""Optimiser steps: losses against their definitions, texts, anchors, gradients, and rates.

Gradients are compared with finite differences, the shortlist with the whole vocabulary, and chunks
with all rows at once.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from small_training import TINY_RUN, texts_of, train_steps
from stand_ins import stand_in

from treeflash.config import LoadConfig
from treeflash.errors import NumericalError
from treeflash.testing import require
from treeflash.training.config import TrainConfig, parse_loss
from treeflash.training.distillation import Response

require("torch")

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from treeflash_cuda.training import loop
from treeflash_cuda.training.batch import Batch, Drafts
from treeflash_cuda.training.data import Batches, BatchPlan, SequenceFeatures, choose_anchors
from treeflash_cuda.training.loop import learning_rate, make_optimizer
from treeflash_cuda.training.losses import (
    LK_DECAY,
    LOSSES,
    SMOOTHING,
    Outcomes,
    forward_kl,
    objective,
    prefix_product,
    reverse_kl,
)
from treeflash_cuda.training.model import Prediction, TargetOutput, in_chunks, make_shortlist

VOCAB, ROWS, TOP = 12, 4, 5
FUNCTIONS = {**LOSSES, "reverse": reverse_kl}


@pytest.fixture
def case():
    """The target's log probabilities, the drafter's logits, and the text's tokens."""
    torch.manual_seed(0)
    target = (2 * torch.randn(ROWS, VOCAB, dtype=torch.float64)).log_softmax(-1)
    logits = torch.randn(ROWS, VOCAB, dtype=torch.float64)
    return target, logits, torch.tensor([3, 0, 11, 7])


def outcomes(target, logits, text, k):
    best, tokens = target.topk(k)
    scored = torch.cat([tokens, text[:, None]], 1)
    return Outcomes.compare(best, logits.log_softmax(-1).gather(1, scored))


def defined(name, log_p, log_q, token, tokens):
    """A loss of one row, by a loop over some tokens and the rest of the vocabulary."""
    others = [t for t in range(VOCAB) if t not in tokens]
    p, q = ([*x[tokens].exp().tolist(), float(x[others].exp().sum())] for x in (log_p, log_q))
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-12)
    overlap = sum(map(min, p, q))
    share = math.exp(-LK_DECAY * overlap)
    return {
        "kl": kl,
        "reverse": sum(b * math.log(b / a) for a, b in zip(p, q, strict=True) if b > 1e-12),
        "ce": -float(log_q[token]),
        "tv": 1 - overlap,
        "lk": share * kl + (1 - share) * (1 - overlap),
    }[name]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("k", [TOP, VOCAB])
def test_a_loss_is_what_its_definition_says(name, k, case):
    target, logits, text = case
    expected = [
        defined(name, log_p, row.log_softmax(-1), token, log_p.topk(k).indices)
        for log_p, row, token in zip(*case, strict=True)
    ]
    # All of the vocabulary leaves a rest that is 0, which is bounded for its logarithm.
    found = FUNCTIONS[name](outcomes(target, logits, text, k)).tolist()
    assert found == pytest.approx(expected, abs=3e-5, rel=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gradient_agrees_with_finite_differences(name, case):
    target, logits, text = case
    share = torch.exp(-LK_DECAY * outcomes(target, logits, text, TOP).acceptance())

    def loss(changed):
        made = outcomes(target, changed, text, TOP)
        if name == "lk":  # its mixture is fixed while the gradient is taken
            return (share * forward_kl(made) + (1 - share) * LOSSES["tv"](made)).sum()
        return FUNCTIONS[name](made).sum()

    leaf = logits.clone().requires_grad_()
    total = FUNCTIONS[name](outcomes(target, leaf, text, TOP)).sum()
    (found,) = torch.autograd.grad(total, leaf)
    step = 1e-6
    for row, column in [(0, 3), (1, 0), (2, 5), (3, 7), (3, 1)]:
        shift = torch.zeros_like(logits)
        shift[row, column] = step
        slope = (loss(logits + shift) - loss(logits - shift)) / (2 * step)
        assert float(found[row, column]) == pytest.approx(float(slope), abs=1e-7)
    assert found.abs().max() > 1e-2


LENGTH, DEPTHS = 12, 3
CONFIG = TrainConfig(gamma=2.0, marginal_weight=0.25, corrected_weight=1.5)


class FixedPredictions(nn.Module):
    """A drafter whose distributions do not depend on the batch."""

    def __init__(self, marginal, corrected):
        super().__init__()
        self.log_probs = [marginal, corrected]

    def forward(self, batch, wanted, shortlist):
        return tuple(
            None if full is None else Prediction(full.gather(1, wanted), full.amax(-1))
            for full in self.log_probs
        )


@pytest.fixture
def batch():
    torch.manual_seed(0)
    anchors = torch.tensor([[1, 4], [3, 8]])
    ends = torch.tensor([[9, 5], [9, 9]])  # the last positions of the texts
    valid = anchors[..., None] + torch.arange(1, DEPTHS + 1) <= ends[..., None]
    assert not valid.all(), "a text must end within a block"
    log_probs, tokens = (2 * torch.randn(2, LENGTH, VOCAB)).log_softmax(-1).sort(descending=True)
    return Batch(
        tokens=torch.randint(VOCAB, (2, LENGTH)),
        features=torch.zeros(2, LENGTH, 0),
        anchors=anchors,
        valid=valid,
        top_tokens=tokens,
        top_log_probs=log_probs,
    )


@pytest.fixture
def predictions(batch):
    logits = torch.randn(2, int(batch.valid.sum()), VOCAB)
    return FixedPredictions(*logits.log_softmax(-1))


def measure(predictions, batch, **changes):
    return objective(
        predictions, batch, VOCAB, replace(CONFIG, **changes), torch.Generator().manual_seed(0)
    )


def token_loss(name, batch, row, position, log_q):
    """The loss of the prediction of the token at a position, before which the target has run."""
    order, log_p = batch.top_tokens[row, position - 1], batch.top_log_probs[row, position - 1]
    by_token = torch.empty(VOCAB).scatter(0, order, log_p)
    return defined(name, by_token, log_q, batch.tokens[row, position], torch.arange(VOCAB))


@pytest.mark.parametrize("loss", ["kl", "ce", "tv", "0.1 ce + 0.9 tv"])
def test_the_loss_is_the_weighted_mean_over_depths(loss, batch, predictions):
    total, parts = measure(predictions, batch, loss=loss)
    for name, log_probs in zip(("marginal", "corrected"), predictions.log_probs, strict=True):
        losses, weights = [], []
        for (row, column, d), log_q in zip(batch.valid.nonzero().tolist(), log_probs, strict=True):
            position = int(batch.anchors[row, column]) + d + 1
            weights.append(math.exp(-d / CONFIG.gamma))
            losses.append(
                sum(
                    share * token_loss(part, batch, row, position, log_q)
                    for part, share in parse_loss(loss).items()
                )
            )
        expected = sum(map(math.prod, zip(weights, losses, strict=True))) / sum(weights)
        assert parts[name] == pytest.approx(expected, rel=1e-3)
    assert parts["loss"] == float(total)
    assert float(total) == pytest.approx(0.25 * parts["marginal"] + 1.5 * parts["corrected"])


def test_prefix_product_weights_follow_the_acceptance_of_each_prediction(batch, predictions):
    _, parts = measure(predictions, batch, loss="ce", position_weights="prefix-product")
    for name, log_probs in zip(("marginal", "corrected"), predictions.log_probs, strict=True):
        total = weights = 0.0
        remaining = iter(log_probs)
        for row, anchors in enumerate(batch.valid.tolist()):
            for column, depths in enumerate(anchors):
                reached, losses = [1.0], []
                for d in range(sum(depths)):
                    position, log_q = int(batch.anchors[row, column]) + d + 1, next(remaining)
                    overlap = 1 - token_loss("tv", batch, row, position, log_q)
                    reached.append(reached[-1] * (SMOOTHING + (1 - SMOOTHING) * overlap))
                    losses.append(token_loss("ce", batch, row, position, log_q))
                own = [sum(reached[d:]) for d in range(1, len(reached))]
                weights += sum(own)
                total += sum(map(math.prod, zip(own, losses, strict=True)))
        assert parts[name] == pytest.approx(total / weights, rel=1e-4)


def test_drafts_have_forward_kl_until_they_leave_the_text_and_reverse_kl_after(batch, predictions):
    """Rejected tokens weigh 0.8 times as much as the one before."""
    tokens = batch.continuations()[:, 0].clone()
    tokens[:, 1] += 1  # the second token is wrong, so that the third is rejected too
    log_probs, top = (2 * torch.randn(2, 1, DEPTHS, VOCAB)).log_softmax(-1).sort(descending=True)
    drafts = Drafts(torch.tensor([0]), tokens[:, None], top, log_probs)
    _, parts = measure(predictions, replace(batch, drafts=drafts), loss="ce")
    total = weights = 0.0
    for index, (row, column, d) in enumerate(batch.valid.nonzero().tolist()):
        log_q = predictions.log_probs[1][index]
        if column == 1:
            position = int(batch.anchors[row, column]) + d + 1
            loss = token_loss("ce", batch, row, position, log_q)
            weight = math.exp(-d / CONFIG.gamma)
        else:
            log_p = torch.empty(VOCAB).scatter(0, top[row, 0, d], log_probs[row, 0, d])
            kind, weight = ("kl", 1.0) if d < 1 else ("reverse", 0.8 ** (d - 1))
            loss = defined(kind, log_p, log_q, 0, torch.arange(VOCAB))
        total, weights = total + weight * loss, weights + weight
    assert batch.valid[:, 0].sum() > 3, "a draft must have a rejected token"
    assert parts["corrected"] == pytest.approx(total / weights, rel=1e-3)


def test_without_a_head_the_marginal_loss_is_all(batch, predictions):
    predictions.log_probs[1] = None
    total, parts = measure(predictions, batch)
    assert parts.keys() == {"marginal", "loss"}
    assert float(total) == parts["marginal"]


def test_a_weight_is_the_slope_of_the_expected_length_by_the_log_of_an_acceptance():
    valid = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[0, 0, 0], [1, 1, 0]]], dtype=torch.bool)
    blocks = [[0, 1, 2], [3], [4, 5]]  # the tokens of each block

    def expected_length(log_smoothed):
        return sum(
            log_smoothed[block[: n + 1]].sum().exp() for block in blocks for n in range(len(block))
        )

    values = torch.tensor([0.9, 0.2, 0.5, 0.7, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    log_smoothed = (SMOOTHING + (1 - SMOOTHING) * values.detach()).log().requires_grad_()
    (slopes,) = torch.autograd.grad(expected_length(log_smoothed), log_smoothed)
    found = prefix_product(valid, values)
    torch.testing.assert_close(found, slopes)
    assert not found.requires_grad, "no gradient flows through the weights"


MANY, HIDDEN = 60, 8


def logits_of(head, hidden, shortlist=None):
    return TargetOutput(SimpleNamespace(norm=None), None, head, shortlist).logits(hidden)


@pytest.fixture
def output():
    """A target's last layer, what it is applied to, and log probabilities of a target."""
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, MANY)
    hidden = torch.randn(5, HIDDEN, requires_grad=True)
    return head, hidden, (2 * torch.randn(5, MANY)).log_softmax(-1)


def test_a_shortlist_has_all_wanted_tokens():
    wanted = torch.tensor([[3, 9], [9, 50]])
    shortlist = make_shortlist(wanted, MANY, 20, torch.Generator().manual_seed(1))
    assert shortlist.num_scored == 3
    assert set(shortlist.tokens[:3].tolist()) == {3, 9, 50}
    assert not set(shortlist.tokens[3:].tolist()) & {3, 9, 50}
    assert torch.equal(shortlist.tokens[shortlist.index[wanted]], wanted)
    assert shortlist.log_weights.exp().sum().item() == pytest.approx(MANY, rel=1e-5)
    assert make_shortlist(wanted, MANY, MANY, torch.Generator()) is None


def test_the_weights_of_a_sample_are_not_rounded_to_the_precision_of_the_head():
    head = nn.Linear(HIDDEN, MANY).bfloat16()
    shortlist = make_shortlist(torch.tensor([[3, 9]]), MANY, 20, torch.Generator().manual_seed(1))
    bias = head.bias[shortlist.tokens].float()
    found = logits_of(head, torch.zeros(1, HIDDEN), shortlist)[0]
    torch.testing.assert_close(found - bias, shortlist.log_weights)


@pytest.mark.sample(1)
@pytest.mark.parametrize("k", [1, 4])
def test_the_gradient_of_a_shortlist_agrees_with_the_full_one_in_expectation(output, k):
    head, hidden, target = output
    best, tokens = target.topk(k)
    scored = torch.cat([tokens, tokens[:, :1]], 1)

    def gradient(shortlist):
        index = scored if shortlist is None else shortlist.index[scored]
        log_probs = logits_of(head, hidden, shortlist).log_softmax(-1).gather(1, index)
        loss = forward_kl(Outcomes.compare(best, log_probs)).sum()
        return torch.autograd.grad(loss, hidden)[0]

    full, generator = gradient(None), torch.Generator().manual_seed(2)

    def error(draws):
        """Of the mean over shortlists, relative to the full gradient."""
        made = (make_shortlist(scored, MANY, 30, generator) for _ in range(draws))
        return (sum(map(gradient, made)) / draws - full).norm() / full.norm()

    # The normaliser is unbiased, and its logarithm the less biased the more negatives there are.
    assert error(1) > 0.02, "a single draw is as close, so the average shows nothing"
    assert error(1500) < 0.02


def test_chunks_give_the_same_values_and_gradients(output):
    head, hidden, _ = output
    widths = []

    def predict(rows):
        scores = logits_of(head, rows)
        widths.append(len(rows))
        return scores.log_softmax(-1)[:, :3], scores.detach().amax(-1)

    results = []
    for limit in (10**6, 2 * MANY):
        values, best = in_chunks(predict, (hidden,), MANY, most=limit)
        (gradient,) = torch.autograd.grad(values.square().sum(), hidden)
        results.append((values, best, gradient))
    torch.testing.assert_close(*results)
    # Forward at once; then forward and, for the gradient, once more, two rows at a time.
    assert widths[:4] == [5, 2, 2, 1]
    assert sorted(widths[4:]) == [1, 2, 2]


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

    stand_in(monkeypatch, loop, Accelerator=accelerator)
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
    plan = BatchPlan(lengths=[5] * 12, batch=3, seed=1)
    epochs = [np.concatenate([plan[4 * epoch + n] for n in range(4)]) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_holds_texts_of_similar_length():
    plan = BatchPlan(lengths=[n // 2 for n in range(12)], batch=2, seed=1)
    for n in range(6):
        first, second = plan[n]
        assert first // 2 == second // 2
    few = BatchPlan(lengths=[5, 5], batch=4, seed=1)
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
