"""Shapes of common models, on which every kernel is checked and timed without a model."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from treeflash_mlx.hybrid import delta_kernel_wins
from treeflash_mlx.metal_kernels import kept_verdicts, runs_kernels, runs_matrix_kernels
from treeflash_mlx.metal_kernels.attention import Shape, exact_columns, winning_columns
from treeflash_mlx.metal_kernels.products import TIMED_LAYERS, choose_products, use_everywhere

LAYERS = ((2560, 2560), (9728, 2560))
"""Outputs and inputs: a few of Qwen3-4B's, with many threadgroups and with few."""
WEIGHTS = ((4, 64), (8, 64), (16, 64), (4, 32), (4, 128))
"""Bits of a weight and numbers of a group."""
HEAD_SHAPES = (
    *(Shape(32, 8, width, mx.bfloat16) for width in (64, 128, 256)),
    Shape(64, 8, 128, mx.bfloat16),
    *(Shape(32, 8, 128, mx.bfloat16, bits, 64) for bits in (4, 8)),
)
DELTA_NET = (16, 32, 128, 128, mx.bfloat16, False)
"""See `delta_kernel_wins`."""


def examine() -> None:
    """Check and time every kernel anew; `metal_kernels.VERDICTS` has what was found."""
    if not runs_kernels():
        return
    kept_verdicts().forget()
    if runs_matrix_kernels():
        for sizes in LAYERS:
            for bits, group in WEIGHTS if sizes is LAYERS[0] else WEIGHTS[:3]:
                choose_products(_layers(*sizes, bits, group))
                use_everywhere(_layers(*sizes, bits, group, count=1))
        for shape in HEAD_SHAPES:
            for few in (True, False):
                winning_columns(shape, few=few)
            if not shape.bits:
                exact_columns(shape)
    delta_kernel_wins(*DELTA_NET)


def _layers(
    outputs: int, inputs: int, bits: int, group: int, count: int = TIMED_LAYERS
) -> nn.Module:
    """Return as many layers as take turns, so that no cache holds the weights of all."""
    layers: list[nn.Module] = []
    for _ in range(count):
        linear = nn.Linear(inputs, outputs, bias=False)
        linear.set_dtype(mx.bfloat16)
        layers.append(linear.to_quantized(group, bits) if bits < 16 else linear)
        mx.eval(layers[-1].parameters())
    return nn.Sequential(*layers)
