"""The loss of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from treeflash.training.config import TrainConfig
from treeflash.training.loss_mixture import parse_loss
from treeflash_cuda.training.batch import Batch
from treeflash_cuda.training.lm_head import make_shortlist
from treeflash_cuda.training.losses import Outcomes, forward_kl, mixture, reverse_kl
from treeflash_cuda.training.position_weights import exponential, prefix_product

REJECTION_DECAY = 0.8
"""The weight of a rejected draft token relative to the one before it (Draft-OPD)."""


def objective(
    blocks: nn.Module,
    batch: Batch,
    vocab_size: int,
    config: TrainConfig,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and its parts as numbers.

    Args:
        blocks: the drafter, `Blocks` or a wrapper of it.
        batch: the tokens to predict.
        vocab_size: of the target.
        config: the losses, and the weights of losses and depths.
        generator: samples the shortlist.
    """
    rows = batch.target_rows()
    wanted = rows.wanted()
    shortlist = None
    if config.negatives:
        shortlist = make_shortlist(wanted, vocab_size, config.negatives, generator)
    marginal, corrected = blocks(batch, wanted, shortlist)
    parts = {"marginal": _mean_loss(batch, Outcomes.of(rows, marginal.log_probs), config)}
    loss = parts["marginal"]
    if corrected is not None:
        parts["corrected"] = _mean_loss(batch, Outcomes.of(rows, corrected.log_probs), config)
        loss = config.marginal_weight * loss + config.corrected_weight * parts["corrected"]
    parts["loss"] = loss
    return loss, {name: float(value.detach()) for name, value in parts.items()}


def _mean_loss(batch: Batch, outcomes: Outcomes, config: TrainConfig) -> Tensor:
    """The weighted mean over the tokens to predict."""
    losses = mixture(parse_loss(config.loss), outcomes)
    if config.position_weights == "exponential":
        weights = exponential(batch.valid, config.gamma)
    else:
        weights = prefix_product(batch.valid, outcomes.acceptance())
    if batch.drafts is not None:
        drafted, rejections = batch.drafted(), batch.rejections()
        on_policy = torch.where(rejections > 0, reverse_kl(outcomes), forward_kl(outcomes))
        losses = torch.where(drafted, on_policy, losses)
        decayed = REJECTION_DECAY ** (rejections - 1).clamp(min=0)
        weights = torch.where(drafted, decayed, weights)
    return (weights * losses).sum() / weights.sum()
