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
are verified. If all drafts were as bad as 0.1, drafting would pause after some iterations.

Inputs. `VerifyCosts` predict the seconds of a target pass by its number of rows. Each node of a
tree comes with the drafter's probability of the path to it: the probability that its token is
emitted. `Acceptance` corrects it by how often such nodes were accepted lately.

Rule for pruning. The nodes of all trees are ranked together by these probabilities, but never
before their parents, so a promising tree gets more of them. The best n nodes cost `costs(n)`
seconds and bring `gain(n)` tokens, the sum of their probabilities. Verified is the n with the
highest `gain(n) - rate * costs(n)`, where `rate` is the tokens per second of decoding lately, or of
plain decoding if that is faster. Using the rate that results from these sizes as the next rate
finds the sizes with the highest rate (Dinkelbach 1967). A single tree has one of the sizes that
were measured, because hardware has steps. It has `SMALLEST` nodes at least. A size that is
`DIFFERENT` from the best one and promises enough is verified once in a while, although it seems too
expensive: else a wrong cost of it would never be seen.

Rule for pausing. A `Pause` keeps a balance: the tokens that an optional step brought beyond what
decoding without it would have emitted in the same time. At the lowest balance the step is skipped
for some iterations; each later pause is twice as long until the step pays again. Optional are
drafts, copies of the text, and the drafts of one sequence of a batch. Several sequences must draft
faster than plain decoding by `MIN_ADVANTAGE`. Copies cost no draft, so they are verified in pauses
of the drafter too; and where they promise more tokens per second than drafted iterations brought
lately, the drafter is not called. A pause goes on in the next text, often one of the same kind.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.config import Method
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.suffix import MATCH_LEVELS
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import DIFFERENT, FORGETTING, SIZES, VerifyCosts, power_of_two

PRIOR_WEIGHT = 4.0
"""Weight of the drafter's own probabilities, as a number of nodes seen."""
PRIOR_SHARE = 0.8
"""The share of paths that go on to the next depth before any iteration was seen."""
CONFIDENCES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
"""Upper ends of the levels of confidence; closer near 1, because drafters overstate theirs."""
MAX_DEPTH = 31
"""Deeper nodes are counted like nodes of this depth."""
SMALLEST = 5
"""Nodes that are verified at least of a single drafted tree."""
MIN_ADVANTAGE = 1.1
"""A factor that is worth a change. In a batch, drafts and copies must be faster than plain decoding
by it: drafting also makes the drafter read every prompt, and lets sequences end at different times,
which leaves smaller batches."""
MIN_PLAIN = 2
"""Iterations without a draft that several sequences run before they draft, to know their time; and
iterations of a pause, if no plain pass is among the latest ones: its cost may be wrong."""


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
        self.balance = min(self.balance + gained, self.highest)
        if self.balance <= self.lowest:
            self.extend()
            self.balance = self.lowest / 2
        elif self.balance > 0:
            self.reset()


