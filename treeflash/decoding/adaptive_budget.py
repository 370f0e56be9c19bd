"""The budget `auto`: how many nodes of each draft tree to verify, and whether to draft at all.

Problem. A larger tree is accepted deeper, and its pass takes longer. The best size depends on the
text, the drafter, the machine and the other sequences. It changes the speed, never the output.

Idea. Maximise the expected tokens per second of decoding as a whole. A node is worth verifying if
the probability that its token is emitted exceeds the tokens that decoding at its present rate would
emit in the time that the node adds to the pass.

Example. A plain pass takes 20 ms, and decoding emits 80 tokens per second lately. A tree has nodes
that are emitted with the probabilities 1 (the root), 0.8, 0.6, 0.3 and 0.2, and a pass over 1, 3
and 5 rows takes 20, 24 and 32 ms. Its worth is the expected tokens less those that the rate emits
meanwhile: 1 - 80 * 0.020 = -0.6, 2.4 - 80 * 0.024 = 0.48 and 2.9 - 80 * 0.032 = 0.34. So 3 nodes
are verified. If all drafts were as bad as 0.1, the root alone would win, and after some such
iterations drafting pauses.

Inputs. `VerifyCosts` predict the seconds of a target pass by its number of rows. Each node of a
tree comes with the drafter's probability of the path to it: the probability that its token is
emitted.

Correction. A drafter is surer, or less sure, than it is right. `AdaptiveBudget` counts, by depth,
the probability that drafted children of accepted nodes had and how many of them were accepted; the
ratio corrects the probability of every node on the way to a node. A drafter that states its
confidence is counted by depth and level of confidence too, because a stated confidence is no more
reliable. Nodes that continue an earlier occurrence of the text are counted by the level of their
match instead. `PRIOR_WEIGHT` keeps the ratios near 1 until enough was seen.

Ranking. A tree's gain is the sum of its nodes' corrected probabilities; the root's is 1. Nodes are
ranked by these probabilities, but never before their parents. With several sequences the nodes of
all trees are ranked together, so a promising tree gets more of them.

Rule for pruning. The best n nodes cost `costs(n)` seconds and bring `gain(n)` tokens. Verified is
the n with the highest `gain(n) - rate * costs(n)`, where `rate` is the tokens per second of
decoding lately, or of plain decoding if that is faster. Using the rate that results from these
sizes as the next rate finds the sizes with the highest rate (Dinkelbach 1967). A single tree has
one of the sizes that were measured, because hardware has steps.

Rule for pausing. A `PayoffTracker` keeps a balance: the tokens that drafting brought beyond what
plain decoding would have emitted in the same time. At `LOWEST_BALANCE` drafting pauses for
`FIRST_PAUSE` iterations; each later pause is twice as long until drafting pays again. Several
sequences must draft faster than plain decoding by `MIN_ADVANTAGE`, and pause until the iterations
that drafted have cost them at most `MAX_LOSS` of their tokens. Copies of the text cost no draft, so
they are verified in pauses of the drafter too; and where they promise more tokens per second than
drafted iterations brought lately, the drafter is not called. Copies without a draft have a balance
and pauses of their own: text may look like earlier text and go on otherwise. In a batch a sequence
whose tree was cut to its root has pauses too, by the same `BackOff`. Measurements are kept by the
number of sequences that ran together, rounded up to a power of two.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import Method
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.suffix import MATCH_LEVELS, match_level
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import OUTLIER_FACTOR, SIZES, VerifyCosts, power_of_two

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
"""Key of an acceptance estimate: a depth, a depth and a level of confidence, or a match's level."""


@dataclass
class BackOff:
    """Pauses an optional step that does not pay; each pause skips it twice as often as the last."""

    pause: int = 0  # iterations until the step is tried again
    # length of the next pause, iterations; None for the first one after the step paid
    next_pause: int | None = None

    def begin(self) -> bool:
        """Begin an iteration; returns whether the step is tried in it."""
        self.pause -= self.pause > 0
        return self.pause == 0

    def extend(self, shortest: int, longest: int) -> None:
        """Begin a pause of at least `shortest` and at most `longest` iterations."""
        self.pause = min(max(self.next_pause or 0, shortest), longest)
        self.next_pause = min(2 * self.pause - 1, longest)  # the last iteration skips nothing

    def reset(self) -> None:
        """Let the next pause be a short one, because the step paid."""
        self.next_pause = None


