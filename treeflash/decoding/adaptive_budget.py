"""The budget `auto`: how many nodes of each draft tree to verify, and whether to draft at all.

Problem. A larger tree is accepted deeper, and its pass takes longer. The best size depends on the
text, the drafter, the machine and the other sequences. It changes the speed, never the output.

Idea. Whatever takes time must bring more tokens than decoding at its present rate would emit in
that time. The rate is the tokens per second of decoding lately, or of plain decoding if that is
faster.

Example. A plain pass takes 20 ms, and decoding emits 80 tokens per second lately. A tree has nodes
that are emitted with the probabilities 1 (the root), 0.8, 0.6, 0.3 and 0.2, and a pass over 1, 3
and 5 rows takes 20, 24 and 32 ms. Its worth is the expected tokens less those that the rate emits
meanwhile: 1 - 80 * 0.020 = -0.6, 2.4 - 80 * 0.024 = 0.48 and 2.9 - 80 * 0.032 = 0.34. So 3 nodes
are verified. If all drafts were as bad as 0.1, drafting would pause after some iterations.

Nodes. `VerifyCosts` predict the seconds of a pass by its number of rows. The probability that a
node's token is emitted is what the drafter or the text says, which each sequence calibrates
(`Calibration`, `SuffixDrafter`), corrected by how often drafts were accepted lately (`Acceptance`).
The nodes of all trees are ranked together, so a promising tree gets more of them. Verified are the
best n nodes with the highest `gain(n) - rate * costs(n)`. Using the rate that results from these
sizes as the next rate finds the sizes with the highest rate (Dinkelbach 1967). A single tree has
one of the sizes that were measured, because hardware has steps. It has `SMALLEST` nodes at least,
and a promising size that no pass had lately is verified once: else nothing would show that the
table is wrong about them.

Drafts. A `Pause` keeps a balance: the tokens that drafting brought beyond what plain decoding would
have emitted in the same time. At the lowest balance it pauses; each later pause is twice as long
until drafting pays again. It ends if a plain pass turns out to be much slower than was thought,
because the balance was wrong. A pause goes on in the next text, often one of the same kind. Copies
of the text cost no draft, so they are verified in pauses too; and where a copy alone promises more
than the rate emits in the time of its pass, the drafter is not called.

Batches. Drafts and copies of several sequences must beat plain decoding by `MIN_ADVANTAGE`. Copies
have a `Pause` of their own. Some iterations decode plainly, so that the time of it is known.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.config import Method
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import DIFFERENT, FORGETTING, SIZES, VerifyCosts, power_of_two

CONFIDENCES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
"""Upper ends of the levels of confidence; closer near 1, because drafters overstate theirs."""
SMALLEST = 5
"""Nodes that are verified at least of a single drafted tree."""
MIN_ADVANTAGE = 1.1
"""A factor that is worth a change. In a batch, drafts and copies must be faster than plain decoding
by it: they let sequences end at different times, which leaves smaller batches, and the drafter must
read every prompt."""
MIN_PLAIN = 2
"""Iterations of plain decoding that several sequences run before they draft, to know its time."""
PLAIN_EVERY = 32
"""Every so many iterations of several sequences are of plain decoding: copies of the text are found
in nearly all of them, so a wrong time of plain decoding would stay."""


@dataclass
class Pause:
    """Skips an optional step while it does not pay; each pause is twice as long as the last one.

    Attributes:
        first: iterations of the first pause after the step paid.
        longest: iterations of any pause.
        lowest: the balance at which the step pauses.
        highest: the balance beyond which gains do not count.
        left: iterations until the step is tried again.
        balance: tokens beyond what decoding without the step would have emitted in the same time.
    """

    first: int = 16
    longest: int = 256
    lowest: float = -2.0
    highest: float = 8.0
    left: int = 0
    balance: float = 0.0
    _next: int = 0  # iterations of the next pause; 0 for the first one

    def begin(self) -> bool:
        """Begin an iteration; returns whether the step is tried in it."""
        self.left -= self.left > 0
        return self.left == 0

    def extend(self) -> None:
        """Begin a pause."""
        self.left = max(self._next, self.first)
        self._next = min(2 * self.left - 1, self.longest)  # the last iteration skips nothing

    def reset(self) -> None:
        """Let the next pause be a short one, because the step paid."""
        self._next = 0

    def add(self, gained: float) -> None:
        """Add what an iteration with the step gained."""
        self.balance = min(max(self.balance + gained, self.lowest), self.highest)
        if self.balance == self.lowest:
            self.extend()
        elif self.balance > 0:
            self.reset()


@dataclass
class Acceptance:
    """How often drafts are accepted, relative to what the drafter's probabilities promise.

    In each iteration with a tree, the counts lose `FORGETTING` of their size. Copies of the text
    are not counted: each sequence learns how good its own are (`SuffixDrafter`).

    Attributes:
        expected: by level of confidence, the sum of the probabilities of children of accepted
            nodes. The nodes of a drafter that states no confidences are of one level.
        accepted: by level, how many of these children were accepted.
        prior: the weight of the drafter's own probabilities, as a number of nodes.
    """

    expected: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(CONFIDENCES) + 1))
    accepted: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(CONFIDENCES) + 1))
    prior: float = 16.0

    def gains(self, tree: DraftTree) -> NDArray[np.float64]:
        """Return (n,) probabilities that the nodes' tokens are emitted; 1 for the root.

        No node has a higher one than its parent.
        """
        shares = (self.accepted + self.prior) / (self.expected + self.prior)
        corrections = np.where(_is_drafted(tree), np.log(shares)[_levels(tree)], 0.0)
        paths = np.minimum(_own_log_probs(tree) + corrections, 0.0).tolist()
        paths[0] = 0.0
        for node, parent in enumerate(tree.parents[1:].tolist(), 1):
            paths[node] += paths[parent]
        return np.asarray(np.exp(paths), np.float64)

    def observe(self, trees: Sequence[DraftTree], paths: Sequence[NDArray[np.int32]]) -> None:
        """Learn from the (a,) accepted nodes of each tree of an iteration."""
        if all(len(tree) == 1 for tree in trees):
            return
        self.expected *= 1 - FORGETTING
        self.accepted *= 1 - FORGETTING
        for tree, path in zip(trees, paths, strict=True):
            on_path = np.zeros(len(tree) + 1, np.bool_)  # the root's parent is -1, the last entry
            on_path[path] = True
            counted = np.flatnonzero(on_path[tree.parents] & _is_drafted(tree))
            levels = _levels(tree)[counted]
            np.add.at(self.expected, levels, np.exp(_own_log_probs(tree)[counted]))
            np.add.at(self.accepted, levels[on_path[counted]], 1.0)


def _own_log_probs(tree: DraftTree) -> NDArray[np.float64]:
    """Return the (n,) log probabilities of nodes given their parents; the root's has no meaning."""
    return tree.log_probs - tree.log_probs[tree.parents]