@dataclass
class Acceptance:
    """How often nodes are accepted, relative to what the drafter's probabilities promise.

    Nodes are counted by kind: the drafter's by depth, by whether they are their parent's best
    child, and by the level of confidence if the drafter states one; copies of the text by the level
    of their match. In each iteration with a tree, all counts lose `FORGETTING` of their size, so a
    kind that is not seen any more counts as the drafter says.
    """

    # by kind, sums of the probabilities of children of accepted nodes, and how many were accepted
    expected: NDArray[np.float64] = field(default_factory=lambda: _counts())
    accepted: NDArray[np.float64] = field(default_factory=lambda: _counts())
    # (MAX_DEPTH + 1,) shares of trees with an accepted node whose children have this depth, and
    # with an accepted one among these
    reached: NDArray[np.float64] = field(default_factory=lambda: np.zeros(MAX_DEPTH + 1))
    passed: NDArray[np.float64] = field(default_factory=lambda: np.zeros(MAX_DEPTH + 1))

    def gains(self, tree: DraftTree) -> NDArray[np.float64]:
        """Return (n,) probabilities that the nodes' tokens are emitted; 1 for the root."""
        kinds = _kinds(tree)
        shares = (self.accepted + PRIOR_WEIGHT) / (self.expected + PRIOR_WEIGHT)
        own = np.log(shares)[tuple(kinds)]
        own[0] = 0.0
        if tree.is_chain:  # copies are often long ones
            factors = np.cumsum(own)
        else:
            factors = own.copy()
            for depth in range(2, int(tree.depths.max()) + 1):
                nodes = np.flatnonzero(tree.depths == depth)
                factors[nodes] += factors[tree.parents[nodes]]
        return np.asarray(np.exp(np.minimum(tree.log_probs + factors, 0.0)), np.float64)

    def share(self, depth: int) -> float:
        """Return the share of paths that go on to a depth if it is drafted."""
        seen = PRIOR_WEIGHT * PRIOR_SHARE + self.passed[min(depth, MAX_DEPTH)]
        return float(seen / (PRIOR_WEIGHT + self.reached[min(depth, MAX_DEPTH)]))

    def observe(self, trees: Sequence[DraftTree], paths: Sequence[NDArray[np.int32]]) -> None:
        """Learn from the (a,) accepted nodes of each tree of an iteration."""
        if all(len(tree) == 1 for tree in trees):
            return
        for counts in (self.expected, self.accepted, self.reached, self.passed):
            counts *= 1 - FORGETTING
        for tree, path in zip(trees, paths, strict=True):
            if len(tree) == 1:
                continue
            kinds = _kinds(tree)
            inner = np.isin(tree.parents, path)
            probs = np.exp(tree.log_probs[inner] - tree.log_probs[tree.parents[inner]])
            np.add.at(self.expected, tuple(kinds[:, inner]), probs)
            np.add.at(self.accepted, tuple(kinds[:, path[1:]]), 1.0)
            depths = np.minimum(np.unique(tree.depths[inner]), MAX_DEPTH)
            self.reached[depths] += 1 / len(trees)
            self.passed[depths[depths < len(path)]] += 1 / len(trees)


def _counts() -> NDArray[np.float64]:
    """Return a count of 0 for each kind of nodes."""
    return np.zeros((MAX_DEPTH + 2, 2, len(CONFIDENCES) + 1))


def _kinds(tree: DraftTree) -> NDArray[np.int64]:
    """Return (3, n) indices of the counts of a tree's nodes; the root's have no meaning.

    They are the depth, whether siblings are better, and the level of confidence. Copies have a
    depth of their own, and the level of their match.
    """
    kinds = np.zeros((3, len(tree)), np.int64)
    kinds[0] = np.minimum(tree.depths, MAX_DEPTH)
    kinds[1] = 1
    kinds[1, np.unique(tree.parents, return_index=True)[1]] = 0  # siblings stand best first
    if tree.confidences is not None:
        kinds[2] = np.searchsorted(CONFIDENCES, tree.confidences, "right")
    if tree.matches is not None:
        copies = np.flatnonzero(tree.matches > 0)
        kinds[:2, copies] = [[MAX_DEPTH + 1], [0]]
        kinds[2, copies] = np.searchsorted(MATCH_LEVELS, tree.matches[copies], "right")
    return kinds


@dataclass
class Pace:
    """Measurements with about the same number of sequences at once."""

    drafting: Pause = field(default_factory=Pause)  # pause of the drafter, for plain decoding
    # pause of copies of the text, for iterations that draft; in pauses of the drafter, for plain
    # decoding
    copying: Pause = field(default_factory=Pause)
    begun: int = 0  # number of iterations
    # decayed sums over iterations with a draft or a copy; without a drafter, over all iterations
    # outside of pauses
    tokens: float = 0.0
    seconds: float = 0.0
    # decayed sums over iterations in which the drafter ran
    drafted_tokens: float = 0.0
    drafted_seconds: float = 0.0
    # seconds of the latest iterations with a draft, without the target's pass
    draft_s: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    # seconds of each depth of the latest drafts
    depth_s: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    depths: int = 1  # depths of the latest draft
    nodes: float | None = None  # mean number of nodes of the last drafted trees
    reach: float | None = None  # depth that drafted trees reached lately


