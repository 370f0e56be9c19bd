"""The loss of a batch against plain loops over the tokens it predicts."""

import math
from dataclasses import replace

import pytest

from treeflash.testing import require
from treeflash.training.config import TrainConfig

require("torch")

import torch
from torch import nn
from treeflash_cuda.training.batch import Batch, Drafts
from treeflash_cuda.training.losses import objective
from treeflash_cuda.training.model import Prediction

VOCAB, LENGTH, DEPTHS = 20, 12, 3
CONFIG = TrainConfig(gamma=2.0, marginal_weight=0.25, corrected_weight=1.5)


class FixedPredictions(nn.Module):
    """A drafter whose distributions do not depend on the batch."""

    def __init__(self, marginal, corrected):
        super().__init__()
        self.log_probs = [marginal, corrected]

    def forward(self, batch, wanted, shortlist):
        index = wanted if shortlist is None else shortlist.index[wanted]
        return tuple(
            None if full is None else Prediction(full.gather(1, index), full.amax(-1))
            for full in self.log_probs
        )


@pytest.fixture
def batch():
    torch.manual_seed(0)
    anchors = torch.tensor([[1, 4], [3, 8]])
    ends = torch.tensor([[9, 5], [9, 9]])  # the last positions of the texts
    valid = anchors[..., None] + torch.arange(1, DEPTHS + 1) <= ends[..., None]
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


def kl(log_p, log_q):
    return float((log_p.exp() * (log_p - log_q)).sum())


def expected_loss(batch, log_probs, config):
    """The weighted mean over all valid (row, anchor, depth)."""
    total = weights = 0.0
    index = 0
    for row, column, d in batch.valid.nonzero().tolist():
        position = int(batch.anchors[row, column]) + d + 1
        q = log_probs[index]
        order = batch.top_tokens[row, position - 1]
        p = batch.top_log_probs[row, position - 1]
        loss = {
            "kl": kl(p, q[order]),
            "ce": -float(q[batch.tokens[row, position]]),
            "tv": float((p.exp() - q[order].exp()).abs().sum() / 2),
        }[config.loss]
        weight = math.exp(-d / config.gamma)
        total, weights, index = total + weight * loss, weights + weight, index + 1
    return total / weights


@pytest.mark.parametrize("loss", ["kl", "ce", "tv"])
def test_the_loss_is_the_weighted_mean_over_depths(loss, batch, predictions):
    config = replace(CONFIG, loss=loss)
    total, parts = objective(predictions, batch, VOCAB, config, torch.Generator())
    marginal, corrected = (
        expected_loss(batch, log_probs, config) for log_probs in predictions.log_probs
    )
    assert not batch.valid.all(), "a text must end within a block"
    assert parts["marginal"] == pytest.approx(marginal, rel=1e-3)
    assert parts["corrected"] == pytest.approx(corrected, rel=1e-3)
    assert float(total) == pytest.approx(0.25 * marginal + 1.5 * corrected, rel=1e-3)
    assert parts["loss"] == float(total)


def test_prefix_product_weights_follow_the_acceptance_of_each_prediction(batch, predictions):
    config = replace(CONFIG, loss="ce", position_weights="prefix-product")
    _, parts = objective(predictions, batch, VOCAB, config, torch.Generator())
    for name, log_probs in zip(("marginal", "corrected"), predictions.log_probs, strict=True):
        total = weights = 0.0
        index = 0
        for row, anchors in enumerate(batch.valid.tolist()):
            for column, depths in enumerate(anchors):
                anchor, reached, losses = int(batch.anchors[row, column]), [], []
                for d in range(sum(depths)):
                    q = log_probs[index]
                    p = batch.top_log_probs[row, anchor + d].exp()
                    order = batch.top_tokens[row, anchor + d]
                    overlap = float(torch.minimum(p, q[order].exp()).sum())
                    reached.append((reached[-1] if d else 1) * (0.5 + overlap / 2))
                    losses.append(-float(q[batch.tokens[row, anchor + d + 1]]))
                    index += 1
                own = [sum(reached[d:]) for d in range(len(reached))]
                weights += sum(own)
                total += sum(w * loss for w, loss in zip(own, losses, strict=True))
        assert parts[name] == pytest.approx(total / weights, rel=1e-4)


def test_drafts_have_forward_kl_until_they_leave_the_text_and_reverse_kl_after(batch, predictions):
    """Rejected tokens weigh 0.8 times as much as the one before."""
    text = batch.continuations()[:, 0]
    tokens = text.clone()
    tokens[:, 1] += 1  # the second token is wrong, so that the third is rejected too
    log_probs, top = (2 * torch.randn(2, 1, DEPTHS, VOCAB)).log_softmax(-1).sort(descending=True)
    drafts = Drafts(torch.tensor([0]), tokens[:, None], top, log_probs)
    drafted = replace(batch, drafts=drafts)
    config = replace(CONFIG, loss="ce")
    _, parts = objective(predictions, drafted, VOCAB, config, torch.Generator())
    total = weights = 0.0
    for index, (row, column, d) in enumerate(batch.valid.nonzero().tolist()):
        q = predictions.log_probs[1][index]
        if column == 1:
            position = int(batch.anchors[row, column]) + d + 1
            loss, weight = -float(q[batch.tokens[row, position]]), math.exp(-d / config.gamma)
        else:
            p, own = log_probs[row, 0, d], q[top[row, 0, d]]
            loss, weight = (kl(p, own), 1) if d < 1 else (kl(own, p), 0.8 ** (d - 1))
        total, weights = total + weight * loss, weights + weight
    assert batch.valid[:, 0].sum() > 3, "a draft must have a rejected token"
    assert parts["corrected"] == pytest.approx(total / weights, rel=1e-3)


def test_without_a_head_the_marginal_loss_is_all(batch, predictions):
    predictions.log_probs[1] = None
    total, parts = objective(predictions, batch, VOCAB, CONFIG, torch.Generator())
    assert parts.keys() == {"marginal", "loss"}
    assert float(total) == parts["marginal"]
