"""Products of rows with weights, plain or quantised, in an order that other rows do not change.

Rows are multiplied 16 at a time, the fewest that GPUs multiply at once: products of other shapes
may add in another order. With more rows a program has several such products for each tile of
weights, which it reads and dequantises once.

Few columns would leave most of a GPU idle, so that a sum is split into parts. How many parts it has
depends on the weight alone. With few rows each part has its own program, and a second kernel
adds the parts; with many rows one program computes them one after the other. Both add them in
the same order, so a row has the same bits among few rows and among many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from treeflash_cuda.gpu.triton_kernels import MAX_REGISTERS, needs_registers
from treeflash_cuda.quantised_weights import GROUP, QuantisedWeight

ROWS = 16
"""Rows of a product."""
MAX_PRODUCTS = 4
"""Products of a program for a tile of weights."""
COLUMNS, DEPTH = 64, 64
"""Columns of a program, and terms of a sum that are added at once."""
PROGRAMS, MIN_STEPS = 256, 8
"""Programs that keep a GPU busy, and `DEPTH`s of a part, as its sums are written and read."""


@triton.jit
def _load_weight(
    weight_pointer,
    scales_pointer,
    least_pointer,
    columns,  # (COLUMNS,) int64
    is_column,
    start,  # the first term
    size,
    width,
    DTYPE: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
):
    """Load the (COLUMNS, DEPTH) weights of columns, 0 beyond the last one."""
    if BITS == 16:
        terms = start + tl.arange(0, DEPTH)
        mask = is_column[:, None] & (terms < size)[None, :]
        places = columns[:, None] * size + terms[None, :]
        weight = tl.load(weight_pointer + places, mask=mask, other=0)
    else:
        nbytes: tl.constexpr = DEPTH * BITS // 8
        group = start // DEPTH * width + columns
        places = group[:, None] * nbytes + tl.arange(0, nbytes)[None, :]
        numbers = tl.load(weight_pointer + places, mask=is_column[:, None], other=0)
        if BITS == 4:
            numbers = tl.interleave(numbers & 15, numbers >> 4)
        scale = tl.load(scales_pointer + group, mask=is_column, other=0).to(tl.float32)
        least = tl.load(least_pointer + group, mask=is_column, other=0).to(tl.float32)
        weight = (numbers.to(tl.float32) * scale[:, None] + least[:, None]).to(DTYPE)
    return weight


@triton.jit
def _store_result(result_pointer, bias_pointer, total, rows, columns, n, width, BIAS: tl.constexpr):
    is_row, is_column = rows < n, columns < width
    if BIAS:
        bias = tl.load(bias_pointer + columns, mask=is_column, other=0)
        total += bias.to(tl.float32)[None, :]
    places = rows[:, None] * width + columns[None, :]
    result = total.to(result_pointer.dtype.element_ty)
    tl.store(result_pointer + places, result, mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["n"])
def _linear(
    x_pointer,
    weight_pointer,
    scales_pointer,
    least_pointer,
    bias_pointer,
    result_pointer,  # (n, width), or (parts, n, width) float32 if each program has one part
    n,
    size,  # terms of a sum
    width,  # columns
    part_size,  # terms of a part
    x_stride,
    ROWS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,  # bits of a quantised weight; 16 for one that is not
    BIAS: tl.constexpr,
    ONE_PART: tl.constexpr,
):
    # Programs of the same columns follow one another, and find the weight in a cache.
    first_row = tl.program_id(0).to(tl.int64) * (ROWS * PRODUCTS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width
    first, end = 0, size
    if ONE_PART:
        first = tl.program_id(2) * part_size
        end = tl.minimum(first + part_size, size)
    totals = ()
    for _ in tl.static_range(PRODUCTS):
        totals += (tl.zeros((ROWS, COLUMNS), tl.float32),)  # type: ignore[assignment]
    for part in range(first, end, part_size):
        sums = ()
        for _ in tl.static_range(PRODUCTS):
            sums += (tl.zeros((ROWS, COLUMNS), tl.float32),)  # type: ignore[assignment]
        for start in range(part, tl.minimum(part + part_size, size), DEPTH):
            weight = _load_weight(
                *(weight_pointer, scales_pointer, least_pointer, columns, is_column),
                *(start, size, width, x_pointer.dtype.element_ty, DEPTH, BITS),
            )
            terms = start + tl.arange(0, DEPTH)
            new = ()
            for i in tl.static_range(PRODUCTS):
                rows = first_row + i * ROWS + tl.arange(0, ROWS)
                mask = (rows < n)[:, None] & (terms < size)[None, :]
                places = rows[:, None] * x_stride + terms[None, :]
                x = tl.load(x_pointer + places, mask=mask, other=0)
                product = tl.dot(x, tl.trans(weight), sums[i], input_precision="ieee")
                new += (product,)  # type: ignore[assignment]
            sums = new
        new = ()
        for i in tl.static_range(PRODUCTS):
            new += (totals[i] + sums[i],)  # type: ignore[assignment]
        totals = new
    if ONE_PART:
        result_pointer += tl.program_id(2).to(tl.int64) * n * width
    for i in tl.static_range(PRODUCTS):
        rows = first_row + i * ROWS + tl.arange(0, ROWS)
        _store_result(result_pointer, bias_pointer, totals[i], rows, columns, n, width, BIAS)


@triton.jit(do_not_specialize=["n"])
def _add_parts(
    parts_pointer,  # (parts, n, width) float32
    bias_pointer,
    result_pointer,
    parts,
    n,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < n)[:, None] & (columns < width)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in range(parts):
        places = (part * n.to(tl.int64) + rows[:, None]) * width + columns[None, :]
        total += tl.load(parts_pointer + places, mask=mask, other=0)
    _store_result(result_pointer, bias_pointer, total, rows, columns, n, width, BIAS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `linear` of PyTorch with an order of a row's sums that other rows do not change.

    Args:
        x: (..., size).
        weight: (width, size), contiguous.
        bias: (width,).

    Returns:
        (..., width) in the dtype of x.
    """
    assert weight.is_contiguous()
    depth = DEPTH // 2 if needs_registers(x.dtype) else DEPTH
    return _product(x, (weight, None, None), bias, len(weight), depth, 16)


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute `operations.quantised_linear`, which reads the weight once for 64 rows."""
    return _product(x, weight, bias, weight.numbers.shape[1], GROUP, weight.bits)


def _product(
    x: Tensor,
    weight: tuple[Tensor, Tensor | None, Tensor | None],
    bias: Tensor | None,
    width: int,
    depth: int,
    bits: int,
) -> Tensor:
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    n, columns = len(rows), triton.cdiv(width, COLUMNS)
    parts, part_size = split(width, size, depth)
    wide = needs_registers(x.dtype)
    most = MAX_PRODUCTS // 2 if wide else MAX_PRODUCTS
    products = min(triton.next_power_of_2(triton.cdiv(max(n, 1), ROWS)), most)
    blocks = triton.cdiv(n, ROWS * products)
    one_part = parts > 1 and blocks * columns < PROGRAMS
    result = rows.new_empty(n, width)
    sums = rows.new_empty(parts, n, width, dtype=torch.float32) if one_part else result
    _linear[blocks, columns, parts if one_part else 1](
        *(rows, *weight, None if one_part else bias, sums),
        *(n, size, width, part_size, rows.stride(0)),
        ROWS=ROWS,
        PRODUCTS=products,
        COLUMNS=COLUMNS,
        DEPTH=depth,
        BITS=bits,
        BIAS=bias is not None and not one_part,
        ONE_PART=one_part,
        num_warps=8 if wide or products == MAX_PRODUCTS else 4,
        maxnreg=MAX_REGISTERS,
        enable_fp_fusion=False,
    )
    if one_part:
        _add_parts[triton.cdiv(n, ROWS), columns](
            *(sums, bias, result, parts, n, width),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            BIAS=bias is not None,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return result.view(*x.shape[:-1], width)


def split(width: int, size: int, depth: int) -> tuple[int, int]:
    """Return the parts of the sums with a (width, size) weight, and the terms of a part."""
    steps = triton.cdiv(size, depth)
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(width, COLUMNS))
    part_size = triton.cdiv(steps, max(min(wanted, steps // MIN_STEPS), 1)) * depth
    return triton.cdiv(size, part_size), part_size
