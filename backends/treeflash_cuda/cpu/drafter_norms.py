"""The norms of a drafter, by the compiled functions of its target's layers.

A draft has few rows and many norms: PyTorch takes longer to begin them than to compute them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from treeflash_cuda.cpu.layer_code import LANES
from treeflash_cuda.cpu.layer_kernels import LayerKernels


def use_kernels(module: nn.Module, kernels: LayerKernels, dtype: torch.dtype) -> None:
    """Let the RMSNorms inside a module call functions for rows of a dtype; for inference only."""
    for norm in module.modules():
        if isinstance(norm, nn.RMSNorm) and norm.eps is not None:
            weight = norm.weight.detach()
            if weight.dtype == dtype and len(weight) % LANES == 0:
                norm.forward = partial(_rms_norm, kernels, weight.float(), norm.eps)  # type: ignore[method-assign]


def _rms_norm(kernels: LayerKernels, weight: Tensor, eps: float, x: Tensor) -> Tensor:
    """Norm (..., size) numbers."""
    rows = x.reshape(-1, len(weight)).contiguous()
    return kernels.rms_norm(rows, weight, eps)[0].view(x.shape)
