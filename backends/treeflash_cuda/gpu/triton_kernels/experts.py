"""Products of rows with the weights of their experts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from treeflash_cuda.gpu.triton_kernels import MAX_REGISTERS, needs_registers

FEW_ROWS, MANY_ROWS = 16, 64
"""Rows of an expert that a program multiplies at once: the fewest that GPUs multiply, or more, so
that the expert's weights are read less often."""
COLUMNS, DEPTH = 64, 64
"""Columns of a program, and terms of a sum that are added at once."""


@triton.jit
def _grouped_linear(
    x_pointer,
    weight_pointer,
    ends_pointer,
    bias_pointer,
    result_pointer,
    size,  # terms of a sum
    width,  # columns
    x_stride,
    weight_strides,  # the strides of experts, columns and terms
    bias_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIAS: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.program_id(1).to(tl.int64)
    first = tl.load(ends_pointer + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_pointer + expert)
    is_column = columns < width
    weights = weight_pointer + expert * weight_strides[0] + columns[None, :] * weight_strides[1]
    for start in range(first, end, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        is_row = rows < end
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for term in range(0, size, DEPTH):
            terms = term + tl.arange(0, DEPTH)
            is_term = terms < size
            places = rows[:, None] * x_stride + terms[None, :]
            x = tl.load(x_pointer + places, mask=is_row[:, None] & is_term[None, :], other=0)
            weight = tl.load(
                weights + terms[:, None] * weight_strides[2],
                mask=is_term[:, None] & is_column[None, :],
                other=0,
            )
            total += tl.dot(x, weight, input_precision="ieee")
        if BIAS:
            bias = tl.load(bias_pointer + expert * bias_stride + columns, mask=is_column, other=0)
            total += bias.to(tl.float32)[None, :]
        places = rows[:, None] * width + columns[None, :]
        result = total.to(x_pointer.dtype.element_ty)
        tl.store(result_pointer + places, result, mask=is_row[:, None] & is_column[None, :])


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `operations.grouped_linear`, in one launch beside the one of the zeros."""
    experts, width, size = weight.shape
    assert x.stride(1) == 1
    assert bias is None or bias.stride(1) == 1
    result = x.new_zeros(len(x), width)
    many, wide = len(x) >= experts * MANY_ROWS // 2, needs_registers(x.dtype)
    _grouped_linear[triton.cdiv(width, COLUMNS), experts](
        *(x, weight, ends, bias, result, size, width, x.stride(0), weight.stride()),
        0 if bias is None else bias.stride(0),
        ROWS=MANY_ROWS if many else FEW_ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH // 2 if wide else DEPTH,
        BIAS=bias is not None,
        enable_fp_fusion=False,
        num_warps=8 if wide else 4,
        maxnreg=MAX_REGISTERS,
    )
    return result
