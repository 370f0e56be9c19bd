"""Made-up inputs of tree attention, and its results row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from treeflash_cuda.visible_keys import PAGE, RowPlan, VisibleKeys

from treeflash.decoding.tree import DraftTree
from treeflash.testing.comparisons import random_tree


@dataclass(frozen=True)
class Case:
    """Rows of several sequences over a cache with NaN wherever no key is, in scattered pages."""

    lengths: tuple[int, ...] = (5,)  # committed positions of each sequence
    nodes: int | tuple[int, ...] = 4  # rows of all sequences, or of each
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
    spare: int = 3  # unused pages
    seed: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """The rows of each sequence."""
        if isinstance(self.nodes, tuple):
            return self.nodes
        return (self.nodes,) * len(self.lengths)


CASES = {
    "trees": Case(lengths=(5, 0, 70), nodes=7),
    "trees that cross tiles and chunks": Case(lengths=(60, 505), nodes=12, heads=2, kv_heads=1),
    "trees of different sizes": Case(lengths=(600, 3, 511, 0), nodes=(1, 19, 40, 2)),
    "a tree of 256 nodes": Case(lengths=(9,), nodes=256, heads=1, kv_heads=1),
    "single tokens": Case(lengths=(3, 64, 1100), nodes=1),
    "prompt tokens": Case(lengths=(0, 60), nodes=9, chunk=True),
    "a window": Case(lengths=(600, 2), nodes=6, window=90),
    "a window inside a tree": Case(lengths=(600, 2), nodes=9, window=2),
    "the first positions and a window": Case(lengths=(600, 2), nodes=4, window=9, sink=3),
    "soft-capping": Case(lengths=(5, 30), nodes=4, softcap=2.0),
    "attention sinks": Case(lengths=(5, 30), nodes=4, sinks=True),
    "blocks that see all of themselves": Case(lengths=(5, 63), nodes=4, block=True),
    "narrow heads": Case(lengths=(5,), nodes=4, head_dim=6),
    "heads whose width is no power of two": Case(lengths=(70,), nodes=4, head_dim=24),
    "many heads for one key head": Case(lengths=(70,), nodes=2, heads=40, kv_heads=2),
}


def columns_of(table, count: int) -> Tensor:
    """The columns at the first offsets of a sequence."""
    offsets = np.arange(count)
    return torch.from_numpy(table[offsets // PAGE] * PAGE + offsets % PAGE)


def keys_of(plan: RowPlan) -> VisibleKeys:
    """The tensors of a plan."""
    arrays = (torch.from_numpy(np.asarray(x, np.int32)) for x in plan.arrays())
    return VisibleKeys.of_rows(*arrays)


def attention_case(case: Case) -> dict:
    """The arguments of `tree_attention`."""
    random = torch.Generator().manual_seed(case.seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(case.dtype)

    used = [length + n for length, n in zip(case.lengths, case.sizes, strict=True)]
    counts = [-(-n // PAGE) for n in used]
    pages = np.random.default_rng(case.seed).permutation(sum(counts) + case.spare)
    tables = np.split(pages[: sum(counts)], np.cumsum(counts)[:-1])
    shape = 2, case.kv_heads, len(pages) * PAGE, case.head_dim
    cache = torch.full(shape, torch.nan, dtype=case.dtype)
    for table, n in zip(tables, used, strict=True):
        cache[:, :, columns_of(table, n)] = numbers(2, case.kv_heads, n, case.head_dim)
    rows: list[DraftTree | int] = list(case.sizes)
    if not (case.chunk or case.block):
        for i, n in enumerate(case.sizes):
            rows[i] = random_tree(np.random.default_rng(case.seed + i), 0, n, 1000)
    groups = case.heads // case.kv_heads
    keys = keys_of(RowPlan.of(tables, np.array(case.lengths), rows, groups))
    if case.block:
        keys = replace(keys, end=keys.shared)
    if case.window is not None:
        keys = keys.within(case.window)
    if case.sink:
        keys = replace(keys, sink=torch.full_like(keys.end, case.sink))
    return {
        "q": numbers(sum(case.sizes), case.heads, case.head_dim),
        "k": cache[0],
        "v": cache[1],
        "keys": keys,
        "scale": case.head_dim**-0.5,
        "softcap": case.softcap,
        "sinks": numbers(case.heads) if case.sinks else None,
    }


def row_columns(keys: VisibleKeys, row: int) -> list[int]:
    """The columns of the keys that a row sees, by position."""
    table, shared = keys.pages[int(keys.table[row]) :].numpy(), int(keys.shared[row])
    sink = 0 if keys.sink is None else int(keys.sink[row])
    start, end = int(keys.start[row]), int(keys.end[row])
    path = keys.paths[row].tolist()
    offsets = [
        position if position < shared else shared + path[position - shared]
        for position in range(end)
        if position >= start or position < sink
    ]
    return [int(table[offset // PAGE]) * PAGE + offset % PAGE for offset in offsets]


def expected_attention(case: Case, inputs: dict) -> Tensor:
    """The result of `tree_attention` in float64, one row and head at a time."""
    q, k, v = (inputs[name].double() for name in "qkv")
    out = torch.empty_like(q)
    for row in range(len(q)):
        columns = row_columns(inputs["keys"], row)
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


def alone(case: Case, inputs: dict, row: int) -> dict:
    """The arguments for one row as plain decoding has them: all its keys are committed."""
    keys = inputs["keys"]
    columns = row_columns(replace(keys, start=torch.zeros_like(keys.end)), row)
    n, groups = len(columns), case.heads // case.kv_heads
    table = 1 + np.arange(-(-n // PAGE))
    shape = 2, case.kv_heads, (len(table) + 2) * PAGE, case.head_dim
    cache = torch.full(shape, torch.nan).to(case.dtype)
    for part, name in enumerate("kv"):
        cache[part, :, columns_of(table, n)] = inputs[name][:, columns]
    one = keys_of(RowPlan.of([table], np.array([n - 1]), [1], groups))
    return inputs | {
        "q": inputs["q"][row][None],
        "k": cache[0],
        "v": cache[1],
        "keys": one if case.window is None else one.within(case.window),
    }
