"""RMSNorm with residual, rotary with the write to the cache, and gated activations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a program that computes elements one by one."""
MAX_INT8 = tl.constexpr(127.0)
ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2**23: float32 numbers around it are integers, so adding it rounds to even."""


@triton.jit
def _rms_norm(
    x_pointer,
    residual_pointer,
    weight_pointer,
    normed_pointer,
    total_pointer,
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,  # SIZE, rounded up to a power of two
    RESIDUAL: tl.constexpr,
):
    row, elements = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    mask = elements < SIZE
    dtype: tl.constexpr = x_pointer.dtype.element_ty
    x = tl.load(x_pointer + row * x_stride + elements, mask=mask, other=0).to(tl.float32)
    if RESIDUAL:
        residual = tl.load(residual_pointer + row * residual_stride + elements, mask=mask, other=0)
        total = (x + residual.to(tl.float32)).to(dtype)
        tl.store(total_pointer + row * SIZE + elements, total, mask=mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_pointer + elements, mask=mask, other=0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight
    tl.store(normed_pointer + row * SIZE + elements, normed.to(dtype), mask=mask)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `operations.rms_norm` in one launch."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    added = None if residual is None else residual.reshape(-1, size)
    assert rows.stride(1) == 1
    assert added is None or added.stride(1) == 1
    normed = rows.new_empty(rows.shape)
    total = None if added is None else rows.new_empty(rows.shape)
    width = triton.next_power_of_2(size)
    _rms_norm[len(rows),](
        *(rows, added, weight, normed, total),
        *(rows.stride(0), 0 if added is None else added.stride(0), eps),
        SIZE=size,
        WIDTH=width,
        RESIDUAL=added is not None,
        # The number follows from the width alone, because the order of the sum depends on it.
        num_warps=min(max(width // 512, 1), 16),
        enable_fp_fusion=False,
    )
    return normed.view(x.shape), x if total is None else total.view(x.shape)


@triton.jit
def _rotate(
    x_pointer,  # the address of the rows' first elements, (rows,)
    weight_pointer,
    cos_pointer,  # the address of the row's position
    sin_pointer,
    is_row,  # (rows,) bool
    eps,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    NORM: tl.constexpr,
):
    """Return (rows, DIMS) heads, normalised and rotated: float32 with values of the dtype."""
    dims, half = tl.arange(0, DIMS), ROTARY_DIM // 2
    dtype: tl.constexpr = x_pointer.dtype.element_ty
    partner = tl.where(dims < half, dims + half, tl.where(dims < ROTARY_DIM, dims - half, dims))
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    x = tl.load(x_pointer[:, None] + dims[None, :], mask=mask, other=0).to(tl.float32)
    y = tl.load(x_pointer[:, None] + partner[None, :], mask=mask, other=0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x_weight = tl.load(weight_pointer + dims, mask=dims < HEAD_DIM, other=0).to(tl.float32)
        y_weight = tl.load(weight_pointer + partner, mask=dims < HEAD_DIM, other=0).to(tl.float32)
        x = (x * factor * x_weight[None, :]).to(dtype).to(tl.float32)
        y = (y * factor * y_weight[None, :]).to(dtype).to(tl.float32)
    cos = tl.load(cos_pointer + dims, mask=dims < ROTARY_DIM, other=0).to(tl.float32)
    sin = tl.load(sin_pointer + dims, mask=dims < ROTARY_DIM, other=0).to(tl.float32)
    cos, sin = tl.where(dims < ROTARY_DIM, cos, 1.0), tl.where(dims < half, -sin, sin)
    return (x * cos[None, :] + y * sin[None, :]).to(dtype).to(tl.float32)


@triton.jit
def _store_column(
    x,  # (DIMS,) float32 of a key head
    column,  # pointer
    DTYPE: tl.constexpr,
    TINY: tl.constexpr,  # the smallest scale
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    dims = tl.arange(0, DIMS)
    mask = dims < HEAD_DIM
    if QUANTISED:
        scale = (tl.max(tl.abs(x), 0) / MAX_INT8).to(DTYPE).to(tl.float32)
        scale = tl.maximum(scale, TINY)
        numbers = (x / scale + ROUNDING) - ROUNDING
        numbers = tl.minimum(tl.maximum(numbers, -MAX_INT8), MAX_INT8)
        tl.store(column + dims, numbers.to(tl.int8), mask=mask)
        tl.store((column + HEAD_DIM).to(tl.pointer_type(tl.float32), bitcast=True), scale)
    else:
        tl.store(column + dims, x.to(DTYPE), mask=mask)


@triton.jit
def _rotate_and_store(
    q_pointer,
    k_pointer,
    v_pointer,
    cos_pointer,
    sin_pointer,
    k_cache_pointer,
    v_cache_pointer,
    slots_pointer,
    q_weight_pointer,
    k_weight_pointer,
    rotated_pointer,  # (n, heads, HEAD_DIM)
    q_strides,
    k_strides,
    v_strides,
    rotary_stride,
    cache_strides,
    eps,
    GROUPS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,  # GROUPS, rounded up to a power of two
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    NORM: tl.constexpr,
    QUANTISED: tl.constexpr,
    TINY: tl.constexpr,
):
    row, kv_head, kv_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    group, dims = tl.arange(0, GROUP_ROWS), tl.arange(0, DIMS)
    dtype: tl.constexpr = q_pointer.dtype.element_ty
    cos, sin = cos_pointer + row * rotary_stride, sin_pointer + row * rotary_stride
    heads = kv_head * GROUPS + group
    q = q_pointer + row * q_strides[0] + heads * q_strides[1]
    rotated = _rotate(
        *(q, q_weight_pointer, cos, sin, group < GROUPS, eps),
        *(HEAD_DIM, DIMS, ROTARY_DIM, NORM),
    )
    places = (row * kv_heads * GROUPS + heads) * HEAD_DIM
    mask = (group < GROUPS)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(rotated_pointer + places[:, None] + dims[None, :], rotated.to(dtype), mask=mask)
    one = tl.zeros((1,), tl.int32)
    k = _rotate(
        *(k_pointer + row * k_strides[0] + kv_head * k_strides[1] + one, k_weight_pointer),
        *(cos, sin, one == 0, eps, HEAD_DIM, DIMS, ROTARY_DIM, NORM),
    )
    v = v_pointer + row * v_strides[0] + kv_head * v_strides[1] + dims
    v = tl.load(v, mask=dims < HEAD_DIM, other=0).to(tl.float32)
    slot = tl.load(slots_pointer + row).to(tl.int64)
    place = kv_head.to(tl.int64) * cache_strides[0] + slot * cache_strides[1]
    k = tl.reshape(k, (DIMS,))
    _store_column(k, k_cache_pointer + place, dtype, TINY, HEAD_DIM, DIMS, QUANTISED)
    _store_column(v, v_cache_pointer + place, dtype, TINY, HEAD_DIM, DIMS, QUANTISED)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Compute `operations.rotate_and_store` in one launch."""
    (n, heads, head_dim), kv_heads = q.shape, k.shape[1]
    assert q.stride(2) == k.stride(2) == v.stride(2) == k_cache.stride(2) == 1
    assert k_cache.stride() == v_cache.stride()
    assert cos.stride() == sin.stride()
    rotated = q.new_empty((n, heads, head_dim))
    groups = heads // kv_heads
    _rotate_and_store[n, kv_heads](
        *(q, k, v, cos, sin, k_cache, v_cache, slots, *(norms or (None, None)), rotated),
        *(q.stride()[:2], k.stride()[:2], v.stride()[:2], cos.stride(0), k_cache.stride()[:2]),
        eps,
        GROUPS=groups,
        GROUP_ROWS=triton.next_power_of_2(groups),
        HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim),
        ROTARY_DIM=cos.shape[1],
        NORM=norms is not None,
        QUANTISED=k_cache.dtype == torch.int8,
        TINY=torch.finfo(q.dtype).tiny,
        num_warps=2,
        enable_fp_fusion=False,
    )
    return rotated


