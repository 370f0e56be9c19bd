"""Products of long prompts, of whose rows the CPU takes a share.

A prompt's products keep the arithmetic of a GPU busy, not its memory. A Mac's CPU has matrix units
of its own, and reads the same memory. So a quantised weight is dequantised once in a call, the GPU
multiplies most rows by it, and the CPU the others at the same time. `choose_shares` times some
shares at load, as kernels are timed, and leaves layers alone where none wins.

A row has other bits on a CPU than on a GPU, so float32 and exact mode keep everything on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
from mlx import nn

from treeflash_mlx.metal_kernels import LONG_BYTES, runs_kernels
from treeflash_mlx.metal_kernels.products import (
    TIMED_LAYERS,
    Module,
    Quantised,
    Shape,
    by_shape,
    race,
)
from treeflash_mlx.overrides import override

LEAST_ROWS = 512
"""Rows of a product of which the CPU takes some: with fewer, dequantising takes too long."""
TIMED_ROWS = 1024
SHARES = (0.15, 0.25, 0.35)
"""Shares of the rows for the CPU that are timed."""
WHOLE_ROWS = 32
"""The GPU gets a multiple of this number of rows, as many as a tile of its kernels has."""

Layers: TypeAlias = Mapping[Shape, Sequence[Module]]


def prompt_layers(model: nn.Module, head: nn.Module | None = None) -> Layers:
    """Return the layers that multiply all rows of a prompt, by shape.

    The output `head` multiplies the last row alone. It is the largest layer by far: timing its
    shares would take longer than timing all others, and gigabytes for its dequantised weight.
    """
    found = {}
    for shape, modules in by_shape(model).items():
        layers = [
            x for x in modules if isinstance(x, nn.Linear | nn.QuantizedLinear) and x is not head
        ]
        if layers and shape[3] != mx.float32:
            found[shape] = layers
    return found


def multiply_shared(module: Module, x: mx.array, share: float) -> mx.array:
    """Multiply (..., inputs) by the weight of a module, with a share of the rows on the CPU."""
    rows = x.reshape(-1, x.shape[-1])
    weight = module.weight
    if isinstance(module, Quantised):
        options = module.group_size, module.bits
        weight = mx.dequantize(weight, module.scales, module.biases, *options)
    cut = gpu_rows(len(rows), share)
    parts = [rows[:cut] @ weight.T, mx.matmul(rows[cut:], weight.T, stream=mx.cpu)]
    return mx.concatenate(parts).reshape(*x.shape[:-1], -1)


def gpu_rows(rows: int, share: float) -> int:
    """Return how many of some rows the GPU multiplies if the CPU has this share."""
    return min(-(-int(rows * (1 - share)) // WHOLE_ROWS) * WHOLE_ROWS, rows)


def choose_shares(layers: Layers) -> None:
    """Let the CPU multiply some rows of long prompts in layers where that is faster."""
    if not runs_kernels():
        return
    for shape, modules in layers.items():
        if (share := fastest(modules[:TIMED_LAYERS], shape)) is not None:
            for module in modules:
                _use_share(module, share)


def fastest(layers: Sequence[Module], shape: Shape) -> float | None:
    """Return the fastest share for layers of one shape; None if the GPU alone is faster."""
    return race(
        "products of long prompts",
        layers,
        shape,
        TIMED_ROWS,
        {f"{share:.0%} of the rows on the CPU": share for share in SHARES},
        multiply_shared,
        LONG_BYTES,  # few calls: each takes milliseconds
    )


def _use_share(module: Module, share: float) -> None:
    """Let a module share its products of many rows."""
    plain: Callable[..., Any] = type(module).__call__

    def call(self: Any, x: mx.array) -> Any:
        if x.size // x.shape[-1] < LEAST_ROWS:
            return plain(self, x)
        out = multiply_shared(self, x, share)
        return out + self["bias"] if "bias" in self else out

    override(module, {"__call__": call})
