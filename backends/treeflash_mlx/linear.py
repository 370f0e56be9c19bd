"""Linear layers of two concatenated vectors."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
from mlx import nn


class PairLinear(nn.Module):
    """A linear layer of two concatenated vectors, of which many rows share the second."""

    def __init__(self, size: int, out: int, bias: bool) -> None:
        """Make the two halves; both vectors have `size` elements."""
        super().__init__()
        # A product with a concatenation is the sum of two products.
        self.of_own = nn.Linear(size, out, bias=False)
        self.of_shared = nn.Linear(size, out, bias=bias)

    def __call__(self, own: mx.array, shared: mx.array, rows: mx.array) -> mx.array:
        """(n, out) from both.

        Args:
            own: (n, size).
            shared: (d, size).
            rows: (n,) the row of `shared` that goes with each of `own`.
        """
        y: mx.array = self.of_own(own) + self.of_shared(shared)[rows]
        return y


def split_pairs(module: nn.Module, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A checkpoint's tensors, with the weights of the pairs in a module split in two.

    Args:
        module: the module to load.
        tensors: by name; a pair has an (out, 2 * size) weight, and perhaps an (out,) bias.
    """
    tensors = dict(tensors)
    for name, child in module.named_modules():
        if isinstance(child, PairLinear):
            of_own, of_shared = mx.split(tensors.pop(f"{name}.weight"), 2, -1)
            # A strided half of a matrix would be copied in every product.
            tensors[f"{name}.of_own.weight"] = mx.contiguous(of_own)
            tensors[f"{name}.of_shared.weight"] = mx.contiguous(of_shared)
            if f"{name}.bias" in tensors:
                tensors[f"{name}.of_shared.bias"] = tensors.pop(f"{name}.bias")
    return tensors
