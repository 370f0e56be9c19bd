"""The learning rate by step, and which weights decay."""

import pytest

from treeflash.testing import require
from treeflash.training.config import TrainConfig

require("torch")

import torch
from torch import nn
from treeflash_cuda.training.loop import learning_rate, make_optimizer


def test_a_linear_warm_up_then_a_cosine_to_zero():
    config = TrainConfig(steps=8, warmup=0.5, learning_rate=2.0)
    rates = [learning_rate(step, config) for step in range(9)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 1.70711, 1.0, 0.29289, 0.0], abs=1e-5)


def test_a_run_without_warm_up_starts_at_the_peak():
    assert learning_rate(0, TrainConfig(warmup=0.0, learning_rate=2.0)) == 2.0


def test_matrices_decay_and_norms_and_biases_do_not():
    model = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in model[:2].parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, tensor in model.state_dict().items():
        kept = 0.95 if name == "0.weight" else 1.0
        torch.testing.assert_close(tensor, kept * before[name], msg=name)
