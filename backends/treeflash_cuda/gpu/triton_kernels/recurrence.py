"""Recurrent layers on draft trees, step by step: gated delta nets, and gated linear attention.

The problem. The state after a node follows from the state after its parent, and a state is far too
large to be kept for every node.

The idea. A program has a few columns of a head's state in its registers, and walks through the tree
depth first, so that the state it has is mostly the one it needs next. Where a node has several
children, registers keep its columns for the later ones. The child that needs most of them comes
last, so that few states are kept at once (`treeflash.decoding.hybrid.depth_first`).

An example. Node 0 has the children 1 and 2, and node 1 has the child 3. The walk is 0, whose state
is kept; 2, then 1 from the kept state, and 3.

The rule: a node's state has the bits that its own path alone would give it, whatever other nodes
the tree has, and a commit of the path repeats the same operations. So a token in a draft tree is
computed like a single token after the same text.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from treeflash.decoding.hybrid import most_kept
from treeflash_cuda.recurrence import L2_EPS, TreeNodes

WARP_ELEMENTS = 512
"""Elements of a state that a warp has in its registers, beside the kept ones."""
MIN_COLUMNS = 4
"""Columns of a program: a thread loads as many float32 at once."""
EPS = tl.constexpr(L2_EPS)


@triton.jit
def _load_keys(
    pointer,  # the first element
    dims,
    stride,
    KEY_DIM: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """Load a (KEYS,) float32 key or query."""
    x = tl.load(pointer + dims * stride, mask=dims < KEY_DIM, other=0).to(tl.float32)
    if NORMALISE:
        x = x * tl.rsqrt(tl.sum(x * x, 0) + EPS)
    return x


@triton.jit
def _load_decay(pointer, dims, stride, KEY_DIM: tl.constexpr):
    """Load the (KEYS, 1) decays of channels; a stride of 0 stands for one of all channels."""
    log_g = tl.load(pointer + dims * stride, mask=dims < KEY_DIM, other=0)
    return tl.exp(log_g.to(tl.float32))[:, None]


@triton.jit
def _tree_recurrence(
    q_pointer,
    k_pointer,
    v_pointer,
    log_g_pointer,
    beta_pointer,
    states_pointer,
    slots_pointer,
    visits_pointer,
    counts_pointer,
    out_pointer,  # (trees, n, heads, VALUE_DIM)
    written_pointer,  # (trees, heads, n, VALUE_DIM) float32
    keys_pointer,  # (trees, heads, n, KEY_DIM) float32
    n,
    scale,
    q_strides,  # the strides of trees, nodes, heads and elements
    k_strides,
    v_strides,
    log_g_strides,  # the strides of trees, nodes, heads and channels
    beta_strides,  # the strides of trees, nodes and heads
    state_strides,  # the strides of slots, heads, keys and values
    GROUPS: tl.constexpr,  # heads that share a key head
    KEY_DIM: tl.constexpr,
    KEYS: tl.constexpr,  # KEY_DIM, rounded up to a power of two
    VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,  # states that are kept at once
    DELTA: tl.constexpr,  # whether values are corrected by what the state has for their key
    NORMALISE: tl.constexpr,
):
    part, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    tree = tl.program_id(2).to(tl.int64)
    key_head = head // GROUPS
    dims, columns = tl.arange(0, KEYS), part * COLUMNS + tl.arange(0, COLUMNS)
    is_key, is_column = dims < KEY_DIM, columns < VALUE_DIM
    places = dims[:, None] * state_strides[2] + columns[None, :] * state_strides[3]
    slot = tl.load(slots_pointer + tree).to(tl.int64)
    places = slot * state_strides[0] + head * state_strides[1] + places
    state = tl.load(states_pointer + places, mask=is_key[:, None] & is_column[None, :], other=0).to(
        tl.float32
    )
    kept = ()
    for _ in tl.static_range(KEPT):
        kept += (state,)  # type: ignore[assignment]
    count = tl.load(counts_pointer + tree)
    for visit in range(count):
        place = visits_pointer + (tree * n + visit) * 3
        node, source, target = tl.load(place), tl.load(place + 1), tl.load(place + 2)
        for i in tl.static_range(KEPT):
            if source == i:
                state = kept[i]
        row = tree * k_strides[0] + node * k_strides[1] + key_head * k_strides[2]
        k = _load_keys(k_pointer + row, dims, k_strides[3], KEY_DIM, NORMALISE)
        row = tree * q_strides[0] + node * q_strides[1] + key_head * q_strides[2]
        q = _load_keys(q_pointer + row, dims, q_strides[3], KEY_DIM, NORMALISE) * scale
        row = tree * v_strides[0] + node * v_strides[1] + head * v_strides[2]
        written = tl.load(v_pointer + row + columns * v_strides[3], mask=is_column, other=0).to(
            tl.float32
        )
        row = tree * log_g_strides[0] + node * log_g_strides[1] + head * log_g_strides[2]
        state = state * _load_decay(log_g_pointer + row, dims, log_g_strides[3], KEY_DIM)
        if DELTA:
            row = tree * beta_strides[0] + node * beta_strides[1] + head * beta_strides[2]
            beta = tl.load(beta_pointer + row).to(tl.float32)
            written = beta * (written - tl.sum(state * k[:, None], 0))
        state = state + k[:, None] * written[None, :]
        out = tl.sum(state * q[:, None], 0).to(out_pointer.dtype.element_ty)
        row = (tree * n + node) * heads + head
        tl.store(out_pointer + row * VALUE_DIM + columns, out, mask=is_column)
        row = (tree * heads + head) * n + node
        tl.store(written_pointer + row * VALUE_DIM + columns, written, mask=is_column)
        if part == 0:
            tl.store(keys_pointer + row * KEY_DIM + dims, k, mask=is_key)
        if visit == 0:  # rows without a node are copies of the root
            for other in range(count, n):
                row = (tree * n + other) * heads + head
                tl.store(out_pointer + row * VALUE_DIM + columns, out, mask=is_column)
        if KEPT:
            new = ()
            for i in tl.static_range(KEPT):
                new += (tl.where(target == i, state, kept[i]),)  # type: ignore[assignment]
            kept = new


@triton.jit
def _commit_recurrence(
    written_pointer,
    keys_pointer,
    log_g_pointer,
    states_pointer,
    paths_pointer,  # (sequences, 4 + n) int32 tree, slots before and after, count, and nodes
    path_stride,
    heads,
    written_strides,  # the strides of layers, trees, heads, nodes and elements
    keys_strides,
    log_g_strides,
    state_strides,  # the strides of slots, layers, heads, keys and values
    KEY_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    layer, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    path = paths_pointer + tl.program_id(2) * path_stride
    tree, before, after = tl.load(path), tl.load(path + 1), tl.load(path + 2)
    dims, columns = tl.arange(0, KEYS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_key, is_column = dims < KEY_DIM, columns < VALUE_DIM
    is_element = is_key[:, None] & is_column[None, :]
    places = dims[:, None] * state_strides[3] + columns[None, :] * state_strides[4]
    places = layer * state_strides[1] + head * state_strides[2] + places
    before_places = before.to(tl.int64) * state_strides[0] + places
    state = tl.load(states_pointer + before_places, mask=is_element, other=0)
    for step in range(tl.load(path + 3)):
        node = tl.load(path + 4 + step)
        row = layer * log_g_strides[0] + tree * log_g_strides[1]
        row = row + head * log_g_strides[2] + node * log_g_strides[3]
        state = state * _load_decay(log_g_pointer + row, dims, log_g_strides[4], KEY_DIM)
        row = layer * keys_strides[0] + tree * keys_strides[1]
        row = row + head * keys_strides[2] + node * keys_strides[3]
        k = tl.load(keys_pointer + row + dims * keys_strides[4], mask=is_key, other=0)
        row = layer * written_strides[0] + tree * written_strides[1]
        row = row + head * written_strides[2] + node * written_strides[3]
        written = tl.load(
            written_pointer + row + columns * written_strides[4], mask=is_column, other=0
        )
        state = state + k[:, None] * written[None, :]
    after_places = after.to(tl.int64) * state_strides[0] + places
    tl.store(states_pointer + after_places, state, mask=is_element)


def tree_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    beta: Tensor | None,
    states: Tensor,
    slots: Tensor,
    nodes: TreeNodes,
    *,
    normalise: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `recurrence.tree_recurrence` in one launch, however deep the trees are."""
    (trees, n, heads, value_dim), key_dim = v.shape, k.shape[3]
    assert nodes.visits is not None
    assert nodes.counts is not None
    out = v.new_empty(v.shape)
    written, keys = (
        v.new_empty((trees, heads, n, size), dtype=torch.float32) for size in (value_dim, key_dim)
    )
    shapes = _shapes(key_dim, value_dim)
    _tree_recurrence[triton.cdiv(value_dim, shapes["COLUMNS"]), heads, trees](
        *(q, k, v, log_g, beta, states, slots, nodes.visits, nodes.counts, out, written, keys),
        *(n, scale, q.stride(), k.stride(), v.stride(), _gate_strides(log_g)),
        *((0, 0, 0) if beta is None else beta.stride(), states.stride()),
        GROUPS=heads // k.shape[2],
        KEPT=most_kept(n),
        DELTA=beta is not None,
        NORMALISE=normalise,
        **shapes,
    )
    return out, written, keys


