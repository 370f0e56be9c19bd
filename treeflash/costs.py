"""What a target's forward costs by the size of the tree, measured on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from treeflash.config import SamplingConfig
from treeflash.interfaces import Backend
from treeflash.tree import DraftTree

SIZES = (1, 2, 4, 5, 8, 12, 16, 24, 32, 48, 64)
"""Trees that are timed and chosen from; hardware has steps, and some are known to lie here."""
REPEATS = 3
PROMPT_TOKENS = 16
MEMORY = 0.1
"""Weight of the newest measurement among those of its size."""


@dataclass
class VerifyCosts:
    """Seconds of a forward over trees of `SIZES` nodes; follows what is measured later.

    Attributes:
        seconds: by size.
    """

    seconds: dict[int, float]

    @classmethod
    def measure(cls, backend: Backend) -> VerifyCosts:
        """Time the backend's target on bushy trees of arbitrary tokens, after a warm-up."""
        verifier = backend.verifier(features=False)
        greedy = SamplingConfig()
        verifier.prefill(list(range(min(PROMPT_TOKENS, backend.vocab_size))), greedy, None)
        seconds: dict[int, list[float]] = {size: [] for size in SIZES}
        for repeat in range(REPEATS + 1):
            for size, times in seconds.items():
                started = time.perf_counter()
                verifier.verify(_bush(size), greedy, None)
                if repeat:  # the first of each size also compiles and allocates
                    times.append(time.perf_counter() - started)
        return cls({size: median(times) for size, times in seconds.items()})

    def observe(self, nodes: int, seconds: float) -> None:
        """Take in a forward of a decoded text: contexts grow, and machines change their speed."""
        if nodes not in self.seconds:
            return
        # One hiccup of the machine is no new speed.
        change = min(max(seconds / self.seconds[nodes], 0.5), 2.0) - 1
        for size in self.seconds:
            # What slows one size down slows others too, but each less surely.
            self.seconds[size] *= 1 + MEMORY * (change if size == nodes else change / 2)


def _bush(nodes: int) -> DraftTree:
    """A tree of which every node has up to four children, as draft trees are about."""
    order = np.arange(nodes, dtype=np.int32)
    parents = (order - 1) // 4
    parents[0] = -1
    depths = np.zeros(nodes, np.int32)
    for node in order[1:]:
        depths[node] = depths[parents[node]] + 1
    return DraftTree(np.zeros(nodes, np.int32), parents, depths, np.zeros(nodes))
