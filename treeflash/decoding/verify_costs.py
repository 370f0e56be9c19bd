"""What a forward pass of the target costs by its number of rows, and how these costs are kept.

Problem. The budget `auto` compares seconds: of a tree, of a plain pass, of a draft. A table of them
is measured once for a target and a device and kept in a file. But the machine may have been busy
then, or may be slower now, and single passes are disturbed all the time.

Idea. The table gives the shape of the costs, and the latest passes correct it: each of them took so
many times what the table says of its number of rows. The correction of a number of rows is the
lowest of these ratios over the passes that are nearest to it, because a disturbance only adds time.
So the first pass already corrects a table that is ten times wrong everywhere, a disturbed pass
changes nothing, and what no pass has shown is as wrong as the passes nearest to it.

Example. The table says 250 ms for 1 row, 500 ms for 16 and 800 ms for 32, because the machine was
busy. The first pass has 16 rows and takes 50 ms, a ratio of 0.1: the costs are now 25, 50 and
80 ms. The next passes of 16 rows take 52, 200 and 51 ms: the lowest of the latest three says 51. A
pass of 1 row takes 30 ms: its correction becomes 0.12, and the one of trees stays.

Rule. Distances are octaves between numbers of rows, and `REMEMBERED` passes since count as an
octave. The `NEAREST` passes by distance count. Passes over one and over several sequences, and over
roots alone and over trees are of different kinds, because a batch computes attention sequence by
sequence, and needs masks for its first tree. Another kind counts only as long as none of the own
kind is known. It makes a plain pass no slower than the table says: else drafts may seem to pay, and
no plain pass would ever show that they do not.

The table and its file take over corrections that are `DIFFERENT` between numbers of rows, or say
that the machine is faster by that factor than it was. A machine that is slower by one factor for
all numbers of rows is busy, and the table stays.

A table is for one machine, model and way to run it; `cost_file` has what the name of its file
depends on. It has all `SIZES`: large ones that are too slow to be timed are on the line through a
plain pass and the largest pass that was timed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from treeflash.config import LoadConfig, remember
from treeflash.decoding.interfaces import Backend, device_report
from treeflash.decoding.passed_checks import run_facts
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree

SIZES = (1, 2, 3, 4, 5, 8, 10, 12, 15, 16, 24, 32, 33, 48, 64, 96, 128, 192, 256)
"""Tree sizes that are timed and chosen from. Hardware has steps; some are known to end at 5, 8, 10,
15, 16 and 32."""
MAX_RELATIVE_COST = 6.0
"""Sizes above one whose pass costs more plain passes than this are not timed."""
PROMPT_TOKENS = 16
"""Length of the text after which sizes are timed."""
FORGETTING = 0.07
"""The share of its weight that an iteration loses to each newer one, in all that is learned."""
NEAREST = 3
"""Passes whose lowest ratio is the correction of a number of rows."""
DIFFERENT = 1.5
"""A factor between costs that is no noise; numbers of rows within it are about equal."""
REMEMBERED = 64
"""Passes that correct the table."""


@dataclass(frozen=True)
class CostFile:
    """The costs of a target on a device, kept for other processes."""

    path: Path
    is_valid: Callable[[], bool]  # whether the process still computes as it did for these costs

    def read(self) -> VerifyCosts | None:
        """Return the costs in the file; None if it is missing or damaged."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            seconds = {int(size): float(cost) for size, cost in stored["seconds"].items()}
            position_s = {int(n): float(cost) for n, cost in stored["position_s"].items()}
            return VerifyCosts(seconds, position_s)
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None

    def write(self, costs: VerifyCosts) -> None:
        """Replace the costs; that the folder cannot be written is not an error."""
        remember(self.path, json.dumps({"seconds": costs.seconds, "position_s": costs.position_s}))

    def describe(self) -> str:
        """Return the costs of some sizes, their age, and how to measure them again."""
        costs = self.read()
        if costs is None:
            return "measured by the first text with --budget auto"
        written = datetime.fromtimestamp(self.path.stat().st_mtime, UTC)
        parts = [
            f"{size} {'row' if size == 1 else 'rows'} {1e3 * costs.seconds[size]:.3g} ms"
            for size in (1, 8, 32)
            if size in costs.seconds
        ]
        return (
            f"{', '.join(parts)}; measured or corrected {written:%Y-%m-%d %H:%M} UTC; delete "
            f"{self.path} to measure again"
        )


