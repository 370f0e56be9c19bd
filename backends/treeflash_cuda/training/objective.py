"""What a run minimises."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from treeflash.training.config import TrainConfig
from treeflash_cuda.training.blocks import Batch
from treeflash_cuda.training.losses import Output, TargetRows, divergence, make_shortlist


def objective(
    blocks: nn.Module,
    batch: Batch,
    output: Output,
    config: TrainConfig,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and what it consists of.

    Args:
        blocks: the drafter, `Blocks` or what wraps it.
        batch: what to predict.
        output: the target's head.
        config: weights of the losses and of depths.
        generator: draws the shortlist.
    """
    rows = batch.target_rows()
    if config.loss == "ce":
        tokens = batch.tokens[batch.places()][:, None]
        rows = TargetRows(tokens, torch.zeros_like(tokens, dtype=torch.float32))
    shortlist = None
    if config.negatives:
        vocab_size = len(output.weight)
        shortlist = make_shortlist(rows.tokens, vocab_size, config.negatives, generator)
    depth = torch.arange(batch.valid.shape[2], device=batch.valid.device)
    weights = torch.exp(-depth / config.gamma).expand_as(batch.valid)[batch.valid]
    weights = weights / weights.sum()
    marginal, corrected = blocks(batch)
    of_marginal = (weights * divergence(output, marginal, rows, shortlist)).sum()
    parts = {"marginal": of_marginal}
    loss = of_marginal
    if corrected is not None:
        parts["corrected"] = (weights * divergence(output, corrected, rows, shortlist)).sum()
        loss = config.marginal_weight * of_marginal + config.corrected_weight * parts["corrected"]
    parts["loss"] = loss
    return loss, {name: float(value.detach()) for name, value in parts.items()}
