"""Attention of the nodes of draft trees.

The rows are the nodes in all heads that share a key. MLX's operation reads the keys again for each
of these heads, and a mask of the size of the context. Here committed positions take no mask, and
each node has a word of 64 bits that says which nodes it sees. Layers may have a sliding window,
sinks, or keys and values of 4 or 8 bits, which are dequantised on the way.

Keys are divided by logical position: a split has some positions and the nodes at these positions,
wherever the columns of the nodes are. Each split has its own softmax, and a second kernel merges
the splits in the order of positions.

Exact mode needs more, because each tile of keys rescales the outputs to a new maximum: a key must
have the same place in the same tile in every pass. So there tiles have 16 positions, whoever is at
them. Splits of committed positions are shared by all nodes, as before. In the others, a simdgroup
has the heads of one node and takes the keys along its path. A tree's node at position 130, say, has
the third place in the tile that begins at 128, after two ancestors that may be in any columns; in
plain decoding the same three keys are in neighbouring columns. With splits of one length, whatever
the context, and no other order anywhere, the node has the same bits in both.

A thread has 128 registers, and a simdgroup's queries and outputs take 48 of them for 128 numbers of
a head in half precision. Wider heads are shared: two or four simdgroups have the same rows and 128
numbers each, add their parts of the scores in threadgroup memory, and then know the same shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from numpy.typing import NDArray

from treeflash.decoding.tree import DraftTree
from treeflash_mlx.group_attention import attend_by_group, is_unfused
from treeflash_mlx.metal_kernels import ROUNDING, choose, make_kernel, padded, relative_error

SPANS: Mapping[int, int] = {0: 128, 4096: 512}
"""Positions of a split, by the positions from which on they are used: short contexts would make too
few threadgroups with long splits, long ones too many parts with short splits."""
EXACT_SPAN = 256
"""Positions of a split in exact mode, in all contexts: a multiple of a tile."""
MAX_NODES = 64
"""Nodes of a tree that words of ancestors can have; paths have no limit."""
SHARES = (1, 2, 4)
SHARE_WIDTH = 128
"""Simdgroups that may share the heads of a row, and the numbers that each has at most."""
MAX_MERGE_THREADS = 128
SIMDGROUPS = 4
BITS, GROUP_SIZES = (4, 8), (32, 64)
"""Quantised keys and values that the kernel reads."""
TIMED_COLUMNS = (1024, 4096, 16384)
TIMED_NODES, FEW_NODES = 12, 6
"""Nodes of the trees that are timed: MLX has another kernel for few rows."""

# A simdgroup has 8 rows, and computes transposed matrices: 8 keys by 8 rows of scores, and 8 values
# by 8 rows of outputs. A lane reads 8 neighbours of a key and 4 of a value at once: element 4 i + j
# of 32 is column i of the left operand's matrix j, or row i of the output's matrix j.
PARTS = """
    constexpr uint WIDTH = D / SHARES;
    uint share = simdgroup_index_in_threadgroup % SHARES, begin = share * WIDTH;
    uint tile = simdgroup_index_in_threadgroup / SHARES;
    uint lane = thread_index_in_simdgroup;
    uint row = (lane >> 4 & 1) * 4 + (lane >> 1 & 3), column = (lane >> 3 & 1) * 4 + (lane & 1) * 2;
    uint heads = q_shape[1], nodes = q_shape[2], key_heads = k_shape[1], group = heads / key_heads;
    uint b = threadgroup_position_in_grid.z / key_heads;
    uint key_head = threadgroup_position_in_grid.z % key_heads;
    uint split = threadgroup_position_in_grid.y, splits = threadgroups_per_grid.y;
    int window = bounds[0], offset = bounds[1];  // the position of the first key
    int start = starts[b], first = (split + offset / SPAN) * SPAN, stop = first + SPAN;
    uint first_row = 8 * (threadgroup_position_in_grid.x * (SIMDGROUPS / SHARES) + tile);
    BEGIN_ROWS
    uint rows = step * nodes;
    BEFORE_KEYS
    KEY_PARTS
    VALUE_PARTS

    uint place[2];  // of this lane's two rows in the output
    int oldest[2];  // position in the window
    simdgroup_matrix<T, 8, 8> query[WIDTH / 8];
    simdgroup_float8x8 output[WIDTH / 8];
    UNROLL for (uint i = 0; i < 2; ++i) {
        uint r = min(first_row + column + i, rows - 1), node = r / step;
        uint head = key_head * group + min(r % step, group - 1);
        place[i] = (b * heads + head) * nodes + node;
        oldest[i] = positions[b * nodes + node] - window + 1;
        SEE_NODES
        const device T* from = q + b * q_strides[0] + head * q_strides[1] + node * q_strides[2];
        UNROLL for (uint d = 0; d < WIDTH / 32; ++d) {
            vec<T, 4> x = *(const device vec<T, 4>*)(from + begin + 32 * d + 4 * row);
            UNROLL for (uint j = 0; j < 4; ++j) {
                query[4 * d + j].thread_elements()[i] = x[j];
                output[4 * d + j].thread_elements()[i] = 0.0f;
            }
        }
    }
    float highest[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};

    BEGIN_TILES
        simdgroup_float8x8 scores[2];
        UNROLL for (uint u = 0; u < 2; ++u) {
            int key = c + int(8 * u + row);
            int at = COLUMN_OF_KEY;
            scores[u] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            UNROLL for (uint d = 0; d < WIDTH / 32; ++d) {
                LOAD_KEY
                UNROLL for (uint j = 0; j < 4; ++j) {
                    LEFT left;
                    left.thread_elements()[0] = x[j];
                    left.thread_elements()[1] = y[j];
                    simdgroup_multiply_accumulate(scores[u], left, query[4 * d + j], scores[u]);
                }
            }
        }
        ADD_SHARES
        UNROLL for (uint u = 0; u < 2; ++u) {
            int key = c + int(8 * u + row);
            bool here = key < end;
            int position = key;
            FIND_POSITION
            UNROLL for (uint i = 0; i < 2; ++i) {
                scores[u].thread_elements()[i] *= scale[0];
                if (!here || position < oldest[i] || IS_HIDDEN)
                    scores[u].thread_elements()[i] = -INFINITY;
            }
        }
        UNROLL for (uint i = 0; i < 2; ++i) {
            float top = max(scores[0].thread_elements()[i], scores[1].thread_elements()[i]);
            top = max(top, simd_shuffle_xor(top, 2));
            top = max(top, simd_shuffle_xor(top, 4));
            top = max(top, simd_shuffle_xor(top, 16));
            top = max(top, highest[i]);
            float factor = exp(highest[i] - top);
            highest[i] = top;
            sum[i] *= factor;
            UNROLL for (uint d = 0; d < WIDTH / 8; ++d)
                output[d].thread_elements()[i] *= factor;
            UNROLL for (uint u = 0; u < 2; ++u) {
                float share = exp(scores[u].thread_elements()[i] - top);
                scores[u].thread_elements()[i] = share;
                sum[i] += share;
            }
        }
        UNROLL for (uint u = 0; u < 2; ++u) {
            int at[2];
            UNROLL for (int i = 0; i < 2; ++i) {
                int key = c + i + int(8 * u + column);
                at[i] = COLUMN_OF_KEY;
            }
            UNROLL for (uint d = 0; d < WIDTH / 32; ++d) {
                LOAD_VALUES
                UNROLL for (uint j = 0; j < 4; ++j) {
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
    UNROLL for (uint i = 0; i < 2; ++i) {
        sum[i] += simd_shuffle_xor(sum[i], 2);
        sum[i] += simd_shuffle_xor(sum[i], 4);
        sum[i] += simd_shuffle_xor(sum[i], 16);
        if (first_row + column + i >= rows || (first_row + column + i) % step >= group)
            continue;
        uint part = place[i] * splits + split;
        UNROLL for (uint d = 0; d < WIDTH / 8; ++d)
            parts[part * D + begin + d / 4 * 32 + 4 * row + d % 4] =
                output[d].thread_elements()[i];
        if (row == 0 && share == 0) {
            weights[2 * part] = highest[i];
            weights[2 * part + 1] = sum[i];
        }
    }
"""
BY_COLUMN = {
    "BEGIN_ROWS": """uint step = group;
    ulong seen[2];""",
    "SEE_NODES": "seen[i] = words[b * nodes + node];",
    "BEGIN_TILES": """// First the committed positions, then the nodes, in tiles of 16.
    bool on_tree = false;
    int c = max(first, max(offset, start - window + 1)), end = min(stop, start);
    while (true) {
        if (!on_tree && c >= end) {
            if (stop <= start)
                break;
            on_tree = true;
            c = start;
            end = min(start + int(nodes), k_shape[2] + offset);
        }
        if (c >= end)
            break;""",
    "COLUMN_OF_KEY": "min(key, end - 1) - offset",
    "FIND_POSITION": """if (on_tree && here) {
                position = positions[b * nodes + key - start];
                here = position >= first && position < stop;
            }""",
    "IS_HIDDEN": "(on_tree && !(seen[i] >> (key - start) & 1))",
}
# Along paths, rows are heads of one node in steps of whole matrices; otherwise of neighbours.
BY_POSITION = {
    "BEGIN_ROWS": """int reach = bounds[2], last = min(start + reach, k_shape[2] + offset);
    bool branches = bounds[3] && stop > start;
    uint step = branches ? (group + 7) / 8 * 8 : group;
    uint own = min(first_row / step, nodes - 1);
    int path = (b * nodes + own) * paths_shape[2] - start;  // of the position 0""",
    "SEE_NODES": "",
    "BEGIN_TILES": """int c = max(first, (start - window + 1) / 16 * 16), end = min(stop, last);
    while (c < end) {""",
    "COLUMN_OF_KEY": """branches && key >= start
                ? start - offset + paths[path + min(key, end - 1)]
                : max(min(key, end - 1) - offset, 0)""",
    "FIND_POSITION": "",
    "IS_HIDDEN": "position - oldest[i] >= window",
}
ALONE = {
    "BEFORE_KEYS": """if (first_row >= rows)
        return;""",
    "ADD_SHARES": "",
}
# All simdgroups of a threadgroup have the same tiles of keys, so they meet at every one. They
# write the next tile's scores elsewhere, while others still read this one's.
SHARED = {
    "BEFORE_KEYS": """threadgroup float shared[2][SIMDGROUPS][2][2][32];
    uint turn = 0;""",
    "ADD_SHARES": """UNROLL for (uint u = 0; u < 2; ++u)
            UNROLL for (uint i = 0; i < 2; ++i)
                shared[turn][tile * SHARES + share][u][i][lane] = scores[u].thread_elements()[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL for (uint u = 0; u < 2; ++u)
            UNROLL for (uint i = 0; i < 2; ++i) {
                float score = 0.0f;
                UNROLL for (uint s = 0; s < SHARES; ++s)
                    score += shared[turn][tile * SHARES + s][u][i][lane];
                scores[u].thread_elements()[i] = score;
            }
        turn ^= 1;""",
}
# A lane reads 8 neighbours of a key as x and y, and 4 of each of two values.
PLAIN = {
    "LEFT": "simdgroup_matrix<T, 8, 8>",
    "KEY_PARTS": "const device T* keys = k + b * k_strides[0] + key_head * k_strides[1];",
    "VALUE_PARTS": "const device T* values = v + b * v_strides[0] + key_head * v_strides[1];",
    "LOAD_KEY": """const device T* from = keys + at * k_strides[2] + begin + 32 * d + 4 * column;
                vec<T, 4> x = *(const device vec<T, 4>*)from;
                vec<T, 4> y = *(const device vec<T, 4>*)(from + 4);""",
    "LOAD_VALUES": """const device T* from = values + begin + 32 * d + 4 * row;
                vec<T, 4> x = *(const device vec<T, 4>*)(from + at[0] * v_strides[2]);
                vec<T, 4> y = *(const device vec<T, 4>*)(from + at[1] * v_strides[2]);""",
}
PARTS_OF_QUANTISED = """
    const device uint* {0} = {1} + b * {1}_strides[0] + key_head * {1}_strides[1];
    const device T* {0}_scales =
        {1}_scales + b * {1}_scales_strides[0] + key_head * {1}_scales_strides[1];
    const device T* {0}_biases =
        {1}_biases + b * {1}_biases_strides[0] + key_head * {1}_biases_strides[1];"""
QUANTISED = {
    "LEFT": "simdgroup_float8x8",
    "KEY_PARTS": PARTS_OF_QUANTISED.format("keys", "k"),
    "VALUE_PARTS": PARTS_OF_QUANTISED.format("values", "v"),
    "LOAD_KEY": """uint g = (begin + 32 * d + 4 * column) / GROUP;
                float factor = float(keys_scales[at * k_scales_strides[2] + g]);
                float bias = float(keys_biases[at * k_biases_strides[2] + g]);
                const device uint* from =
                    keys + at * k_strides[2] + (begin / 8 + 4 * d + column / 2) * (BITS / 4);
                uint2 pair = BITS == 4 ? uint2(*from) : *(const device uint2*)from;
                pair[1] >>= BITS == 4 ? 16 : 0;
                float4 x, y;
                UNROLL for (uint j = 0; j < 4; ++j) {
                    x[j] = factor * float(pair[0] >> (BITS * j) & ((1 << BITS) - 1)) + bias;
                    y[j] = factor * float(pair[1] >> (BITS * j) & ((1 << BITS) - 1)) + bias;
                }""",
    "LOAD_VALUES": """uint g = (begin + 32 * d + 4 * row) / GROUP;
                float4 x, y;
                UNROLL for (uint i = 0; i < 2; ++i) {
                    float factor = float(values_scales[at[i] * v_scales_strides[2] + g]);
                    float bias = float(values_biases[at[i] * v_biases_strides[2] + g]);
                    uint word = values[at[i] * v_strides[2] + (begin / 4 + 8 * d + row) * BITS / 8]
                        >> (BITS == 4 ? 16 * (row & 1) : 0);
                    UNROLL for (uint j = 0; j < 4; ++j) {
                        float value = factor * float(word >> (BITS * j) & ((1 << BITS) - 1)) + bias;
                        if (i == 0)
                            x[j] = value;
                        else
                            y[j] = value;
                    }
                }""",
}
MERGE = """
    uint d = thread_position_in_grid.x, row = thread_position_in_grid.y, width = parts_shape[3];
    uint nodes = parts_shape[1], splits = parts_shape[2];
    float sink = float(sinks[row / nodes % sinks_shape[0]]);
    float highest = sink, output = 0.0f, sum = 0.0f;
    for (uint s = 0; s < splits; ++s)
        highest = max(highest, weights[2 * (row * splits + s)]);
    for (uint s = 0; s < splits; ++s) {
        uint part = row * splits + s;
        float factor = exp(weights[2 * part] - highest);
        output += factor * parts[part * width + d];
        sum += factor * weights[2 * part + 1];
    }
    sum += exp(sink - highest);
    out[row * width + d] = static_cast<T>(output / sum);
"""
ROW_INPUTS: tuple[str, ...] = ("positions", "starts", "scale", "bounds")
INPUTS: tuple[str, ...] = ("q", "k", "v")
QUANTISED_INPUTS = ("q", *(x + part for x in "kv" for part in ("", "_scales", "_biases")))
NO_WINDOW = 1 << 30


Launch: TypeAlias = Callable[[Sequence[mx.array], mx.array], mx.array]
"""Launches both kernels for queries, keys and values, and sinks; returns the outputs."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of a pass, as the kernel takes them.

    Attributes:
        ancestors: (batch, n) uint64 words, see `ancestor_words`; in exact mode (batch, n, depths)
            int32 nodes on the path to each node, see `path_nodes`, or anything for chains alone.
            These three arrays are `padded`.
        positions: (batch, n) int32 logical positions of the nodes.
        starts: (batch,) int32 committed positions.
        length: of the longest sequence, with the deepest node.
        depths: of the trees, at most, in exact mode; 0 otherwise.
        branches: whether a tree is not a chain, in exact mode.
        constants: arrays that equal layers share, by what they are made of.
        launches: of both kernels, for layers of one shape.
    """

    ancestors: mx.array
    positions: mx.array
    starts: mx.array
    length: int
    depths: int = 0
    branches: bool = False
    constants: dict[tuple[float, ...], mx.array] = field(default_factory=dict, repr=False)
    launches: dict[tuple[Any, ...], Launch] = field(default_factory=dict, repr=False)

    @classmethod
    def of_pass(
        cls,
        ancestors: mx.array,
        positions: mx.array,
        starts: mx.array,
        length: int,
        depths: int = 0,
        branches: bool = False,
    ) -> Nodes:
        """Make the nodes from arrays that may be small; `starts` may have another shape."""
        arrays = padded(ancestors), padded(positions), padded(starts.reshape(-1))
        return cls(*arrays, length, depths, branches)

    def constant(self, *numbers: float) -> mx.array:
        """Return an array of these numbers, int32 or float32, which is made once for a pass."""
        if numbers not in self.constants:
            self.constants[numbers] = mx.array(numbers)
        return self.constants[numbers]


def ancestor_words(ancestors: mx.array) -> mx.array:
    """Return (batch, n) uint64 words of (batch, n, n) bool; bit j is true if a node sees node j."""
    bits = mx.array(1, mx.uint64) << mx.arange(ancestors.shape[2]).astype(mx.uint64)
    return mx.where(ancestors, bits, mx.array(0, mx.uint64)).sum(2)


def path_nodes(trees: Sequence[DraftTree], rows: int) -> NDArray[np.int32]:
    """Return the (batch, rows, depths) ancestors of each node by depth, with itself.

    Rows without a node, and depths below a node, have the root.
    """
    depths = 1 + max(int(tree.depths.max()) for tree in trees)
    paths = np.zeros((len(trees), rows, depths), np.int32)
    for path, tree in zip(paths, trees, strict=True):
        nodes, ancestors = np.nonzero(tree.ancestor_mask())
        path[nodes, tree.depths[ancestors]] = ancestors
    return paths


@cache
def source(*, quantised: bool, shared: bool, exact: bool = False) -> str:
    """Write the source of the first kernel, for keys and values of `BITS` bits or for others.

    The heads of a row may be `shared` by several simdgroups.
    """
    text, order = PARTS, BY_POSITION if exact else BY_COLUMN
    for parts in (order, QUANTISED if quantised else PLAIN, SHARED if shared else ALONE):
        for name, part in parts.items():
            text = text.replace(name, part)
    return text


def span_of(positions: int) -> int:
    """Return the positions of a split, in a context of this number."""
    return SPANS[max(least for least in SPANS if positions >= least)]


def shares_of(head_dim: int) -> int:
    """Return the simdgroups that share a head of this width; 0 if it is too wide."""
    return next((number for number in SHARES if head_dim <= number * SHARE_WIDTH), 0)


def tree_attention(
    q: mx.array,
    k: Sequence[mx.array],
    v: Sequence[mx.array],
    nodes: Nodes,
    scale: float,
    *,
    window: int | None = None,
    first: int = 0,
    sinks: mx.array | None = None,
    bits: int = 0,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """Return the (batch, heads, n, head_dim) outputs at all nodes.

    Args:
        q: (batch, heads, n, head_dim); the entries of a row are neighbours in memory.
        k: one array of shape (batch, key_heads, columns, head_dim), the committed positions from
            `first` on and then the nodes; or its three parts, if it is quantised.
        v: like `k`.
        nodes: of the pass.
        scale: of the scores.
        window: positions that a node sees, with its own; None for all.
        first: the position of the first column.
        sinks: (heads,) scores of a position without a value, in any dtype; None without sinks.
        bits: of quantised keys and values.
        dtype: of the outputs; the queries' by default.
    """
    heads, group_size = q.shape[1], k[1].shape[3] if bits else 0
    key = q.shape, q.dtype, k[0].shape[1], group_size, scale, window, first, bits, dtype
    if (launch := nodes.launches.get(key)) is None:
        launch = nodes.launches[key] = _launch(nodes, *key)
    return launch([q, *k, *v], nodes.constant(*[-math.inf] * heads) if sinks is None else sinks)


def _launch(
    nodes: Nodes,
    shape: Sequence[int],
    q_dtype: mx.Dtype,
    key_heads: int,
    group_size: int,
    scale: float,
    window: int | None,
    first: int,
    bits: int,
    dtype: mx.Dtype | None,
) -> Launch:
    """Return what launches both kernels; the arguments are as in `tree_attention`."""
    batch, heads, n, width = shape
    shares, exact = shares_of(width), nodes.depths > 0
    span = EXACT_SPAN if exact else span_of(nodes.length - first)
    splits = -(-nodes.length // span) - first // span
    group = heads // key_heads
    step = 8 * -(-group // 8) if nodes.branches else group
    tiles = -(-(step * n) // (8 * SIMDGROUPS // shares))
    template: dict[str, Any] = {"T": q_dtype, "D": width, "SPAN": span}
    template |= {"SIMDGROUPS": SIMDGROUPS, "SHARES": shares}
    name, inputs = "attention_parts" + "_exact" * exact + "_shared" * (shares > 1), INPUTS
    if bits:
        template |= {"BITS": bits, "GROUP": width // group_size}
        name, inputs = f"{name}_quantised", QUANTISED_INPUTS
    inputs = (*inputs, "paths" if exact else "words", *ROW_INPUTS)
    text = source(quantised=bits > 0, shared=shares > 1, exact=exact)
    bounds = [NO_WINDOW if window is None else window, first]
    if exact:
        bounds += [nodes.depths, int(nodes.branches)]
    constants = nodes.constant(float(scale)), nodes.constant(*bounds)
    rows = nodes.ancestors, nodes.positions, nodes.starts, *constants
    parts = partial(
        # Keys and values are parts of a longer storage, and queries are often transposed.
        make_kernel(name, inputs, ("parts", "weights"), text, copies=False),
        template=list(template.items()),
        grid=(32 * SIMDGROUPS * tiles, splits, batch * key_heads),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        output_shapes=[(batch * heads, n, splits, x) for x in (width, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    merge = partial(
        make_kernel("attention_merge", ("parts", "weights", "sinks"), ("out",), MERGE),
        template=[("T", dtype or q_dtype)],
        grid=(width, batch * heads * n, 1),
        threadgroup=(min(width, MAX_MERGE_THREADS), 1, 1),
        output_shapes=[(batch, heads, n, width)],
        output_dtypes=[dtype or q_dtype],
    )

    def launch(inputs: Sequence[mx.array], sinks: mx.array) -> mx.array:
        out: mx.array = merge(inputs=[*parts(inputs=[*inputs, *rows]), sinks])[0]
        return out

    return launch


def runs_shape(head_dim: int) -> bool:
    """Return whether the kernel can run heads of this width."""
    shares = shares_of(head_dim)
    return shares > 0 and head_dim % (32 * shares) == 0


@dataclass(frozen=True)
class Shape:
    """The attention of a layer.

    Attributes:
        dtype: of the queries.
        bits: of keys and values; 0 if they have the queries' dtype.
        group_size: of quantised keys and values.
    """

    heads: int
    key_heads: int
    head_dim: int
    dtype: mx.Dtype
    bits: int = 0
    group_size: int = 0


@lru_cache(128)
def winning_columns(shape: Shape, *, few: bool = False) -> float:
    """Return from how many columns on the kernel wins on this device; infinite if it never does.

    It is decided at load, when a pass over a tree is first built, and once in a process. For `few`
    nodes, at most `group_attention.FEW_ROWS`, the kernel has another rival.
    """
    nodes = FEW_NODES if few else TIMED_NODES

    @cache
    def errors(_: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for least, span in SPANS.items():
            # Two splits of committed positions after those that make splits so long, and a third
            # that begins between the depths of the tree.
            columns = least + 2 * span - 2 + nodes
            checked = _Benchmark(shape, columns, nodes)
            # Windows that begin in the second split, and between the depths of the tree.
            for window in (None, span // 2 + 3, 2):
                found[_case(columns, window)] = checked.error(window)
        return found

    what = "attention of draft trees"
    name = f"{shape.heads} heads of {shape.head_dim}"
    if shape.bits:
        name += f", keys of {shape.bits} bits"
    for columns in TIMED_COLUMNS:
        benchmark, limit = _Benchmark(shape, columns, nodes), 2 * ROUNDING[shape.dtype]
        timed = {"": benchmark.by_kernel}, benchmark.by_operation, benchmark.q
        size = f"{nodes} nodes, {columns} columns"
        if choose(what, name, size, errors, limit, *timed, key=shape) is not None:
            return columns
    return math.inf


@lru_cache(64)
def exact_columns(shape: Shape) -> float:
    """Return from how many columns on exact mode uses the kernel: 0, or infinite if it is wrong."""

    def errors(_: str) -> dict[str, float]:
        columns = 2 * EXACT_SPAN - 2 + TIMED_NODES
        checked = _Benchmark(shape, columns, TIMED_NODES, exact=True)
        windows = None, EXACT_SPAN // 2 + 3, 2
        return {_case(columns, window): checked.error(window) for window in windows}

    name, limit = f"{shape.heads} heads of {shape.head_dim}", 2 * ROUNDING[shape.dtype]
    found = choose("attention in exact mode", name, "all columns", errors, limit)
    return math.inf if found is None else 0


def _case(columns: int, window: int | None) -> str:
    return f"{columns} columns" + ("" if window is None else f", a window of {window}")


class _Benchmark:
    """A tree after committed positions, on which the kernel is compared with the operation."""

    def __init__(self, shape: Shape, columns: int, n: int, *, exact: bool = False) -> None:
        self.tree = DraftTree.from_parents(
            np.zeros(n, np.int32), (np.arange(n, dtype=np.int32) - 1) // 2
        )
        self.shape, self.start = shape, columns - n
        *keys, key = mx.random.split(mx.random.key(0), 4)
        sizes = [(shape.heads, n), *[(shape.key_heads, columns)] * 2]
        self.q, *pair = (
            mx.random.normal((1, *size, shape.head_dim), key=random_key).astype(shape.dtype)
            for size, random_key in zip(sizes, keys, strict=True)
        )
        options = shape.group_size, shape.bits
        self.k, self.v = (mx.quantize(x, *options) if shape.bits else [x] for x in pair)
        self.scale = shape.head_dim**-0.5
        self.sinks = mx.random.normal((shape.heads,), key=key).astype(shape.dtype)
        ancestors = mx.array(self.tree.ancestor_mask())
        self.mask = mx.concatenate([mx.ones((n, self.start), mx.bool_), ancestors], 1)
        depths = int(self.tree.depths.max()) + 1
        paths = mx.array(path_nodes([self.tree], n))
        self.nodes = Nodes.of_pass(
            paths if exact else ancestor_words(ancestors[None]),
            mx.array(self.tree.positions(self.start)[None]),
            mx.array([self.start], mx.int32),
            self.start + depths,
            *((depths, True) if exact else ()),
        )

    def by_kernel(self, q: mx.array, _: int) -> mx.array:
        return tree_attention(q, self.k, self.v, self.nodes, self.scale, bits=self.shape.bits)

    def by_operation(self, q: mx.array, _: int) -> mx.array:
        return self.operation(q, self.k, self.v, self.mask, None)

    def operation(
        self,
        q: mx.array,
        k: Sequence[mx.array],
        v: Sequence[mx.array],
        mask: mx.array,
        sinks: mx.array | None,
    ) -> mx.array:
        if self.shape.bits:
            options = self.scale, mask, self.shape.group_size, self.shape.bits
            copied = 1 * q  # the function changes its queries
            return quantized_scaled_dot_product_attention(copied, k, v, *options)
        (keys,), (values,) = k, v
        if sinks is None and is_unfused(q, keys):
            return attend_by_group(q, keys, values, self.scale, mask)
        return mx.fast.scaled_dot_product_attention(
            q, keys, values, scale=self.scale, mask=mask, sinks=sinks
        )

    def error(self, window: int | None) -> float:
        """Measure the kernel's relative error.

        With a window, layers also have sinks, and queries are laid out as in most models.
        """
        q, first, mask, sinks = self.q, 0, self.mask, None
        if window is not None:
            q = mx.contiguous(q.swapaxes(1, 2)).swapaxes(1, 2)
            first = self.start - window + 1
            positions = np.concatenate([np.arange(self.start), self.tree.positions(self.start)])
            distances = positions[self.start :, None] - positions
            mask = (mask & mx.array(distances < window))[:, first:]
            sinks = None if self.shape.bits else self.sinks  # mlx-lm has no sinks beside these
        k, v = ([x[:, :, first:] for x in parts] for parts in (self.k, self.v))
        arrays, bits = (q, k, v), self.shape.bits
        found = tree_attention(
            *arrays, self.nodes, self.scale, window=window, first=first, sinks=sinks, bits=bits
        )
        return relative_error(found, self.operation(q, k, v, mask, sinks))
