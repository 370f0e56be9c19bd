"""Products of 5 to 32 rows with weights of 4, 8 or 16 bits.

MLX multiplies few rows by its kernel for one row, whose cost grows with the rows, and more rows by
a kernel with tiles of 32 or 64. Here a tile has 8, 16, 24 or 32. `choose_products` lets layers and
embeddings use the kernel for the numbers of rows where it wins.

The terms of a sum are added in an order that depends on the geometry alone, and the elements of a
matrix on their own row and column. So with one geometry a row has the same bits beside any others:
`use_everywhere` multiplies all numbers of rows so, in tiles of 32, for exact mode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import mlx.core as mx
from mlx import nn

from treeflash.decoding.backend_base import distinct
from treeflash_mlx.metal_kernels import (
    ROUNDING,
    choose,
    make_kernel,
    relative_error,
    runs_matrix_kernels,
)
from treeflash_mlx.overrides import override

TIMED_ROWS: Mapping[int, tuple[int, ...]] = {
    4: (5, 7, 9, 12, 17),
    8: (5, 7, 9, 12, 17, 25),
    16: (9, 12, 16, 17, 25),
}
"""By the bits of a weight. The kernel costs equally much for all rows of as many matrices of 8;
operations cost more with each row. So if it wins for one of these numbers, it wins up to the next
one, or to the end of the last one's matrix. More rows take longer to compute than weights to read,
and fewer are left to MLX's kernel for one row."""
GROUP_SIZES = (32, 64, 128)
UNQUANTISED_GROUP = 64
"""Inputs that a simdgroup takes at once of weights that have no groups."""
MANY_OUTPUTS = 4096
"""Layers with at least as many outputs fill a GPU with the largest threadgroups."""
MAX_COLUMNS = 4
"""Matrices of 8 rows that a threadgroup multiplies at most; other threadgroups have the rest."""
TIMED_LAYERS = 8
"""Layers that take turns in a chain: the weights of one alone would stay in the GPU's cache."""

