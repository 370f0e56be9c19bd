"""Products of 5 to 16 rows with weights of 4 or 8 bits.

MLX multiplies few rows by its kernel for one row, whose cost grows with the rows, and more rows by
a kernel with tiles of 32. Here a tile has 8 or 16. `choose_products` lets quantised layers and
embeddings use the kernel for the numbers of rows where it wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
from mlx import nn

from treeflash_mlx.metal_kernels import ROUNDING, choose, make_kernel, relative_error, uses_kernels

MAX_ROWS = 16
RACED_ROWS = (5, 7, 9, 12)
"""The kernel costs equally much up to 8 rows, and from 9 to 16; operations cost more with each row.
So if it wins for one of these numbers, it wins up to the next."""
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
SPLITS, TILES = 8, 4  # simdgroups of a threadgroup, and matrices of 8 outputs that each computes
RACED_LAYERS = 8
"""Layers that take turns in a race: the weights of one alone would stay in the GPU's cache."""

# The weights are the left operand, as the whole numbers that they are stored as; a group's scale
# and bias are applied to the group's sum. Each simdgroup takes every SPLITS-th group of all
# outputs of the threadgroup. Of 32 neighbouring inputs, a lane reads 8 weights at once: the two
# elements that it holds of each of 4 matrices, if input 4 i + j is in row i of matrix j.
SOURCE = """
    uint lane = thread_index_in_simdgroup, split = simdgroup_index_in_threadgroup;
    uint rows = x_shape[0], width = x_shape[1], outputs = weight_shape[0], words = weight_shape[1];
    uint groups = width / GROUP, first = threadgroup_position_in_grid.x * 8 * TILES;
    uint row = (lane >> 4 & 1) * 4 + (lane >> 1 & 3), column = (lane >> 3 & 1) * 4 + (lane & 1) * 2;
    uint place[TILES];
    simdgroup_float8x8 total[TILES][COLUMNS];
    UNROLL for (uint t = 0; t < TILES; ++t) {
        place[t] = min(first + 8 * t + row, outputs - 1);
        UNROLL for (uint c = 0; c < COLUMNS; ++c)
            total[t][c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    for (uint g = split; g < groups; g += SPLITS) {
        simdgroup_float8x8 sum[TILES][COLUMNS];
        UNROLL for (uint t = 0; t < TILES; ++t)
            UNROLL for (uint c = 0; c < COLUMNS; ++c)
                sum[t][c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        float2 inputs[COLUMNS];
        UNROLL for (uint c = 0; c < COLUMNS; ++c)
            inputs[c] = float2(0.0f);
        for (uint k = g * GROUP; k < (g + 1) * GROUP; k += 32) {
            vec<T, 4> values[COLUMNS][2];
            UNROLL for (uint c = 0; c < COLUMNS; ++c)
                UNROLL for (uint i = 0; i < 2; ++i) {
                    uint m = min(8 * c + column + i, rows - 1);
                    values[c][i] = *(const device vec<T, 4>*)(x + m * width + k + 4 * row);
                }
            uint weights[TILES][BITS / 4];
            UNROLL for (uint t = 0; t < TILES; ++t)
                UNROLL for (uint i = 0; i < BITS / 4; ++i)
                    weights[t][i] = weight[size_t(place[t]) * words
                        + (k / 8 + column / 2) * (BITS / 4) + i];
            UNROLL for (uint j = 0; j < 4; ++j) {
                simdgroup_float8x8 right[COLUMNS];
                UNROLL for (uint c = 0; c < COLUMNS; ++c)
                    UNROLL for (uint i = 0; i < 2; ++i) {
                        float value = float(values[c][i][j]);
                        right[c].thread_elements()[i] = value;
                        inputs[c][i] += value;
                    }
                UNROLL for (uint t = 0; t < TILES; ++t) {
                    simdgroup_float8x8 left;
                    uint low = weights[t][0] >> (BITS * j);
                    uint high = BITS == 4 ? low >> 16 : weights[t][BITS / 4 - 1] >> (BITS * j);
                    left.thread_elements()[0] = float(low & ((1 << BITS) - 1));
                    left.thread_elements()[1] = float(high & ((1 << BITS) - 1));
                    UNROLL for (uint c = 0; c < COLUMNS; ++c)
                        simdgroup_multiply_accumulate(sum[t][c], left, right[c], sum[t][c]);
                }
            }
        }
        UNROLL for (uint c = 0; c < COLUMNS; ++c)
            UNROLL for (uint i = 0; i < 2; ++i) {
                inputs[c][i] += simd_shuffle_xor(inputs[c][i], 2);
                inputs[c][i] += simd_shuffle_xor(inputs[c][i], 4);
                inputs[c][i] += simd_shuffle_xor(inputs[c][i], 16);
            }
        UNROLL for (uint t = 0; t < TILES; ++t) {
            float scale = float(scales[place[t] * groups + g]);
            float bias = float(biases[place[t] * groups + g]);
            UNROLL for (uint c = 0; c < COLUMNS; ++c)
                UNROLL for (uint i = 0; i < 2; ++i)
                    total[t][c].thread_elements()[i] +=
                        scale * sum[t][c].thread_elements()[i] + bias * inputs[c][i];
        }
    }
    threadgroup float parts[SPLITS][8 * COLUMNS][8 * TILES];
    UNROLL for (uint t = 0; t < TILES; ++t)
        UNROLL for (uint c = 0; c < COLUMNS; ++c)
            UNROLL for (uint i = 0; i < 2; ++i)
                parts[split][8 * c + column + i][8 * t + row] = total[t][c].thread_elements()[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_index_in_threadgroup; i < 64 * TILES * COLUMNS; i += 32 * SPLITS) {
        uint m = i / (8 * TILES), n = i % (8 * TILES);
        if (m < rows && first + n < outputs) {
            float y = 0.0f;
            UNROLL for (uint s = 0; s < SPLITS; ++s)
                y += parts[s][m][n];
            out[m * outputs + first + n] = static_cast<T>(y);
        }
    }
"""
INPUTS = ("x", "weight", "scales", "biases")

