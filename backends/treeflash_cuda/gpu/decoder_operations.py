"""The operations of layers of our own on a GPU, made of the ones that have Triton kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from treeflash_cuda.decoder.operations import DecoderOperations, GroupedLinear, Rotation
from treeflash_cuda.gpu.graphs import MAX_ROWS
from treeflash_cuda.operations import Activation, Operations

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""The names of activations of gates in `Operations`, by transformers' names."""
GROUPED_MM = 8, 0
"""The least compute capability for which PyTorch has a grouped product."""


def decoder_operations(operations: Operations, device: torch.device) -> DecoderOperations:
    """Return the operations of a decoder's layers, made of a GPU's operations."""
    is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < GROUPED_MM

    def gated(gate_and_up: Tensor, activation: str) -> Tensor:
        return operations.gated(*gate_and_up.chunk(2, -1), ACTIVATIONS[activation])

    def grouped_linear(rows: int) -> GroupedLinear:
        # Long parts of prompts have no graph, and many rows for each expert.
        return operations.grouped_linear if rows <= MAX_ROWS or is_old else grouped_mm

    return DecoderOperations(
        rms_norm=operations.rms_norm,
        rotation=rotation,
        gated=gated,
        grouped_linear=grouped_linear,
    )


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Compute `operations.grouped_linear` with PyTorch's product, which may read `ends`."""
    return F.grouped_mm(x, weight.mT, offs=ends)


def rotation(
    positions: Tensor, frequencies: Tensor, scale: Tensor | float, dtype: torch.dtype
) -> Rotation:
    """Compute (n, head_dim) cosines and sines, as `Operations.rotate_and_store` takes them."""
    angles = positions[:, None] * frequencies
    if not isinstance(scale, Tensor) and scale == 1:
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)
    parts = angles.cos() * scale, angles.sin() * scale
    cos, sin = (torch.cat([x, x], -1).to(dtype) for x in parts)
    return cos, sin
