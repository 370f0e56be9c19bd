"""Keys and values in 8 bits, each with the scale of its token and head behind it.

What moves columns (commits, forks, batches) moves bytes and knows nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

KV_BITS = 8
LARGEST = 127
SCALE_BYTES = 4
"""A float32, which must begin at a multiple of its size: so must the head's width."""


def quantise(x: Tensor) -> Tensor:
    """(..., head_dim + 4) int8 from (..., head_dim) keys or values."""
    least = torch.finfo(x.dtype).tiny
    scale = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=least).float()
    numbers = (x.float() / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return torch.cat([numbers, scale.view(torch.int8)], -1)


def dequantise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., head_dim) keys or values from what `quantise` returned for such a dtype."""
    numbers, scale = x.split([x.shape[-1] - SCALE_BYTES, SCALE_BYTES], -1)
    # One kernel reads bytes and writes floats.
    return numbers * scale.view(torch.float32).to(dtype)
