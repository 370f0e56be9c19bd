"""Norms and gated feed-forward networks of a model, computed by one operation each.

A module is replaced only if the operation gives what the module gives: other models may have norms
that add 1 to their weights, or other activations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from treeflash_cuda.operations import Operations

TOLERANCE = 0.01
"""Root mean square difference, relative to the module's outputs."""
ROWS = 4
"""Rows of the input on which a module and the operation are compared."""


def fuse_layers(model: nn.Module, operations: Operations) -> None:
    """Let norms and gated networks of a loaded model call operations; it is then for inference."""
    for module in model.modules():
        if (
            len(inspect.signature(module.forward).parameters) != 1
        ):  # a norm with a gate, for example
            continue
        for make in (_norm, _gated):
            candidate = make(module, operations)
            if candidate is not None and _agree(module, *candidate):
                module.forward = candidate[0]


Candidate = tuple[Callable[[Tensor], Tensor], Tensor]
"""Another `forward` of a module, and inputs of the module."""


def _norm(module: nn.Module, operations: Operations) -> Candidate | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or eps is None:
        return None

    def forward(x: Tensor) -> Tensor:
        return operations.rms_norm(x, weight, eps)[0]

    return forward, _numbers(len(weight), weight)


def _gated(module: nn.Module, operations: Operations) -> Candidate | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if getattr(module, "act_fn", None) is None or not all(isinstance(x, nn.Module) for x in parts):
        return None
    gate, up, down = parts
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None

    def forward(x: Tensor) -> Tensor:
        assert gate is not None
        assert up is not None
        assert down is not None
        out: Tensor = down(operations.gated(gate(x), up(x)))
        return out

    return forward, _numbers(weight.shape[1], weight)


def _numbers(size: int, like: Tensor) -> Tensor:
    """(1, rows, size) random inputs."""
    random = torch.randn(1, ROWS, size, generator=torch.Generator().manual_seed(0))
    return random.to(like.device, like.dtype)


def _agree(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    with torch.inference_mode():
        expected, actual = module(x).float(), forward(x).float()
        difference = (actual - expected).square().mean().sqrt()
        return float(difference) <= TOLERANCE * float(expected.square().mean().sqrt())
