"""The loss against its definition, and the shortlist against the whole vocabulary."""

import pytest

from treeflash.testing import require

require("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from treeflash_cuda.training.losses import (  # noqa: E402
    LMHead,
    TargetRows,
    divergence,
    make_shortlist,
)

VOCAB, HIDDEN, ROWS = 60, 8, 5


@pytest.fixture
def case():
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB)
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    target = (2 * torch.randn(ROWS, VOCAB)).log_softmax(-1)
    return LMHead(head), hidden, target


def rows(target, k):
    best, tokens = target.topk(k)
    return TargetRows(tokens, best)


def test_with_all_tokens_it_is_the_kl_divergence(case):
    output, hidden, target = case
    q = output.logits(hidden).log_softmax(-1)
    expected = (target.exp() * (target - q)).sum(-1)
    found = divergence(output, hidden, rows(target, VOCAB), None)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_rest_counts_as_one_more(case):
    output, hidden, target = case
    top = rows(target, 4)
    p, q = target.exp(), output.logits(hidden).softmax(-1)
    coarse = torch.zeros(ROWS)
    for row, tokens in enumerate(top.tokens):
        other = torch.ones(VOCAB, dtype=torch.bool)
        other[tokens] = False
        coarse[row] = (p[row, tokens] * (p[row, tokens] / q[row, tokens]).log()).sum() + (
            p[row, other].sum() * (p[row, other].sum() / q[row, other].sum()).log()
        )
    torch.testing.assert_close(divergence(output, hidden, top, None), coarse)


def test_one_certain_token_is_cross_entropy(case):
    output, hidden, _ = case
    tokens = torch.arange(ROWS)[:, None]
    found = divergence(output, hidden, TargetRows(tokens, torch.zeros(ROWS, 1)), None)
    expected = nn.functional.cross_entropy(output.logits(hidden), tokens[:, 0], reduction="none")
    torch.testing.assert_close(found, expected)


def test_a_shortlist_has_all_wanted_tokens(case):
    wanted = torch.tensor([[3, 9], [9, 50]])
    shortlist = make_shortlist(wanted, VOCAB, 20, torch.Generator().manual_seed(1))
    assert set(shortlist.tokens[:3].tolist()) == {3, 9, 50}
    assert not set(shortlist.tokens[3:].tolist()) & {3, 9, 50}
    assert torch.equal(shortlist.tokens[shortlist.index[wanted]], wanted)
    weights = shortlist.log_weights.exp()
    assert weights.sum().item() == pytest.approx(VOCAB, rel=1e-5)
    assert make_shortlist(wanted, VOCAB, VOCAB, torch.Generator()) is None


@pytest.mark.parametrize("k", [1, 4])
def test_the_gradient_of_a_shortlist_agrees_with_the_full_one_in_expectation(case, k):
    output, hidden, target = case
    top = rows(target, k)
    (full,) = torch.autograd.grad(divergence(output, hidden, top, None).sum(), hidden)
    generator = torch.Generator().manual_seed(2)

    def mean_gradient(negatives, draws):
        total = torch.zeros_like(full)
        for _ in range(draws):
            shortlist = make_shortlist(top.tokens, VOCAB, negatives, generator)
            loss = divergence(output, hidden, top, shortlist).sum()
            total += torch.autograd.grad(loss, hidden)[0]
        return total / draws

    # The normaliser is unbiased, and its logarithm the less biased the more negatives there are.
    scale = full.norm()
    one = (mean_gradient(30, 1) - full).norm() / scale
    assert (mean_gradient(30, 1500) - full).norm() / scale < 0.02
    assert one > 0.02, "a single draw is as close, so the average shows nothing"
