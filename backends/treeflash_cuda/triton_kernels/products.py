"""Products with weights whose rows do not depend on the number of rows, for exact mode."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows of a product, the fewest that GPUs multiply at once. Products of other shapes may add in
another order, so a prompt has as many for each program."""
COLUMNS, DEPTH = 64, 64
"""Columns of a program, and terms of a sum that are added at once."""


@triton.jit(do_not_specialize=["n"])
def _linear(
    x_pointer,
    weight_pointer,
    bias_pointer,
    result_pointer,
    n,
    size,  # terms of a sum
    width,  # columns
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIAS: tl.constexpr,
):
    # Programs of the same columns follow one another, and find the weight in a cache.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < n, columns < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, DEPTH):
        terms = start + tl.arange(0, DEPTH)
        is_term = terms < size
        places = rows[:, None] * x_stride + terms[None, :]
        x = tl.load(x_pointer + places, mask=is_row[:, None] & is_term[None, :], other=0)
        places = columns[:, None] * size + terms[None, :]
        weight = tl.load(
            weight_pointer + places, mask=is_column[:, None] & is_term[None, :], other=0
        )
        total += tl.dot(x, tl.trans(weight), input_precision="ieee")
    if BIAS:
        bias = tl.load(bias_pointer + columns, mask=is_column, other=0)
        total += bias.to(tl.float32)[None, :]
    places = rows[:, None] * width + columns[None, :]
    result = total.to(x_pointer.dtype.element_ty)
    tl.store(result_pointer + places, result, mask=is_row[:, None] & is_column[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `linear` of PyTorch with an order of a row's sums that other rows do not change.

    Args:
        x: (..., size).
        weight: (width, size), contiguous.
        bias: (width,).

    Returns:
        (..., width) in the dtype of x.
    """
    width, size = weight.shape
    assert weight.is_contiguous()
    rows = x.reshape(-1, size)
    result = rows.new_empty(len(rows), width)
    _linear[triton.cdiv(len(rows), ROWS), triton.cdiv(width, COLUMNS)](
        *(rows, weight, bias, result, len(rows), size, width, rows.stride(0)),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH // 2 if x.dtype.itemsize == 4 else DEPTH,
        BIAS=bias is not None,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return result.view(*x.shape[:-1], width)
