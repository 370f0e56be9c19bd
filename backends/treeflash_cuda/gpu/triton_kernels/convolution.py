"""Short convolutions on draft trees: the inputs of a node, their sum and the activation at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from transformers.activations import ACT2FN

BLOCK = 512
"""Channels of a program."""
FUSED = {None: False, "silu": True, "swish": True}
"""Names of activations in transformers, and whether they are SiLU; others follow the kernel."""


@triton.jit
def _convolve_paths(
    rows_pointer,
    tails_pointer,
    slots_pointer,
    windows_pointer,  # (trees, n, KERNEL)
    weight_pointer,
    bias_pointer,
    out_pointer,  # (trees, n, channels)
    inputs_pointer,  # (trees, KERNEL - 1 + n, channels)
    n,
    channels,
    row_strides,  # the strides of trees, nodes and channels
    tail_strides,  # the strides of slots, channels and positions
    weight_strides,  # the strides of channels and positions
    KERNEL: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    node, tree = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dims = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_channel = dims < channels
    slot = tl.load(slots_pointer + tree).to(tl.int64)
    tail = tails_pointer + slot * tail_strides[0] + dims * tail_strides[1]
    tree_rows = rows_pointer + tree * row_strides[0] + dims * row_strides[2]
    inputs = inputs_pointer + tree * (KERNEL - 1 + n) * channels + dims
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(KERNEL):
        place = tl.load(windows_pointer + (tree * n + node) * KERNEL + i)
        if place < KERNEL - 1:
            x = tl.load(tail + place * tail_strides[2], mask=is_channel, other=0)
        else:
            row = place - (KERNEL - 1)
            x = tl.load(tree_rows + row * row_strides[1], mask=is_channel, other=0)
        weight = weight_pointer + dims * weight_strides[0] + i * weight_strides[1]
        weight = tl.load(weight, mask=is_channel, other=0).to(tl.float32)
        total = total + x.to(tl.float32) * weight
    own = tl.load(tree_rows + node * row_strides[1], mask=is_channel, other=0)
    tl.store(inputs + (KERNEL - 1 + node) * channels, own, mask=is_channel)
    if node == 0:
        for i in tl.static_range(KERNEL - 1):
            x = tl.load(tail + i * tail_strides[2], mask=is_channel, other=0)
            tl.store(inputs + i * channels, x, mask=is_channel)
    if bias_pointer is not None:
        total = total + tl.load(bias_pointer + dims, mask=is_channel, other=0).to(tl.float32)
    if SILU:  # its input is rounded, as for PyTorch's function
        total = total.to(weight_pointer.dtype.element_ty).to(tl.float32)
        total = total / (1 + tl.exp(-total))
    out = total.to(out_pointer.dtype.element_ty)
    tl.store(out_pointer + (tree * n + node) * channels + dims, out, mask=is_channel)


def convolve_paths(
    rows: Tensor,
    tails: Tensor,
    slots: Tensor,
    windows: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `recurrence.convolve_paths` in one launch."""
    (trees, n, channels), kernel = rows.shape, weight.shape[1]
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    inputs = rows.new_empty((trees, kernel - 1 + n, channels))
    _convolve_paths[triton.cdiv(channels, BLOCK), n, trees](
        *(rows, tails, slots, windows, weight, bias, out, inputs, n, channels),
        *(rows.stride(), tails.stride(), weight.stride()),
        KERNEL=kernel,
        SILU=FUSED.get(activation, False),
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    return out if activation in FUSED else ACT2FN[activation](out), inputs
