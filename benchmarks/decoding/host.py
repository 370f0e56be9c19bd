"""The time of Python between two passes, with a stub in place of the models.

    python -m benchmarks.decoding.host [--sequences 1,8,32] [--nodes 16,64] [--json FILE]

A device waits while the core makes tables, calibrates them, grows trees and accepts paths. Here the
models are stubs whose own time is taken off: the AR head gives made-up rows in the shape of a
published drafter (15 depths, 16 previous tokens, 16 children), whose children continue as a real
table's do, and the target accepts most best children.

- `host_ms`: of an iteration of all sequences, as it is.
- `plain_ms`: with a separate table for each sequence, calibrated and grown one after the other.

Both are medians; the iterations take turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import product
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.common import Parser, Row, show, write_json
from treeflash.cli.console import guarded
from treeflash.config import DecodeConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.interfaces import Prefill, TableOptions, Verify
from treeflash.decoding.sampling import SampledTokens
from treeflash.decoding.transitions import RowBatch, TransitionTable

VOCAB_SIZE, DEPTHS = 151_936, 15
PROMPT, WARM_UP = 1024, 8
ACCEPTED = 0.72
"""The share of nodes whose first child the stub of the target accepts."""


class State:
    """The state of a sequence: its length."""

    needs_snapshots, nbytes, length = False, 0, 0

    def close(self) -> None:
        pass

    def restorable(self, length: int) -> int:
        return length


class Stub:
    """A backend without models, and its verifier, drafter and head.

    Attributes:
        batched: whether the head gives the rows of all sequences as one batch.
        seconds: that the stubs took themselves.
    """

    name, device, device_name, dtype, inexact = "stub", "cpu", "none", "float32", "a stub"
    vocab_size, max_positions = VOCAB_SIZE, 1 << 20

    def __init__(self, *, batched: bool) -> None:
        self.drafter_config = SimpleNamespace(depths=DEPTHS, has_marginals=True)
        self.verifier = self.drafter = self.head = self
        self.batched = batched
        self.seconds = 0.0
        self._random = np.random.default_rng(0)

    def open(self, capacity: int, *, drafts: bool) -> State:
        return State()

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        return 0

    def check_trees(self) -> None:
        pass

    def draft(self, roots: Sequence[Any], depths: int) -> list[int]:
        return [depths] * len(roots)

    def transitions(self, blocks: Sequence[int], options: TableOptions) -> list[TransitionTable]:
        started = time.perf_counter()
        arguments = self._rows(len(blocks), blocks[0], options)
        self.seconds += time.perf_counter() - started
        if self.batched:
            return RowBatch(*arguments).tables()
        *parts, shape = arguments
        rows = zip(*([x[None] for x in part] for part in parts), strict=True)
        return [RowBatch(*(*row, shape)).dense(0) for row in rows]

    def _rows(self, count: int, depths: int, options: TableOptions) -> tuple[Any, ...]:
        m, k, random = options.m, options.k, self._random
        n = min(options.rows or (depths - 1) * m, (depths - 1) * m)
        order = random.random((count, (depths - 1) * m)) + np.arange((depths - 1) * m) / (4 * m)
        places = np.sort(np.argsort(order)[:, :n]).astype(np.int32) + m
        previous = random.integers(0, VOCAB_SIZE, (count, depths + 1, m)).astype(np.int32)
        depth = np.concatenate([np.zeros((count, 1), np.int32), places // m], 1)
        tokens = np.resize(previous[np.arange(count)[:, None], depth + 1], (count, 1 + n, k))
        probs = random.dirichlet(np.full(k, 0.25), (count, 1 + n))
        log_probs = np.log(0.95 * -np.sort(-probs) + 1e-9).astype(np.float32)
        before = np.take_along_axis(previous[:, :depths].reshape(count, -1), places, 1)
        return places, before, tokens, log_probs, (depths, m)

    def run(self, work: Sequence[Prefill | Verify]) -> list[SampledTokens | None]:
        started = time.perf_counter()
        results = [self._sample(item) for item in work]
        self.seconds += time.perf_counter() - started
        return results

    def _sample(self, item: Prefill | Verify) -> SampledTokens | None:
        if isinstance(item, Prefill):
            state: Any = item.state
            state.length += len(item.token_ids)
            return None if item.params is None else SampledTokens(np.array([5], np.int32))
        tokens = self._random.integers(0, VOCAB_SIZE, len(item.tree)).astype(np.int32)
        first = {p: i for i, p in reversed(list(enumerate(item.tree.parents.tolist())))}
        for parent, child in first.items():
            if parent >= 0 and self._random.random() < ACCEPTED:
                tokens[parent] = item.tree.tokens[child]
        return SampledTokens(tokens)

    def commit(self, paths: Sequence[tuple[State, Any]]) -> None:
        for state, path in paths:
            state.length += len(path)


def host_ms(sequences: int, nodes: int, iterations: int) -> list[float]:
    """Return the milliseconds of an iteration: in a batch, and one sequence after the other."""
    config = DecodeConfig(
        method="treeflash", budget=nodes, suffix=False, max_tokens=DEPTHS * (iterations + WARM_UP)
    )
    runs: list[tuple[Any, Scheduler, list[float]]] = []
    for batched in (True, False):
        stub: Any = Stub(batched=batched)
        scheduler = Scheduler(
            stub, SchedulerConfig(max_parallel=sequences, lone_prefill_chunk=1 << 20)
        )
        for _ in range(sequences):
            scheduler.submit(Request(prompt_ids=list(range(PROMPT)), config=config))
        runs.append((stub, scheduler, []))
    for number in range(WARM_UP + iterations):
        for stub, scheduler, times in runs:
            stub.seconds, started = 0.0, time.perf_counter()
            scheduler.step()
            if number >= WARM_UP:
                times.append(1000 * (time.perf_counter() - started - stub.seconds))
    for _, scheduler, _ in runs:
        scheduler.close()
    return [median(times) for _, _, times in runs]


def parser() -> Parser:
    """Return the command line."""
    options = Parser(__doc__)
    options.add_numbers("--sequences", [1, 8, 32], "numbers of sequences")
    options.add_numbers("--nodes", [16, 64], "nodes of each tree")
    options.add_number("--iterations", 60, "iterations per median")
    return options


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    rows: list[Row] = []
    for sequences, nodes in product(args.sequences, args.nodes):
        batched, plain = host_ms(sequences, nodes, args.iterations)
        rows.append({"sequences": sequences, "nodes": nodes, "host_ms": batched, "plain_ms": plain})
    show("host time of an iteration", rows)
    write_json(args.json, "host", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