@dataclass
class VerifyCosts:
    """Seconds of a forward pass by its rows: a measured table that the latest passes correct.

    Attributes:
        seconds: by number of nodes, ascending, 1 first, after a short prompt; all are finite and
            above 0.
        position_s: extra seconds for each committed position of a sequence, by the number of its
            rows that read it.
        file: where the costs are kept for other processes; None if they are not.
        sizes: (n,) sizes of the table, ascending.

    Raises:
        ValueError: a number is out of range, or the sizes do not ascend from 1.
    """

    seconds: dict[int, float]
    position_s: dict[int, float] = field(default_factory=dict)
    file: CostFile | None = field(default=None, compare=False, repr=False)
    sizes: NDArray[np.int64] = field(init=False, compare=False, repr=False)
    # (n, 3) the latest passes, the newest last: kind, binary logarithm of the number of rows, and
    # seconds divided by what the table says
    _passes: NDArray[np.float64] = field(init=False, compare=False, repr=False)
    # corrections by kind since the newest pass
    _known: dict[int, NDArray[np.float64]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        sizes, seconds = list(self.seconds), list(self.seconds.values())
        if sizes[:1] != [1] or sizes != sorted(sizes):
            raise ValueError(f"tree sizes must ascend from 1, got {sizes}")
        if not all(0 < x < math.inf for x in seconds):
            raise ValueError(f"seconds must be finite and above 0, got {seconds}")
        if not all(0 <= x < math.inf for x in self.position_s.values()):
            raise ValueError(f"position_s must be finite and 0 or more, got {self.position_s}")
        self.sizes, self._passes = np.array(sizes), np.zeros((0, 3))

    @classmethod
    def measure(
        cls, backend: Backend, clock: Callable[[], float] = time.perf_counter
    ) -> VerifyCosts:
        """Time the backend's target on bushy trees of arbitrary tokens."""
        on_cpu = backend.device == "cpu"
        # Kernels of a GPU for few rows and for many read the keys at different speeds, which short
        # prompts do not show.
        wanted = 256 if on_cpu else 4096
        longest = min(wanted, max(backend.max_positions, PROMPT_TOKENS))
        prompt = [token % backend.vocab_size for token in range(longest)]
        with SequenceSession(backend, capacity=longest + max(SIZES)) as sequence:
            sequence.extend(prompt[:PROMPT_TOKENS])
            best = _time_sizes(sequence, clock)
            token_s = math.inf if on_cpu else _token_seconds(sequence, clock)
            limit = MAX_RELATIVE_COST * best[1]
            costs = {size: seconds for size, seconds in best.items() if seconds <= limit}
            readers = (max(costs),) if longest <= 256 else (1, 8, 32)
            short_s = {size: costs[size] for size in readers if size in costs}
            position_s: dict[int, float] = {}
            if longest >= 256:
                position_s = _position_seconds(sequence, prompt[PROMPT_TOKENS:], short_s, clock)
        largest = max(best)
        slope = (best[largest] - best[1]) / max(largest - 1, 1)
        beyond = {
            size: best[largest] + slope * (size - largest) for size in SIZES if size > largest
        }
        measured = {**best, **beyond, 1: min(best[1], token_s)}
        # A larger tree has the rows of a smaller one, which was disturbed if it took longer.
        sound = accumulate(reversed(measured.values()), min)
        return cls(dict(zip(measured, reversed(list(sound)), strict=True)), position_s)

    @classmethod
    def kept(
        cls, backend: Backend, file: CostFile, clock: Callable[[], float] = time.perf_counter
    ) -> VerifyCosts:
        """Return the costs in a file, or measure them, and keep them there.

        That the file cannot be written is not an error.
        """
        costs = file.read()
        if costs is None:
            if backend.device != "cpu":  # it reads a long text too
                logging.getLogger(__name__).warning(
                    "timing forward passes on %s for the budget auto, once for this model",
                    backend.device_name,
                )
            costs = cls.measure(backend, clock)
            file.write(costs)
        costs.file = file
        return costs

    def predict(
        self,
        rows: Sequence[int] | NDArray[np.int64],
        reads: Sequence[float] | NDArray[np.float64],
        sequences: int = 1,
    ) -> NDArray[np.float64]:
        """Return the (n,) seconds of n forward passes over `sequences` trees each.

        `rows` are (n,) nodes of all trees together, `reads` the (n,) sums over rows of the
        committed positions that each reads.
        """
        numbers = np.asarray(rows)
        found = self._table_seconds(numbers, np.asarray(reads, np.float64), sequences)
        for chosen, has_trees in ((numbers > sequences, True), (numbers <= sequences, False)):
            if chosen.any():
                ratios = self._corrections(_kind(sequences, has_trees))
                found[chosen] *= np.interp(numbers[chosen], self.sizes, ratios)
        return found

    def observe(self, rows: int, reads: float, sequences: int, seconds: float) -> None:
        """Take in a forward pass of decoding."""
        table_s = float(self._table_seconds(np.array([rows]), np.array([reads]), sequences)[0])
        kind, ratio = _kind(sequences, rows > sequences), max(seconds, 1e-9) / table_s
        # Threads may share the costs: each reads the passes and what is known of them as a whole.
        self._passes = np.vstack([self._passes[-REMEMBERED:], [kind, math.log2(rows), ratio]])
        self._known = {}
        if len(self._passes) > REMEMBERED:
            self._correct_table()
            self._passes = self._passes[REMEMBERED // 2 :]

    def is_known(self, size: int) -> bool:
        """Return whether a late pass had a single tree of about that size."""
        trees = self._passes[self._passes[:, 0] == _kind(1, True)]
        return bool((abs(trees[:, 1] - math.log2(size)) < math.log2(DIFFERENT)).any())

    def _table_seconds(
        self, rows: NDArray[np.int64], reads: NDArray[np.float64], sequences: int
    ) -> NDArray[np.float64]:
        """Return the (n,) seconds by the table, as `predict` does."""
        seconds = list(self.seconds.values())
        found = np.interp(rows, self.sizes, seconds)
        if rows.max() > self.sizes[-1] > 1:  # the last slope continues
            slope = (seconds[-1] - seconds[-2]) / (self.sizes[-1] - self.sizes[-2])
            found += np.maximum(rows - self.sizes[-1], 0) * max(slope, 0.0)
        if self.position_s:
            numbers, position_s = list(self.position_s), list(self.position_s.values())
            known = np.clip(rows / sequences, numbers[0], numbers[-1])
            found += np.interp(known, numbers, position_s) / known * reads
        return found

    def _corrections(self, kind: int) -> NDArray[np.float64]:
        """Return the (n,) corrections of the table's sizes for a kind of passes."""
        passes = self._passes
        if not len(passes):
            return np.ones(len(self.sizes))
        if (found := self._known.get(kind)) is None:
            own = np.flatnonzero(passes[:, 0] == kind)
            used = own if len(own) else np.arange(len(passes))
            distances = abs(np.log2(self.sizes)[:, None] - passes[used, 1])
            distances += (len(passes) - used) / REMEMBERED
            nearest = np.argsort(distances, 1, kind="stable")[:, :NEAREST]
            found = passes[used, 2][nearest].min(1)
            if not len(own) and not kind % 2:
                found = np.minimum(found, 1.0)
            self._known[kind] = found
        return found

    def _correct_table(self) -> None:
        """Take lasting corrections over into the table and its file; see the module's rule."""
        roots, trees = _kind(1, False), _kind(1, True)
        counts = Counter(self._passes[:, 0].tolist())
        if counts[trees] < NEAREST:
            return
        ratios = self._corrections(trees).copy()
        if counts[roots] > 1:  # plain passes are rare, and one may be disturbed
            ratios[0] = self._corrections(roots)[0]
        ratios /= max(ratios.min(), 1.0)
        if max(ratios.max(), 1 / ratios.min()) <= DIFFERENT:
            return
        self.position_s = {
            rows: cost * float(np.interp(rows, self.sizes, ratios))
            for rows, cost in self.position_s.items()
        }
        costs = zip(self.seconds.items(), ratios.tolist(), strict=True)
        self.seconds = {size: cost * ratio for (size, cost), ratio in costs}
        self._passes, self._known = self._passes[:0], {}  # the table has what they said
        if self.file is not None and self.file.is_valid():
            self.file.write(self)


def _kind(sequences: int, has_trees: bool) -> int:
    """Return the kind of passes over about so many sequences, with trees or roots alone."""
    return 2 * power_of_two(sequences) + has_trees


def model_key(target: Path) -> str:
    """Return a text that tells the model in a folder from others that cost something else."""
    weights = sorted((path.name, path.stat().st_size) for path in target.glob("*.safetensors"))
    return json.dumps([weights, (target / "config.json").read_text(encoding="utf-8")])


def cost_file(backend: Backend, model: str, loaded: LoadConfig, folder: Path) -> CostFile:
    """Return the file with the costs of a model on this machine, loaded in this way.

    Its name is a hash of what costs depend on: the model, the device with its threads, the machine,
    the kernels that are used, and `run_facts`: all settings, sources of treeflash and the backend,
    versions of packages, and variables that choose kernels, such as those of a preloaded BLAS.
    """
    name = backend.device_name
    # A Mac gets its name from the network that it is in; its chip is the device's name.
    node = "" if platform.mac_ver()[0] else platform.node()
    # Kernels that are timed at load may win this time and lose the next.
    used = sorted(
        (kernel, size)
        for kernel, verdicts in device_report(backend).kernels.items()
        for size, verdict in verdicts.items()
        if verdict.startswith("used")
    )
    known = {
        "model": model,
        "device": [backend.name, name, backend.dtype, backend.inexact is None, node],
        "kernels": used,
        "sizes": SIZES,
        **run_facts(replace(loaded, device=None), type(backend).__module__.partition(".")[0]),
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    return CostFile(folder / f"{digest}.json", lambda: backend.device_name == name)


def power_of_two(sequences: int) -> int:
    """Round a number of sequences up to a power of two, the key of measurements."""
    return 1 << (sequences - 1).bit_length()


def _time(sequence: SequenceSession, size: int, clock: Callable[[], float]) -> float:
    """Time a pass over a tree of some nodes."""
    tree = _bushy_tree(size, sequence.backend.vocab_size)
    before = clock()
    sequence.verify(tree)
    return clock() - before


def _time_sizes(
    sequence: SequenceSession, clock: Callable[[], float], rounds: int = 8, budget_s: float = 0.2
) -> dict[int, float]:
    """Return the best time of each tree size.

    The first forward pass of a size also compiles and allocates: the best time counts, and no size
    is given up because of its first. There are at least two rounds and at most `rounds`; none
    begins once those after the first have taken `budget_s`.
    """
    best: dict[int, float] = {}
    for size in SIZES:
        best[size] = _time(sequence, size, clock)
        if best[size] > MAX_RELATIVE_COST * best[1]:
            best[size] = min(best[size], _time(sequence, size, clock))
        if best[size] > MAX_RELATIVE_COST * best[1]:
            break
    started = clock()
    for number in range(1, rounds):
        if number >= 2 and clock() - started > budget_s:
            break
        # A pass is slower after a much larger one. So rounds go down and up in turn, and sizes
        # follow similar ones, as they do in decoding.
        order = sorted(best, reverse=number % 2 == 1)
        for size in [size for size in order if best[size] <= MAX_RELATIVE_COST * best[1]]:
            best[size] = min(best[size], _time(sequence, size, clock))
    return best


def _position_seconds(
    sequence: SequenceSession,
    tokens: Sequence[int],
    short_s: Mapping[int, float],
    clock: Callable[[], float],
    budget_s: float = 3.0,
) -> dict[int, float]:
    """Return the extra seconds of a pass for each position, by number of rows.

    The tokens extend the sequence, in parts of 512, until `budget_s` are over. `short_s` has the
    seconds of passes before, by number of rows.
    """
    started = clock()
    for first in range(0, len(tokens), 512):
        sequence.extend(tokens[first : first + 512])
        if clock() - started >= budget_s:
            break
    added = sequence.length - PROMPT_TOKENS
    long_s = {rows: min(_time(sequence, rows, clock) for _ in range(2)) for rows in short_s}
    return {rows: max(long_s[rows] - short_s[rows], 0.0) / added for rows in short_s}


def _token_seconds(
    sequence: SequenceSession, clock: Callable[[], float], first: int = 2, tokens: int = 8
) -> float:
    """Time a token of plain decoding, the only pass that a device begins before it is asked to.

    A pass over a root that is known in advance would take longer, and drafts would seem to pay. A
    device has no pass of a next token before the `first` ones; `tokens` are timed after them.
    """
    root, started = 0, 0.0
    for number in range(first + tokens):
        if number == first:
            started = clock()
        root = int(sequence.verify(DraftTree.root_only(root))[0])
        sequence.commit(np.zeros(1, np.int32))
    return (clock() - started) / tokens


def _bushy_tree(nodes: int, vocab_size: int) -> DraftTree:
    """Build a tree whose nodes have up to four children, much like draft trees.

    Its tokens differ: a single token would take the same experts of a mixture at every node.
    """
    tokens = np.random.default_rng(nodes).integers(0, vocab_size, nodes).astype(np.int32)
    return DraftTree.from_parents(tokens, (np.arange(nodes, dtype=np.int32) - 1) // 4)
