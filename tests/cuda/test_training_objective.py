"""The loss of a batch against plain loops over the tokens it predicts."""

import math
from dataclasses import replace

import pytest

from treeflash.testing import require
from treeflash.training.config import TrainConfig

require("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from treeflash_cuda.training.blocks import Batch  # noqa: E402
from treeflash_cuda.training.losses import LMHead  # noqa: E402
from treeflash_cuda.training.objective import objective  # noqa: E402

VOCAB, HIDDEN, LENGTH, DEPTHS = 20, 6, 12, 3
CONFIG = TrainConfig(gamma=2.0, marginal_weight=0.25, corrected_weight=1.5)


class FixedPredictions(nn.Module):
    """A drafter whose hidden states do not depend on the batch."""

    def __init__(self, marginal, corrected):
        super().__init__()
        self.marginal, self.corrected = marginal, corrected

    def forward(self, batch):
        return self.marginal, self.corrected


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
    count = int(batch.valid.sum())
    return FixedPredictions(torch.randn(count, HIDDEN), torch.randn(count, HIDDEN))


def expected_loss(batch, log_probs, config):
    """The weighted mean over all valid (row, anchor, depth)."""
    total = weights = 0.0
    index = 0
    for row, column, d in batch.valid.nonzero().tolist():
        position = int(batch.anchors[row, column]) + d + 1
        q = log_probs[index]
        if config.loss == "ce":
            loss = -float(q[batch.tokens[row, position]])
        else:
            tokens = batch.top_tokens[row, position - 1]
            log_p = batch.top_log_probs[row, position - 1]
            loss = float((log_p.exp() * (log_p - q[tokens])).sum())
        weight = math.exp(-d / config.gamma)
        total, weights, index = total + weight * loss, weights + weight, index + 1
    return total / weights


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_the_loss_is_the_weighted_mean_over_depths(loss, batch, predictions):
    config = replace(CONFIG, loss=loss)
    output = LMHead(nn.Linear(HIDDEN, VOCAB))
    total, parts = objective(predictions, batch, output, config, torch.Generator())
    marginal, corrected = (
        expected_loss(batch, output.logits(hidden).log_softmax(-1), config)
        for hidden in (predictions.marginal, predictions.corrected)
    )
    assert not batch.valid.all(), "a text must end within a block"
    assert parts["marginal"] == pytest.approx(marginal, rel=1e-4)
    assert parts["corrected"] == pytest.approx(corrected, rel=1e-4)
    assert float(total) == pytest.approx(0.25 * marginal + 1.5 * corrected, rel=1e-4)
    assert parts["loss"] == float(total)


def test_without_a_head_the_marginal_loss_is_all(batch, predictions):
    predictions.corrected = None
    output = LMHead(nn.Linear(HIDDEN, VOCAB))
    total, parts = objective(predictions, batch, output, CONFIG, torch.Generator())
    assert parts.keys() == {"marginal", "loss"}
    assert float(total) == parts["marginal"]
