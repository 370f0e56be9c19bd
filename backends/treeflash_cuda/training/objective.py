"""The loss of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from treeflash.training.config import TrainConfig
from treeflash_cuda.training.blocks import Batch
from treeflash_cuda.training.losses import LMHead, TargetRows, divergence, make_shortlist


def objective(
    blocks: nn.Module,
    batch: Batch,
    lm_head: LMHead,
    config: TrainConfig,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and its parts as numbers.

    Args:
        blocks: the drafter, `Blocks` or a wrapper of it.
        batch: the tokens to predict.
        lm_head: of the target.
        config: the weights of the losses and depths.
        generator: samples the shortlist.
    """
    rows = batch.target_rows()
    if config.loss == "ce":
        tokens = batch.tokens[batch.predicted()][:, None]
        rows = TargetRows(tokens, torch.zeros_like(tokens, dtype=torch.float32))
    shortlist = None
    if config.negatives:
        vocab_size = len(lm_head.weight)
        shortlist = make_shortlist(rows.tokens, vocab_size, config.negatives, generator)
    depth = torch.arange(batch.valid.shape[2], device=batch.valid.device)
    weights = torch.exp(-depth / config.gamma).expand_as(batch.valid)[batch.valid]
    weights = weights / weights.sum()
    marginal, corrected = blocks(batch)
    marginal_loss = (weights * divergence(lm_head, marginal, rows, shortlist)).sum()
    parts = {"marginal": marginal_loss}
    loss = marginal_loss
    if corrected is not None:
        parts["corrected"] = (weights * divergence(lm_head, corrected, rows, shortlist)).sum()
        loss = config.marginal_weight * marginal_loss + config.corrected_weight * parts["corrected"]
    parts["loss"] = loss
    return loss, {name: float(value.detach()) for name, value in parts.items()}