# The weights are the left operand: 8 outputs by 8 inputs. The threadgroup's simdgroups share its
# outputs and divide the groups of inputs: each takes every SPLITS-th. Of STEP neighbouring inputs,
# 32 or 64, each of four lanes reads a quarter of an output's weights at once. Every 8 of them are
# the two elements that the lane holds of each of 4 matrices: matrix j has weights j and 4 + j.
# With steps of 32, for example, input 4 i + j is in row i of matrix j.
SOURCE = """
    uint lane = thread_index_in_simdgroup, split = simdgroup_index_in_threadgroup;
    uint width = x_shape[1], outputs = weight_shape[0], words = weight_shape[1];
    uint groups = width / GROUP, first = threadgroup_position_in_grid.x * 8 * TILES;
    uint first_row = threadgroup_position_in_grid.y * 8 * COLUMNS, rows = x_shape[0] - first_row;
    uint row = (lane >> 4 & 1) * 4 + (lane >> 1 & 3), column = (lane >> 3 & 1) * 4 + (lane & 1) * 2;
    uint quarter = STEP / 4 * (column / 2), start = STEP / 4 * (row / 2) + 4 * (row % 2);
    uint place[TILES];
    simdgroup_float8x8 total[TILES][COLUMNS];
    UNROLL for (uint t = 0; t < TILES; ++t) {
        place[t] = min(first + 8 * t + row, outputs - 1);
        UNROLL for (uint c = 0; c < COLUMNS; ++c)
            total[t][c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    for (uint g = split; g < groups; g += SPLITS) {
        BEGIN_GROUP
        for (uint k = g * GROUP; k < (g + 1) * GROUP; k += STEP) {
            LOAD_WEIGHTS
            UNROLL for (uint w = 0; w < STEP / 32; ++w) {
                vec<T, 4> values[COLUMNS][2];
                UNROLL for (uint c = 0; c < COLUMNS; ++c)
                    UNROLL for (uint i = 0; i < 2; ++i) {
                        uint m = min(8 * c + column + i, rows - 1);
                        values[c][i] = *(const device vec<T, 4>*)(
                            x + (first_row + m) * width + k + start + 8 * w);
                        ADD_INPUTS
                    }
                UNROLL for (uint j = 0; j < 4; ++j) {
                    simdgroup_matrix<T, 8, 8> right[COLUMNS];
                    UNROLL for (uint c = 0; c < COLUMNS; ++c)
                        UNROLL for (uint i = 0; i < 2; ++i)
                            right[c].thread_elements()[i] = INPUT;
                    UNROLL for (uint t = 0; t < TILES; ++t) {
                        SET_LEFT
                        UNROLL for (uint c = 0; c < COLUMNS; ++c)
                            simdgroup_multiply_accumulate(SUM[t][c], left, right[c], SUM[t][c]);
                    }
                }
            }
        }
        END_GROUP
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
            out[size_t(first_row + m) * outputs + first + n] = static_cast<T>(y);
        }
    }
"""
ONE_SUM = {"ADD_INPUTS": "", "INPUT": "values[c][i][j]", "SUM": "total", "END_GROUP": ""}
# A weight is dequantised where it is used: the whole number stays at its place in the word, and the
# factor of the place has the group's scale. A lane reads two words at once, unless 16 weights of 4
# bits are more than its quarter of a group.
QUANTISED = {
    "BEGIN_GROUP": """float scale[TILES], bias[TILES];
        UNROLL for (uint t = 0; t < TILES; ++t) {
            scale[t] = float(scales[place[t] * groups + g]);
            bias[t] = float(biases[place[t] * groups + g]);
        }""",
    "LOAD_WEIGHTS": """uint2 weights[TILES];
            UNROLL for (uint t = 0; t < TILES; ++t) {
                const device uint* from =
                    weight + size_t(place[t]) * words + (k + quarter) / (32 / BITS);
                weights[t] = STEP * BITS < 256 ? uint2(*from) : *(const device uint2*)from;
            }""",
    "SET_LEFT": """simdgroup_float8x8 left;
                        uint mask = ((1u << BITS) - 1) << (BITS * j);
                        uint low = weights[t][BITS == 4 ? w : 0];
                        uint high = BITS == 4 ? low >> 16 : weights[t][1];
                        float factor = scale[t] / (1u << (BITS * j));
                        left.thread_elements()[0] = float(low & mask) * factor + bias[t];
                        left.thread_elements()[1] = float(high & mask) * factor + bias[t];""",
    **ONE_SUM,
}
UNQUANTISED = {
    "BEGIN_GROUP": "",
    "LOAD_WEIGHTS": """vec<T, 4> weights[TILES][2];
            UNROLL for (uint t = 0; t < TILES; ++t)
                UNROLL for (uint i = 0; i < 2; ++i)
                    weights[t][i] = *(const device vec<T, 4>*)(
                        weight + size_t(place[t]) * words + k + quarter + 4 * i);""",
    "SET_LEFT": """simdgroup_matrix<T, 8, 8> left;
                        UNROLL for (uint i = 0; i < 2; ++i)
                            left.thread_elements()[i] = weights[t][i][j];""",
    **ONE_SUM,
}
# Or weights stay numbers at their places in the word until the products of a group are summed. Its
# inputs are multiplied by the factors of the places instead, once for all outputs, and summed for
# the bias: of each row's inputs, eight lanes have some.
SCALED_SUMS = QUANTISED | {
    "BEGIN_GROUP": QUANTISED["BEGIN_GROUP"]
    + """
        float inputs[COLUMNS][2];
        simdgroup_float8x8 part[TILES][COLUMNS];
        UNROLL for (uint c = 0; c < COLUMNS; ++c) {
            inputs[c][0] = inputs[c][1] = 0.0f;
            UNROLL for (uint t = 0; t < TILES; ++t)
                part[t][c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }""",
    "ADD_INPUTS": """UNROLL for (uint j = 0; j < 4; ++j)
                            inputs[c][i] += float(values[c][i][j]);""",
    "INPUT": "static_cast<T>(float(values[c][i][j]) / (1u << (BITS * j)))",
    "SET_LEFT": """simdgroup_float8x8 left;
                        uint mask = ((1u << BITS) - 1) << (BITS * j);
                        uint low = weights[t][BITS == 4 ? w : 0];
                        uint high = BITS == 4 ? low >> 16 : weights[t][1];
                        left.thread_elements()[0] = float(low & mask);
                        left.thread_elements()[1] = float(high & mask);""",
    "SUM": "part",
    "END_GROUP": """UNROLL for (uint c = 0; c < COLUMNS; ++c)
            UNROLL for (uint i = 0; i < 2; ++i) {
                UNROLL for (uint n = 1; n < 4; ++n)
                    inputs[c][i] += simd_shuffle_xor(inputs[c][i], n == 3 ? 16 : 2 * n);
                UNROLL for (uint t = 0; t < TILES; ++t)
                    total[t][c].thread_elements()[i] +=
                        scale[t] * part[t][c].thread_elements()[i] + bias[t] * inputs[c][i];
            }""",
}
SCALED_SUMS_BITS, SCALED_SUMS_ROWS = 4, 16
"""Only with so few bits computing takes longer than reading, and only for so few rows a thread has
registers for two sums."""

