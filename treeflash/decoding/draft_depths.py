"""How many depths to draft, for a drafter that runs a pass for each depth.

A depth is worth its pass if the probability that an accepted path reaches it is at least the number
of tokens that decoding emits in the time of the pass. The probability is the product of the
observed shares of iterations in which a path that reached the depth before went on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.tree import DraftTree

SMOOTHING = 0.07
"""Weight of the newest iteration in running sums and means."""
PRIOR, PRIOR_WEIGHT = 0.8, 2.0
"""The share before any iteration was seen, and its weight as a number of iterations."""
MAX_RATIO = 2.0
"""A draft whose depths take more than this many times the expected seconds counts as this many."""


@dataclass
class DraftDepths:
    """What the iterations with about the same number of sequences have shown.

    Attributes:
        seconds: of a depth, a running mean; None before the first draft.
        depths: of the latest draft.
        reached: by depth, a running count of the paths that could go on to it.
        accepted: by depth, a running count of those that did.
    """

    seconds: float | None = None
    depths: int = 1
    reached: dict[int, float] = field(default_factory=dict)
    accepted: dict[int, float] = field(default_factory=dict)

    def choose(self, most: int, rate: float, sequences: int = 1) -> int:
        """The depths that pay, from 1 to `most`.

        Args:
            most: that the drafter and the expected trees have.
            rate: tokens per second of all sequences together.
            sequences: in the draft.
        """
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
        self,
        trees: Sequence[DraftTree],
        paths: Sequence[NDArray[np.int32]],
        seconds: float | None,
    ) -> None:
        """Learn from an iteration that drafted.

        Args:
            trees: that were verified.
            paths: (a,) accepted nodes of each tree.
            seconds: of the draft; None if they say nothing about later drafts.
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
        return (accepted + PRIOR_WEIGHT * PRIOR) / (reached + PRIOR_WEIGHT)
