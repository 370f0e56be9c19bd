"""Weights of linear layers as integers of 4 or 8 bits, in groups with a scale and a least number.

The groups are MLX's, so that a drafter of 4 or 8 bits drafts nearly the same there: 64 weights of a
row share a scale and a least number, and a weight is `least + number * scale`.

Groups come first in memory, so that what a kernel reads at once lies together: the same group of
neighbouring rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 64
"""Weights that share a scale; a linear layer needs a multiple of them in each row."""
BITS = 4, 8
"""Bits of a number."""


class QuantisedWeight(NamedTuple):
    """The (width, size) weight of a linear layer; there are size / `GROUP` groups."""

    numbers: Tensor  # (groups, width, GROUP * bits / 8) uint8; of 4 bits the first is the lower one
    scales: Tensor  # (groups, width)
    least: Tensor  # (groups, width)

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return self.numbers.shape[2] * 8 // GROUP

    def dequantised(self) -> Tensor:
        """Return the (width, size) weight in the dtype of the scales."""
        numbers = self.numbers
        if self.bits == 4:
            numbers = torch.stack([numbers & 15, numbers >> 4], -1).flatten(2)
        weight = numbers.float() * self.scales.float()[..., None] + self.least.float()[..., None]
        return weight.transpose(0, 1).flatten(1).to(self.scales.dtype)


def quantise_weight(weight: Tensor, bits: int) -> QuantisedWeight:
    """Round a (width, size) weight to numbers of 4 or 8 bits."""
    groups = weight.float().unflatten(1, (-1, GROUP)).transpose(0, 1)
    low, high = groups.aminmax(dim=2)
    largest = 2**bits - 1
    # Numbers are chosen for the scales as they are stored.
    least, scales = low.to(weight.dtype), ((high - low) / largest).to(weight.dtype)
    steps = scales.float().clamp(min=torch.finfo(weight.dtype).tiny)[..., None]
    numbers = ((groups - least.float()[..., None]) / steps).round().clamp(0, largest)
    numbers = numbers.to(torch.uint8)
    if bits == 4:
        first, second = numbers.unflatten(2, (-1, 2)).unbind(3)
        numbers = first | second << 4
    return QuantisedWeight(numbers.contiguous(), scales.contiguous(), least.contiguous())
