"""The shortlist against the whole vocabulary, and chunks against all rows at once."""

from types import SimpleNamespace

import pytest

from treeflash.testing import require

require("torch")

import torch
from torch import nn
from treeflash_cuda.training.batch import TargetRows
from treeflash_cuda.training.losses import Outcomes, forward_kl
from treeflash_cuda.training.model import TargetOutput, in_chunks, make_shortlist

pytestmark = pytest.mark.sample(1)

VOCAB, HIDDEN, ROWS = 60, 8, 5


def logits(head, hidden, shortlist=None):
    output = TargetOutput(SimpleNamespace(norm=None), None, head, shortlist)
    return output.logits(hidden)


@pytest.fixture
def case():
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB)
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    target = (2 * torch.randn(ROWS, VOCAB)).log_softmax(-1)
    return head, hidden, target


def test_a_shortlist_has_all_wanted_tokens():
    wanted = torch.tensor([[3, 9], [9, 50]])
    shortlist = make_shortlist(wanted, VOCAB, 20, torch.Generator().manual_seed(1))
    assert shortlist.num_scored == 3
    assert set(shortlist.tokens[:3].tolist()) == {3, 9, 50}
    assert not set(shortlist.tokens[3:].tolist()) & {3, 9, 50}
    assert torch.equal(shortlist.tokens[shortlist.index[wanted]], wanted)
    weights = shortlist.log_weights.exp()
    assert weights.sum().item() == pytest.approx(VOCAB, rel=1e-5)
    assert make_shortlist(wanted, VOCAB, VOCAB, torch.Generator()) is None


def test_the_weights_of_a_sample_are_not_rounded_to_the_precision_of_the_head():
    head = nn.Linear(HIDDEN, VOCAB).bfloat16()
    shortlist = make_shortlist(torch.tensor([[3, 9]]), VOCAB, 20, torch.Generator().manual_seed(1))
    bias = head.bias[shortlist.tokens].float()
    found = logits(head, torch.zeros(1, HIDDEN), shortlist)[0]
    torch.testing.assert_close(found - bias, shortlist.log_weights)


@pytest.mark.parametrize("k", [1, 4])
def test_the_gradient_of_a_shortlist_agrees_with_the_full_one_in_expectation(case, k):
    head, hidden, target = case
    best, tokens = target.topk(k)
    rows = TargetRows(tokens, best, tokens[:, 0])

    def gradient(shortlist):
        index = rows.scored_tokens() if shortlist is None else shortlist.index[rows.scored_tokens()]
        log_probs = logits(head, hidden, shortlist).log_softmax(-1).gather(1, index)
        loss = forward_kl(Outcomes.compare(rows, log_probs)).sum()
        return torch.autograd.grad(loss, hidden)[0]

    full = gradient(None)
    generator = torch.Generator().manual_seed(2)

    def mean_gradient(negatives, draws):
        made = (
            make_shortlist(rows.scored_tokens(), VOCAB, negatives, generator) for _ in range(draws)
        )
        return sum(map(gradient, made)) / draws

    # The normaliser is unbiased, and its logarithm the less biased the more negatives there are.
    scale = full.norm()
    one = (mean_gradient(30, 1) - full).norm() / scale
    assert (mean_gradient(30, 1500) - full).norm() / scale < 0.02
    assert one > 0.02, "a single draw is as close, so the average shows nothing"


def test_chunks_give_the_same_values_and_gradients(case):
    head, hidden, _ = case
    widths = []

    def predict(rows):
        scores = logits(head, rows)
        widths.append(len(rows))
        return scores.log_softmax(-1)[:, :3], scores.detach().amax(-1)

    results = []
    for limit in (10**6, 2 * VOCAB):
        values, best = in_chunks(predict, (hidden,), VOCAB, most=limit)
        (gradient,) = torch.autograd.grad(values.square().sum(), hidden)
        results.append((values, best, gradient))
    torch.testing.assert_close(*results)
    # Forward at once; then forward and, for the gradient, once more, two rows at a time.
    assert widths[:4] == [5, 2, 2, 1]
    assert sorted(widths[4:]) == [1, 2, 2]
