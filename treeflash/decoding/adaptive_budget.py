"""The budget `auto`: how many nodes of each draft tree to verify, and whether to draft at all.

Larger trees are accepted further, and cost more to verify. The budget maximises the expected tokens
per second of decoding as a whole. It changes the speed, never the output.

Inputs. `VerifyCosts` are the seconds of a target pass by its number of rows, measured once for a
target and a device and corrected by every pass of decoding. Each node of a tree comes with the
drafter's probability of the path to it: the probability that its token is emitted.

Correction. A drafter is surer, or less sure, than it is right. `AdaptiveBudget` counts, by depth,
the probability that drafted children of accepted nodes had and how many of them were accepted; the
ratio corrects the probability of every node on the way to a node. A drafter that states its
confidence is counted by depth and level of confidence too, because a stated confidence is no more
reliable. Nodes that continue an earlier occurrence of the text are counted by the level of their
match instead. `PRIOR_WEIGHT` keeps the ratios near 1 until enough was seen.

Ranking. A tree's gain is the sum of its nodes' corrected probabilities; the root's is 1. Nodes are
ranked by these probabilities, but never before their parents. With several sequences the nodes of
all trees are ranked together, so a promising tree gets more of them.

Pruning. The best n nodes cost `costs(n)` seconds and bring `gain(n)` tokens. Verified is the n with
the highest `gain(n) - rate * costs(n)`, where `rate` is the tokens per second of decoding lately,
or of plain decoding if that is faster. Using the rate that results from these sizes as the next
rate finds the sizes with the highest rate (Dinkelbach 1967). A single tree has one of the sizes
that were measured, because hardware has steps.

Pausing. The budget keeps a balance: the tokens that drafting brought beyond what plain decoding
would have emitted in the same time. At `LOWEST_BALANCE` drafting pauses for `FIRST_PAUSE`
iterations; each further pause is twice as long until drafting pays again. Several sequences must
draft faster than plain decoding by `MIN_ADVANTAGE`, and pause until the iterations that drafted
have cost them at most `MAX_LOSS` of their tokens. Copies of the text cost no draft, so they are
verified in pauses of the drafter too; and where they promise more tokens per second than drafted
iterations brought lately, the drafter is not called. Copies without a draft have a balance and
pauses of their own: text may look like earlier text and go on otherwise. Measurements are kept by
the number of sequences that ran together, rounded up to a power of two.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import LoadConfig, Method
from treeflash.decoding.interfaces import Backend, device_report
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.suffix import MATCH_LEVELS, match_level
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
PREFILL_TOKENS = 2048
FIRST_TOKENS, PLAIN_TOKENS = 2, 8
"""Tokens that are decoded before plain decoding is timed, until which a device has no pass of a
next token, and tokens that are timed."""
COST_SMOOTHING = 0.1
"""Weight of the newest measurement in the running mean of its size."""
COST_FORGETTING = 0.02
"""The share of what trees cost more than their roots that a pass over roots alone forgets."""
OUTLIER_FACTOR = 2.0
"""A forward pass that takes more than this many times its expected seconds was disturbed, and
counts as this many times."""
PACKAGES = ("treeflash", "mlx", "torch")
"""Their versions decide how long forward passes take."""


@dataclass
class VerifyCosts:
    """Seconds of a forward pass by tree size, updated from the forward passes of decoded sequences.

    Attributes:
        seconds: by number of nodes, ascending, 1 first, after a short prompt; all are finite and
            above 0.
        position_s: further seconds for each committed position of a sequence, by the number of its
            rows that read it.
        sequences_s: further seconds of a pass over several sequences, whose attention is computed
            sequence by sequence; by number of sequences, rounded up to a power of two, and by
            whether any of them has more than its root: the first such tree makes masks necessary.

    Raises:
        ValueError: a number is out of range, or the sizes do not ascend from 1.
    """

    seconds: dict[int, float]
    position_s: dict[int, float] = field(default_factory=dict)
    sequences_s: dict[tuple[int, bool], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes, seconds = list(self.seconds), list(self.seconds.values())
        if sizes[:1] != [1] or sizes != sorted(sizes):
            raise ValueError(f"tree sizes must ascend from 1, got {sizes}")
        if not all(0 < x < math.inf for x in seconds):
            raise ValueError(f"seconds must be finite and above 0, got {seconds}")
        if not all(0 <= x < math.inf for x in self.position_s.values()):
            raise ValueError(f"position_s must be finite and 0 or more, got {self.position_s}")

    @classmethod
    def measure(cls, backend: Backend) -> VerifyCosts:
        """Time the backend's target on bushy trees of arbitrary tokens."""

        def timed(size: int) -> float:
            tree = _bushy_tree(size, backend.vocab_size)
            before = time.perf_counter()
            sequence.verify(tree)
            return time.perf_counter() - before

        longest = LONG_PROMPT_TOKENS if backend.device == "cpu" else GPU_PROMPT_TOKENS
        longest = min(longest, max(backend.max_positions, PROMPT_TOKENS))
        prompt = [token % backend.vocab_size for token in range(longest)]
        sequence = SequenceSession(backend, capacity=longest + max(TIMED))
        sequence.extend(prompt[:PROMPT_TOKENS])
        # The first forward pass of a size also compiles and allocates: the best time counts, and no
        # size is given up because of its first.
        best: dict[int, float] = {}
        for size in TIMED:
            best[size] = timed(size)
            if best[size] > MAX_RELATIVE_COST * best[1]:
                best[size] = min(best[size], timed(size))
            if best[size] > MAX_RELATIVE_COST * best[1]:
                break
        started = time.perf_counter()
        for number in range(1, MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() - started > TIME_BUDGET_S:
                break
            for size in [size for size in best if best[size] <= MAX_RELATIVE_COST * best[1]]:
                best[size] = min(best[size], timed(size))
        token_s = math.inf if backend.device == "cpu" else _token_seconds(sequence)
        sizes = [size for size in SIZES if size <= max(best)]
        line = np.interp(sizes, list(best), list(best.values())).tolist()
        pairs = zip(sizes, line, strict=True)
        limit = MAX_RELATIVE_COST * best[1]
        costs = {size: seconds for size, seconds in pairs if seconds <= limit}
        timed_sizes = [size for size in best if size in costs]
        position_s: dict[int, float] = {}
        if longest >= LONG_PROMPT_TOKENS:
            for first in range(PROMPT_TOKENS, longest, PREFILL_TOKENS):
                sequence.extend(prompt[first : first + PREFILL_TOKENS])
            on_gpu = longest > LONG_PROMPT_TOKENS
            for rows in GPU_READERS if on_gpu else timed_sizes[-1:]:
                if rows in timed_sizes:
                    longer_s = min(timed(rows) for _ in range(MIN_ROUNDS)) - best[rows]
                    position_s[rows] = max(longer_s, 0.0) / (longest - PROMPT_TOKENS)
        sequence.close()
        return cls({**costs, 1: min(costs[1], token_s)}, position_s)

    @classmethod
    def cached(
        cls, backend: Backend, target: Path, loaded: LoadConfig, folder: Path
    ) -> VerifyCosts:
        """The costs that were measured before for this target, device and dtype, or measured now.

        `folder` has the measurements; that it cannot be written is not an error.
        """
        weights = sorted((path.name, path.stat().st_size) for path in target.glob("*.safetensors"))
        key = [
            backend.name,
            backend.device_name,
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
        # Kernels that race at load may win this time and lose the next.
        used = sorted(
            (kernel, size)
            for kernel, verdicts in device_report(backend).kernels.items()
            for size, verdict in verdicts.items()
            if verdict.startswith("used")
        )
        known = [*key, *machine, versions, used, weights, TIMED]
        digest = hashlib.sha256(json.dumps(known).encode())
        digest.update((target / "config.json").read_bytes())
        file = folder / f"{digest.hexdigest()[:16]}.json"
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            seconds = {int(size): float(cost) for size, cost in stored["seconds"].items()}
            position_s = {int(n): float(cost) for n, cost in stored["position_s"].items()}
            return cls(seconds, position_s)
        except (OSError, ValueError, TypeError, AttributeError, KeyError):  # missing or torn
            if backend.device != "cpu":  # which reads a long text too
                logging.getLogger(__name__).warning(
                    "timing forward passes on %s for the budget auto, once for this model",
                    backend.device_name,
                )
            costs = cls.measure(backend)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{time.monotonic_ns()}")
            measured = {"seconds": costs.seconds, "position_s": costs.position_s}
            scratch.write_text(json.dumps(measured), encoding="utf-8")
            scratch.replace(file)
        except OSError:
            pass  # a read-only home: the next process measures again
        return costs

    def predict(
        self, rows: Sequence[int] | NDArray[np.int64], reads: Sequence[float], sequences: int = 1
    ) -> NDArray[np.float64]:
        """(n,) seconds of n forward passes over `sequences` trees each.

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
        # The further seconds are negative if single trees were measured while others computed.
        roots, trees = (self._further_s(sequences, has_trees) for has_trees in (False, True))
        together = alone + np.where(np.asarray(rows) > sequences, trees, roots)
        return np.asarray(np.maximum(together, alone / OUTLIER_FACTOR), np.float64)

    def _further_s(self, sequences: int, has_trees: bool) -> float:
        """The further seconds of a pass; of passes of the other kind until one was observed."""
        number = power_of_two(sequences)
        other = self.sequences_s.get((number, not has_trees), 0.0)
        return self.sequences_s.get((number, has_trees), other)

    def _read_s(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) seconds for each row and position, of sequences with (n,) rows."""
        if not self.position_s:
            return np.zeros(len(rows))
        numbers, seconds = list(self.position_s), list(self.position_s.values())
        known = np.clip(rows, numbers[0], numbers[-1])
        return np.asarray(np.interp(known, numbers, seconds) / known, np.float64)

    def observe(self, rows: int, reads: float, sequences: int, seconds: float) -> None:
        """Take in a forward pass of decoding; machines change their speed."""
        expected = float(self.predict([rows], [reads], sequences)[0])
        ratio = min(max(seconds / expected, 1 / OUTLIER_FACTOR), OUTLIER_FACTOR)
        change = COST_SMOOTHING * (ratio - 1)
        if sequences > 1:
            key = power_of_two(sequences), rows > sequences
            weight = COST_SMOOTHING if key in self.sequences_s else 1.0
            known = self._further_s(*key)
            self.sequences_s[key] = known + weight * (ratio - 1) * expected
            trees = key[0], True
            if trees in self.sequences_s and not key[1]:
                # Else trees that were dear once would never be tried again.
                dearer = self.sequences_s[trees] - self.sequences_s[key]
                self.sequences_s[trees] -= COST_FORGETTING * dearer
            return
        for size in self.seconds:
            # A slowdown of one size probably affects the others too, but less surely.
            self.seconds[size] *= 1 + (change if size == rows else change / 2)


def power_of_two(sequences: int) -> int:
    """The number of sequences rounded up to a power of two, by which measurements are kept."""
    return 1 << (sequences - 1).bit_length()


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
    """A tree whose nodes have up to four children, much like draft trees.

    Its tokens differ: a single token would take the same experts of a mixture at every node.
    """
    tokens = np.random.default_rng(nodes).integers(0, vocab_size, nodes).astype(np.int32)
    return DraftTree.from_parents(tokens, (np.arange(nodes, dtype=np.int32) - 1) // 4)


SMOOTHING = 0.07
"""Weight of the newest iteration in running sums."""
PRIOR_WEIGHT = 2.0
"""Weight of the drafter's own probabilities, as a number of nodes seen."""
CONFIDENCES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
"""Upper ends of the levels of confidence; closer near 1, because drafters overstate theirs."""
LOWEST_BALANCE, HIGHEST_BALANCE = -2.0, 8.0
"""Bounds of the balance, tokens: drafting pauses at the lower one."""
MIN_ADVANTAGE = 1.1
"""In a batch, draft or copy only if it is at least this much faster than plain decoding. Drafting
also makes the drafter read every prompt, and lets sequences end at different times, which leaves
smaller batches."""
EXTRA_DEPTHS, REACH_DECAY = 1, 0.25
"""Depths that are drafted beyond the depth that trees reached lately, and the depths by which that
depth shrinks in every iteration whose trees are shallower."""
MIN_SPARE = 8
"""A tree is built with this many nodes more than twice the nodes that it is expected to keep."""
MIN_PLAIN, MAX_PLAIN = 2, 8
"""Iterations without a draft that several sequences run before they draft, and the iterations that
are remembered. The one after the prompts were read is slower than the others."""
FIRST_PAUSE, FIRST_PAUSE_TOGETHER, MAX_PAUSE = 16, 4, 256
"""Iterations of the first pause of one sequence and of several, and of any pause; each is twice as
long as the pause before while drafting does not pay."""
MAX_LOSS, GAIN_SMOOTHING = 0.01, 0.3
"""The share of their tokens that several sequences may lose by trying drafts that do not pay: their
pauses are as long as that takes. The weight of the newest iteration in the mean of gains."""

Key: TypeAlias = int | tuple[int, int] | tuple[Literal["match"], int]
"""A depth, a depth and a level of confidence, or the level of a match."""


@dataclass
class Balance:
    """What a choice brought beyond the alternative; the choice pauses where it does not pay."""

    # tokens beyond those that the alternative would have emitted in the same time, divided by the
    # square root of the number of sequences, as their noise is
    balance: float = 0.0
    pause: int = 0  # iterations until the choice is made again
    # length of the next pause, iterations; None for the first one after the choice paid
    next_pause: int | None = None
    # tokens that an iteration brings beyond the alternative's tokens, a running mean
    gain: float | None = None

    def add(self, gained: float, sequences: int) -> None:
        """Add the tokens of an iteration of some sequences beyond the alternative's tokens."""
        first = FIRST_PAUSE if sequences == 1 else FIRST_PAUSE_TOGETHER
        self.balance = min(self.balance + gained / math.sqrt(sequences), HIGHEST_BALANCE)
        known = gained if self.gain is None else self.gain
        self.gain = known + GAIN_SMOOTHING * (gained - known)
        if self.balance <= LOWEST_BALANCE:
            # Trying again may lose as much.
            enough = round(-self.gain / (MAX_LOSS * sequences)) if sequences > 1 else 0
            self.pause = min(max(self.next_pause or first, enough), MAX_PAUSE)
            self.balance, self.next_pause = LOWEST_BALANCE / 2, min(2 * self.pause, MAX_PAUSE)
        elif self.balance > 0:
            self.next_pause = None


@dataclass
class Throughput(Balance):
    """Measurements with about the same number of sequences at once.

    Its balance is of drafting, beyond plain decoding.
    """

    # of iterations with a draft or a copy, a running sum; without a drafter, of all iterations
    # outside of pauses
    tokens: float = 0.0
    seconds: float = 0.0  # of these iterations, a running sum
    drafted_tokens: float = 0.0  # of the iterations in which the drafter ran, a running sum
    drafted_seconds: float = 0.0  # of these iterations, a running sum
    # of copies of the text in place of a draft, beyond iterations that draft; in pauses of the
    # drafter, beyond plain decoding
    copying: Balance = field(default_factory=Balance)
    draft_s: float | None = None  # of the last draft before which all sequences had drafted
    nodes: float | None = None  # of the last drafted trees, on average
    reach: float | None = None  # depth that drafted trees reached lately


@dataclass
class AdaptiveBudget:
    """The adaptive budget of one pair and method; it outlives sequences."""

    costs: VerifyCosts  # of the target's forward pass
    has_drafter: bool = True  # whether a drafter drafts; else trees only have copies of the text
    # by depth, by depth and level of confidence, and by level of a match: the running sum of the
    # probabilities of the children of accepted nodes
    expected: dict[Key, float] = field(default_factory=dict)
    # the running count of those children that were accepted
    accepted: dict[Key, float] = field(default_factory=dict)
    # by number of sequences, rounded up to a power of two
    throughput: dict[int, Throughput] = field(default_factory=dict)
    iterations: dict[int, int] = field(default_factory=dict)  # begun with each number of sequences
    # by number of sequences, the seconds of the latest iterations without a draft, which the costs
    # of single trees do not tell
    plain_s: dict[int, deque[float]] = field(default_factory=dict)
    # by number of sequences, rounded up to a power of two, for a drafter that runs a pass for each
    # depth
    draft_depths: dict[int, DraftDepths] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """The most nodes that any tree can have."""
        return max(self.costs.seconds)

    def throughput_with(self, sequences: int) -> Throughput:
        """The measurements with about that many sequences."""
        return self.throughput.setdefault(power_of_two(sequences), Throughput())

    def begin(self, sequences: int = 1) -> bool:
        """Begin an iteration of some sequences; returns whether it should draft."""
        now = self.throughput_with(sequences)
        now.pause -= now.pause > 0
        now.copying.pause -= now.copying.pause > 0
        before = self.iterations.get(sequences, 0)
        self.iterations[sequences] = before + 1
        return now.pause == 0 and (sequences == 1 or before >= MIN_PLAIN)

    def copies_alone(self, sequences: int) -> bool:
        """Whether copies of the text are verified in iterations that do not draft.

        They are not while plain decoding is timed, and where they do not pay.
        """
        now = self.throughput_with(sequences)
        return self.has_drafter and now.pause > 0 and now.copying.pause == 0

    def nodes_to_build(self, sequences: int) -> int:
        """Nodes that a tree is built with before it is pruned."""
        largest = self.nodes_to_copy(sequences)
        # A larger tree would be pruned. If it pays after all, the next iteration builds more nodes.
        expected = self.throughput_with(sequences).nodes
        return largest if expected is None else min(largest, 2 * math.ceil(expected) + MIN_SPARE)

    def expected_nodes(self, sequences: int) -> int:
        """Nodes that a tree is expected to have when it was pruned."""
        expected = self.throughput_with(sequences).nodes
        return self.nodes_to_build(sequences) if expected is None else max(round(expected), 1)

    def depths_to_draft(self, sequences: int = 1) -> int | None:
        """Depths worth drafting, a little beyond the depth that trees reach; None is all."""
        reach = self.throughput_with(sequences).reach
        return None if reach is None else math.ceil(reach) + EXTRA_DEPTHS

    def nodes_to_copy(self, sequences: int) -> int:
        """Nodes of a copy of the text before it is pruned; they cost nothing to make."""
        return max(self.largest // sequences, min(self.largest, 32))

    def prefers_copy(self, tree: DraftTree, length: int, sequences: int = 1) -> bool:
        """Whether a copy of the text promises more tokens per second than the drafter brought.

        `length` is the number of committed positions; `sequences` ask for drafts.
        """
        now = self.throughput_with(sequences)
        if not now.drafted_seconds or now.copying.pause:
            return False
        expected = np.cumsum(np.exp(tree.log_probs) * self._corrections(tree))
        sizes = np.array([*(n for n in self.costs.seconds if n < len(tree)), len(tree)])
        rows = sequences * sizes
        costs = self.costs.predict(rows, (rows * float(length)).tolist(), sequences)
        rates = sequences * expected[sizes - 1] / costs
        return bool(rates.max() > now.drafted_tokens / now.drafted_seconds)

    def passes_to_draft(self, most: int, lengths: Sequence[int]) -> int:
        """Depths worth drafting, at most `most`, for a drafter that runs a pass for each depth."""
        sequences = len(lengths)
        most = min(self.depths_to_draft(sequences) or most, most)
        depths = self.draft_depths.setdefault(power_of_two(sequences), DraftDepths())
        return depths.choose(most, self._rate(sequences, lengths), sequences)

    def prune(
        self, trees: Sequence[DraftTree], lengths: Sequence[int], other_rows: int = 0
    ) -> list[NDArray[np.int64]]:
        """The nodes of each tree that pay, ascending, with the root and every node's parent.

        `lengths` are committed positions, `other_rows` further rows of the same forward pass.
        """
        gains = [np.exp(tree.log_probs) * self._corrections(tree) for tree in trees]
        ranks = [_ranks(tree, gain) for tree, gain in zip(trees, gains, strict=True)]
        sizes_of_trees = [len(tree) for tree in trees]
        owners = np.repeat(np.arange(len(trees)), sizes_of_trees)
        order = np.argsort(-np.concatenate(ranks), kind="stable")
        expected = np.cumsum(np.concatenate(gains)[order])
        reads = np.cumsum(np.asarray(lengths, np.float64)[owners[order]])
        if len(trees) == 1 and not other_rows:
            # Hardware has steps: only sizes whose costs are known.
            sizes = np.array([*(n for n in self.costs.seconds if n < len(order)), len(order)])
        else:
            sizes = np.arange(len(trees), len(order) + 1)
        costs = self.costs.predict(sizes + other_rows, reads[sizes - 1], len(trees))
        rate = self._rate(len(trees), lengths)
        if len(trees) > 1 and not self.throughput_with(len(trees)).seconds:
            # Nothing was drafted yet: take the rate that this pass alone could reach.
            rate = max(rate, float((expected[sizes - 1] / costs).max()))
        worth = expected[sizes - 1] - rate * costs
        kept = np.zeros(len(order), np.bool_)
        kept[order[: sizes[int(np.argmax(worth))]]] = True
        parts = np.split(kept, np.cumsum(sizes_of_trees)[:-1])
        return [np.flatnonzero(part) for part in parts]

    def observe(
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[NDArray[np.int32]],
        lengths: Sequence[int],
        seconds: Mapping[Any, float],
        *,
        first: bool = False,
    ) -> None:
        """Learn from an iteration that verified `trees` and accepted the (a,) nodes `paths`.

        `lengths` are committed positions before the iteration; `seconds` are of its phases. A
        sequence that drafts for the `first` time also reads its prompt, and perhaps compiles
        kernels: its time says nothing about later iterations.
        """
        sequences = len(trees)
        rows = sum(len(tree) for tree in trees)
        reads = float(np.dot([len(tree) for tree in trees], lengths))
        longest = OUTLIER_FACTOR * float(self.costs.predict([rows], [reads], sequences)[0])
        all_s = sum(seconds.values()) - max(seconds["verify"] - longest, 0.0)
        self.costs.observe(rows, reads, sequences, seconds["verify"])
        now = self.throughput_with(sequences)
        drafted = "draft" in seconds
        if drafted and not first:
            now.draft_s = seconds["draft"]
        elif first and now.draft_s is not None:
            # The draft counts as if it had read no prompt.
            all_s -= max(seconds["draft"] - now.draft_s, 0.0)
        tokens = sum(len(path) for path in paths)
        plain = not drafted and rows == sequences
        if plain and sequences > 1:
            self.plain_s.setdefault(sequences, deque(maxlen=MAX_PLAIN)).append(all_s)
        for tree, path in zip(trees, paths, strict=True):
            self._observe_depths(tree, path)
        if drafted:
            now.nodes = rows / sequences
            deepest = max(_drafted_depth(tree) for tree in trees)
            now.reach = max(deepest, (now.reach or 0) - REACH_DECAY)
            if depths := self.draft_depths.get(power_of_two(sequences)):
                depths.observe(trees, paths, None if first else seconds["draft"])
        if (first and now.draft_s is None) or (plain and (self.has_drafter or now.pause)):
            return
        now.tokens = (1 - SMOOTHING) * now.tokens + tokens
        now.seconds = (1 - SMOOTHING) * now.seconds + all_s
        if drafted:
            now.drafted_tokens = (1 - SMOOTHING) * now.drafted_tokens + tokens
            now.drafted_seconds = (1 - SMOOTHING) * now.drafted_seconds + all_s
        if plain:
            return
        choice = now if drafted or not self.has_drafter else now.copying
        if choice is now or now.pause:
            advantage = MIN_ADVANTAGE if sequences > 1 else 1.0
            rate = advantage * self._plain_rate(sequences, lengths)
        elif now.drafted_seconds:
            rate = now.drafted_tokens / now.drafted_seconds
        else:
            return
        choice.add(tokens - all_s * rate, sequences)

    def _observe_depths(self, tree: DraftTree, path: NDArray[np.int32]) -> None:
        for depth, parent in enumerate(path, 1):
            children = np.flatnonzero(tree.parents == parent)
            if not len(children):
                break
            probs = np.exp(tree.log_probs[children] - tree.log_probs[parent])
            hits = children == path[depth] if depth < len(path) else np.zeros(len(children))
            drafted = np.ones(len(children), np.bool_)
            if tree.matches is not None:
                drafted = tree.matches[children] == 0
                if not drafted.all():
                    level = match_level(tree.matches[children[~drafted][0]])
                    self._count(("match", level), probs[~drafted], hits[~drafted])
            if not drafted.any():
                continue
            self._count(depth, probs[drafted], hits[drafted])
            if tree.confidences is not None:
                level = bisect_right(CONFIDENCES, float(tree.confidences[children[drafted][0]]))
                self._count((depth, level), probs[drafted], hits[drafted])

    def _count(self, key: Key, probs: NDArray[np.float64], hits: NDArray[Any]) -> None:
        """Count the children of an accepted node."""
        for counts, value in ((self.expected, probs.sum()), (self.accepted, hits.sum())):
            counts[key] = (1 - SMOOTHING) * counts.get(key, 0.0) + float(value)

    def _plain_rate(self, sequences: int, lengths: Sequence[int]) -> float:
        """Tokens per second of plain decoding, which is always possible."""
        if known := self.plain_s.get(sequences):
            return sequences / min(known)  # a disturbance only adds time
        reads = float(sum(lengths))
        return sequences / float(self.costs.predict([sequences], [reads], sequences)[0])

    def _rate(self, sequences: int, lengths: Sequence[int]) -> float:
        now = self.throughput_with(sequences)
        plain = self._plain_rate(sequences, lengths)
        return max(plain, now.tokens / now.seconds) if now.seconds else plain

    def _corrections(self, tree: DraftTree) -> NDArray[np.float64]:
        """(n,) factors on the probabilities of nodes: the product along the path to each."""
        depths = range(int(tree.depths.max()) + 1)
        factors = np.array([self._factor(depth, 1.0) for depth in depths])  # 1 for the root
        corrections: NDArray[np.float64] = np.cumprod(factors)[tree.depths]
        if tree.confidences is None and tree.matches is None:
            return corrections
        own = factors[tree.depths]
        if tree.confidences is not None:
            levels = range(len(CONFIDENCES) + 1)
            by_level = [[self._factor((d, i), factors[d]) for i in levels] for d in depths]
            found = np.searchsorted(CONFIDENCES, tree.confidences, "right")
            own = np.array(by_level)[tree.depths, found]
        if tree.matches is not None:
            by_match = [self._factor(("match", i), 1.0) for i in range(len(MATCH_LEVELS) + 1)]
            copies = np.flatnonzero(tree.matches)
            found = np.searchsorted(MATCH_LEVELS, tree.matches[copies], "right")
            own[copies] = np.array(by_match)[found]
        if tree.is_chain:  # copies are often long ones
            return np.asarray(np.cumprod(own), np.float64)
        for depth in depths[1:]:
            nodes = np.flatnonzero(tree.depths == depth)
            corrections[nodes] = corrections[tree.parents[nodes]] * own[nodes]
        return corrections

    def _factor(self, key: Key, prior: float) -> float:
        """The accepted drafts as a share of the expected ones; `prior` before any was seen."""
        accepted, expected = self.accepted.get(key, 0.0), self.expected.get(key, 0.0)
        return (accepted + PRIOR_WEIGHT * prior) / (expected + PRIOR_WEIGHT)


def _ranks(tree: DraftTree, gains: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) gains to rank nodes by: at most the parent's gain, and infinite for the root."""
    ranks = gains.copy()
    ranks[0] = np.inf
    if tree.is_chain:
        return np.minimum.accumulate(ranks)
    for depth in range(1, int(tree.depths.max()) + 1):
        nodes = np.flatnonzero(tree.depths == depth)
        ranks[nodes] = np.minimum(ranks[nodes], ranks[tree.parents[nodes]])
    return ranks


def _drafted_depth(tree: DraftTree) -> int:
    """Depth of the deepest node that the drafter proposed."""
    if tree.matches is None:
        return int(tree.depths.max())
    return int(tree.depths.max(initial=0, where=tree.matches == 0))


@dataclass(eq=False)
class AdaptiveBudgets:
    """The adaptive budgets of one pair, by method; schedulers and threads may share them.

    The budgets share the costs of the target's forward pass, which are None until one is needed.
    """

    costs: VerifyCosts | None = None
    by_method: dict[Method, AdaptiveBudget] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def get(self, method: Method, measure: Callable[[], VerifyCosts]) -> AdaptiveBudget:
        """The budget of a method; `measure` gives the costs if none are known yet."""
        with self._lock:
            if method not in self.by_method:
                if self.costs is None:
                    self.costs = measure()
                self.by_method[method] = AdaptiveBudget(self.costs, method != "suffix")
            return self.by_method[method]

    def is_paused(self, sequences: int) -> bool:
        """Whether no method drafts now with about that many sequences."""
        with self._lock:
            budgets = list(self.by_method.values())
        found = [x.throughput.get(power_of_two(sequences)) for x in budgets]
        return bool(found) and all(now is not None and now.pause > 0 for now in found)


PRIOR_SHARE = 0.8
"""The share of paths that go on to the next depth before any iteration was seen."""
MAX_RATIO = 2.0
"""A draft whose depths take more than this many times the expected seconds counts as this many."""


@dataclass
class DraftDepths:
    """What the iterations with about the same number of sequences have shown."""

    seconds: float | None = None  # of a depth, a running mean; None before the first draft
    depths: int = 1  # of the latest draft
    # by depth, a running count of the paths that could go on to it
    reached: dict[int, float] = field(default_factory=dict)
    # by depth, a running count of those that did
    accepted: dict[int, float] = field(default_factory=dict)

    def choose(self, most: int, rate: float, sequences: int = 1) -> int:
        """The depths that pay, from 1 to `most`, at a `rate` of tokens per second in all."""
        self.depths = most
        if self.seconds is not None:
            share, price = 1.0, rate * self.seconds / sequences
            for depth in range(1, most + 1):
                share *= self._share(depth)
                if share < price:
                    self.depths = max(depth - 1, 1)
                    break
        return self.depths

    def observe(
        self, trees: Sequence[DraftTree], paths: Sequence[NDArray[np.int32]], seconds: float | None
    ) -> None:
        """Learn from an iteration that drafted, from its trees and the (a,) accepted nodes of each.

        `seconds` are of the draft; None if they say nothing about later drafts.
        """
        if seconds is not None:
            newest = seconds / self.depths
            known = newest if self.seconds is None else self.seconds
            self.seconds = known + SMOOTHING * (min(newest, MAX_RATIO * known) - known)
        # Depths that are not drafted any more slowly go back to the prior, so they are tried again.
        for counts in (self.reached, self.accepted):
            for depth in counts:
                counts[depth] *= 1 - SMOOTHING
        for tree, path in zip(trees, paths, strict=True):
            for depth, parent in enumerate(path, 1):
                if not (tree.parents == parent).any():
                    break
                self.reached[depth] = self.reached.get(depth, 0.0) + 1 / len(trees)
                if depth < len(path):
                    self.accepted[depth] = self.accepted.get(depth, 0.0) + 1 / len(trees)

    def _share(self, depth: int) -> float:
        reached, accepted = self.reached.get(depth, 0.0), self.accepted.get(depth, 0.0)
        return (accepted + PRIOR_WEIGHT * PRIOR_SHARE) / (reached + PRIOR_WEIGHT)
