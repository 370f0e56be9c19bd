"""Attention of the nodes of draft trees.

The rows are the nodes in all heads that share a key. MLX's operation reads the keys again for each
of these heads, and a mask of the size of the context. Here committed positions take no mask, and
each node has a word of 64 bits that says which nodes it sees.

Keys are divided by logical position: a split has `SPAN` positions and the nodes at these positions,
wherever the columns of the nodes are. Each split has its own softmax, and a second kernel merges
the splits in the order of positions.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from treeflash.decoding.tree import DraftTree
from treeflash_mlx.metal_kernels import ROUNDING, choose, make_kernel, relative_error

SPAN = 512
"""Positions of a split."""
MAX_NODES = 64
MAX_HEAD_DIM = 256
SIMDGROUPS = 4
RACED_COLUMNS = (1024, 4096, 16384)
RACED_NODES = 12

# A simdgroup has 8 rows, and computes transposed matrices: 8 keys by 8 rows of scores, and 8 values
# by 8 rows of outputs. A lane reads 8 neighbours of a key and 4 of a value at once: element 4 i + j
# of 32 is column i of the left operand's matrix j, or row i of the output's matrix j.
PARTS = """
    uint lane = thread_index_in_simdgroup;
    uint row = (lane >> 4 & 1) * 4 + (lane >> 1 & 3), column = (lane >> 3 & 1) * 4 + (lane & 1) * 2;
    uint heads = q_shape[1], nodes = q_shape[2], key_heads = k_shape[1], group = heads / key_heads;
    uint b = threadgroup_position_in_grid.z / key_heads;
    uint key_head = threadgroup_position_in_grid.z % key_heads;
    uint split = threadgroup_position_in_grid.y, splits = threadgroups_per_grid.y;
    uint rows = group * nodes, first_row =
        8 * (threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup);
    if (first_row >= rows)
        return;
    const device T* keys = k + b * k_strides[0] + key_head * k_strides[1];
    const device T* values = v + b * v_strides[0] + key_head * v_strides[1];
    int start = starts[b], first = split * SPAN, stop = first + SPAN;

    uint place[2];  // of this lane's two rows in the output
    ulong seen[2];
    simdgroup_float8x8 query[D / 8], output[D / 8];
    for (uint i = 0; i < 2; ++i) {
        uint r = min(first_row + column + i, rows - 1);
        uint head = key_head * group + r / nodes, node = r % nodes;
        place[i] = (b * heads + head) * nodes + node;
        seen[i] = words[b * nodes + node];
        const device T* from = q + b * q_strides[0] + head * q_strides[1] + node * q_strides[2];
        for (uint d = 0; d < D / 32; ++d) {
            vec<T, 4> x = *(const device vec<T, 4>*)(from + 32 * d + 4 * row);
            for (uint j = 0; j < 4; ++j) {
                query[4 * d + j].thread_elements()[i] = float(x[j]) * scale[0];
                output[4 * d + j].thread_elements()[i] = 0.0f;
            }
        }
    }
    float highest[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};

    // First the committed positions, then the nodes, in tiles of 16.
    bool on_tree = false;
    int c = first, end = min(stop, start);
    while (true) {
        if (!on_tree && c >= end) {
            if (stop <= start)
                break;
            on_tree = true;
            c = start;
            end = min(start + int(nodes), k_shape[2]);
        }
        if (c >= end)
            break;
        simdgroup_float8x8 scores[2];
        for (uint u = 0; u < 2; ++u) {
            int key = c + int(8 * u + row);
            const device T* from = keys + min(key, end - 1) * k_strides[2] + 4 * column;
            scores[u] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            for (uint d = 0; d < D / 32; ++d) {
                vec<T, 4> x = *(const device vec<T, 4>*)(from + 32 * d);
                vec<T, 4> y = *(const device vec<T, 4>*)(from + 32 * d + 4);
                for (uint j = 0; j < 4; ++j) {
                    simdgroup_float8x8 left;
                    left.thread_elements()[0] = float(x[j]);
                    left.thread_elements()[1] = float(y[j]);
                    simdgroup_multiply_accumulate(scores[u], left, query[4 * d + j], scores[u]);
                }
            }
            bool here = key < end;
            if (on_tree && here) {
                int position = positions[b * nodes + key - start];
                here = position >= first && position < stop;
            }
            for (uint i = 0; i < 2; ++i)
                if (!here || (on_tree && !(seen[i] >> (key - start) & 1)))
                    scores[u].thread_elements()[i] = -INFINITY;
        }
        for (uint i = 0; i < 2; ++i) {
            float top = max(scores[0].thread_elements()[i], scores[1].thread_elements()[i]);
            top = max(top, simd_shuffle_xor(top, 2));
            top = max(top, simd_shuffle_xor(top, 4));
            top = max(top, simd_shuffle_xor(top, 16));
            top = max(top, highest[i]);
            float factor = exp(highest[i] - top);
            highest[i] = top;
            sum[i] *= factor;
            for (uint d = 0; d < D / 8; ++d)
                output[d].thread_elements()[i] *= factor;
            for (uint u = 0; u < 2; ++u) {
                float share = exp(scores[u].thread_elements()[i] - top);
                scores[u].thread_elements()[i] = share;
                sum[i] += share;
            }
        }
        for (uint u = 0; u < 2; ++u) {
            int key = c + int(8 * u + column);
            const device T* from[2];
            for (int i = 0; i < 2; ++i)
                from[i] = values + min(key + i, end - 1) * v_strides[2] + 4 * row;
            for (uint d = 0; d < D / 32; ++d) {
                vec<T, 4> x = *(const device vec<T, 4>*)(from[0] + 32 * d);
                vec<T, 4> y = *(const device vec<T, 4>*)(from[1] + 32 * d);
                for (uint j = 0; j < 4; ++j) {
                    simdgroup_float8x8 left;
                    left.thread_elements()[0] = float(x[j]);
                    left.thread_elements()[1] = float(y[j]);
                    simdgroup_multiply_accumulate(
                        output[4 * d + j], left, scores[u], output[4 * d + j]);
                }
            }
        }
        c += 16;
    }
    for (uint i = 0; i < 2; ++i) {
        sum[i] += simd_shuffle_xor(sum[i], 2);
        sum[i] += simd_shuffle_xor(sum[i], 4);
        sum[i] += simd_shuffle_xor(sum[i], 16);
        if (first_row + column + i >= rows)
            continue;
        uint part = place[i] * splits + split;
        for (uint d = 0; d < D / 8; ++d)
            parts[part * D + d / 4 * 32 + 4 * row + d % 4] = output[d].thread_elements()[i];
        if (row == 0) {
            weights[2 * part] = highest[i];
            weights[2 * part + 1] = sum[i];
        }
    }
