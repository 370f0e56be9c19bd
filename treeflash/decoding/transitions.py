"""The drafter's proposal: which tokens may follow which, at every depth of the block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.errors import NumericalError


@dataclass(frozen=True, eq=False)
class TransitionTable:
    """Candidate children for every depth and previous-token candidate (TreeFlash, section 3).

    `D` depths (block size - 1), `M` rows (previous tokens), `K` children a row. Index 0 of the
    first axis is depth 1. Depth 1 has one real row, row 0: its previous token is the root.

    Attributes:
        tokens: (D, M, K) int32; children of a row, most probable first.
        log_probs: (D, M, K) float32, nats, non-increasing along K; -inf marks an absent child.
        next_row: (D, M, K) int32; the row of the next depth whose previous token is this child,
            or -1 where there is none: the child is then always a leaf.
    """

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    next_row: NDArray[np.int32]

    def __post_init__(self) -> None:
        if np.isnan(self.log_probs).any():
            raise NumericalError(
                "the drafter's output is not a number (NaN): its weights are damaged, or the dtype "
                "overflows; try --dtype float32, or --method ar to decode without a drafter"
            )

    @classmethod
    def from_marginals(
        cls, tokens: NDArray[np.int32], log_probs: NDArray[np.float32]
    ) -> TransitionTable:
        """The table of a drafter without an AR head: what follows ignores what came before.

        Args:
            tokens: (D, K) the best tokens of each depth, most probable first.
            log_probs: (D, K) their marginal log probabilities.
        """
        next_row = np.zeros((len(tokens), 1, tokens.shape[1]), np.int32)
        next_row[-1] = -1
        return cls(tokens[:, None], log_probs[:, None], next_row)

    @classmethod
    def from_candidates(
        cls,
        previous: NDArray[np.int32],
        tokens: NDArray[np.int32],
        log_probs: NDArray[np.float32],
    ) -> TransitionTable:
        """The table of an AR head.

        Args:
            previous: (D - 1, M) the previous-token candidates of depths 2 to D, distinct in a row;
                -1 where there is none.
            tokens: (D, M, K) children; the rows of depth 1 after the first are ignored, and those
                without a previous token.
            log_probs: (D, M, K) their log probabilities.
        """
        log_probs = log_probs.copy()
        log_probs[0, 1:] = -np.inf
        log_probs[1:][previous < 0] = -np.inf
        next_row = np.full(tokens.shape, -1, np.int32)
        matches = tokens[:-1, :, :, None] == previous[:, None, None, :]
        next_row[:-1] = np.where(matches.any(-1), matches.argmax(-1), -1)
        return cls(tokens, log_probs, next_row)

    @classmethod
    def from_rows(
        cls,
        places: NDArray[np.int32],
        previous: NDArray[np.int32],
        tokens: NDArray[np.int32],
        log_probs: NDArray[np.float32],
        shape: tuple[int, int],
    ) -> TransitionTable:
        """The table of an AR head that scored some of the rows, the root's first.

        Args:
            places: (n,) the others' among all D * M rows, numbered depth by depth.
            previous: (n,) their previous tokens.
            tokens: (1 + n, K) children of the root and of those.
            log_probs: (1 + n, K) their log probabilities.
            shape: D and M.
        """
        depths, m = shape
        of_depths = np.full(depths * m, -1, np.int32)
        of_depths[places] = previous
        at = np.concatenate([[0], places])
        children = np.zeros((depths * m, tokens.shape[1]), np.int32)
        children[at] = tokens
        theirs = np.full(children.shape, -np.inf, np.float32)
        theirs[at] = log_probs
        return cls.from_candidates(
            of_depths.reshape(shape)[1:],
            children.reshape(depths, m, -1),
            theirs.reshape(depths, m, -1),
        )

    def until(self, depth: int) -> TransitionTable:
        """The table of the depths up to that one, 1 or more; the whole where it has no more."""
        if depth >= self.depths:
            return self
        next_row = self.next_row[:depth].copy()
        next_row[-1] = -1
        return TransitionTable(self.tokens[:depth], self.log_probs[:depth], next_row)

    @property
    def depths(self) -> int:
        """Depths that the table covers: the drafter's block size less one, or fewer."""
        return len(self.tokens)
