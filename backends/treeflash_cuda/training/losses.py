"""Losses of a drafter's predictions against the target's, per token, in nats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MINIMUM_REST = 1e-6
"""Lower bound of the probability of the remaining tokens, for its logarithm."""
LK_DECAY = 3.0
"""How fast LK moves from KL to total variation as acceptance grows (the paper's eta)."""


@dataclass(frozen=True, eq=False)
class TargetRows:
    """The target's distribution at n positions: its top tokens; the rest counts as one more.

    Attributes:
        tokens: (n, K).
        log_probs: (n, K) nats.
        next: (n,) the token that the text has there.
    """

    tokens: Tensor
    log_probs: Tensor
    next: Tensor

    def wanted(self) -> Tensor:
        """(n, K + 1) the tokens whose log probabilities the losses need; the text's is last."""
        return torch.cat([self.tokens, self.next[:, None]], 1)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Both distributions over K + 1 outcomes: the target's top tokens, and any other token.

    Attributes:
        p: (n, K + 1) the target's.
        q: (n, K + 1) the drafter's.
        log_p: (n, K + 1) nats.
        log_q: (n, K + 1) nats.
        log_next: (n,) the drafter's log probability of the text's token.
    """

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor
    log_next: Tensor

    @classmethod
    def of(cls, rows: TargetRows, log_probs: Tensor) -> Outcomes:
        """Compare the target with the drafter's (n, K + 1) log probabilities of `wanted`."""
        p, log_p = _with_rest(rows.log_probs)
        q, log_q = _with_rest(log_probs[:, :-1])
        return cls(p, q, log_p, log_q, log_probs[:, -1])

    def acceptance(self) -> Tensor:
        """(n,) the probability that speculative sampling accepts the drafter's sample."""
        return 1 - total_variation(self)


def forward_kl(outcomes: Outcomes) -> Tensor:
    """(n,) KL(target || drafter)."""
    return (outcomes.p * (outcomes.log_p - outcomes.log_q)).sum(-1)


def reverse_kl(outcomes: Outcomes) -> Tensor:
    """(n,) KL(drafter || target)."""
    return (outcomes.q * (outcomes.log_q - outcomes.log_p)).sum(-1)


def cross_entropy(outcomes: Outcomes) -> Tensor:
    """(n,) minus the log probability of the text's token."""
    return -outcomes.log_next


def total_variation(outcomes: Outcomes) -> Tensor:
    """(n,) half the sum of absolute differences: 1 minus the probability of acceptance."""
    return (outcomes.p - outcomes.q).abs().sum(-1) / 2


def lk(outcomes: Outcomes) -> Tensor:
    """(n,) KL where acceptance is low, and total variation where it is high.

    Total variation is what decoding loses, but its gradient vanishes while the distributions hardly
    overlap (arXiv 2602.23881, the hybrid loss).
    """
    share = torch.exp(-LK_DECAY * outcomes.acceptance().detach())
    return share * forward_kl(outcomes) + (1 - share) * total_variation(outcomes)


LOSSES: dict[str, Callable[[Outcomes], Tensor]] = {
    "kl": forward_kl,
    "ce": cross_entropy,
    "tv": total_variation,
    "lk": lk,
}


def mixture(weights: Mapping[str, float], outcomes: Outcomes) -> Tensor:
    """(n,) the weighted sum of losses."""
    return torch.stack([weight * LOSSES[name](outcomes) for name, weight in weights.items()]).sum(0)


def _with_rest(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and their logarithms, with the probability of all other tokens added."""
    probs = log_probs.exp()
    rest = (1 - probs.sum(-1, keepdim=True)).clamp_min(0)
    log_rest = rest.clamp_min(MINIMUM_REST).log()
    return torch.cat([probs, rest], -1), torch.cat([log_probs, log_rest], -1)