@dataclass
class AdaptiveBudget:
    """The adaptive budget of one pair and method; it outlives sequences."""

    costs: VerifyCosts  # costs of the target's forward pass
    has_drafter: bool = True  # whether a drafter drafts; else trees only have copies of the text
    acceptance: Acceptance = field(default_factory=Acceptance)
    # by number of sequences, rounded up to a power of two
    paces: dict[int, Pace] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """The most nodes that any tree can have."""
        return max(self.costs.seconds)

    def pace(self, sequences: int) -> Pace:
        """Return the measurements with about that many sequences."""
        return self.paces.setdefault(power_of_two(sequences), Pace())

    def begin(self, sequences: int = 1) -> bool:
        """Begin an iteration of some sequences; returns whether it should draft."""
        now = self.pace(sequences)
        pays = now.drafting.begin()
        now.copying.begin()
        now.begun += 1
        return pays and (sequences == 1 or now.begun > MIN_PLAIN)

    def copies_alone(self, sequences: int) -> bool:
        """Return whether copies of the text are verified in iterations that do not draft.

        They are not while plain decoding is timed, and where they do not pay.
        """
        now = self.pace(sequences)
        return self.has_drafter and now.drafting.left > 0 and now.copying.left == 0

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
        sequences = len(lengths)
        now = self.pace(sequences)
        now.depths = min(self.depths_to_draft(sequences) or most, most)
        if now.depth_s:
            price = self._rate(sequences, lengths) * statistics.median(now.depth_s) / sequences
            shares = np.cumprod([self.acceptance.share(d + 1) for d in range(now.depths)])
            now.depths = max(int((shares >= price).sum()), 1)
        return now.depths

    def prefers_copy(self, tree: DraftTree, length: int, sequences: int = 1) -> bool:
        """Return whether a copy promises more tokens per second than the drafter brought.

        `length` is the number of committed positions; `sequences` ask for drafts.
        """
        now = self.pace(sequences)
        if not now.drafted_seconds or now.copying.left:
            return False
        expected = np.cumsum(self.acceptance.gains(tree))
        sizes = self._sizes(len(tree))
        rows = sequences * sizes
        costs = self.costs.predict(rows, (rows * float(length)).tolist(), sequences)
        rates = sequences * expected[sizes - 1] / costs
        return bool(rates.max() > now.drafted_tokens / now.drafted_seconds)

    def prune(
        self, trees: Sequence[DraftTree], lengths: Sequence[int], other_rows: int = 0
    ) -> list[NDArray[np.int64]]:
        """Select the nodes of each tree that pay, ascending, with the root and every node's parent.

        `lengths` are committed positions, `other_rows` other rows of the same forward pass.
        """
        gains = [self.acceptance.gains(tree) for tree in trees]
        ranks = [_ranks(tree, gain) for tree, gain in zip(trees, gains, strict=True)]
        sizes_of_trees = [len(tree) for tree in trees]
        owners = np.repeat(np.arange(len(trees)), sizes_of_trees)
        order = np.argsort(-np.concatenate(ranks), kind="stable")
        expected = np.cumsum(np.concatenate(gains)[order])
        reads = np.cumsum(np.asarray(lengths, np.float64)[owners[order]])
        if len(trees) == 1 and not other_rows:
            sizes = self._sizes(len(order))
            if _drafted_depth(trees[0]):
                sizes = sizes[sizes >= min(SMALLEST, len(order))]
        else:
            sizes = np.arange(len(trees), len(order) + 1)
        costs = self.costs.predict(sizes + other_rows, reads[sizes - 1], len(trees))
        rate = self._rate(len(trees), lengths)
        if not self.pace(len(trees)).seconds:
            # Nothing was drafted yet: take the rate that this pass alone could reach.
            rate = max(rate, float((expected[sizes - 1] / costs).max()))
        size = int(sizes[int(np.argmax(expected[sizes - 1] - rate * costs))])
        if len(trees) == 1 and not other_rows and _drafted_depth(trees[0]):
            size = self._size_to_try(size, sizes, expected)
        kept = np.zeros(len(order), np.bool_)
        kept[order[:size]] = True
        parts = np.split(kept, np.cumsum(sizes_of_trees)[:-1])
        return [np.flatnonzero(part) for part in parts]

    def _size_to_try(
        self, best: int, sizes: NDArray[np.int64], expected: NDArray[np.float64]
    ) -> int:
        """Return a promising size whose cost is not known, or else the best size.

        `expected` has the tokens of 1, 2, ... nodes. A smaller size promises almost as many tokens
        as the best one, a larger size more.
        """
        smaller, larger = (
            sizes[sizes * DIFFERENT <= best][-1:],
            sizes[sizes >= best * DIFFERENT][:1],
        )
        tokens = expected[best - 1]
        promising = [
            *smaller[expected[smaller - 1] * MIN_ADVANTAGE >= tokens],
            *larger[expected[larger - 1] >= tokens * MIN_ADVANTAGE],
        ]
        if not self.costs.is_known(best):
            return best
        return next((int(size) for size in promising if not self.costs.is_known(int(size))), best)

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
        self.costs.observe(rows, reads, sequences, seconds["verify"])
        self.acceptance.observe(trees, paths)
        now = self.pace(sequences)
        drafted = "draft" in seconds
        other_s = sum(seconds.values()) - seconds["verify"]
        if drafted:
            now.nodes = rows / sequences
            deepest = max(_drafted_depth(tree) for tree in trees)
            reach = deepest if now.reach is None else now.reach
            now.reach = max(deepest, reach + FORGETTING * (deepest - reach))
            if not first:
                now.draft_s.append(other_s)
                now.depth_s.append(seconds["draft"] / now.depths)
            elif not now.draft_s:
                return
            other_s = statistics.median(now.draft_s)
        elif rows == sequences and (self.has_drafter or now.drafting.left):
            return  # a plain iteration
        # The expected seconds, because a disturbance says nothing about the choice.
        all_s = other_s + float(self.costs.predict([rows], [reads], sequences)[0])
        tokens = sum(len(path) for path in paths)
        now.tokens = (1 - FORGETTING) * now.tokens + tokens
        now.seconds = (1 - FORGETTING) * now.seconds + all_s
        if drafted:
            now.drafted_tokens = (1 - FORGETTING) * now.drafted_tokens + tokens
            now.drafted_seconds = (1 - FORGETTING) * now.drafted_seconds + all_s
        elif rows == sequences:
            return
        step = now.drafting if drafted or not self.has_drafter else now.copying
        if step is now.drafting or now.drafting.left:
            advantage = MIN_ADVANTAGE if sequences > 1 else 1.0
            rate = advantage * self._plain_rate(sequences, lengths)
        elif now.drafted_seconds:
            rate = now.drafted_tokens / now.drafted_seconds
        else:
            return
        # The noise of several sequences is the square root of their number.
        step.add((tokens - all_s * rate) / math.sqrt(sequences))
        if step is now.drafting and step.left and not self.costs.has_seen_plain(sequences):
            step.left, step.balance = MIN_PLAIN + 1, 0.0
            step.reset()

    def _sizes(self, most: int) -> NDArray[np.int64]:
        """Return the sizes that the best part of a tree with `most` nodes may have."""
        return np.append(self.costs.sizes[self.costs.sizes < most], most)

    def _plain_rate(self, sequences: int, lengths: Sequence[int]) -> float:
        """Return the tokens per second of plain decoding, which is always possible."""
        return sequences / float(
            self.costs.predict([sequences], [float(sum(lengths))], sequences)[0]
        )

    def _rate(self, sequences: int, lengths: Sequence[int]) -> float:
        now, plain = self.pace(sequences), self._plain_rate(sequences, lengths)
        return max(plain, now.tokens / now.seconds) if now.seconds else plain


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
        found = [x.paces.get(power_of_two(sequences)) for x in budgets]
        return bool(found) and all(now is not None and now.drafting.left > 0 for now in found)
