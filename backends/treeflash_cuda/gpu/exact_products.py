"""Products of exact mode on a GPU: one Triton kernel, whose rows do not depend on each other.

See `treeflash_cuda.exact` for what the mode promises.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from treeflash.decoding.probe import INEXACT
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.exact import products_of
from treeflash_cuda.gpu.kernel_loading import TOLERANCES, on_its_device

CHECKED_TOKENS = 4
"""Rows on which the kernel for products is compared with PyTorch."""
CHECKED_REPEATS = 64
"""Times that these rows make a prompt, for which the kernel has other programs."""


def use_kernel_for_products(model: nn.Module) -> None:
    """Let a Triton kernel compute the linear layers of a loaded model; see `triton_kernels`.

    Raises an UnsupportedModelError if a module computes products in another way, or the kernel's
    results differ from PyTorch's, or a row's results in a prompt from its results in a tree.
    """
    from treeflash_cuda.gpu.triton_kernels import products

    linear = on_its_device(products.linear)
    random = torch.Generator().manual_seed(0)
    for owner, name, _ in products_of(model):
        weight, bias = owner.weight, owner.bias
        x = torch.randn(CHECKED_TOKENS, weight.shape[1], generator=random).to(weight)
        actual, expected = linear(x, weight, bias), F.linear(x, weight, bias).float()
        difference = float((actual.float() - expected).square().mean().sqrt() / expected.std())
        if not difference <= TOLERANCES[weight.dtype]:
            raise UnsupportedModelError(
                f"{INEXACT}: the results of the kernel for products differ by {difference:.2%}"
            )
        of_prompt = linear(x.repeat(CHECKED_REPEATS, 1), weight, bias)
        if not torch.equal(of_prompt[:CHECKED_TOKENS], actual):
            raise UnsupportedModelError(
                f"{INEXACT}: products of many rows have other bits than products of few"
            )
        setattr(owner, name, partial(linear, weight=weight, bias=bias))