INPUTS: tuple[str, ...] = ("x", "weight")
QUANTISED_INPUTS = (*INPUTS, "scales", "biases")

Quantised: TypeAlias = nn.QuantizedLinear | nn.QuantizedEmbedding
Module: TypeAlias = nn.Linear | nn.Embedding | Quantised
METHODS: Mapping[type[nn.Module], str] = {
    nn.Linear: "__call__",
    nn.QuantizedLinear: "__call__",
    nn.Embedding: "as_linear",
    nn.QuantizedEmbedding: "as_linear",
}
"""The product of each kind of module; a module with its own product keeps it."""
Product: TypeAlias = Callable[[mx.array], mx.array]
"""Multiplies inputs of one shape by the weight of one module."""
T = TypeVar("T")
Shape: TypeAlias = tuple[tuple[int, ...], int, int, mx.Dtype]
"""Shape of the weight, bits of a number, numbers of a group, dtype of the inputs."""


class Geometry(NamedTuple):
    """How a product is divided: matrices of 8 outputs of a simdgroup, and simdgroups.

    With `scaled_sums` scales and biases are for the sums of groups, and not for weights.
    """

    tiles: int
    splits: int
    scaled_sums: bool = False

    def __str__(self) -> str:
        text = f"{8 * self.tiles} outputs, {self.splits} simdgroups"
        return text + ", scaled sums" * self.scaled_sums


EXACT_GEOMETRY = Geometry(2, 8)
"""Every product in exact mode has it: for all numbers of rows two threadgroups' sums fit into the
memory of one."""