Quantised: TypeAlias = nn.QuantizedLinear | nn.QuantizedEmbedding
Shape: TypeAlias = tuple[tuple[int, ...], int, int, mx.Dtype]
"""Outputs and words of the weight, bits of a number, numbers of a group, dtype."""


def fits(module: nn.Module) -> bool:
    """Return whether the kernel can multiply by the weight of a module."""
    return (
        isinstance(module, Quantised)
        and module.mode == "affine"
        and module.bits in BITS
        and module.group_size in GROUP_SIZES
        and module.weight.ndim == 2
    )


def multiply(module: Quantised, x: mx.array) -> mx.array:
    """Multiply: (..., outputs) of (..., inputs), without a bias; at most `MAX_ROWS` rows."""
    weight, width = module.weight, x.shape[-1]
    rows, outputs = x.size // width, weight.shape[0]
    threadgroups = -(-outputs // (8 * TILES))
    template = {
        "T": x.dtype,
        "BITS": module.bits,
        "GROUP": module.group_size,
        "COLUMNS": -(-rows // 8),
        "SPLITS": SPLITS,
        "TILES": TILES,
    }
    (out,) = make_kernel("products", INPUTS, ("out",), SOURCE)(
        inputs=[x.reshape(rows, width), weight, module.scales, module.biases],
        template=list(template.items()),
        grid=(32 * SPLITS * threadgroups, 1, 1),
        threadgroup=(32 * SPLITS, 1, 1),
        output_shapes=[(rows, outputs)],
        output_dtypes=[x.dtype],
    )
    return out.reshape(*x.shape[:-1], outputs)


def multiply_plainly(module: Quantised, x: mx.array) -> mx.array:
    """Compute what `multiply` computes, by MLX's operation."""
    return mx.quantized_matmul(
        x,
        module.weight,
        module.scales,
        module.biases,
        transpose=True,
        group_size=module.group_size,
        bits=module.bits,
    )


def choose_products(*models: nn.Module | None) -> None:
    """Let layers of models multiply by the kernel, for the numbers of rows where it wins."""
    if not uses_kernels():
        return
    by_shape: dict[Shape, dict[int, Quantised]] = {}
    for model in models:
        for module in [] if model is None else model.modules():
            if fits(module):
                key = module.weight.shape, module.bits, module.group_size, module.scales.dtype
                by_shape.setdefault(key, {})[id(module)] = module
    for layers in by_shape.values():
        modules = list(layers.values())
        won = {n: wins(modules[:RACED_LAYERS], n) for n in RACED_ROWS}
        numbers = range(RACED_ROWS[0], MAX_ROWS + 1)
        rows = frozenset(n for n in numbers if won[max(m for m in RACED_ROWS if m <= n)])
        for module in modules if rows else ():
            _use_kernel(module, rows)


def wins(layers: Sequence[Quantised], rows: int) -> bool:
    """Return whether the kernel is right and faster, for layers of one shape."""
    first = layers[0]
    width = first.scales.shape[1] * first.group_size
    x = mx.random.normal((rows, width), key=mx.random.key(0)).astype(first.scales.dtype)

    def link(product: Callable[[Quantised, mx.array], mx.array]) -> Callable[..., mx.array]:
        # Each call waits for the one before, and its input stays finite.
        return lambda y, call: x + 0 * product(layers[call % len(layers)], y)[:, :1]

    return choose(
        "products of few rows",
        f"{first.weight.shape[0]} x {width} in {first.bits} bits",
        f"{rows} rows",
        lambda: relative_error(multiply(first, x), multiply_plainly(first, x)),
        ROUNDING[x.dtype],
        link(multiply),
        link(multiply_plainly),
        x,
        first.weight.nbytes,
    )


def _use_kernel(module: Quantised, rows: frozenset[int]) -> None:
    """Give one module, and no other, a class whose products of 5 to 16 rows use the kernel."""
    cls = type(module)
    name = "__call__" if isinstance(module, nn.QuantizedLinear) else "as_linear"
    plain = getattr(cls, name)

    def call(self: Any, x: mx.array) -> mx.array:
        if x.size // x.shape[-1] not in rows or x.dtype != self.scales.dtype:
            return plain(self, x)
        out = multiply(self, x)
        return out + self["bias"] if "bias" in self else out

    module.__class__ = type(cls.__name__, (cls,), {name: call})
