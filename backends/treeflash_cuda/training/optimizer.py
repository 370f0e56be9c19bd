"""The optimiser and its learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from treeflash.training.config import TrainConfig


def make_optimizer(blocks: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW without weight decay for norms and biases."""
    trainable = [p for p in blocks.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine decay that reaches 0 after the last step."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
