"""Linear layers of two concatenated vectors."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
from mlx import nn


class PairLinear(nn.Module):
    """A linear layer of two concatenated vectors of equal size; many rows share the second one."""

    def __init__(self, size: int, out: int, bias: bool) -> None:
        super().__init__()
        # A product with a concatenation is the sum of two products.
        self.first = nn.Linear(size, out, bias=False)
        self.second = nn.Linear(size, out, bias=bias)

    def __call__(self, first: mx.array, second: mx.array, rows: mx.array) -> mx.array:
        """(n, out) from (n, size) first vectors and the (n,) rows of (d, size) second vectors."""
        return self.first(first) + self.second(second)[rows]


def split_pairs(module: nn.Module, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A checkpoint's tensors by name, with the weights of the `PairLinear`s in a module split.

    A pair has an (out, 2 * size) weight in the checkpoint, and perhaps an (out,) bias.
    """
    tensors = dict(tensors)
    for name, child in module.named_modules():
        if isinstance(child, PairLinear):
            first, second = mx.split(tensors.pop(f"{name}.weight"), 2, -1)
            # A strided half of a matrix would be copied in every product.
            tensors[f"{name}.first.weight"] = mx.contiguous(first)
            tensors[f"{name}.second.weight"] = mx.contiguous(second)
            if f"{name}.bias" in tensors:
                tensors[f"{name}.second.bias"] = tensors.pop(f"{name}.bias")
    return tensors
