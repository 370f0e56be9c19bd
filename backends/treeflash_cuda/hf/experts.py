"""Experts of a target, computed without a read of their numbers of rows on the host.

transformers sorts the rows by expert and calls PyTorch's grouped product. PyTorch has a kernel for
it in bfloat16 on compute capability 9.0 and 10.0; elsewhere it copies the experts' numbers of rows
to the host, and calls a product for each. Such a copy cannot be part of a CUDA graph, and takes
twice the latency of the device in every layer otherwise.

Example: two rows go to the experts (1, 3) and (0, 1). Sorted by expert, the four pairs are of the
experts 0, 1, 1, 3, which end before the pairs 1, 3, 3 and 4. One operation multiplies all pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treeflash_cuda.experts import routed
from treeflash_cuda.gpu.graphs import MAX_ROWS
from treeflash_cuda.hf.fused_layers import agrees
from treeflash_cuda.operations import TOLERANCES, Operations, RandomInputs

CHECKED_ROWS = 3
"""Rows on which a module and its replacement are compared."""


def has_experts(model: nn.Module) -> bool:
    """Return whether a model has experts that `fuse_experts` may replace."""
    return any(_is_experts(module) for module in model.modules())


def fuse_experts(model: nn.Module, operations: Operations, dtype: torch.dtype) -> None:
    """Let a loaded model's experts call `operations.grouped_linear`; it is then for inference.

    Experts whose results the operation does not give keep transformers' implementation.

    Args:
        model: its experts have the layout of transformers' `use_experts_implementation`.
        operations: has the product.
        dtype: of the experts' inputs.
    """
    for module in model.modules():
        if _is_experts(module):
            forward = RoutedExperts(module, operations)
            if _agrees(forward, dtype):
                module.forward = forward


class RoutedExperts:
    """The `forward` of a module of experts."""

    def __init__(self, module: Any, operations: Operations) -> None:
        self.module = module
        self.operations = operations
        self.plain = module.forward

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of each row's experts.

        Args:
            hidden: (rows, size).
            chosen: (rows, per_token) experts of each row. A number beyond the last expert stands
                for none.
            weights: (rows, per_token) of the experts.

        Returns:
            (rows, size) in the dtype of `hidden`.
        """
        module = self.module
        if len(hidden) > MAX_ROWS:  # rows of a prompt, whose pass is not captured
            result: Tensor = self.plain(hidden, chosen, weights)
            return result
        return routed(hidden, chosen, weights, module.num_experts, self._network).to(hidden.dtype)

    def _network(self, x: Tensor, ends: Tensor) -> Tensor:
        module = self.module
        x = self._linear(x, "gate_up_proj" if module.has_gate else "up_proj", ends)
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        x = self._linear(x.contiguous(), "down_proj", ends)
        return module.post_expert_norm(x) if module.has_post_expert_norm else x

    def _linear(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        weight: Tensor = getattr(self.module, name)
        if self.module.is_transposed:
            weight = weight.transpose(1, 2)
        bias: Tensor | None = getattr(self.module, f"{name}_bias", None)
        return self.operations.grouped_linear(x, weight, ends, bias)


def _is_experts(module: nn.Module) -> bool:
    """Return whether a module has transformers' layout of experts, on this process alone."""
    weight = getattr(module, "down_proj", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.dtype in TOLERANCES
        and hasattr(module, "_apply_gate")
        and not getattr(module, "_is_expert_parallel", True)
    )


def _agrees(forward: RoutedExperts, dtype: torch.dtype) -> bool:
    """Return whether experts compute what they do in transformers, on made-up rows."""
    module = forward.module
    weight = module.down_proj
    numbers, size = RandomInputs(weight.device, dtype), weight.shape[1 + module.is_transposed]
    per_token = min(2, module.num_experts)
    chosen = torch.arange(CHECKED_ROWS * per_token, device=weight.device) * 5 % module.num_experts
    chosen = chosen.view(CHECKED_ROWS, per_token)
    inputs = numbers.draw(CHECKED_ROWS, size), chosen, numbers.draw(CHECKED_ROWS, per_token).abs()
    return agrees(forward, forward.plain, *inputs)
