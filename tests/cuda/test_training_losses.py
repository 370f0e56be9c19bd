"""Each loss against its definition token by token, and its gradient against finite differences."""

import math

import pytest

from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda.training.batch import TargetRows
from treeflash_cuda.training.losses import (
    LK_DECAY,
    LOSSES,
    Outcomes,
    forward_kl,
    mixture,
    reverse_kl,
)

VOCAB, ROWS, TOP = 12, 4, 5


@pytest.fixture
def case():
    """The target's log probabilities, the drafter's logits, and the text's tokens."""
    torch.manual_seed(0)
    target = (2 * torch.randn(ROWS, VOCAB, dtype=torch.float64)).log_softmax(-1)
    logits = torch.randn(ROWS, VOCAB, dtype=torch.float64)
    return target, logits, torch.tensor([3, 0, 11, 7])


def outcomes(target, logits, text, k):
    best, tokens = target.topk(k)
    rows = TargetRows(tokens, best, text)
    return Outcomes.compare(rows, logits.log_softmax(-1).gather(1, rows.scored_tokens()))


def coarse(log_probs, tokens):
    """The probabilities of some tokens, and of all others together."""
    probs = [math.exp(log_probs[token]) for token in tokens]
    others = [t for t in range(VOCAB) if t not in tokens]
    return [*probs, sum(math.exp(log_probs[t]) for t in others)]


def slow(name, target, logits, text, k):
    """A loss by loops over the outcomes of each row."""
    found = []
    for row in range(ROWS):
        tokens = target[row].topk(k).indices.tolist()
        log_q = logits[row].log_softmax(-1).tolist()
        p, q = coarse(target[row].tolist(), tokens), coarse(log_q, tokens)
        pairs = [(a, b) for a, b in zip(p, q, strict=True) if a > 1e-12]
        kl = sum(a * math.log(a / b) for a, b in pairs)
        overlap = sum(map(min, p, q))
        share = math.exp(-LK_DECAY * overlap)
        found.append(
            {
                "kl": kl,
                "reverse": sum(b * math.log(b / a) for a, b in pairs),
                "ce": -log_q[text[row]],
                "tv": 1 - overlap,
                "lk": share * kl + (1 - share) * (1 - overlap),
            }[name]
        )
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", [*LOSSES, "reverse"])
@pytest.mark.parametrize("k", [TOP, VOCAB])
def test_a_loss_is_what_its_definition_says(name, k, case):
    function = reverse_kl if name == "reverse" else LOSSES[name]
    found = function(outcomes(*case, k))
    # All of the vocabulary leaves a rest that is 0, which is bounded for its logarithm.
    torch.testing.assert_close(found, slow(name, *case, k), atol=3e-5, rtol=1e-6)


@pytest.mark.parametrize("name", [*LOSSES, "reverse"])
def test_a_gradient_agrees_with_finite_differences(name, case):
    target, logits, text = case

    def loss(changed):
        made = outcomes(target, changed, text, TOP)
        if name == "reverse":
            return reverse_kl(made).sum()
        if name == "lk":  # its mixture is fixed while the gradient is taken
            share = torch.exp(-LK_DECAY * outcomes(target, logits, text, TOP).acceptance())
            tv = LOSSES["tv"](made)
            return (share * forward_kl(made) + (1 - share) * tv).sum()
        return LOSSES[name](made).sum()

    leaf = logits.clone().requires_grad_()
    function = reverse_kl if name == "reverse" else LOSSES[name]
    (found,) = torch.autograd.grad(function(outcomes(target, leaf, text, TOP)).sum(), leaf)
    step = 1e-6
    for row, column in [(0, 3), (1, 0), (2, 5), (3, 7), (3, 1)]:
        shift = torch.zeros_like(logits)
        shift[row, column] = step
        slope = (loss(logits + shift) - loss(logits - shift)) / (2 * step)
        assert float(found[row, column]) == pytest.approx(float(slope), abs=1e-7)
    assert found.abs().max() > 1e-2


def test_a_mixture_is_the_weighted_sum(case):
    made = outcomes(*case, TOP)
    expected = 0.1 * LOSSES["ce"](made) + 0.9 * LOSSES["tv"](made)
    torch.testing.assert_close(mixture({"ce": 0.1, "tv": 0.9}, made), expected)


def test_acceptance_is_what_total_variation_leaves(case):
    target, logits, _ = case
    found = outcomes(*case, VOCAB).acceptance()
    overlap = torch.minimum(target.exp(), logits.softmax(-1)).sum(-1)
    torch.testing.assert_close(found, overlap, atol=1e-5, rtol=1e-5)
