"""Moves of the columns of a KV cache, in all layers at once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _move_columns(
    storage_pointer,
    sources_pointer,
    targets_pointer,
    ends_pointer,
    width,
    plane_stride,
    column_stride,
    WIDTH: tl.constexpr,
):
    """Move the columns of one sequence in one plane, the first ones first.

    A target is never a later source, and a thread moves the same numbers of every column.
    """
    plane, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(ends_pointer + sequence - 1, mask=sequence > 0, other=0)
    end = tl.load(ends_pointer + sequence)
    numbers = tl.arange(0, WIDTH)
    mask = numbers < width
    pointers = storage_pointer + plane * plane_stride + numbers
    for i in range(first, end):
        source = tl.load(sources_pointer + i).to(tl.int64)
        target = tl.load(targets_pointer + i).to(tl.int64)
        column = tl.load(pointers + source * column_stride, mask=mask)
        tl.store(pointers + target * column_stride, column, mask=mask)


def move_columns(storage: Tensor, sources: Tensor, targets: Tensor, ends: Tensor) -> None:
    """Compute `operations.move_columns` in one launch, however large the storage is."""
    width = storage.shape[-1]
    planes = storage.flatten(0, -3)
    assert planes.data_ptr() == storage.data_ptr()
    assert planes.stride(2) == 1
    _move_columns[len(planes), len(ends)](
        *(planes, sources, targets, ends, width, planes.stride(0), planes.stride(1)),
        WIDTH=triton.next_power_of_2(width),
        num_warps=1,
        enable_fp_fusion=False,
    )
