"""Made-up inputs of tree attention, and its results row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from treeflash_cuda.operations import VisibleKeys

from treeflash.testing.comparisons import random_tree


@dataclass(frozen=True)
class Case:
    """Rows of several sequences over a cache with NaN wherever no key is."""

    lengths: tuple[int, ...] = (5,)  # committed positions of each sequence
    nodes: int = 4  # rows of each sequence
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    chunk: bool = False  # rows are consecutive tokens, not a tree
    block: bool = False  # rows see each other and are at no positions, as slots of a drafter
    window: int | None = None
    sink: int = 0  # positions that are visible besides a window
    softcap: float | None = None
    sinks: bool = False
    spare: int = 3  # unused columns around each sequence
    seed: int = 0


def attention_case(case: Case) -> dict:
    """The arguments of `tree_attention`."""
    random = torch.Generator().manual_seed(case.seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(case.dtype)

    t, n = len(case.lengths), case.nodes
    first, columns = [], case.spare
    for length in case.lengths:
        first.append(columns)
        columns += length + n + case.spare
    cache = torch.full((2, case.kv_heads, columns, case.head_dim), torch.nan, dtype=case.dtype)
    for start, length in zip(first, case.lengths, strict=True):
        cache[:, :, start : start + length + n] = numbers(
            2, case.kv_heads, length + n, case.head_dim
        )
    starts = torch.tensor(first, dtype=torch.int32)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    rows = torch.arange(n, dtype=torch.int32).expand(t, n)
    if case.chunk:
        keys = VisibleKeys.of_chunks(starts, lengths, lengths[:, None] + rows)
    elif case.block:
        end = (lengths[:, None] + n).repeat(1, n)
        keys = VisibleKeys(
            starts, lengths, torch.zeros_like(end), end, rows[:, None].expand(t, n, n)
        )
    else:
        trees = [random_tree(np.random.default_rng(case.seed + i), 0, n, 1000) for i in range(t)]
        depths = torch.from_numpy(np.stack([tree.depths for tree in trees])).int()
        ancestors = torch.from_numpy(np.stack([tree.ancestor_mask() for tree in trees]))
        keys = VisibleKeys.of_trees(starts, lengths, lengths[:, None] + depths, ancestors)
    if case.window is not None:
        keys = keys.within(case.window)
    if case.sink:
        sink = torch.full((t,), case.sink, dtype=torch.int32)
        keys = VisibleKeys(keys.first, keys.shared, keys.start, keys.end, keys.paths, sink)
    longest = max(case.lengths) + (n if case.chunk else 0)
    return {
        "q": numbers(t * n, case.heads, case.head_dim),
        "k": cache[0],
        "v": cache[1],
        "keys": keys,
        "max_length": 1 << longest.bit_length(),
        "scale": case.head_dim**-0.5,
        "softcap": case.softcap,
        "sinks": numbers(case.heads) if case.sinks else None,
    }


def row_columns(keys: VisibleKeys, sequence: int, row: int) -> list[int]:
    """The columns of the keys that a row sees, by position."""
    first, shared = int(keys.first[sequence]), int(keys.shared[sequence])
    sink = 0 if keys.sink is None else int(keys.sink[sequence])
    start, end = int(keys.start[sequence, row]), int(keys.end[sequence, row])
    path = keys.paths[sequence, row].tolist()
    return [
        first + position if position < shared else first + shared + path[position - shared]
        for position in range(end)
        if position >= start or position < sink
    ]


def expected_attention(case: Case, inputs: dict) -> Tensor:
    """The result of `tree_attention` in float64, one row and head at a time."""
    q, k, v = (inputs[name].double() for name in "qkv")
    out = torch.empty_like(q)
    for row in range(len(q)):
        columns = row_columns(inputs["keys"], *divmod(row, case.nodes))
        for head in range(case.heads):
            kv_head = head * case.kv_heads // case.heads
            scores = k[kv_head, columns] @ q[row, head] * inputs["scale"]
            if case.softcap is not None:
                scores = case.softcap * (scores / case.softcap).tanh()
            if case.sinks:
                scores = torch.cat([scores, inputs["sinks"][head : head + 1].double()])
            weights = scores.softmax(0)[: len(columns)]
            out[row, head] = weights @ v[kv_head, columns]
    return out.to(case.dtype)


def alone(case: Case, inputs: dict, sequence: int, row: int) -> dict:
    """The arguments for one row as plain decoding has them: all its keys are committed."""
    keys = inputs["keys"]
    columns = row_columns(replace(keys, start=torch.zeros_like(keys.end)), sequence, row)
    n, first = len(columns), 5
    cache = torch.full((2, case.kv_heads, first + n + 9, case.head_dim), torch.nan).to(case.dtype)
    for part, name in enumerate("kv"):
        cache[part, :, first : first + n] = inputs[name][:, columns]
    position = torch.tensor([n - 1], dtype=torch.int32)
    ancestors = torch.ones(1, 1, 1, dtype=torch.bool)
    places = torch.full_like(position, first), position
    one = VisibleKeys.of_trees(*places, position[None], ancestors)
    return inputs | {
        "q": inputs["q"][sequence * case.nodes + row][None],
        "k": cache[0],
        "v": cache[1],
        "keys": one if case.window is None else one.within(case.window),
        "max_length": 2048,
    }