def geometries(outputs: int, rows: int) -> list[Geometry]:
    """List the geometries that are timed.

    Small layers make few threadgroups, which leave cores idle unless each has fewer outputs. A
    threadgroup takes at most 16 KiB for its sums, half of what there is.
    """
    columns = -(-rows // 8)
    numbers = (4,) if outputs >= MANY_OUTPUTS else (4, 2, 1)
    return [Geometry(tiles, 8 if tiles * columns <= 8 else 4) for tiles in numbers]


def variants(shape: Shape, rows: int) -> list[Geometry]:
    """List what is timed for layers of a shape.

    The factors of sums' inputs are too small for float16.
    """
    (outputs, _), bits, _, dtype = shape
    found = geometries(outputs, rows)
    if bits == SCALED_SUMS_BITS and rows <= SCALED_SUMS_ROWS and dtype != mx.float16:
        found.append(found[0]._replace(scaled_sums=True))
    return found


def shape_of(module: nn.Module) -> Shape | None:
    """Return the shape of a module whose weight the kernel can multiply by; None for others."""
    if method_of(module) is None:
        return None
    if isinstance(module, Quantised):
        bits, group, dtype = module.bits, module.group_size, module.scales.dtype
        runs = module.mode == "affine" and bits in TIMED_ROWS and group in GROUP_SIZES
    else:
        bits, group, dtype = 16, UNQUANTISED_GROUP, module.weight.dtype
        runs = dtype in (mx.float16, mx.bfloat16) and module.weight.shape[-1] % group == 0
    shape = tuple(module.weight.shape)
    return (shape, bits, group, dtype) if runs and len(shape) == 2 else None


def method_of(module: nn.Module) -> str | None:
    """Return the name of a module's product; None if it has none, or another than MLX's."""
    for kind, name in METHODS.items():
        if isinstance(module, kind) and getattr(type(module), name) is getattr(kind, name):
            return name
    return None


@cache
def source(*, quantised: bool, scaled_sums: bool = False) -> str:
    """Write the source for weights of 4 or 8 bits, or of 16."""
    text, parts = SOURCE, QUANTISED if quantised else UNQUANTISED
    for name, part in (SCALED_SUMS if scaled_sums else parts).items():
        text = re.sub(rf"\b{name}\b", part, text)
    return text


def multiply(module: Module, x: mx.array, geometry: Geometry) -> mx.array:
    """Multiply (..., inputs) by the weight of a module: (..., outputs), without a bias."""
    return prepare(module, x, geometry)(x)


def prepare(module: Module, x: mx.array, geometry: Geometry) -> Product:
    """Return the product of a module's weight for inputs of the shape and dtype of `x`.

    What a launch takes besides the inputs is made once: a pass has hundreds of products.
    """
    weight, width = module.weight, x.shape[-1]
    rows, outputs = x.size // width, weight.shape[0]
    template: dict[str, Any] = {"T": x.dtype, "GROUP": UNQUANTISED_GROUP}
    name, inputs, arrays, step = "products", INPUTS, [weight], 32
    if is_quantised := isinstance(module, Quantised):
        name, inputs = "products_quantised" + "_sums" * geometry.scaled_sums, QUANTISED_INPUTS
        arrays += [module.scales, module.biases]
        template |= {"GROUP": module.group_size, "BITS": module.bits}
        if module.bits == 4 and module.group_size >= 64:
            step = 64  # a lane reads two words at once
    columns = min(-(-rows // 8), MAX_COLUMNS)
    template |= {"COLUMNS": columns, "TILES": geometry.tiles, "SPLITS": geometry.splits}
    template["STEP"] = step
    threads = 32 * geometry.splits
    text = source(quantised=is_quantised, scaled_sums=geometry.scaled_sums)
    launch = partial(
        make_kernel(name, inputs, ("out",), text),
        template=list(template.items()),
        grid=(threads * -(-outputs // (8 * geometry.tiles)), -(-rows // (8 * columns)), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(*x.shape[:-1], outputs)],
        output_dtypes=[x.dtype],
    )
    is_flat, flat = x.ndim == 2, (rows, width)

    def call(x: mx.array) -> mx.array:
        out: mx.array = launch(inputs=[x if is_flat else x.reshape(flat), *arrays])[0]
        return out

    return call


def multiply_plainly(module: Module, x: mx.array) -> mx.array:
    """Compute what `multiply` computes, by MLX's operation."""
    if not isinstance(module, Quantised):
        return x @ module.weight.T
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
    if not runs_matrix_kernels():
        return
    for (_, bits, _, dtype), modules in by_shape(*models).items():
        timed = TIMED_ROWS[bits]
        stops = [*timed[1:], 8 * -(-timed[-1] // 8) + 1]
        won: dict[int, Geometry] = {}
        for first, stop in zip(timed, stops, strict=True):
            if (geometry := fastest(modules[:TIMED_LAYERS], first)) is not None:
                won |= dict.fromkeys(range(first, stop), geometry)
        for module in modules if won else ():
            _use_kernel(module, won.get, dtype)


def use_everywhere(model: nn.Module) -> None:
    """Let layers of a model multiply by the kernel in one geometry, whatever the number of rows.

    Layers for which the kernel is wrong on this device keep MLX's operation.
    """
    for shape, modules in by_shape(model).items():
        (outputs, _), bits, _, dtype = shape
        first = modules[0]
        x = _inputs(first, shape, 8 * MAX_COLUMNS + 1)

        def errors(_: str, first: Module = first, x: mx.array = x) -> dict[str, float]:
            found = multiply(first, x, EXACT_GEOMETRY)
            return {"": relative_error(found, multiply_plainly(first, x))}

        name = f"{outputs} x {x.shape[1]} in {bits} bits"
        if choose("products in exact mode", name, "all rows", errors, ROUNDING[dtype]) is None:
            continue
        for module in modules:
            _use_kernel(module, lambda _: EXACT_GEOMETRY, dtype)


def by_shape(*models: nn.Module | None) -> dict[Shape, list[Module]]:
    """Group the modules of models that the kernel can multiply by, each once."""
    found: dict[Shape, list[Module]] = {}
    for module in distinct(x for model in models if model is not None for x in model.modules()):
        if (shape := shape_of(module)) is not None:
            found.setdefault(shape, []).append(module)
    return found


def _inputs(module: Module, shape: Shape, rows: int) -> mx.array:
    """Return random inputs of a module that the kernel can multiply by."""
    (_, width), _, group, dtype = shape
    if isinstance(module, Quantised):
        width = module.scales.shape[1] * group
    return mx.random.normal((rows, width), key=mx.random.key(0)).astype(dtype)


def race(
    kind: str,
    layers: Sequence[Module],
    shape: Shape,
    rows: int,
    others: Mapping[str, T],
    product: Callable[[Module, mx.array, T], mx.array],
    nbytes: int,
) -> T | None:
    """Return the fastest way to multiply rows by layers; None if MLX's operation wins.

    Args:
        kind: of the products, in the verdict.
        layers: of this shape, perhaps with a class that `_use_kernel` made.
        shape: of the layers.
        rows: number of rows.
        others: the other ways, by their names in the verdict.
        product: multiplies by a layer in one of these ways.
        nbytes: see `choose`.
    """
    first, ((outputs, _), bits, _, _) = layers[0], shape
    x = _inputs(first, shape, rows)

    def candidate(product: Callable[[Module, mx.array], mx.array]) -> Callable[..., mx.array]:
        # Each call waits for the one before, and its input stays finite.
        return lambda y, call: x + 0 * product(layers[call % len(layers)], y)[:, :1]

    def by(way: T) -> Callable[[Module, mx.array], mx.array]:
        return lambda module, y: product(module, y, way)

    def errors(name: str) -> dict[str, float]:
        found = product(first, x, others[name])
        return {"": relative_error(found, multiply_plainly(first, x))}

    winner = choose(
        kind,
        f"{outputs} x {x.shape[1]} in {bits} bits",
        f"{rows} rows",
        errors,
        ROUNDING[x.dtype],
        {name: candidate(by(way)) for name, way in others.items()},
        candidate(multiply_plainly),
        x,
        nbytes,
        key=shape,
    )
    return None if winner is None else others[winner]


def fastest(layers: Sequence[Module], rows: int) -> Geometry | None:
    """Return the fastest geometry for layers of one shape; None if MLX's operation wins."""
    first, shape = layers[0], shape_of(layers[0])
    assert shape is not None
    candidates = {str(each): each for each in variants(shape, rows)}
    return race(
        "products of few rows",
        layers,
        shape,
        rows,
        candidates,
        multiply,
        first.weight.nbytes,
    )


def _use_kernel(
    module: Module, geometry_of: Callable[[int], Geometry | None], dtype: mx.Dtype
) -> None:
    """Let a module use the kernel in its products of some rows.

    Args:
        module: multiplies.
        geometry_of: the number of rows; None for MLX's operation.
        dtype: of the inputs.
    """
    name = method_of(module)
    assert name is not None
    plain = getattr(type(module), name)
    prepared: dict[tuple[int, ...], Product | None] = {}

    def call(self: Any, x: mx.array) -> mx.array:
        if x.dtype != dtype:
            return plain(self, x)
        shape = x.shape
        if shape not in prepared:
            geometry = geometry_of(x.size // shape[-1])
            prepared[shape] = None if geometry is None else prepare(self, x, geometry)
        if (product := prepared[shape]) is None:
            return plain(self, x)
        out = product(x)
        return out + self["bias"] if "bias" in self else out

    override(module, {name: call})
