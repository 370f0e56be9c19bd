"""Attention in which the heads of a group are rows of one head, where MLX has no fused kernel.

MLX fuses attention to a mask for few rows, as long as all heads of a group together have few of
them, and for many rows, if heads are narrow. Its operations for everything else read the keys of a
group once for each of its heads.
"""

from __future__ import annotations

import mlx.core as mx

FEW_ROWS, MAX_GROUP_ROWS = 8, 32
"""Rows of MLX's kernel for few rows: of a head, and of the heads of a group together."""
MAX_FUSED_WIDTH = 128
"""The widest heads of its kernel for many rows."""


def is_unfused(queries: mx.array, keys: mx.array) -> bool:
    """Return whether MLX would read the keys of a group for each of its heads, on a GPU."""
    _, heads, rows, width = queries.shape
    group = heads // keys.shape[1]
    if group == 1:
        return False
    if rows <= FEW_ROWS:
        return rows * group > MAX_GROUP_ROWS
    return width > MAX_FUSED_WIDTH


def attend_by_group(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array
) -> mx.array:
    """Return the (batch, heads, n, width) attention to (batch, groups, columns, width) keys.

    The mask is (n, columns) or (batch, 1, n, columns).
    """
    batch, heads, nodes, width = queries.shape
    groups = keys.shape[1]
    rows = queries.reshape(batch, groups, heads // groups * nodes, width)
    masks = mx.concatenate([mask] * (heads // groups), -2)
    out = mx.fast.scaled_dot_product_attention(rows, keys, values, scale=scale, mask=masks)
    return out.reshape(batch, heads, nodes, -1)
