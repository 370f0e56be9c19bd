"""The operations of layers of our own on a GPU, made of the ones that have Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from treeflash_cuda.decoder.operations import DecoderOperations, Rotation
from treeflash_cuda.operations import Activation, Operations

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""The names of activations of gates in `Operations`, by transformers' names."""


def decoder_operations(operations: Operations) -> DecoderOperations:
    """Return the operations of a decoder's layers, made of a GPU's operations."""

    def gated(gate_and_up: Tensor, activation: str) -> Tensor:
        return operations.gated(*gate_and_up.chunk(2, -1), ACTIVATIONS[activation])

    return DecoderOperations(rms_norm=operations.rms_norm, rotation=rotation, gated=gated)


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
