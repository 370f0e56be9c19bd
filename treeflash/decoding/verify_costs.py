"""What a forward pass of the target costs by its number of rows, and how these costs are kept.

Problem. The budget `auto` compares seconds: of a tree, of a plain pass, of a draft. They are
measured once for a target and a device and kept in a file. A machine that was busy then, or that
computes otherwise now, would leave drafting too small or off for good.

Idea. Every pass of decoding is a measurement too. Passes correct the costs of the process, and
these correct the file. What no pass shows, because it looks too expensive to be tried, becomes
cheaper until it is tried: an estimate that is too low is corrected by the next pass, one that is
too high never would be.

Example. The file says 385 ms for 1 row and 1,840 ms for 8, from a busy machine; passes take 25 ms.
Three plain passes in a row take less than two thirds of their 385 ms, so all costs are divided by
15 at once: 25 ms for 1 row and 119 ms for 8. That is still too much for 8 rows, and drafts are cut
to the root. After three such drafts the excess of 94 ms over a plain pass is halved by each later
one, until a tree of 8 nodes is verified. Its pass takes 35 ms, which is then the cost.

Rule.
- Each pass moves the cost of its size by `COST_SMOOTHING` of the difference, and the costs of
  other sizes by half as much.
- A size without any pass keeps its measured proportion to the next sizes with `AGREEING` passes. If
  all were measured on a busy machine, and trees of 12 nodes show that, a plain pass is as much
  faster than it was measured. With half of the error, rows 2 to 12 would look too cheap.
- `AGREEING` passes in a row that disagree with their costs by `DISAGREEMENT` in the same direction
  correct them at once: if they are faster, or trees, for all sizes; if they are slower plain
  passes, for a plain pass alone.
- What a pruned tree shows nothing about, because it is smaller, loses `COST_FORGETTING` of what it
  costs more, or `DOUBT` of it while one draft after another is cut to its root.
- The file takes its shape from the medians of the latest passes where they differ from it by
  `DISAGREEMENT`, so that neither disturbed passes nor costs in doubt are kept: sizes with fewer
  than `LATEST` passes are as wrong as those next to them. It keeps the scale of the fastest
  process: the medians are divided by how much slower they are than the file's costs at the size
  where that is least. A busy process so changes nothing. Measured costs that fall with the rows, or
  whose rounds disagree, are not kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from treeflash.config import LoadConfig, remember
from treeflash.decoding.interfaces import Backend, device_report
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree

TIMED = (1, 5, 8, 10, 12, 15, 16, 24, 32, 33, 48, 64, 128, 256)
"""Tree sizes that are timed; hardware has steps; some are known to end at 5, 8, 10, 15, 16 and
32."""
SIZES = tuple(sorted({*TIMED, 2, 3, 4, 96, 192}))
"""Tree sizes to choose from; those that are not timed are interpolated linearly."""
MAX_RELATIVE_COST = 6.0
"""A size whose pass costs more plain passes than this is left out, and so are all larger ones."""
MIN_ROUNDS, MAX_ROUNDS = 2, 8
"""Rounds of timing."""
TIME_BUDGET_S = 0.2
"""No round begins once the rounds after the first have taken this many seconds."""
PROMPT_TOKENS, LONG_PROMPT_TOKENS = 16, 256
GPU_PROMPT_TOKENS, GPU_READERS = 4096, (1, 8, 32)
"""Length of the long prompt on a GPU, and the numbers of rows after it that are timed: kernels for
few rows and for many read the keys at different speeds, which short prompts do not show."""
PREFILL_TOKENS, PREFILL_S = 512, 3.0
"""Tokens of a part of it, and the seconds after which a slow GPU gets no further part."""
FIRST_TOKENS, PLAIN_TOKENS = 2, 8
"""Tokens that are decoded before plain decoding is timed, until which a device has no pass of a
next token, and tokens that are timed."""
COST_SMOOTHING = 0.1
"""Weight of the newest measurement in the running mean of its size."""
COST_FORGETTING = 0.02
"""The share of the excess of larger trees over a pass that the pass forgets."""
OUTLIER_FACTOR = 2.0
"""A forward pass that takes more than this many times its expected seconds was disturbed, and
counts as this many times."""
PACKAGES = ("treeflash", "mlx", "torch")
"""Their versions decide how long forward passes take."""
DISAGREEMENT, AGREEING = 1.5, 3
"""A factor between predicted and observed seconds, and the passes in a row with such a factor after
which the costs are wrong, and not a pass disturbed. Rounds of timing may differ by this factor."""
IMPLAUSIBLE = 100.0
"""A pass that takes a hundredth of its predicted seconds says nothing about the costs."""
DOUBT = 0.5
"""The same for a draft that was cut to its root, from the `AGREEING`-th in a row on."""
KEPT_EVERY, LATEST = 16, 9
"""Passes after which costs are compared with the file, and the passes of a size that must have been
seen until then."""


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

    @property
    def written(self) -> datetime | None:
        """When the costs were measured or corrected last; None without a file."""
        try:
            return datetime.fromtimestamp(self.path.stat().st_mtime, UTC)
        except OSError:
            return None

    def write(self, costs: VerifyCosts) -> None:
        """Replace the costs; that the folder cannot be written is not an error."""
        remember(self.path, json.dumps({"seconds": costs.seconds, "position_s": costs.position_s}))

    def describe(self) -> str:
        """Return the costs of some sizes, their age, and how to measure them again."""
        costs, written = self.read(), self.written
        if costs is None or written is None:
            return "measured by the first text with --budget auto"
        shown = [size for size in (1, 8, 32) if size in costs.seconds]
        parts = [
            f"{size} {'row' if size == 1 else 'rows'} {1e3 * costs.seconds[size]:.3g} ms"
            for size in shown
        ]
        return (
            f"{', '.join(parts)}; measured or corrected {written:%Y-%m-%d %H:%M} UTC; delete "
            f"{self.path} to measure again"
        )

    def correct(self, costs: VerifyCosts) -> None:
        """Take over the shape that passes of single trees showed; see the rule of the module."""
        stored = self.read()
        if not self.is_valid() or stored is None or stored.seconds.keys() != costs.seconds.keys():
            return
        shown = {
            size: statistics.median(passes) / stored.seconds[size]
            for size, passes in sorted(costs.passes_s.items())
            if len(passes) == LATEST
        }
        if not shown:
            return
        ratios = np.interp(list(stored.seconds), list(shown), list(shown.values()))
        ratios /= max(ratios.min(), 1.0)
        if max(ratios.max(), 1 / ratios.min()) > DISAGREEMENT:
            pairs = zip(stored.seconds.items(), ratios.tolist(), strict=True)
            seconds = {size: cost * ratio for (size, cost), ratio in pairs}
            self.write(VerifyCosts(seconds, costs.position_s))


@dataclass
class VerifyCosts:
    """Seconds of a forward pass by tree size, updated from the forward passes of decoded sequences.

    Attributes:
        seconds: by number of nodes, ascending, 1 first, after a short prompt; all are finite and
            above 0.
        position_s: extra seconds for each committed position of a sequence, by the number of its
            rows that read it.
        sequences_s: extra seconds of a pass over several sequences, whose attention is computed
            sequence by sequence; by number of sequences, rounded up to a power of two, and by
            whether any of them has more than its root: the first such tree makes masks necessary.
        doubtful: sizes that became cheaper because no such tree was tried lately.
        is_sound: whether the rounds of timing agreed, and no size was faster than a smaller one.
        file: where the costs are kept for other processes; None if they are not.

    Raises:
        ValueError: a number is out of range, or the sizes do not ascend from 1.
    """

    seconds: dict[int, float]
    position_s: dict[int, float] = field(default_factory=dict)
    sequences_s: dict[tuple[int, bool], float] = field(default_factory=dict)
    doubtful: set[int] = field(default_factory=set, compare=False, repr=False)
    is_sound: bool = field(default=True, compare=False, repr=False)
    file: CostFile | None = field(default=None, compare=False, repr=False)
    # The seconds of the latest passes over single trees, without reading positions, by size.
    passes_s: dict[int, deque[float]] = field(init=False, compare=False, repr=False)
    # The observed seconds of the latest passes, divided by the predicted ones.
    _ratios: deque[float] = field(
        default_factory=lambda: deque(maxlen=AGREEING), init=False, compare=False, repr=False
    )
    _passes: int = field(default=0, init=False, compare=False, repr=False)
    # The costs before passes of single trees corrected them, and these passes by size.
    _before: dict[int, float] = field(init=False, compare=False, repr=False)
    _seen: Counter[int] = field(init=False, compare=False, repr=False)
    _cut_drafts: int = field(default=0, init=False, compare=False, repr=False)  # in a row

    def __post_init__(self) -> None:
        sizes, seconds = list(self.seconds), list(self.seconds.values())
        if sizes[:1] != [1] or sizes != sorted(sizes):
            raise ValueError(f"tree sizes must ascend from 1, got {sizes}")
        if not all(0 < x < math.inf for x in seconds):
            raise ValueError(f"seconds must be finite and above 0, got {seconds}")
        if not all(0 <= x < math.inf for x in self.position_s.values()):
            raise ValueError(f"position_s must be finite and 0 or more, got {self.position_s}")
        self._before, self._seen = dict(self.seconds), Counter()
        self.passes_s = {size: deque(maxlen=LATEST) for size in self.seconds}

    @classmethod
    def measure(cls, backend: Backend) -> VerifyCosts:
        """Time the backend's target on bushy trees of arbitrary tokens."""
        on_cpu = backend.device == "cpu"
        longest = LONG_PROMPT_TOKENS if on_cpu else GPU_PROMPT_TOKENS
        longest = min(longest, max(backend.max_positions, PROMPT_TOKENS))
        prompt = [token % backend.vocab_size for token in range(longest)]
        with SequenceSession(backend, capacity=longest + max(TIMED)) as sequence:
            sequence.extend(prompt[:PROMPT_TOKENS])
            best, is_sound = _time_sizes(sequence)
            token_s = math.inf if on_cpu else _token_seconds(sequence)
            sizes = [size for size in SIZES if size <= max(best)]
            line = np.interp(sizes, list(best), list(best.values())).tolist()
            limit = MAX_RELATIVE_COST * best[1]
            costs = {n: cost for n, cost in zip(sizes, line, strict=True) if cost <= limit}
            position_s: dict[int, float] = {}
            if longest >= LONG_PROMPT_TOKENS:
                short_s = {size: seconds for size, seconds in best.items() if size in costs}
                readers = GPU_READERS if longest > LONG_PROMPT_TOKENS else (max(short_s),)
                short_s = {size: short_s[size] for size in readers if size in short_s}
                position_s = _position_seconds(sequence, prompt[PROMPT_TOKENS:], short_s)
        return cls({**costs, 1: min(costs[1], token_s)}, position_s, is_sound=is_sound)

    @classmethod
    def kept(cls, backend: Backend, file: CostFile) -> VerifyCosts:
        """Return the costs in a file, or measure them, and keep them there if they are sound.

        That the file cannot be written is not an error.
        """
        costs = file.read()
        if costs is None:
            if backend.device != "cpu":  # which reads a long text too
                logging.getLogger(__name__).warning(
                    "timing forward passes on %s for the budget auto, once for this model",
                    backend.device_name,
                )
            costs = cls.measure(backend)
            if not costs.is_sound:
                return costs
            file.write(costs)
        costs.file = file
        return costs

    def predict(
        self, rows: Sequence[int] | NDArray[np.int64], reads: Sequence[float], sequences: int = 1
    ) -> NDArray[np.float64]:
        """Return the (n,) seconds of n forward passes over `sequences` trees each.

        `rows` are (n,) nodes of all trees together, `reads` the (n,) sums over rows of the
        committed positions that each reads.
        """
        sizes, seconds = list(self.seconds), list(self.seconds.values())
        alone = np.interp(rows, sizes, seconds)
        # Beyond the largest size the last slope continues.
        if len(sizes) > 1:
            slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
            alone += np.maximum(np.asarray(rows) - sizes[-1], 0) * max(slope, 0.0)
        alone = alone + self._read_s(np.asarray(rows) / sequences) * np.asarray(reads, np.float64)
        # The extra seconds are negative if single trees were measured while others computed.
        roots, trees = (self._extra_s(sequences, has_trees) for has_trees in (False, True))
        together = alone + np.where(np.asarray(rows) > sequences, trees, roots)
        return np.asarray(np.maximum(together, alone / OUTLIER_FACTOR), np.float64)

    def _extra_s(self, sequences: int, has_trees: bool) -> float:
        """Extra seconds of a batched pass.

        Falls back to the other kind (trees or roots alone) until this one was observed.
        """
        number = power_of_two(sequences)
        other = self.sequences_s.get((number, not has_trees), 0.0)
        return self.sequences_s.get((number, has_trees), other)

    def _read_s(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the (n,) seconds for each row and position, of sequences with (n,) rows."""
        if not self.position_s:
            return np.zeros(len(rows))
        numbers, seconds = list(self.position_s), list(self.position_s.values())
        known = np.clip(rows, numbers[0], numbers[-1])
        return np.asarray(np.interp(known, numbers, seconds) / known, np.float64)

    def observe(self, rows: int, reads: float, sequences: int, seconds: float) -> None:
        """Take in a forward pass of decoding; machines change their speed."""
        expected = float(self.predict([rows], [reads], sequences)[0])
        ratio = seconds / expected
        self._ratios.append(ratio)
        if not self._rescale(rows, sequences):
            self._smooth(rows, sequences, ratio, expected)
        if sequences == 1 and rows in self.passes_s:
            read_s = float(self._read_s(np.array([rows]))[0]) * reads
            self.passes_s[rows].append(max(seconds - read_s, seconds / OUTLIER_FACTOR))
        self._passes += 1
        if self.file is not None and self._passes % KEPT_EVERY == 0:
            self.file.correct(self)

    def _rescale(self, rows: int, sequences: int) -> bool:
        """Correct costs at once if the latest passes agree against them; return whether they do."""
        if len(self._ratios) < AGREEING:
            return False
        fastest, slowest = min(self._ratios), max(self._ratios)
        if 1 / IMPLAUSIBLE < slowest < 1 / DISAGREEMENT:
            factor = slowest
        elif fastest > DISAGREEMENT and sequences == 1:
            factor = fastest
        else:
            return False
        self._ratios.clear()
        if factor > 1 and rows == 1:
            # That plain passes take longer does not say that trees do: a tree will show it.
            self.seconds[1] *= factor
            for size in self.seconds:
                self.seconds[size] = max(self.seconds[size], self.seconds[1])
        else:
            for size in self.seconds:
                self.seconds[size] *= factor
        self._before, self._seen = dict(self.seconds), Counter()
        if sequences == 1:
            self._seen[rows] = AGREEING
        return True

    def _smooth(self, rows: int, sequences: int, ratio: float, expected: float) -> None:
        """Move costs a little towards the seconds of a pass, `ratio` times the expected ones."""
        if sequences == 1 and rows in self.doubtful:
            self.doubtful.discard(rows)
            self.seconds[rows] *= ratio
            self._seen[rows] = AGREEING
            return
        ratio = min(max(ratio, 1 / OUTLIER_FACTOR), OUTLIER_FACTOR)
        change = COST_SMOOTHING * (ratio - 1)
        if sequences > 1:
            key = power_of_two(sequences), rows > sequences
            weight = COST_SMOOTHING if key in self.sequences_s else 1.0
            known = self._extra_s(*key)
            self.sequences_s[key] = known + weight * (ratio - 1) * expected
            trees = key[0], True
            if trees in self.sequences_s and not key[1]:
                # Decay the estimate, so that trees that were expensive once are tried again.
                excess = self.sequences_s[trees] - self.sequences_s[key]
                self.sequences_s[trees] -= COST_FORGETTING * excess
            return
        for size in self.seconds:
            # A slowdown of one size probably affects the others too, but less surely.
            self.seconds[size] *= 1 + (change if size == rows else change / 2)
        self._seen[rows] += 1
        self._keep_shape()

    def _keep_shape(self) -> None:
        """Correct sizes that were not seen as much as the sizes next to them that were."""
        known = [size for size in self.seconds if self._seen[size] >= AGREEING]
        if not known:
            return
        corrections = [self.seconds[size] / self._before[size] for size in known]
        line = np.interp(list(self.seconds), known, corrections).tolist()
        for size, correction in zip(self.seconds, line, strict=True):
            if not self._seen[size] and size not in self.doubtful:
                self.seconds[size] = self._before[size] * correction

    def doubt(self, rows: int) -> None:
        """Doubt what trees with more than `rows` nodes cost, so that they are tried.

        They become cheaper slowly, and fast while one draft after another is cut to its root.
        """
        self._cut_drafts = self._cut_drafts + 1 if rows == 1 else 0
        share = DOUBT if self._cut_drafts >= AGREEING else COST_FORGETTING if rows > 1 else 0.0
        known = float(self.predict([rows], [0])[0])
        for size, seconds in self.seconds.items():
            if share and size > rows and seconds > known:
                self.seconds[size] -= share * (seconds - known)
                self.doubtful.add(size)
                self._seen[size] = 0


def model_key(target: Path) -> str:
    """Return a text that tells the model in a folder from others that cost something else."""
    weights = sorted((path.name, path.stat().st_size) for path in target.glob("*.safetensors"))
    return json.dumps([weights, (target / "config.json").read_text(encoding="utf-8")])


def cost_file(backend: Backend, model: str, loaded: LoadConfig, folder: Path) -> CostFile:
    """Return the file with the costs of a model on this machine, loaded in this way."""
    name = backend.device_name
    key = [
        backend.name,
        name,
        backend.dtype,
        loaded.kv_bits,
        backend.inexact is None,
        loaded.cuda_graphs,
        loaded.compile,
    ]
    # A preloaded BLAS may be many times as fast with several rows.
    variables = map(os.environ.get, ("OMP_NUM_THREADS", "LD_PRELOAD"))
    machine = platform.node(), platform.processor(), os.cpu_count(), *variables
    versions = [*(version(name) for name in PACKAGES if find_spec(name)), platform.mac_ver()[0]]
    # Kernels that are timed at load may win this time and lose the next.
    used = sorted(
        (kernel, size)
        for kernel, verdicts in device_report(backend).kernels.items()
        for size, verdict in verdicts.items()
        if verdict.startswith("used")
    )
    text = json.dumps([*key, *machine, versions, used, model, TIMED])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return CostFile(folder / f"{digest}.json", lambda: backend.device_name == name)


def power_of_two(sequences: int) -> int:
    """Round a number of sequences up to a power of two, the key of measurements."""
    return 1 << (sequences - 1).bit_length()


def _time(sequence: SequenceSession, size: int) -> float:
    """Time a pass over a tree of some nodes."""
    tree = _bushy_tree(size, sequence.backend.vocab_size)
    before = time.perf_counter()
    sequence.verify(tree)
    return time.perf_counter() - before


def _time_sizes(sequence: SequenceSession) -> tuple[dict[int, float], bool]:
    """Return the best time of each tree size, and whether the times are sound.

    The first forward pass of a size also compiles and allocates: the best time counts, and no size
    is given up because of its first.
    """
    best: dict[int, float] = {}
    for size in TIMED:
        best[size] = _time(sequence, size)
        if best[size] > MAX_RELATIVE_COST * best[1]:
            best[size] = min(best[size], _time(sequence, size))
        if best[size] > MAX_RELATIVE_COST * best[1]:
            break
    rounds: dict[int, list[float]] = {size: [] for size in best}
    started = time.perf_counter()
    for number in range(1, MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - started > TIME_BUDGET_S:
            break
        # A pass is slower after a much larger one. So rounds go down and up in turn, and sizes
        # follow similar ones, as they do in decoding.
        order = sorted(best, reverse=number % 2 == 1)
        for size in [size for size in order if best[size] <= MAX_RELATIVE_COST * best[1]]:
            rounds[size].append(_time(sequence, size))
            best[size] = min(best[size], rounds[size][-1])
    agree = all(
        statistics.median(times) <= DISAGREEMENT * best[size]
        for size, times in rounds.items()
        if times
    )
    rise = all(best[b] * DISAGREEMENT >= best[a] for a, b in pairwise(best))
    return best, agree and rise


def _position_seconds(
    sequence: SequenceSession, tokens: Sequence[int], short_s: Mapping[int, float]
) -> dict[int, float]:
    """Return the extra seconds of a pass for each position, by number of rows.

    The tokens extend the sequence, in chunks, until `PREFILL_S` are over. `short_s` has the
    seconds of passes before, by number of rows.
    """
    started = time.perf_counter()
    for first in range(0, len(tokens), PREFILL_TOKENS):
        sequence.extend(tokens[first : first + PREFILL_TOKENS])
        if time.perf_counter() - started >= PREFILL_S:
            break
    added = sequence.length - PROMPT_TOKENS
    long_s = {rows: min(_time(sequence, rows) for _ in range(MIN_ROUNDS)) for rows in short_s}
    return {rows: max(long_s[rows] - short_s[rows], 0.0) / added for rows in short_s}


def _token_seconds(sequence: SequenceSession) -> float:
    """Time a token of plain decoding, the only pass that a device begins before it is asked to.

    A pass over a root that is known in advance would take longer, and drafts would seem to pay.
    """
    root, started = 0, 0.0
    for number in range(FIRST_TOKENS + PLAIN_TOKENS):
        if number == FIRST_TOKENS:
            started = time.perf_counter()
        root = int(sequence.verify(DraftTree.root_only(root))[0])
        sequence.commit(np.zeros(1, np.int32))
    return (time.perf_counter() - started) / PLAIN_TOKENS


def _bushy_tree(nodes: int, vocab_size: int) -> DraftTree:
    """Build a tree whose nodes have up to four children, much like draft trees.

    Its tokens differ: a single token would take the same experts of a mixture at every node.
    """
    tokens = np.random.default_rng(nodes).integers(0, vocab_size, nodes).astype(np.int32)
    return DraftTree.from_parents(tokens, (np.arange(nodes, dtype=np.int32) - 1) // 4)
