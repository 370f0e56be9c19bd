"""What the passes of a decoder differ in: attention, recurrences, and operations of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash_cuda.linear import PackedLinear, PlainLinear, can_pack, join
from treeflash_cuda.operations import GATES

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""The cosines and sines of n rows, in the form that the device's attention reads."""


class Attention(Protocol):
    """The attention of a pass, in all layers."""

    def turn(
        self,
        layer: int,
        heads: Tensor,  # (n, heads + 2 * kv_heads, head_dim) queries, keys and values; may change
        rotation: Rotation | None,  # None leaves queries and keys as they are
        # (heads + kv_heads, head_dim) float32 weights of queries' and keys' RMSNorm.
        norms: Tensor | None,
        eps: float,  # the norms' epsilon
    ) -> Tensor:
        """Norm and rotate queries and keys, and write keys and values to the rows' KV caches.

        Returns the (n, heads, head_dim) queries.
        """

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        """Attend to a layer's stored keys: (n, heads * head_dim) from (n, heads, head_dim)."""


class Recurrences(Protocol):
    """The recurrences of a pass, in all gated delta nets; each remembers what its commit needs."""

    def convolve(self, layer: int, rows: Tensor, filters: Tensor, activation: str) -> Tensor:
        """Convolve (n, channels) rows with the ones before them by (channels, kernel) filters.

        Returns their (n, channels) activations; see `GATES`.
        """

    def delta_rule(
        self,
        layer: int,
        q: Tensor,  # (n, key_heads, key_dim)
        k: Tensor,  # (n, key_heads, key_dim)
        v: Tensor,  # (n, heads, value_dim)
        log_g: Tensor,  # (n, heads) float32 log decays
        beta: Tensor,  # (n, heads)
    ) -> Tensor:
        """Return the (n, heads, value_dim) that rows read from their states and write there.

        Keys and queries are normed. `recurrence.delta_rule` has the rule.
        """


def constant(tensor: Tensor) -> nn.Parameter:
    """Return a tensor as a parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)


def linear(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> nn.Module:
    """Make one linear layer, packed if possible, of layers that read one input."""
    weight, bias = join(weights, biases)
    return (PackedLinear if can_pack(weight) else PlainLinear)(weight, bias)


def rms_norm(
    x: Tensor,  # (n, size)
    weight: Tensor,  # (size,) float32
    eps: float,
    residual: Tensor | None = None,  # (n, size), added first
) -> tuple[Tensor, Tensor]:
    """Return the (n, size) normed sum, and the sum itself."""
    if residual is not None:
        x = x + residual
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype), x


def rotation(
    positions: Tensor,  # (n,) rotary positions
    frequencies: Tensor,  # (head_dim / 2,) float32, see `Rope`
    scale: Tensor | float,  # see `Rope`
    dtype: torch.dtype,  # the dtype of the result
) -> Rotation:
    """Compute (n, 1, head_dim) cosines and sines; the first half of the sines is negative."""
    angles = positions.float()[:, None, None] * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(
    turned: Tensor,  # (n, heads, head_dim) queries and keys
    angles: Rotation | None,  # the result of `rotation`; None leaves them as they are
    norms: Tensor | None,  # (heads, head_dim) float32 weights of their RMSNorm
    eps: float,  # the norms' epsilon
    # Numbers of heads that are normed as one; None norms each head by itself.
    wholes: list[int] | None = None,
) -> Tensor:
    """Norm and rotate queries and keys: (n, heads, head_dim)."""
    if norms is not None:
        x = turned.float()
        if wholes is None:
            normed = F.rms_norm(x, x.shape[-1:], None, eps).mul_(norms)
        else:
            pairs = zip(x.split(wholes, 1), norms.split(wholes), strict=True)
            normed = torch.cat([F.rms_norm(part, w.shape, w, eps) for part, w in pairs], 1)
        turned = normed.to(turned.dtype)
    if angles is not None:
        cos, sin = angles
        # The halves of a head change places, and the sines' signs do the rest.
        turned = (turned * cos).add_(turned.roll(turned.shape[-1] // 2, -1).mul_(sin))
    return turned


def gated(gate_and_up: Tensor, activation: str) -> Tensor:
    """Return (n, size) activation(gate) * up, from (n, 2 * size) gates and then factors."""
    gate, up = gate_and_up.chunk(2, -1)
    return GATES[activation](gate).mul_(up)


def capped(x: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(x / cap); x may change."""
    return x.div_(cap).tanh_().mul_(cap)


GroupedLinear: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The type of `operations.grouped_linear`, without biases."""


@dataclass(frozen=True)
class DecoderOperations:
    """One implementation of each operation, with the arguments of the function above."""

    linear: Callable[[Sequence[Tensor], Sequence[Tensor | None]], nn.Module] = linear
    rms_norm: Callable[..., tuple[Tensor, Tensor]] = rms_norm
    rotation: Callable[[Tensor, Tensor, Tensor | float, torch.dtype], Rotation] = rotation
    gated: Callable[[Tensor, str], Tensor] = gated
    capped: Callable[[Tensor, float], Tensor] = capped
    # From the rows of a pass to the product of their experts; None runs experts one by one.
    grouped_linear: Callable[[int], GroupedLinear] | None = None


PYTORCH = DecoderOperations()
"""The operations in PyTorch."""