@dataclass
class PayoffTracker(BackOff):
    """Tracks whether an optional step gains tokens per second, and pauses it while it loses.

    The step is drafting or copying; the alternative is to go on without it.
    """

    # tokens beyond those that the alternative would have emitted in the same time, divided by the
    # square root of the number of sequences, as their noise is
    balance: float = 0.0
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
            self.extend(max(first, enough), MAX_PAUSE)
            self.balance = LOWEST_BALANCE / 2
        elif self.balance > 0:
            self.reset()


@dataclass
class Throughput:
    """Measurements with about the same number of sequences at once."""

    drafting: PayoffTracker = field(default_factory=PayoffTracker)  # beyond plain decoding
    # of copies of the text in place of a draft, beyond iterations that draft; in pauses of the
    # drafter, beyond plain decoding
    copying: PayoffTracker = field(default_factory=PayoffTracker)
    # Exponentially decayed sums over iterations with a draft or a copy; without a drafter, over all
    # iterations outside of pauses.
    tokens: float = 0.0
    seconds: float = 0.0
    # Exponentially decayed sums over the iterations in which the drafter ran.
    drafted_tokens: float = 0.0
    drafted_seconds: float = 0.0
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
        """Return the measurements with about that many sequences."""
        return self.throughput.setdefault(power_of_two(sequences), Throughput())

    def begin(self, sequences: int = 1) -> bool:
        """Begin an iteration of some sequences; returns whether it should draft."""
        now = self.throughput_with(sequences)
        pays = now.drafting.begin()
        now.copying.begin()
        before = self.iterations.get(sequences, 0)
        self.iterations[sequences] = before + 1
        return pays and (sequences == 1 or before >= MIN_PLAIN)

    def copies_alone(self, sequences: int) -> bool:
        """Return whether copies of the text are verified in iterations that do not draft.

        They are not while plain decoding is timed, and where they do not pay.
        """
        now = self.throughput_with(sequences)
        return self.has_drafter and now.drafting.pause > 0 and now.copying.pause == 0

    def nodes_to_build(self, sequences: int) -> int:
        """Return how many nodes a tree is built with before it is pruned."""
        largest = self.nodes_to_copy(sequences)
        # A larger tree would be pruned. If it pays after all, the next iteration builds more nodes.
        expected = self.throughput_with(sequences).nodes
        return largest if expected is None else min(largest, 2 * math.ceil(expected) + MIN_SPARE)

    def expected_nodes(self, sequences: int) -> int:
        """Return how many nodes a pruned tree is expected to have."""
        expected = self.throughput_with(sequences).nodes
        return self.nodes_to_build(sequences) if expected is None else max(round(expected), 1)

    def depths_to_draft(self, sequences: int = 1) -> int | None:
        """Return the depths worth drafting, a little beyond what trees reach; None is all."""
        reach = self.throughput_with(sequences).reach
        return None if reach is None else math.ceil(reach) + EXTRA_DEPTHS

    def nodes_to_copy(self, sequences: int) -> int:
        """Return how many nodes a copy of the text has before it is pruned; they cost nothing."""
        return max(self.largest // sequences, min(self.largest, 32))

    def prefers_copy(self, tree: DraftTree, length: int, sequences: int = 1) -> bool:
        """Return whether a copy promises more tokens per second than the drafter brought.

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
        """Return the depths worth drafting, at most `most`, if each takes a pass."""
        sequences = len(lengths)
        most = min(self.depths_to_draft(sequences) or most, most)
        depths = self.draft_depths.setdefault(power_of_two(sequences), DraftDepths())
        return depths.choose(most, self._rate(sequences, lengths), sequences)

    def prune(
        self, trees: Sequence[DraftTree], lengths: Sequence[int], other_rows: int = 0
    ) -> list[NDArray[np.int64]]:
        """Select the nodes of each tree that pay, ascending, with the root and every node's parent.

        `lengths` are committed positions, `other_rows` other rows of the same forward pass.
        """
        gains = [np.exp(tree.log_probs) * self._corrections(tree) for tree in trees]
        ranks = [_ranks(tree, gain) for tree, gain in zip(trees, gains, strict=True)]
        sizes_of_trees = [len(tree) for tree in trees]
        owners = np.repeat(np.arange(len(trees)), sizes_of_trees)
        order = np.argsort(-np.concatenate(ranks), kind="stable")
        expected = np.cumsum(np.concatenate(gains)[order])
        reads = np.cumsum(np.asarray(lengths, np.float64)[owners[order]])
        if len(trees) == 1 and not other_rows:
            # Hardware has steps, so only sizes whose costs are known are tried.
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
        if drafted and sequences == 1:
            self.costs.doubt(rows)
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
        if (first and now.draft_s is None) or (plain and (self.has_drafter or now.drafting.pause)):
            return
        now.tokens = (1 - SMOOTHING) * now.tokens + tokens
        now.seconds = (1 - SMOOTHING) * now.seconds + all_s
        if drafted:
            now.drafted_tokens = (1 - SMOOTHING) * now.drafted_tokens + tokens
            now.drafted_seconds = (1 - SMOOTHING) * now.drafted_seconds + all_s
        if plain:
            return
        choice = now.drafting if drafted or not self.has_drafter else now.copying
        if choice is now.drafting or now.drafting.pause:
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
        """Return the tokens per second of plain decoding, which is always possible."""
        if known := self.plain_s.get(sequences):
            return sequences / min(known)  # a disturbance only adds time
        reads = float(sum(lengths))
        return sequences / float(self.costs.predict([sequences], [reads], sequences)[0])

    def _rate(self, sequences: int, lengths: Sequence[int]) -> float:
        now = self.throughput_with(sequences)
        plain = self._plain_rate(sequences, lengths)
        return max(plain, now.tokens / now.seconds) if now.seconds else plain

    def _corrections(self, tree: DraftTree) -> NDArray[np.float64]:
        """Return (n,) factors on the probabilities of nodes: the product along the path to each."""
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
        """Return the accepted share of the expected drafts; `prior` before any was seen."""
        accepted, expected = self.accepted.get(key, 0.0), self.expected.get(key, 0.0)
        return (accepted + PRIOR_WEIGHT * prior) / (expected + PRIOR_WEIGHT)


def _ranks(tree: DraftTree, gains: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (n,) gains to rank nodes by: at most the parent's gain, and infinite for the root."""
    ranks = gains.copy()
    ranks[0] = np.inf
    if tree.is_chain:
        return np.minimum.accumulate(ranks)
    for depth in range(1, int(tree.depths.max()) + 1):
        nodes = np.flatnonzero(tree.depths == depth)
        ranks[nodes] = np.minimum(ranks[nodes], ranks[tree.parents[nodes]])
    return ranks


def _drafted_depth(tree: DraftTree) -> int:
    """Return the depth of the deepest node that the drafter proposed."""
    if tree.matches is None:
        return int(tree.depths.max())
    return int(tree.depths.max(initial=0, where=tree.matches == 0))


@dataclass(eq=False)
class AdaptiveBudgets:
    """The adaptive budgets of one pair, by method; schedulers and threads may share them.

    The budgets share the costs of the target's forward pass, which are None until one is needed.
    `measure` gives them then, if costs are kept for other processes; else they are measured.
    """

    costs: VerifyCosts | None = None
    by_method: dict[Method, AdaptiveBudget] = field(default_factory=dict)
    measure: Callable[[Backend], VerifyCosts] | None = None
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def get(self, method: Method, backend: Backend) -> AdaptiveBudget:
        """Return the budget of a method; a backend's costs are measured if they are unknown."""
        with self._lock:
            if method not in self.by_method:
                if self.costs is None:
                    self.costs = (self.measure or VerifyCosts.measure)(backend)
                self.by_method[method] = AdaptiveBudget(self.costs, method != "suffix")
            return self.by_method[method]

    @property
    def largest(self) -> int:
        """The most nodes that any tree can have; until the costs are known, with any costs."""
        return max(SIZES if self.costs is None else self.costs.seconds)

    def is_paused(self, sequences: int) -> bool:
        """Return whether no method drafts now with about that many sequences."""
        with self._lock:
            budgets = list(self.by_method.values())
        found = [x.throughput.get(power_of_two(sequences)) for x in budgets]
        return bool(found) and all(now is not None and now.drafting.pause > 0 for now in found)


PRIOR_SHARE = 0.8
"""The share of paths that go on to the next depth before any iteration was seen."""
MAX_RATIO = 2.0
"""A draft whose depths take more than this many times the expected seconds counts as this many."""


@dataclass
class DraftDepths:
    """What the iterations with about the same number of sequences have shown."""

    seconds_per_depth: float | None = None  # running mean; None before the first draft
    depths: int = 1  # of the latest draft
    # by depth, a running count of the paths that could go on to it
    reached: dict[int, float] = field(default_factory=dict)
    # by depth, a running count of those that did
    accepted: dict[int, float] = field(default_factory=dict)

    def choose(self, most: int, rate: float, sequences: int = 1) -> int:
        """Choose the depths that pay, from 1 to `most`, at a `rate` of tokens per second in all."""
        self.depths = most
        if self.seconds_per_depth is not None:
            share, price = 1.0, rate * self.seconds_per_depth / sequences
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
            known = newest if self.seconds_per_depth is None else self.seconds_per_depth
            self.seconds_per_depth = known + SMOOTHING * (min(newest, MAX_RATIO * known) - known)
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
