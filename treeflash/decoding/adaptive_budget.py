"""The budget `auto`: the tree sizes that maximise expected tokens per second.

It also turns drafting off while it does not pay.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import OUTLIER_FACTOR, VerifyCosts, power_of_two

SMOOTHING = 0.07
"""Weight of the newest iteration in running sums."""
PRIOR_WEIGHT = 2.0
"""Nodes' worth of trust in the drafter's own probabilities."""
CONFIDENCES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
"""Where levels of confidence end; more of them near 1, as drafters say that they are surer than
they are."""
LOWEST_BALANCE, HIGHEST_BALANCE = -2.0, 8.0
"""Bounds of the balance, tokens: drafting pauses at the lower one."""
LEAST_ADVANTAGE = 1.05
"""Drafts of several texts must be so many times as fast as plain decoding. They also make the
drafter read every prompt, and let texts end at different times, which leaves smaller batches."""
FURTHER_DEPTHS, REACH_DECAY = 1, 0.25
"""Depths that are drafted beyond those that trees reached; and by how many those become fewer with
every iteration whose trees are shallower."""
FEWEST_SPARE = 8
"""Nodes that a tree is built with beyond twice those that it is expected to keep."""
FEWEST_PLAIN, MOST_PLAIN = 2, 8
"""Iterations without a draft that are timed before several texts draft, and that are remembered.
The one after the prompts were read is slower than the others."""
FIRST_PAUSE, LONGEST_PAUSE = 16, 256
"""Iterations of a pause: doubled from one to the next while drafting does not pay."""

Key: TypeAlias = int | tuple[int, int]
"""A depth, or a depth and a level of confidence."""


@dataclass
class Throughput:
    """What was measured with about the same number of texts at once.

    Attributes:
        tokens: of drafted iterations, a running sum.
        seconds: of those iterations, a running sum.
        balance: tokens beyond those that plain decoding would have generated in the same time;
            divided by the square root of the number of texts, as their noise is.
        pause: iterations until the next draft.
        next_pause: length of the next pause, iterations.
        nodes: of the last drafted trees, on average.
        reach: depth that drafted trees reached lately.
    """

    tokens: float = 0.0
    seconds: float = 0.0
    balance: float = 0.0
    pause: int = 0
    next_pause: int = FIRST_PAUSE
    nodes: float | None = None
    reach: float | None = None


@dataclass
class AdaptiveBudget:
    """What was learned about one pair and method; it outlives a text and never changes the output.

    The nodes of a tree are expected to bring the sum of their probabilities (the root's is 1),
    corrected by how often a draft of their depth was accepted if the one before it was. A drafter
    that says how confident it is is not believed: drafts of each level of confidence are counted
    too, and corrected on their own as far as enough were seen. The best sizes are those with the
    highest expected tokens - rate * seconds, where `rate` is the tokens per second of decoding as a
    whole: repeated, this finds the sizes with the highest rate (Dinkelbach 1967). With several
    texts, the nodes of all trees are ranked together and cut once.

    Attributes:
        costs: of the target's forward pass.
        expected: by depth, and by depth and level of confidence: the running sum of the
            probabilities of the children of accepted nodes.
        accepted: the running count of those children that were accepted.
        throughput: by number of texts, rounded up to a power of two.
        begun: iterations, by number of texts.
        plain_s: by number of texts, seconds of the latest iterations without a draft. The costs of
            single trees do not tell them.
    """

    costs: VerifyCosts
    expected: dict[Key, float] = field(default_factory=dict)
    accepted: dict[Key, float] = field(default_factory=dict)
    throughput: dict[int, Throughput] = field(default_factory=dict)
    begun: dict[int, int] = field(default_factory=dict)
    plain_s: dict[int, deque[float]] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """The most nodes that any tree can have."""
        return self.costs.largest

    def of(self, texts: int) -> Throughput:
        """What was measured with about that many texts."""
        return self.throughput.setdefault(power_of_two(texts), Throughput())

    def begin(self, texts: int = 1) -> bool:
        """Begin an iteration of so many texts; returns whether it should draft."""
        now = self.of(texts)
        now.pause -= now.pause > 0
        begun = self.begun.get(texts, 0)
        self.begun[texts] = begun + 1
        return now.pause == 0 and (texts == 1 or begun >= FEWEST_PLAIN)

    def built(self, texts: int = 1) -> int:
        """Nodes that a tree is built with before it is cut."""
        most = max(self.largest // texts, min(self.largest, 32))
        # Larger trees would be cut; one that needs them finds them in the next iteration.
        expected = self.of(texts).nodes
        return most if expected is None else min(most, 2 * math.ceil(expected) + FEWEST_SPARE)

    def nodes(self, texts: int = 1) -> int:
        """Nodes that a tree is expected to be cut to."""
        found = self.of(texts).nodes
        return self.built(texts) if found is None else max(round(found), 1)

    def depths(self, texts: int = 1) -> int | None:
        """Depths worth drafting, a little beyond those that trees reach; None is all."""
        reach = self.of(texts).reach
        return None if reach is None else math.ceil(reach) + FURTHER_DEPTHS

    def cut(
        self, trees: Sequence[DraftTree], lengths: Sequence[int], other_rows: int = 0
    ) -> list[NDArray[np.int64]]:
        """The nodes of each tree that pay, ascending; the root and every node's parent among them.

        Args:
            trees: of all texts that are verified together.
            lengths: committed positions of each text.
            other_rows: further rows of the same forward pass.
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
        costs = self.costs.of(sizes + other_rows, reads[sizes - 1], len(trees))
        rate = self._rate(len(trees), lengths)
        if len(trees) > 1 and not self.of(len(trees)).seconds:  # what this pass alone could reach
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
        """Learn from an iteration.

        Args:
            trees: that were verified together; the roots alone if nothing was drafted.
            paths: (a,) accepted nodes of each.
            lengths: committed positions of each text before that.
            seconds: by phase, of the whole iteration.
            first: whether a text drafted for the first time. That also reads its prompt, and
                perhaps compiles kernels: the time taken says nothing about later iterations.
        """
        texts = len(trees)
        rows = sum(len(tree) for tree in trees)
        reads = float(np.dot([len(tree) for tree in trees], lengths))
        longest = OUTLIER_FACTOR * float(self.costs.of([rows], [reads], texts)[0])
        all_s = sum(seconds.values()) - max(seconds["verify"] - longest, 0.0)
        self.costs.observe(rows, reads, texts, seconds["verify"])
        now = self.of(texts)
        if "draft" not in seconds:
            if texts > 1:
                self.plain_s.setdefault(texts, deque(maxlen=MOST_PLAIN)).append(all_s)
            return
        now.nodes = rows / texts
        deepest = max(int(tree.depths.max()) for tree in trees)
        now.reach = max(deepest, (now.reach or 0) - REACH_DECAY)
        for tree, path in zip(trees, paths, strict=True):
            self._observe_depths(tree, path)
        if first:
            return
        tokens = sum(len(path) for path in paths)
        now.tokens = (1 - SMOOTHING) * now.tokens + tokens
        now.seconds = (1 - SMOOTHING) * now.seconds + all_s
        due = all_s * self._plain_rate(texts, lengths) * (LEAST_ADVANTAGE if texts > 1 else 1)
        gained = (tokens - due) / math.sqrt(texts)
        now.balance = min(now.balance + gained, HIGHEST_BALANCE)
        if now.balance <= LOWEST_BALANCE:
            now.pause, now.balance = now.next_pause, LOWEST_BALANCE / 2
            now.next_pause = min(2 * now.next_pause, LONGEST_PAUSE)
        elif now.balance > 0:
            now.next_pause = FIRST_PAUSE

    def _observe_depths(self, tree: DraftTree, path: NDArray[np.int32]) -> None:
        for depth, parent in enumerate(path, 1):
            children = np.flatnonzero(tree.parents == parent)
            if not len(children):
                break
            mass = float(np.exp(tree.log_probs[children] - tree.log_probs[parent]).sum())
            hit = float(depth < len(path))
            keys: list[Key] = [depth]
            if tree.confidences is not None:
                keys.append((depth, int(_level(tree.confidences[children[0]]))))
            for key in keys:
                self.expected[key] = (1 - SMOOTHING) * self.expected.get(key, 0.0) + mass
                self.accepted[key] = (1 - SMOOTHING) * self.accepted.get(key, 0.0) + hit

    def _plain_rate(self, texts: int, lengths: Sequence[int]) -> float:
        """Tokens per second of plain decoding, which is always possible."""
        if known := self.plain_s.get(texts):
            return texts / min(known)  # a disturbance only adds time
        return texts / float(self.costs.of([texts], [float(sum(lengths))], texts)[0])

    def _rate(self, texts: int, lengths: Sequence[int]) -> float:
        now = self.of(texts)
        plain = self._plain_rate(texts, lengths)
        return max(plain, now.tokens / now.seconds) if now.seconds else plain

    def _corrections(self, tree: DraftTree) -> NDArray[np.float64]:
        """(n,) factors on the probabilities of nodes: those of all nodes on the way to them."""
        depths = range(int(tree.depths.max()) + 1)
        factors = np.array([self._factor(depth, 1.0) if depth else 1.0 for depth in depths])
        corrections: NDArray[np.float64] = np.cumprod(factors)[tree.depths]
        if tree.confidences is None:
            return corrections
        levels = _level(tree.confidences)
        for depth in depths[1:]:
            nodes = np.flatnonzero(tree.depths == depth)
            of_levels = np.array(
                [self._factor((depth, i), factors[depth]) for i in range(len(CONFIDENCES) + 1)]
            )
            corrections[nodes] = corrections[tree.parents[nodes]] * of_levels[levels[nodes]]
        return corrections

    def _factor(self, key: Key, prior: float) -> float:
        """How many of the drafts that were expected to be accepted were; `prior` before any."""
        accepted, expected = self.accepted.get(key, 0.0), self.expected.get(key, 0.0)
        return (accepted + PRIOR_WEIGHT * prior) / (expected + PRIOR_WEIGHT)


def _ranks(tree: DraftTree, gains: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) by which nodes are chosen: none ranks above its parent, and the root above all."""
    ranks = gains.copy()
    ranks[0] = np.inf
    for depth in range(1, int(tree.depths.max()) + 1):
        nodes = np.flatnonzero(tree.depths == depth)
        ranks[nodes] = np.minimum(ranks[nodes], ranks[tree.parents[nodes]])
    return ranks


def _level(confidence: Any) -> Any:
    """The level of a confidence, or of many."""
    return np.searchsorted(CONFIDENCES, confidence, "right")
