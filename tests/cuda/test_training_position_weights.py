"""Position weights against loops, and D-PACE's against what they stand for."""

import math

import pytest

from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda.training.losses import SMOOTHING, exponential, prefix_product

VALID = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[0, 0, 0], [1, 1, 0]]], dtype=torch.bool)
ACCEPTANCE = torch.tensor([0.9, 0.2, 0.5, 0.7, 0.0, 1.0], dtype=torch.float64)
BLOCKS = [[0, 1, 2], [3], [4, 5]]
"""The tokens of each block, in the order of `VALID`."""


def expected_length(acceptance, blocks):
    total = 0.0
    for block in blocks:
        reached = 1.0
        for token in block:
            reached *= SMOOTHING + (1 - SMOOTHING) * acceptance[token]
            total += reached
    return total


def test_exponential_weights_fall_with_depth():
    found = exponential(VALID, gamma=2.0).tolist()
    assert found == pytest.approx([1, math.exp(-0.5), math.exp(-1), 1, 1, math.exp(-0.5)])


def test_prefix_products_are_summed_from_each_depth_on():
    found = prefix_product(VALID, ACCEPTANCE).tolist()
    for block in BLOCKS:
        smoothed = [SMOOTHING + (1 - SMOOTHING) * float(ACCEPTANCE[token]) for token in block]
        products = [math.prod(smoothed[: m + 1]) for m in range(len(block))]
        assert [found[token] for token in block] == pytest.approx(
            [sum(products[j:]) for j in range(len(block))]
        )


def test_a_weight_is_the_slope_of_the_expected_length_by_the_log_of_an_acceptance():
    found = prefix_product(VALID, ACCEPTANCE).tolist()
    values, step = ACCEPTANCE.tolist(), 1e-6
    for token, value in enumerate(values):
        smoothed = SMOOTHING + (1 - SMOOTHING) * value
        lengths = []
        for sign in (1, -1):
            changed = smoothed * math.exp(sign * step)
            shifted = [*values]
            shifted[token] = (changed - SMOOTHING) / (1 - SMOOTHING)
            lengths.append(expected_length(shifted, BLOCKS))
        assert found[token] == pytest.approx((lengths[0] - lengths[1]) / (2 * step), rel=1e-6)


def test_no_gradient_flows_through_the_weights():
    acceptance = ACCEPTANCE.clone().requires_grad_()
    assert not prefix_product(VALID, acceptance).requires_grad
