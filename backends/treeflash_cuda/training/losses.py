"""The divergence of a drafter's predictions from the target's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MINIMUM_REST = 1e-6
"""Lower bound of the probability of the remaining tokens, for its logarithm."""


@dataclass(frozen=True, eq=False)
class TargetRows:
    """The target's distribution at n positions: its top tokens; the rest counts as one more.

    Attributes:
        tokens: (n, K).
        log_probs: (n, K) nats.
    """

    tokens: Tensor
    log_probs: Tensor


@dataclass(frozen=True, eq=False)
class Shortlist:
    """A part of the vocabulary that represents all of it.

    Attributes:
        tokens: (v,) the tokens to score, then a random sample of the others.
        log_weights: (v,) 0 for the former; for the sample, the log of the number of tokens that
            each represents.
        index: (vocab,) the index of a token in `tokens`; -1 if it is not there.
    """

    tokens: Tensor
    log_weights: Tensor
    index: Tensor


class LMHead:
    """The target's output head: logits of the vocabulary, or of a shortlist."""

    def __init__(self, head: nn.Module) -> None:
        """Take the weights of a linear layer."""
        self.weight: Tensor = head.weight.detach()
        bias = getattr(head, "bias", None)
        self.bias: Tensor | None = None if bias is None else bias.detach()

    def logits(self, hidden: Tensor, shortlist: Shortlist | None = None) -> Tensor:
        """(n, v) float32 from (n, hidden_size); the log weights of a shortlist are added."""
        weight, bias = self.weight, self.bias
        if shortlist is not None:
            weight = weight[shortlist.tokens]
            token_bias = 0 if bias is None else bias[shortlist.tokens]
            bias = (shortlist.log_weights + token_bias).to(weight.dtype)
        return F.linear(hidden.to(weight.dtype), weight, bias).float()


def make_shortlist(
    wanted: Tensor, vocab_size: int, negatives: int, generator: torch.Generator
) -> Shortlist | None:
    """All wanted tokens and a uniform sample of the others; None if that is the vocabulary.

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
    # With replacement: simple and unbiased, as a token drawn twice counts twice.
    drawn = others[torch.randint(len(others), (negatives,), generator=generator)]
    tokens = torch.cat([kept, drawn])
    index[tokens] = torch.arange(len(tokens))
    weights = torch.zeros(len(tokens))
    weights[len(kept) :] = math.log(len(others) / negatives)
    device = wanted.device
    return Shortlist(tokens.to(device), weights.to(device), index.to(device))


def divergence(
    lm_head: LMHead, hidden: Tensor, rows: TargetRows, shortlist: Shortlist | None
) -> Tensor:
    """(n,) forward KL divergence in nats of the drafter from the target.

    With one token of probability 1 per row, this is the cross-entropy. The normaliser over a
    shortlist is unbiased, as each sampled token is weighted by the number of tokens it represents
    (sampled softmax, Bengio and Senecal 2008).

    Args:
        lm_head: of the target.
        hidden: (n, hidden_size) after the final norm.
        rows: the target's distribution at the n positions.
        shortlist: contains all of `rows.tokens`; None is the whole vocabulary.
    """
    index = rows.tokens if shortlist is None else shortlist.index[rows.tokens]
    log_q = lm_head.logits(hidden, shortlist).log_softmax(-1).gather(-1, index)
    p = rows.log_probs.exp()
    rest_p = (1 - p.sum(-1)).clamp_min(0)
    rest_q = (1 - log_q.exp().sum(-1)).clamp_min(MINIMUM_REST)
    rest = torch.xlogy(rest_p, rest_p) - rest_p * rest_q.log()
    return (p * (rows.log_probs - log_q)).sum(-1) + rest
