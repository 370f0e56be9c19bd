"""The operations that a decoder's layers consist of, which an engine may replace by its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from treeflash_cuda.linear import PackedLinear, PlainLinear, can_pack, join

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""(n, 1, head_dim) cosines and sines of n rows; the first half of the sines is negative."""


class Attention(Protocol):
    """The attention of a pass, in all layers."""

    def turn(
        self,
        layer: int,
        heads: Tensor,  # (n, heads + 2 * kv_heads, head_dim) queries, keys and values; may change
        rotation: Rotation | None,  # None leaves queries and keys as they are
        norms: Tensor | None,  # (heads + kv_heads, head_dim) weights of queries' and keys' RMSNorm
        eps: float,  # the norms' epsilon
    ) -> Tensor:
        """Norm and rotate queries and keys, and write keys and values to the rows' KV caches.

        Returns the (n, heads, head_dim) queries.
        """

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        """Attend to a layer's stored keys: (n, heads * head_dim) from (n, heads, head_dim)."""


def linear(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> nn.Module:
    """Make one linear layer of the weights of some that read the same input, packed if possible."""
    weight, bias = join(weights, biases)
    return (PackedLinear if can_pack(weight) else PlainLinear)(weight, bias)


def rms_norm(
    x: Tensor,  # (n, size)
    weight: Tensor,  # (size,)
    eps: float,
    residual: Tensor | None = None,  # (n, size), added first
) -> tuple[Tensor, Tensor]:
    """Return the (n, size) normed sum, and the sum itself."""
    if residual is not None:
        x = x + residual
    return F.rms_norm(x, weight.shape, weight, eps), x


def rotate(
    turned: Tensor,  # (n, heads, head_dim) queries and keys
    rotation: Rotation | None,  # None leaves them as they are
    norms: Tensor | None,  # (heads, head_dim) weights of their RMSNorm
    eps: float,  # the norms' epsilon
) -> Tensor:
    """Norm and rotate queries and keys: (n, heads, head_dim)."""
    if norms is not None:
        turned = F.rms_norm(turned, turned.shape[-1:], None, eps) * norms
    if rotation is not None:
        cos, sin = rotation
        # The halves of a head change places, and the sines' signs do the rest.
        turned = (turned * cos).add_(turned.roll(turned.shape[-1] // 2, -1).mul_(sin))
    return turned


def gated(gate_and_up: Tensor) -> Tensor:
    """Return (n, size) SiLU(gate) * up, from (n, 2 * size) gates and then factors."""
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


@dataclass(frozen=True)
class DecoderOperations:
    """One implementation of each operation, with the arguments of the function above."""

    linear: Callable[[Sequence[Tensor], Sequence[Tensor | None]], nn.Module] = linear
    rms_norm: Callable[..., tuple[Tensor, Tensor]] = rms_norm
    gated: Callable[[Tensor], Tensor] = gated


PYTORCH = DecoderOperations()
"""The operations in PyTorch."""