def commit_recurrence(
    written: Tensor, keys: Tensor, log_g: Tensor, states: Tensor, paths: Tensor
) -> None:
    """Compute `recurrence.commit_recurrence` in one launch."""
    layers, _, heads, _, value_dim = written.shape
    shapes = _shapes(keys.shape[4], value_dim)
    _commit_recurrence[triton.cdiv(value_dim, shapes["COLUMNS"]), layers * heads, len(paths)](
        *(written, keys, log_g, states, paths, paths.stride(0), heads),
        *(written.stride(), keys.stride(), _gate_strides(log_g), states.stride()),
        **shapes,
    )


def _gate_strides(log_g: Tensor) -> tuple[int, ...]:
    return (*log_g.stride()[:-1], log_g.stride(-1) if log_g.shape[-1] > 1 else 0)


def _shapes(key_dim: int, value_dim: int) -> dict[str, int | bool]:
    """Return what fixes the order of sums, and so must be equal for trees and commits."""
    keys = triton.next_power_of_2(key_dim)
    columns = min(triton.next_power_of_2(value_dim), max(WARP_ELEMENTS // keys, MIN_COLUMNS))
    return {
        "KEY_DIM": key_dim,
        "KEYS": keys,
        "VALUE_DIM": value_dim,
        "COLUMNS": columns,
        "num_warps": max(keys * columns // WARP_ELEMENTS, 1),
        "enable_fp_fusion": False,
    }
