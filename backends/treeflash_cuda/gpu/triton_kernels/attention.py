"""Tree attention of all sequences: the positions they share, then each row's own.

A sequence's positions are cut into tiles, and tiles into chunks. The first kernel attends to the
tiles that are common to all rows of a sequence. Its work is a list of items, each a block of rows
and one chunk, which its programs share: chunks are what keeps a GPU busy with few rows and long
contexts. The second kernel has a program for each row: it goes on where the first one stopped, with
keys that it gathers along the row's path, and adds the chunks in order. So a row's result depends
neither on where the common positions end, nor on the rows in its block: a token in a draft tree is
computed like a single token after the same text.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from treeflash_cuda.gpu.triton_kernels import MAX_REGISTERS, needs_registers
from treeflash_cuda.visible_keys import CHUNK, PAGE, PLACES_EACH, VisibleKeys, block_rows

STAGES = tl.constexpr(4)
"""Chunks whose sums are loaded at once, as a program would wait for memory in each of them."""
PIPELINE_STAGES = 5
"""Stages of the first kernel's loop over tiles. Triton divides them between the loads of pages and
the loads of tiles, which need the pages: so two tiles are loaded ahead, as by 3 without pages."""
PROGRAMS = 1024
"""Programs of the first kernel: some more than the largest GPUs run at once."""
ROWS = 16
"""Rows of a product, the fewest that GPUs multiply at once. All products of both kernels have as
many, because products of other shapes may add in another order."""
TILE_NUMBERS, WIDE_TILE_NUMBERS = 8192, 2048
"""Numbers of the keys of a tile: each pipeline stage holds one in shared memory. Without tensor
cores products need registers, so tiles are smaller."""
MIN_TILE, MAX_TILE = 16, 64
"""Positions of a tile."""
MAX_SMALL, MAX_NARROW = 64, 128
"""Wider heads need the registers of more warps: with keys in 8 bits or soft-capped scores, and
without."""
MIN_DIMS = 16
"""Width of a product; narrower heads are filled up with zeros."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_columns(
    cache,  # the cache of one key head
    columns,  # (tile,) int32
    used,  # (tile,) bool; other columns may hold NaN
    stride,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    DTYPE: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    """Load the (tile, DIMS) keys or values of columns, 0 where they are not used."""
    dims, columns = tl.arange(0, DIMS), columns.to(tl.int64)
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    x = tl.load(cache + columns[:, None] * stride + dims[None, :], mask=mask, other=0)
    if QUANTISED:  # a float32 scale follows the numbers of a column
        scales = cache.to(tl.pointer_type(tl.float32), bitcast=True)
        scale = tl.load(scales + (columns * stride + HEAD_DIM) // 4, mask=used, other=0)
        x = (x.to(tl.float32) * scale.to(DTYPE).to(tl.float32)[:, None]).to(DTYPE)
    return x


@triton.jit
def _add_tile(
    q,  # (rows, DIMS)
    k,  # (tile, DIMS)
    v,  # (tile, DIMS)
    visible,  # (rows, tile) or (1, tile)
    state,  # the largest score of each row in bits, the sum of weights, and of weighted values
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
):
    """Attend to one more tile, with an online softmax."""
    highest, total, out = state
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP:
        scores = softcap * (1 - 2 / (tl.exp2(scores * (2 * LOG2_E / softcap)) + 1))
    scores = tl.where(visible, scores * LOG2_E, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    share = tl.exp2(highest - base)
    weights = tl.exp2(scores - base[:, None]).to(v.dtype)
    # Weights are added as values are: the order of a sum over a row would depend on its layout.
    ones = tl.full((v.shape[0], 16), 1.0, tl.float32).to(v.dtype)
    total = total * share + tl.max(tl.dot(weights, ones, input_precision="ieee"), 1)
    out = out * share[:, None] + tl.dot(weights, v, input_precision="ieee")
    return new_highest, total, out


@triton.jit
def _load_queries(
    queries,  # (ROWS,) places of rows and heads of a key head: row * GROUPS + head
    end_query,
    kv_head,
    q_pointer,
    q_row_stride,
    q_head_stride,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Load (ROWS, DIMS) queries, and their state before any tile."""
    head, dims = kv_head * GROUPS + queries % GROUPS, tl.arange(0, DIMS)
    places = (queries // GROUPS).to(tl.int64) * q_row_stride + head * q_head_stride
    is_element = (queries < end_query)[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_pointer + places[:, None] + dims[None, :], mask=is_element, other=0)
    highest = tl.full(queries.shape, float("-inf"), tl.float32)
    return q, (highest, tl.zeros_like(highest), tl.zeros(q.shape, tl.float32))


@triton.jit
def _load_range(queries, end_query, start_pointer, end_pointer, GROUPS: tl.constexpr):
    """Load the first positions that queries see, and their ends."""
    row, is_query = queries // GROUPS, queries < end_query
    start = tl.load(start_pointer + row, mask=is_query, other=2147483647)
    return start, tl.load(end_pointer + row, mask=is_query, other=0)


@triton.jit
def _add_shared_tile(
    q, bounds, k, v, positions, sink, state, scale, softcap, SOFTCAP: tl.constexpr
):
    start, end = bounds
    visible = (positions[None, :] >= start[:, None]) | (positions < sink)[None, :]
    visible = visible & (positions[None, :] < end[:, None])
    return _add_tile(q, k, v, visible, state, scale, softcap, SOFTCAP)


@triton.jit
def _store_sums(
    state,
    queries,  # (ROWS,) as in `_load_queries`
    end_query,
    chunk,
    kv_head,
    heads,
    places_pointer,
    sums_pointer,
    outputs_pointer,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    highest, total, out = state
    is_query, dims = queries < end_query, tl.arange(0, DIMS)
    place = tl.load(places_pointer + queries // GROUPS, mask=is_query, other=0) + chunk
    place = place.to(tl.int64) * heads + kv_head * GROUPS + queries % GROUPS
    is_element = is_query[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(sums_pointer + place * 2, highest, mask=is_query)
    tl.store(sums_pointer + place * 2 + 1, total, mask=is_query)
    tl.store(outputs_pointer + place[:, None] * HEAD_DIM + dims[None, :], out, mask=is_element)


@triton.jit
def _attend_to_chunk(
    block,  # the first row, the first query, the query after the last one, chunk, and heads
    inputs,  # pointers
    ranges,  # pointers
    results,  # pointers
    factors,  # strides, and what scores are computed with
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINK: tl.constexpr,
    QUANTISED: tl.constexpr,
    PAIR: tl.constexpr,  # whether there are two products for each tile
):
    """Attend from 1 or 2 times `ROWS` queries to the tiles of a chunk that all rows share."""
    row, first_query, end_query, chunk, kv_head, heads = block
    q_pointer, k_pointer, v_pointer = inputs
    pages_pointer, table_pointer, shared_pointer, start_pointer, end_pointer, sink_pointer = ranges
    q_row_stride, q_head_stride, kv_head_stride, kv_column_stride, scale, softcap = factors
    queries = first_query + tl.arange(0, ROWS)
    bounds = _load_range(queries, end_query, start_pointer, end_pointer, GROUPS)
    low, high = tl.min(bounds[0]), tl.max(bounds[1])
    if PAIR:
        more_bounds = _load_range(queries + ROWS, end_query, start_pointer, end_pointer, GROUPS)
        low = tl.minimum(low, tl.min(more_bounds[0]))
        high = tl.maximum(high, tl.max(more_bounds[1]))
    chunk_start, sink = chunk * CHUNK, 0
    if SINK:
        sink = tl.load(sink_pointer + row)
        if chunk_start < sink:
            low = 0
    common = tl.load(shared_pointer + row) // TILE * TILE
    low = tl.maximum(chunk_start, low // TILE * TILE)
    high = tl.minimum(tl.minimum(common, high), chunk_start + CHUNK)
    if low < high:
        q, state = _load_queries(
            *(queries, end_query, kv_head, q_pointer, q_row_stride, q_head_stride),
            *(GROUPS, HEAD_DIM, DIMS),
        )
        if PAIR:
            more_q, more_state = _load_queries(
                *(queries + ROWS, end_query, kv_head, q_pointer, q_row_stride, q_head_stride),
                *(GROUPS, HEAD_DIM, DIMS),
            )
        k_head = k_pointer + kv_head.to(tl.int64) * kv_head_stride
        v_head = v_pointer + kv_head.to(tl.int64) * kv_head_stride
        table = pages_pointer + tl.load(table_pointer + row)
        dtype: tl.constexpr = q_pointer.dtype.element_ty
        for tile in range(low, high, TILE):
            positions = tile + tl.arange(0, TILE)
            # A page has whole tiles.
            first = tl.load(table + tile // PAGE) * PAGE + tile % PAGE
            columns, used = first + tl.arange(0, TILE), positions < common
            k = _load_columns(
                k_head, columns, used, kv_column_stride, HEAD_DIM, DIMS, dtype, QUANTISED
            )
            v = _load_columns(
                v_head, columns, used, kv_column_stride, HEAD_DIM, DIMS, dtype, QUANTISED
            )
            state = _add_shared_tile(
                q, bounds, k, v, positions, sink, state, scale, softcap, SOFTCAP
            )
            if PAIR:
                more_state = _add_shared_tile(
                    more_q, more_bounds, k, v, positions, sink, more_state, scale, softcap, SOFTCAP
                )
        _store_sums(
            *(state, queries, end_query, chunk, kv_head, heads),
            *results,
            *(GROUPS, HEAD_DIM, DIMS),
        )
        if PAIR:
            _store_sums(
                *(more_state, queries + ROWS, end_query, chunk, kv_head, heads),
                *results,
                *(GROUPS, HEAD_DIM, DIMS),
            )


@triton.jit
def _shared_positions(
    items_pointer,
    count_pointer,
    q_pointer,
    k_pointer,
    v_pointer,
    pages_pointer,
    table_pointer,
    shared_pointer,
    start_pointer,
    end_pointer,
    sink_pointer,
    places_pointer,
    sums_pointer,  # (places, heads, 2) float32 largest scores, sums of weights
    outputs_pointer,  # (places, heads, HEAD_DIM) float32 sums of weighted values
    heads,
    q_row_stride,
    q_head_stride,
    kv_head_stride,
    kv_column_stride,
    scale,
    softcap,
    GROUPS: tl.constexpr,  # heads that share a key head
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # HEAD_DIM, rounded up to a power of two
    ROWS: tl.constexpr,  # the rows of a product
    PAIR: tl.constexpr,  # whether there are two products for each tile where a block has the rows
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINK: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    """Run every n-th item of `SharedWork`; n is the number of programs, as a GPU has room for."""
    size: tl.constexpr = 2 * ROWS if PAIR else ROWS
    parts: tl.constexpr = (BLOCK * GROUPS + size - 1) // size
    kv_head, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    inputs = q_pointer, k_pointer, v_pointer
    ranges = pages_pointer, table_pointer, shared_pointer, start_pointer, end_pointer, sink_pointer
    results = places_pointer, sums_pointer, outputs_pointer
    factors = q_row_stride, q_head_stride, kv_head_stride, kv_column_stride, scale, softcap
    for item in range(tl.program_id(0), tl.load(count_pointer), tl.num_programs(0)):
        row = tl.load(items_pointer + item * 3)
        end_query = tl.load(items_pointer + item * 3 + 1) * GROUPS
        chunk = tl.load(items_pointer + item * 3 + 2)
        first_query = row * GROUPS + part * size
        block = row, first_query, end_query, chunk, kv_head, heads
        last_alone = first_query
        if PAIR:
            last_alone = end_query - ROWS
            if first_query < last_alone:
                _attend_to_chunk(
                    *(block, inputs, ranges, results, factors),
                    *(GROUPS, HEAD_DIM, DIMS),
                    *(ROWS, TILE, CHUNK, PAGE, SOFTCAP, SINK, QUANTISED, True),
                )
        if (last_alone <= first_query) & (first_query < end_query):
            _attend_to_chunk(
                *(block, inputs, ranges, results, factors),
                *(GROUPS, HEAD_DIM, DIMS),
                *(ROWS, TILE, CHUNK, PAGE, SOFTCAP, SINK, QUANTISED, False),
            )


@triton.jit
def _load_sums(
    chunk,
    start,
    end,
    common,
    sink,
    first_place,
    heads,  # (ROWS,)
    is_row,  # (ROWS,) bool
    total_heads,
    sums_pointer,
    outputs_pointer,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Load what `_shared_positions` has found in a chunk, if it had to look there."""
    dims, chunk_start = tl.arange(0, DIMS), chunk * CHUNK
    low = tl.where(chunk_start < sink, 0, start // TILE * TILE)
    # Rows are compared, not numbers: Triton 3.9's interpreter takes no mask that combines a block
    # with a single comparison.
    added_end = tl.minimum(tl.minimum(common, end), chunk_start + CHUNK)
    added = tl.where(is_row, tl.maximum(low, chunk_start), added_end) < added_end
    place = (first_place + chunk).to(tl.int64) * total_heads + heads
    highest = tl.load(sums_pointer + place * 2, mask=added, other=float("-inf"))
    total = tl.load(sums_pointer + place * 2 + 1, mask=added, other=0.0)
    is_element = added[:, None] & (dims < HEAD_DIM)[None, :]
    places = outputs_pointer + place[:, None] * HEAD_DIM + dims[None, :]
    return highest, total, tl.load(places, mask=is_element, other=0.0)


@triton.jit
def _add_sums(state, part):
    """Add the sums over a chunk to those over the chunks before it."""
    highest, total, out = state
    part_highest, part_total, part_out = part
    new_highest = tl.maximum(highest, part_highest)
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    share, part_share = tl.exp2(highest - base), tl.exp2(part_highest - base)
    total = total * share + part_total * part_share
    return new_highest, total, out * share[:, None] + part_out * part_share[:, None]


@triton.jit
def _own_positions(
    q_pointer,
    k_pointer,
    v_pointer,
    pages_pointer,
    table_pointer,
    shared_pointer,
    start_pointer,
    end_pointer,
    sink_pointer,
    places_pointer,
    paths_pointer,
    sinks_pointer,
    sums_pointer,  # the result of `_shared_positions`
    outputs_pointer,  # the result of `_shared_positions`
    result_pointer,  # (rows, heads, HEAD_DIM)
    depths,
    total_heads,
    q_row_stride,
    q_head_stride,
    kv_head_stride,
    kv_column_stride,
    scale,
    softcap,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINK: tl.constexpr,
    SINKS: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    """Add the sums over chunks of a row in order, and attend to what no other row shares."""
    row = tl.program_id(0)
    parts = tl.cdiv(GROUPS, ROWS)
    kv_head, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    start, end = tl.load(start_pointer + row), tl.load(end_pointer + row)
    shared, first_place = tl.load(shared_pointer + row), tl.load(places_pointer + row)
    common = shared // TILE * TILE
    table = pages_pointer + tl.load(table_pointer + row)
    path_row = paths_pointer + row.to(tl.int64) * depths
    begin, sink = start, 0
    if SINK:
        sink = tl.load(sink_pointer + row)
        if sink > 0:
            begin = 0
    group, dims = part * ROWS + tl.arange(0, ROWS), tl.arange(0, DIMS)
    is_row = group < GROUPS
    is_element = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    heads = kv_head * GROUPS + group
    places = row.to(tl.int64) * q_row_stride + heads * q_head_stride
    q = tl.load(q_pointer + places[:, None] + dims[None, :], mask=is_element, other=0)
    k_head = k_pointer + kv_head.to(tl.int64) * kv_head_stride
    v_head = v_pointer + kv_head.to(tl.int64) * kv_head_stride
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    state = highest, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, DIMS), tl.float32)
    # Chunks that rows share as a whole are only added, so their sums are loaded ahead.
    whole = tl.minimum(common, end) // CHUNK
    for chunk in tl.range(begin // CHUNK, whole, num_stages=STAGES):
        part_state = _load_sums(
            *(chunk, start, end, common, sink, first_place, heads, is_row, total_heads),
            *(sums_pointer, outputs_pointer, HEAD_DIM, DIMS, TILE, CHUNK),
        )
        state = _add_sums(state, part_state)
    for chunk in range(tl.maximum(begin // CHUNK, whole), tl.cdiv(end, CHUNK)):
        part_state = _load_sums(
            *(chunk, start, end, common, sink, first_place, heads, is_row, total_heads),
            *(sums_pointer, outputs_pointer, HEAD_DIM, DIMS, TILE, CHUNK),
        )
        low = tl.where(chunk * CHUNK < sink, 0, start // TILE * TILE)
        low = tl.maximum(tl.maximum(common, chunk * CHUNK), low)
        for tile in range(low, tl.minimum(end, (chunk + 1) * CHUNK), TILE):
            positions = tile + tl.arange(0, TILE)
            visible = (positions >= start) | (positions < sink)
            visible = visible & (positions < end)
            depth = positions - shared
            path = tl.load(path_row + depth, mask=visible & (depth >= 0), other=0)
            offsets = tl.where(depth < 0, positions, shared + path)
            page = tl.load(table + offsets // PAGE, mask=visible, other=0)
            columns = page * PAGE + offsets % PAGE
            k = _load_columns(
                k_head, columns, visible, kv_column_stride, HEAD_DIM, DIMS, q.dtype, QUANTISED
            )
            v = _load_columns(
                v_head, columns, visible, kv_column_stride, HEAD_DIM, DIMS, q.dtype, QUANTISED
            )
            part_state = _add_tile(q, k, v, visible[None, :], part_state, scale, softcap, SOFTCAP)
        state = _add_sums(state, part_state)
    highest, total, out = state
    if SINKS:
        score = tl.load(sinks_pointer + heads, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
        base = tl.maximum(highest, score)
        share = tl.exp2(highest - base)
        total = total * share + tl.exp2(score - base)
        out = out * share[:, None]
    total = tl.where(is_row, total, 1.0)
    places = (row.to(tl.int64) * total_heads + heads) * HEAD_DIM
    result = (out / total[:, None]).to(q.dtype)
    tl.store(result_pointer + places[:, None] + dims[None, :], result, mask=is_element)


def tile_size(head_dim: int, *, wide: bool, quantised: bool) -> int:
    """Return a tile's positions, by model and GPU alone, as the order of sums depends on it."""
    numbers = WIDE_TILE_NUMBERS if wide else TILE_NUMBERS
    columns = numbers // triton.next_power_of_2(head_dim)
    return min(max(columns // 2 if quantised else columns, MIN_TILE), MAX_TILE)


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: VisibleKeys,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute `operations.tree_attention` in two launches, whatever the lengths are."""
    (rows, heads, head_dim), kv_heads, work = q.shape, k.shape[0], keys.work
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert k.stride() == v.stride()
    groups, places = heads // kv_heads, len(work.items) * PLACES_EACH
    wide = needs_registers(q.dtype)
    quantised = k.dtype == torch.int8  # its numbers become floats in registers, before products
    shapes: dict[str, Any] = {
        "GROUPS": groups,
        "HEAD_DIM": head_dim,
        "DIMS": max(triton.next_power_of_2(head_dim), MIN_DIMS),
        "ROWS": ROWS,
        "TILE": tile_size(head_dim, wide=wide, quantised=quantised),
        "CHUNK": CHUNK,
        "PAGE": PAGE,
        "SOFTCAP": softcap is not None,
        "SINK": keys.sink is not None,
        "QUANTISED": quantised,
        "enable_fp_fusion": False,
        "maxnreg": MAX_REGISTERS,
    }
    strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1)
    factors = scale, 0.0 if softcap is None else softcap
    ranges = keys.pages, keys.table, keys.shared, keys.start, keys.end, keys.sink
    inputs = q, k, v, *ranges, work.places
    sums = q.new_empty((places, heads, 2), dtype=torch.float32)
    outputs = q.new_empty((places, heads, head_dim), dtype=torch.float32)
    # Products without tensor cores need the registers of the second rows themselves.
    narrow = MAX_SMALL if quantised or softcap is not None else MAX_NARROW
    size = ROWS if wide else 2 * ROWS
    block = block_rows(groups)
    columns = kv_heads * triton.cdiv(block * groups, size)
    _shared_positions[min(len(work.items), triton.cdiv(PROGRAMS, columns)), columns](
        *(work.items, work.count, *inputs, sums, outputs, heads, *strides, *factors),
        BLOCK=block,
        PAIR=not wide,
        num_warps=8 if wide or head_dim > narrow else 4,
        num_stages=PIPELINE_STAGES,
        **shapes,
    )
    result = q.new_empty((rows, heads, head_dim))
    _own_positions[rows, kv_heads * triton.cdiv(groups, ROWS)](
        *(*inputs, keys.paths, sinks, sums, outputs, result, keys.paths.shape[1], heads),
        *(*strides, *factors),
        SINKS=sinks is not None,
        num_warps=8 if wide or quantised else 4,
        # Few tiles follow each other, and other numbers make some GPUs spill registers.
        num_stages=3 if wide or head_dim > MAX_NARROW else 1 if head_dim > MAX_SMALL else 2,
        **shapes,
    )
    return result
