"""Losses of a drafter's predictions against the target's, in nats, and their mean over a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treeflash.training.config import TrainConfig, parse_loss
from treeflash_cuda.training.batch import Batch
from treeflash_cuda.training.model import make_shortlist

MIN_REST = 1e-6
"""Lower bound of the probability of the remaining tokens, for its logarithm."""
LK_DECAY = 3.0
"""How fast LK moves from KL to total variation as acceptance grows (the paper's eta)."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Both distributions over K + 1 outcomes: the target's top tokens, and any other token."""

    p: Tensor  # (n, K + 1) the target's probabilities
    q: Tensor  # (n, K + 1) the drafter's probabilities
    log_p: Tensor  # (n, K + 1) nats
    log_q: Tensor  # (n, K + 1) nats
    log_next: Tensor  # (n,) the drafter's log probability of the next token of the sequence

    @classmethod
    def compare(cls, target: Tensor, log_probs: Tensor) -> Outcomes:
        """Compare the target's log probabilities with (n, K + 1) others; see `Batch.scored`."""
        p, log_p = _with_rest(target)
        q, log_q = _with_rest(log_probs[:, :-1])
        return cls(p, q, log_p, log_q, log_probs[:, -1])

    def acceptance(self) -> Tensor:
        """Return the (n,) probability that speculative sampling accepts the drafter's sample."""
        return 1 - total_variation(self)


def forward_kl(outcomes: Outcomes) -> Tensor:
    """Return the (n,) KL(target || drafter)."""
    return (outcomes.p * (outcomes.log_p - outcomes.log_q)).sum(-1)


def reverse_kl(outcomes: Outcomes) -> Tensor:
    """Return the (n,) KL(drafter || target)."""
    return (outcomes.q * (outcomes.log_q - outcomes.log_p)).sum(-1)


def total_variation(outcomes: Outcomes) -> Tensor:
    """Return (n,) half the sum of absolute differences: 1 minus the probability of acceptance."""
    return (outcomes.p - outcomes.q).abs().sum(-1) / 2


def lk(outcomes: Outcomes) -> Tensor:
    """Return the (n,) KL where acceptance is low, and total variation where it is high.

    Total variation is what decoding loses, but its gradient vanishes while the distributions hardly
    overlap (arXiv 2602.23881, the hybrid loss).
    """
    share = torch.exp(-LK_DECAY * outcomes.acceptance().detach())
    return share * forward_kl(outcomes) + (1 - share) * total_variation(outcomes)


LOSSES: dict[str, Callable[[Outcomes], Tensor]] = {
    "kl": forward_kl,
    "ce": lambda outcomes: -outcomes.log_next,
    "tv": total_variation,
    "lk": lk,
}


def mixture(weights: Mapping[str, float], outcomes: Outcomes) -> Tensor:
    """Return the (n,) weighted sum of losses."""
    return torch.stack([weight * LOSSES[name](outcomes) for name, weight in weights.items()]).sum(0)


def _with_rest(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Add the probability of all other tokens; return probabilities and logarithms."""
    probs = log_probs.exp()
    rest = (1 - probs.sum(-1, keepdim=True)).clamp_min(0)
    log_rest = rest.clamp_min(MIN_REST).log()
    return torch.cat([probs, rest], -1), torch.cat([log_probs, log_rest], -1)


SMOOTHING = 0.5
"""D-PACE's lower bound of an acceptance, so that late depths count while early ones are bad."""


def exponential(valid: Tensor, gamma: float) -> Tensor:
    """Return the (n,) exp(-(d - 1) / gamma) at depth d (DFlash, arXiv 2602.06036).

    The n tokens to predict are (rows, A, D) bool by depth.
    """
    depth = torch.arange(valid.shape[-1], device=valid.device)
    return torch.exp(-depth / gamma).expand_as(valid)[valid]


def prefix_product(valid: Tensor, acceptance: Tensor) -> Tensor:
    """Return (n,) how much the expected accepted length depends on each depth (D-PACE, equation 8).

    The expected length is the sum over depths of the product of the acceptances up to that depth. A
    depth's weight is the part of the sum that has its acceptance as a factor. D-PACE uses the
    probability of the sequence's token as the acceptance; here it is the acceptance of the whole
    distribution.

    The n tokens to predict are (rows, A, D) bool by depth, the first ones of each block. There is
    no gradient of the (n,) acceptance, which is from 0 to 1.
    """
    smoothed = acceptance.new_zeros(valid.shape)
    smoothed[valid] = SMOOTHING + (1 - SMOOTHING) * acceptance.detach()
    reached = smoothed.cumprod(-1)
    return reached.flip(-1).cumsum(-1).flip(-1)[valid]


REJECTION_DECAY = 0.8
"""The weight of a rejected draft token relative to the one before it (Draft-OPD)."""


def objective(
    blocks: nn.Module,  # the drafter, `Blocks` or a wrapper of it
    batch: Batch,  # the tokens to predict
    vocab_size: int,  # the size of the target's vocabulary
    config: TrainConfig,  # the losses, and the weights of losses and depths
    generator: torch.Generator,  # samples the shortlist
) -> tuple[Tensor, dict[str, float]]:
    """Compute a batch's loss, and the numbers `marginal`, `corrected` (with a head), `loss`."""
    scored, target = batch.scored()
    shortlist = None
    if config.negatives:
        shortlist = make_shortlist(scored, vocab_size, config.negatives, generator)
    marginal, corrected = blocks(batch, scored, shortlist)
    parts = {"marginal": _mean_loss(batch, Outcomes.compare(target, marginal.log_probs), config)}
    loss = parts["marginal"]
    if corrected is not None:
        parts["corrected"] = _mean_loss(
            batch, Outcomes.compare(target, corrected.log_probs), config
        )
        loss = config.marginal_weight * loss + config.corrected_weight * parts["corrected"]
    parts["loss"] = loss
    return loss, {name: float(value.detach()) for name, value in parts.items()}


def _mean_loss(batch: Batch, outcomes: Outcomes, config: TrainConfig) -> Tensor:
    """Average the losses of the tokens to predict by their weights."""
    losses = mixture(parse_loss(config.loss), outcomes)
    if config.position_weights == "exponential":
        weights = exponential(batch.valid, config.gamma)
    else:
        weights = prefix_product(batch.valid, outcomes.acceptance())
    if batch.drafts is not None:
        is_drafted, rejections = batch.is_drafted(), batch.rejections()
        on_policy = torch.where(rejections > 0, reverse_kl(outcomes), forward_kl(outcomes))
        losses = torch.where(is_drafted, on_policy, losses)
        decayed = REJECTION_DECAY ** (rejections - 1).clamp(min=0)
        weights = torch.where(is_drafted, decayed, weights)
    return (weights * losses).sum() / weights.sum()