def _levels(tree: DraftTree) -> NDArray[np.int64]:
    """Return the (n,) levels of confidence of nodes; the root's has no meaning."""
    if tree.confidences is None:
        return np.zeros(len(tree), np.int64)
    return np.searchsorted(CONFIDENCES, tree.confidences, "right")


def _is_drafted(tree: DraftTree) -> NDArray[np.bool_]:
    """Return (n,) bool, whether the drafter proposed a node, or it is the root."""
    if tree.matches is None:
        return np.ones(len(tree), np.bool_)
    return np.equal(tree.matches, 0)


@dataclass
class Rate:
    """Tokens and seconds of the latest iterations, as sums of which each forgets a share."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """Add an iteration."""
        self.tokens = (1 - FORGETTING) * self.tokens + tokens
        self.seconds = (1 - FORGETTING) * self.seconds + seconds

    @property
    def per_s(self) -> float:
        """Tokens per second; 0 before anything was seen."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Pace:
    """Measurements with about the same number of sequences at once."""

    drafting: Pause = field(default_factory=Pause)  # pause of the drafter
    copying: Pause = field(default_factory=Pause)  # pause of copies; only a batch heeds it
    begun: int = 0  # number of iterations
    rate: Rate = field(default_factory=Rate)  # rate of iterations with a draft or a copy
    # seconds of the latest drafts
    draft_s: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    # seconds of each depth of the latest drafts
    depth_s: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    depths: int = 1  # depths of the latest draft
    # (d,) shares of paths that go on to each depth lately, for drafters that take a pass for each
    shares: NDArray[np.float64] = field(default_factory=lambda: np.ones(0))
    nodes: float | None = None  # mean number of nodes of the last drafted trees
    reach: float | None = None  # depth that drafted trees reached lately

    def learn(self, trees: Sequence[DraftTree], paths: Sequence[NDArray[np.int32]]) -> None:
        """Learn how large and how deep drafted trees are, and how deep they were accepted."""
        self.nodes = sum(map(len, trees)) / len(trees)
        deepest = max(map(_drafted_depth, trees))
        reach = deepest if self.reach is None else self.reach
        self.reach = max(deepest, reach + FORGETTING * (deepest - reach))
        depths = np.arange(1, len(self.shares) + 1)
        accepted = np.mean([depths < len(path) for path in paths], 0)
        # What was not drafted becomes as likely as the depth before it, until it is tried again.
        seen = np.where(depths <= self.depths, accepted, np.append(1.0, self.shares)[:-1])
        self.shares += FORGETTING * (seen - self.shares)