@triton.jit
def _gated(
    gate_pointer,
    up_pointer,
    result_pointer,
    gate_stride,
    up_stride,
    size,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    elements = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < size
    dtype: tl.constexpr = gate_pointer.dtype.element_ty
    x = tl.load(gate_pointer + row * gate_stride + elements, mask=mask, other=0).to(tl.float32)
    if GELU:
        # x / 2 * (1 + tanh(y)) is x * sigmoid(2 * y).
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        active = x * tl.sigmoid(inner)
    else:
        active = x * tl.sigmoid(x)
    up = tl.load(up_pointer + row * up_stride + elements, mask=mask, other=0).to(tl.float32)
    result = active.to(dtype).to(tl.float32) * up
    tl.store(result_pointer + row * size + elements, result.to(dtype), mask=mask)


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Compute `operations.gated` in one launch."""
    size = gate.shape[-1]
    gates, ups = gate.reshape(-1, size), up.reshape(-1, size)
    assert gates.stride(1) == ups.stride(1) == 1
    result = gates.new_empty(gates.shape)
    _gated[len(gates), triton.cdiv(size, BLOCK)](
        *(gates, ups, result, gates.stride(0), ups.stride(0), size),
        BLOCK=BLOCK,
        GELU=activation == "gelu_pytorch_tanh",
        enable_fp_fusion=False,
    )
    return result.view(gate.shape)
