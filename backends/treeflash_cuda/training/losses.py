"""How far a drafter's prediction is from the target's, over the vocabulary or a part of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_REST = 1e-6
"""Floor of the probability of what is not told apart, for its logarithm."""


@dataclass(frozen=True, eq=False)
class TargetRows:
    """The target's distribution at n positions: its best tokens; the rest counts as one more.

    Attributes:
        tokens: (n, K).
        log_probs: (n, K) nats.
    """

    tokens: Tensor
    log_probs: Tensor


@dataclass(frozen=True, eq=False)
class Shortlist:
    """A part of the vocabulary that stands for all of it.

    Attributes:
        tokens: (v,) those that matter, and a random sample of the others.
        log_weights: (v,) 0, and for the sample the log of how many others each stands for.
        index: (vocab,) where in `tokens` a token is; -1 for those left out.
    """

    tokens: Tensor
    log_weights: Tensor
    index: Tensor


class Output:
    """The target's output head: logits of all tokens, or of some."""

    def __init__(self, head: nn.Module) -> None:
        """Take a linear layer."""
        self.weight: Tensor = head.weight.detach()
        bias = getattr(head, "bias", None)
        self.bias: Tensor | None = None if bias is None else bias.detach()

    def logits(self, hidden: Tensor, shortlist: Shortlist | None = None) -> Tensor:
        """(n, v) float32 from (n, hidden_size); those of a shortlist with its log weights."""
        weight, bias = self.weight, self.bias
        if shortlist is not None:
            weight = weight[shortlist.tokens]
            of_tokens = 0 if bias is None else bias[shortlist.tokens]
            bias = (shortlist.log_weights + of_tokens).to(weight.dtype)
        return F.linear(hidden.to(weight.dtype), weight, bias).float()


def make_shortlist(
    wanted: Tensor, vocab_size: int, negatives: int, generator: torch.Generator
) -> Shortlist | None:
    """All wanted tokens, and a uniform sample of the others; None where that is everything.

    Args:
        wanted: token ids, in any shape.
        vocab_size: of the target.
        negatives: size of the sample.
        generator: on the CPU, so that a run is the same on every device.
    """
    index = torch.full((vocab_size,), -1, dtype=torch.long)
    index[wanted.flatten().cpu()] = 0
    kept = torch.nonzero(index == 0)[:, 0]
    others = torch.nonzero(index < 0)[:, 0]
    if negatives >= len(others):
        return None
    # With replacement: simple, unbiased, and a token drawn twice counts twice.
    drawn = others[torch.randint(len(others), (negatives,), generator=generator)]
    tokens = torch.cat([kept, drawn])
    index[tokens] = torch.arange(len(tokens))
    weights = torch.zeros(len(tokens))
    weights[len(kept) :] = math.log(len(others) / negatives)
    device = wanted.device
    return Shortlist(tokens.to(device), weights.to(device), index.to(device))


def divergence(
    output: Output, hidden: Tensor, rows: TargetRows, shortlist: Shortlist | None
) -> Tensor:
    """(n,) forward KL in nats, from the target to the drafter; cross-entropy where K = 1 is sure.

    The normaliser over a shortlist is unbiased: a sampled token counts for those it stands for
    (sampled softmax, Bengio and Senecal 2008).

    Args:
        output: the target's head.
        hidden: (n, hidden_size) normalised.
        rows: of the target, n.
        shortlist: holds all of `rows.tokens`; None is the whole vocabulary.
    """
    index = rows.tokens if shortlist is None else shortlist.index[rows.tokens]
    told = output.logits(hidden, shortlist).log_softmax(-1).gather(-1, index)
    p = rows.log_probs.exp()
    rest_p = (1 - p.sum(-1)).clamp_min(0)
    rest_q = (1 - told.exp().sum(-1)).clamp_min(LEAST_REST)
    rest = torch.xlogy(rest_p, rest_p) - rest_p * rest_q.log()
    return (p * (rows.log_probs - told)).sum(-1) + rest