"""
MERGE = """
    uint d = thread_position_in_grid.x, row = thread_position_in_grid.y, width = parts_shape[2];
    uint splits = parts_shape[1];
    float highest = -INFINITY, output = 0.0f, sum = 0.0f;
    for (uint s = 0; s < splits; ++s)
        highest = max(highest, weights[2 * (row * splits + s)]);
    for (uint s = 0; s < splits; ++s) {
        uint part = row * splits + s;
        float factor = exp(weights[2 * part] - highest);
        output += factor * parts[part * width + d];
        sum += factor * weights[2 * part + 1];
    }
    out[row * width + d] = static_cast<T>(output / sum);
"""
INPUTS = ("q", "k", "v", "words", "positions", "starts", "scale")


def ancestor_words(ancestors: mx.array) -> mx.array:
    """(batch, n) uint64 words of (batch, n, n) bool; bit j is true if a node sees node j."""
    bits = mx.array(1, mx.uint64) << mx.arange(ancestors.shape[2]).astype(mx.uint64)
    return mx.where(ancestors, bits, mx.array(0, mx.uint64)).sum(2)


def tree_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    words: mx.array,
    positions: mx.array,
    starts: mx.array,
    scale: float,
    length: int,
) -> mx.array:
    """(batch, heads, n, head_dim) outputs at all nodes.

    Args:
        q: (batch, heads, n, head_dim); the entries of a row are neighbours in memory.
        k: (batch, key_heads, columns, head_dim), the committed positions and then the nodes.
        v: like `k`.
        words: (batch, n) uint64; see `ancestor_words`.
        positions: (batch, n) int32 logical positions of the nodes.
        starts: (batch,) int32 committed positions.
        scale: of the scores.
        length: of the longest sequence, with the deepest node.
    """
    batch, heads, n, width = q.shape
    key_heads, splits = k.shape[1], -(-length // SPAN)
    tiles = -(-(heads // key_heads * n) // (8 * SIMDGROUPS))
    template = {"T": q.dtype, "D": width, "SPAN": SPAN, "SIMDGROUPS": SIMDGROUPS}
    # Keys and values are parts of a longer storage, and queries are often transposed.
    kernel = make_kernel("attention_parts", INPUTS, ("parts", "weights"), PARTS, copies=False)
    parts, weights = kernel(
        inputs=[q, k, v, words, positions, starts, mx.array([scale])],
        template=list(template.items()),
        grid=(32 * SIMDGROUPS * tiles, splits, batch * key_heads),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        output_shapes=[(batch * heads * n, splits, width), (batch * heads * n, splits, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    (out,) = make_kernel("attention_merge", ("parts", "weights"), ("out",), MERGE)(
        inputs=[parts, weights],
        template=[("T", q.dtype)],
        grid=(width, batch * heads * n, 1),
        threadgroup=(width, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    result: mx.array = out
    return result


def runs_shape(head_dim: int, nodes: int) -> bool:
    """Whether the kernel can run trees of this size with heads of this width."""
    return head_dim % 32 == 0 and head_dim <= MAX_HEAD_DIM and nodes <= MAX_NODES


@lru_cache(64)
def winning_columns(heads: int, key_heads: int, head_dim: int, dtype: mx.Dtype) -> float:
    """The number of columns from which on the kernel wins on this device; infinite if never.

    It is decided at load, when a pass over a tree is first built, and once in a process.
    """
    tree = DraftTree.from_parents(
        np.zeros(RACED_NODES, np.int32), (np.arange(RACED_NODES, dtype=np.int32) - 1) // 2
    )
    sizes = heads, key_heads, head_dim
    # Two splits of committed positions, and a third that begins between the depths of the tree.
    if not _wins(tree, 2 * SPAN - 2 + RACED_NODES, sizes, dtype, race=False):
        return math.inf
    races = (n for n in RACED_COLUMNS if _wins(tree, n, sizes, dtype, race=True))
    return next(races, math.inf)


def _wins(
    tree: DraftTree, columns: int, sizes: tuple[int, int, int], dtype: mx.Dtype, *, race: bool
) -> bool:
    """Whether the kernel is right or, in a race, faster, with this number of columns."""
    heads, key_heads, width = sizes
    n, start = len(tree), columns - len(tree)
    ks = mx.random.split(mx.random.key(0), 3)
    q = mx.random.normal((1, heads, n, width), key=ks[0]).astype(dtype)
    k, v = (mx.random.normal((1, key_heads, columns, width), key=x).astype(dtype) for x in ks[1:])
    ancestors = mx.array(tree.ancestor_mask())
    mask = mx.concatenate([mx.ones((n, start), mx.bool_), ancestors], 1)
    words, positions = ancestor_words(ancestors[None]), mx.array(tree.positions(start)[None])
    starts, length = mx.array([start], mx.int32), start + int(tree.depths.max()) + 1
    scale = width**-0.5

    def by_kernel(q: mx.array, _: int = 0) -> mx.array:
        return tree_attention(q, k, v, words, positions, starts, scale, length)

    def by_operation(q: mx.array, _: int = 0) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    def error() -> float:
        return relative_error(by_kernel(q), by_operation(q))

    what, limit = "attention of draft trees", 2 * ROUNDING[dtype]
    if race:
        return choose(what, lambda: 0, limit, by_kernel, by_operation, q)
    return choose(what, error, limit)