@dataclass
class AdaptiveBudget:
    """The adaptive budget of one pair and method; it outlives sequences."""

    costs: VerifyCosts  # costs of the target's forward pass
    acceptance: Acceptance = field(default_factory=Acceptance)
    # by number of sequences, rounded up to a power of two
    paces: defaultdict[int, Pace] = field(default_factory=lambda: defaultdict(Pace))

    @property
    def largest(self) -> int:
        """The most nodes that any tree can have."""
        return max(self.costs.seconds)

    def pace(self, sequences: int) -> Pace:
        """Return the measurements with about that many sequences."""
        return self.paces[power_of_two(sequences)]

    def begin(self, sequences: int = 1) -> bool:
        """Begin an iteration of some sequences; returns whether it should draft."""
        now = self.pace(sequences)
        pays = now.drafting.begin()
        now.copying.begin()
        now.begun += 1
        return pays and not self._times_plain(sequences)

    def copies(self, sequences: int) -> bool:
        """Return whether the iteration that has begun verifies copies of the text."""
        paused = sequences > 1 and self.pace(sequences).copying.left > 0
        return not paused and not self._times_plain(sequences)

    def _times_plain(self, sequences: int) -> bool:
        """Return whether the iteration measures plain decoding, without drafts and copies."""
        begun = self.pace(sequences).begun
        return sequences > 1 and (begun <= MIN_PLAIN or begun % PLAIN_EVERY == 0)

    def nodes_to_build(self, sequences: int) -> int:
        """Return how many nodes a tree is built with before it is pruned."""
        largest = self.nodes_to_copy(sequences)
        # A larger tree would be pruned. If it pays after all, the next iteration builds more nodes.
        expected = self.pace(sequences).nodes
        if expected is None:
            return largest
        return min(largest, 2 * max(math.ceil(expected), SMALLEST))

    def expected_nodes(self, sequences: int) -> int:
        """Return how many nodes a pruned tree is expected to have."""
        expected = self.pace(sequences).nodes
        return self.nodes_to_build(sequences) if expected is None else max(round(expected), 1)

    def nodes_to_copy(self, sequences: int) -> int:
        """Return how many nodes a copy of the text has before it is pruned; they cost nothing."""
        return max(self.largest // sequences, min(self.largest, 32))

    def depths_to_draft(self, sequences: int = 1) -> int | None:
        """Return the depths worth drafting, one beyond what trees reach lately; None is all."""
        reach = self.pace(sequences).reach
        return None if reach is None else math.ceil(reach) + 1

    def passes_to_draft(self, most: int, lengths: Sequence[int]) -> int:
        """Return the depths worth drafting, at most `most`, if each takes a pass."""
        now = self.pace(len(lengths))
        now.shares = np.append(now.shares, np.ones(max(most - len(now.shares), 0)))
        now.depths = most
        if now.depth_s:
            price = self._rate(lengths) * statistics.median(now.depth_s) / len(lengths)
            now.depths = max(int((now.shares[:most] > price).sum()), 1)
        return now.depths

    def prefers_copy(self, tree: DraftTree, length: int, sequences: int = 1) -> bool:
        """Return whether a copy alone promises more than the rate emits in the time of its pass.

        `length` is the number of committed positions; `sequences` ask for drafts.
        """
        sizes = self._sizes(len(tree))
        expected = sequences * np.cumsum(self.acceptance.gains(tree))[sizes - 1]
        rows = sequences * sizes
        costs = self.costs.predict(rows, (rows * float(length)).tolist(), sequences)
        pays = bool((expected > self._rate([length] * sequences) * costs).any())
        return pays and self.pace(sequences).rate.seconds > 0

    def prune(
        self,
        trees: Sequence[DraftTree],
        lengths: Sequence[int],
        others: Sequence[tuple[int, int]] = (),
    ) -> list[NDArray[np.int64]]:
        """Select the nodes of each tree that pay, ascending, with the root and every node's parent.

        `lengths` are committed positions. `others` are the nodes and the committed positions of
        each other tree of the forward pass: its sequence waits for the pass, too.
        """
        counts = [len(tree) for tree in trees]
        gains = np.concatenate([self.acceptance.gains(tree) for tree in trees])
        is_root = np.concatenate([tree.parents for tree in trees]) < 0
        owners = np.repeat(np.arange(len(trees)), counts)
        order = np.argsort(np.where(is_root, -np.inf, -gains), kind="stable")
        expected = np.cumsum(gains[order])
        sizes = np.arange(len(trees), len(order) + 1)
        is_lone = len(trees) == 1 and not others
        if is_lone:
            smallest = SMALLEST if _drafted_depth(trees[0]) else 1
            sizes = self._sizes(len(order))
            sizes = sizes[sizes >= min(smallest, len(order))]
        rows = sizes + sum(number for number, _ in others)
        reads = np.cumsum(np.asarray(lengths, np.float64)[owners[order]])
        reads += sum(number * length for number, length in others)
        all_lengths = [*lengths, *(length for _, length in others)]
        costs = self.costs.predict(rows, reads[sizes - 1], len(all_lengths))
        rate = self._rate(all_lengths)
        if not self.pace(len(all_lengths)).rate.seconds:
            # Nothing was drafted yet: take the rate that this pass alone could reach.
            rate = max(rate, float(((expected[sizes - 1] + len(others)) / costs).max()))
        best = int(sizes[np.argmax(expected[sizes - 1] - rate * costs)])
        if is_lone and _drafted_depth(trees[0]):
            best = self._size_to_try(best, sizes, expected)
        kept = np.zeros(len(order), np.bool_)
        kept[order[:best]] = True
        return [np.flatnonzero(part) for part in np.split(kept, np.cumsum(counts)[:-1])]

    def _size_to_try(
        self, best: int, sizes: NDArray[np.int64], expected: NDArray[np.float64]
    ) -> int:
        """Return the next larger size, if it promises more and its cost is not known, or the best.

        `expected` has the tokens of the first nodes. Else nothing would show a wrong cost of it.
        """
        larger: int = next(iter(sizes[sizes >= best * DIFFERENT].tolist()), best)
        promises = expected[larger - 1] >= MIN_ADVANTAGE * expected[best - 1]
        if promises and self.costs.is_known(best) and not self.costs.is_known(larger):
            return larger
        return best

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
        sequences, now = len(trees), self.pace(len(trees))
        sizes = [len(tree) for tree in trees]
        rows, reads = sum(sizes), float(np.dot(sizes, lengths))
        is_plain = rows == sequences
        thought = self._rate_to_beat(lengths) if is_plain and now.drafting.left else 0.0
        draft_s = seconds.get("draft", 0.0)
        self.costs.observe(rows, reads, sequences, sum(seconds.values()) - draft_s)
        if thought and thought > DIFFERENT * self._rate_to_beat(lengths):
            now.drafting = Pause()  # drafts lost against a plain pass that is slower than thought
        self.acceptance.observe(trees, paths)
        drafted = "draft" in seconds
        if drafted:
            now.learn(trees, paths)
            if not first:
                now.draft_s.append(draft_s)
                now.depth_s.append(draft_s / now.depths)
            elif not now.draft_s:
                return
            draft_s = statistics.median(now.draft_s)
        elif is_plain:
            return
        # The expected seconds, because a disturbance says nothing about the choice.
        all_s = draft_s + float(self.costs.predict([rows], [reads], sequences)[0])
        tokens = sum(map(len, paths))
        now.rate.add(tokens, all_s)
        # The noise of several sequences is the square root of their number.
        gained = (tokens - all_s * self._rate_to_beat(lengths)) / math.sqrt(sequences)
        (now.drafting if drafted else now.copying).add(gained)

    def _sizes(self, most: int) -> NDArray[np.int64]:
        """Return the sizes that the best part of a tree with `most` nodes may have."""
        return np.append(self.costs.sizes[self.costs.sizes < most], most)

    def _rate_to_beat(self, lengths: Sequence[int]) -> float:
        """Return the tokens per second that drafts and copies must beat: plain decoding's.

        In a batch it is higher by `MIN_ADVANTAGE`.
        """
        sequences = len(lengths)
        plain_s = float(self.costs.predict([sequences], [sum(lengths)], sequences)[0])
        return (MIN_ADVANTAGE if sequences > 1 else 1.0) * sequences / plain_s

    def _rate(self, lengths: Sequence[int]) -> float:
        """Return the tokens per second of decoding lately, or the rate to beat if it is higher."""
        return max(self._rate_to_beat(lengths), self.pace(len(lengths)).rate.per_s)


def _drafted_depth(tree: DraftTree) -> int:
    """Return the depth of the deepest node that the drafter proposed."""
    return int(tree.depths[_is_drafted(tree)].max(initial=0))


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
                self.by_method[method] = AdaptiveBudget(self.costs)
            return self.by_method[method]

    @property
    def largest(self) -> int:
        """The most nodes that any tree can have; until the costs are known, with any costs."""
        return max(SIZES if self.costs is None else self.costs.seconds)

    def is_paused(self, sequences: int) -> bool:
        """Return whether no method drafts now with about that many sequences."""
        with self._lock:
            budgets = list(self.by_method.values())
        found = [x.paces.get(power_of_two(sequences)) for x in budgets]
        return bool(found) and all(now is not None and now.drafting.left > 0 for now in found)
