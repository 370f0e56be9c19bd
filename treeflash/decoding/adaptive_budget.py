"""The budget `auto`: the tree size that maximises expected tokens per second.

It also turns drafting off while it does not pay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import OUTLIER_FACTOR, VerifyCosts

MEMORY = 0.07
"""Weight of the newest iteration in what is learned."""
PRIOR_WEIGHT = 2.0
"""Nodes' worth of trust in the drafter's own probabilities."""
LOSS, GAIN = -2.0, 8.0
"""Bounds of the balance, tokens: drafting rests at the lower one."""
FIRST_REST, LONGEST_REST = 16, 256
"""Iterations of a rest: doubled from one to the next while drafting does not pay."""


@dataclass
class AdaptiveBudget:
    """What was learned about one pair and method; it outlives a text and never changes the output.

    A tree's first n nodes are expected to bring the sum of their probabilities (the root's is 1),
    corrected by how often a draft of their depth was accepted, where the one before it was. The
    best size is the one with the highest expected tokens - rate * seconds, where `rate` is the
    tokens a second that decoding brings on the whole: repeated, this finds the sizes with the
    highest rate (Dinkelbach 1967).

    Attributes:
        costs: of the target's forward.
        expected: by depth, probabilities of the children of accepted nodes, a running sum.
        accepted: by depth, how many of those children were accepted, a running sum.
        tokens: of drafted iterations, a running sum.
        seconds: of those iterations, a running sum.
        balance: tokens that drafting brought beyond what plain decoding would have in its time.
        rest: iterations until the next draft.
        next_rest: how long the next rest will be.
        nodes: of the last drafted tree.
    """

    costs: VerifyCosts
    expected: dict[int, float] = field(default_factory=dict)
    accepted: dict[int, float] = field(default_factory=dict)
    tokens: float = 0.0
    seconds: float = 0.0
    balance: float = 0.0
    rest: int = 0
    next_rest: int = FIRST_REST
    nodes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = self.largest

    @property
    def largest(self) -> int:
        """Nodes that a tree is built with before it is cut."""
        return max(self.costs.seconds)

    def begin(self) -> bool:
        """Begin an iteration; returns whether it should draft."""
        self.rest -= self.rest > 0
        return self.rest == 0

    def cut(self, tree: DraftTree) -> DraftTree:
        """The first nodes of a tree, as many as pay."""
        gains = np.exp(tree.log_probs) * self._corrections(tree.depths)
        expected = np.cumsum(gains)
        rate = 1 / self.costs.seconds[1]  # of plain decoding, which is always possible
        if self.seconds:
            rate = max(rate, self.tokens / self.seconds)
        sizes = [*(size for size in self.costs.seconds if size < len(tree)), len(tree)]
        worth = expected[np.array(sizes) - 1] - rate * self.costs.of(sizes)
        return tree.first(sizes[int(np.argmax(worth))])

    def observe(
        self,
        tree: DraftTree,
        path: NDArray[np.int32],
        seconds: Mapping[Any, float],
        *,
        first: bool = False,
    ) -> None:
        """Learn from an iteration.

        Args:
            tree: that was verified; the root alone where nothing was drafted.
            path: (a,) its accepted nodes.
            seconds: by phase.
            first: whether it is the first drafted one of a text. It also reads the prompt, and
                perhaps compiles kernels: what it took says nothing about those that follow.
        """
        longest = OUTLIER_FACTOR * float(self.costs.of([len(tree)])[0])
        all_s = sum(seconds.values()) - max(seconds["verify"] - longest, 0.0)
        self.costs.observe(len(tree), seconds["verify"])
        if "draft" not in seconds:
            return
        self.nodes = len(tree)
        for depth, parent in enumerate(path, 1):
            children = tree.parents == parent
            if not children.any():
                break
            mass = float(np.exp(tree.log_probs[children] - tree.log_probs[parent]).sum())
            self.expected[depth] = (1 - MEMORY) * self.expected.get(depth, 0.0) + mass
            hit = float(depth < len(path))
            self.accepted[depth] = (1 - MEMORY) * self.accepted.get(depth, 0.0) + hit
        if first:
            return
        self.tokens = (1 - MEMORY) * self.tokens + len(path)
        self.seconds = (1 - MEMORY) * self.seconds + all_s
        self.balance = min(self.balance + len(path) - all_s / self.costs.seconds[1], GAIN)
        if self.balance <= LOSS:
            self.rest, self.balance = self.next_rest, LOSS / 2
            self.next_rest = min(2 * self.next_rest, LONGEST_REST)
        elif self.balance > 0:
            self.next_rest = FIRST_REST

    def _corrections(self, depths: NDArray[np.int32]) -> NDArray[np.float64]:
        """(n,) factors on the probabilities of nodes: those of all depths on the way to them."""
        factors = np.ones(int(depths.max()) + 1)
        for depth in range(1, len(factors)):
            accepted, expected = self.accepted.get(depth, 0.0), self.expected.get(depth, 0.0)
            factors[depth] = (accepted + PRIOR_WEIGHT) / (expected + PRIOR_WEIGHT)
        return np.asarray(np.cumprod(factors)[depths], np.float64)
