"""The drafter's proposal: which tokens may follow which, at every depth of the block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.errors import NumericalError

ROUNDING = 0.01
"""Nats above 0 that a log probability may reach by rounding; beyond them it is an error."""


NOT_FINITE = (
    "the drafter's output is not finite (NaN or infinity): its weights are damaged, or the dtype "
    "overflows; try --dtype float32, or --method ar to decode without a drafter"
)


@dataclass(frozen=True, eq=False)
class TransitionTable:
    """Candidate children for every depth and previous-token candidate (TreeFlash, section 3).

    `D` depths, `M` rows (previous tokens), `K` children per row. Index 0 of the
    first axis is depth 1. Depth 1 has one valid row, row 0: its previous token is the root.

    Attributes:
        tokens: (D, M, K) int32; children of a row, most probable first.
        log_probs: (D, M, K) float32, nats, at most 0 and non-increasing along K; -inf marks an
            absent child. Values above 0 by rounding are set to 0: a child more probable than its
            parent would be sorted before it.
        next_row: (D, M, K) int32; the row of the next depth whose previous token is this child,
            or -1 if there is none: the child is then always a leaf.
        confidences: (D, M) float32, 0 to 1; how much of a row the drafter expects to be right, as
            it says itself; None if it does not say. Not calibrated, and no part of `log_probs`.

    Raises:
        NumericalError: a log probability is NaN or infinity.
        ValueError: a log probability is above 0 by more than rounding, or the arrays' shapes
            differ.
    """

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    next_row: NDArray[np.int32]
    confidences: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        shapes = [x.shape for x in (self.tokens, self.log_probs, self.next_row)]
        if len(set(shapes)) > 1:
            raise ValueError(f"tokens, log_probs and next_row must have one shape, got {shapes}")
        highest = self.log_probs.max(initial=-np.inf)
        if not highest < np.inf:
            raise NumericalError(NOT_FINITE)
        if highest > ROUNDING:
            raise ValueError(f"log probabilities must be at most 0, got {highest}")
        if highest > 0:
            object.__setattr__(self, "log_probs", np.minimum(self.log_probs, np.float32(0)))

    @classmethod
    def from_marginals(
        cls, tokens: NDArray[np.int32], log_probs: NDArray[np.float32]
    ) -> TransitionTable:
        """The table of a drafter without an AR head: children do not depend on the previous token.

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
        confidences: NDArray[np.float32] | None = None,
    ) -> TransitionTable:
        """The table of an AR head.

        Args:
            previous: (D - 1, M) int32 previous-token candidates of depths 2 to D, distinct at each
                depth; -1 for a row that was not scored.
            tokens: (D, M, K) int32 children, 0 or more; rows that were not scored are ignored, and
                so are the rows of depth 1 after the first.
            log_probs: (D, M, K) float32 log probabilities of the children.
            confidences: (D, M) float32 of the rows, if the head says.
        """
        log_probs = log_probs.copy()
        log_probs[0, 1:] = -np.inf
        log_probs[1:][previous < 0] = -np.inf
        next_row = np.full(tokens.shape, -1, np.int32)
        if previous.size:
            next_row[:-1] = _positions(previous, tokens[:-1])
        return cls(tokens, log_probs, next_row, confidences)

    @classmethod
    def from_rows(
        cls,
        places: NDArray[np.int32],
        previous: NDArray[np.int32],
        tokens: NDArray[np.int32],
        log_probs: NDArray[np.float32],
        shape: tuple[int, int],
        confidences: NDArray[np.float32] | None = None,
    ) -> TransitionTable:
        """The table of an AR head that scored the root's row and n others.

        Args:
            places: (n,) int32 indices of those n among all D * M rows, numbered depth by depth.
            previous: (n,) int32 their previous tokens.
            tokens: (1 + n, K) int32 children, those of the root first.
            log_probs: (1 + n, K) float32 log probabilities of the children.
            shape: (D, M).
            confidences: (1 + n,) float32 of the rows, if the head says.
        """
        depths, m = shape
        every_previous = np.full(depths * m, -1, np.int32)
        every_previous[places] = previous
        scored = np.concatenate([[0], places])
        every_token = np.zeros((depths * m, tokens.shape[1]), np.int32)
        every_token[scored] = tokens
        every_log_prob = np.full(every_token.shape, -np.inf, np.float32)
        every_log_prob[scored] = log_probs
        every_confidence = None
        if confidences is not None:
            every_confidence = np.ones(shape, np.float32)
            every_confidence.ravel()[scored] = confidences
        return cls.from_candidates(
            every_previous.reshape(shape)[1:],
            every_token.reshape(depths, m, -1),
            every_log_prob.reshape(depths, m, -1),
            every_confidence,
        )

    @classmethod
    def from_paths(
        cls,
        tokens: Sequence[NDArray[np.int32]],
        log_probs: Sequence[NDArray[np.float32]],
        kept: Sequence[NDArray[np.int64]],
        confidences: Sequence[NDArray[np.float32]] | None = None,
    ) -> TransitionTable:
        """The table of a recurrent head, in which each row follows one path and not one token.

        Args:
            tokens: by depth, (n, K) int32 children of n paths; at depth 1 of the root alone.
            log_probs: by depth, (n, K) float32 log probabilities of the children.
            kept: by depth, (n',) indices into the n * K children: those that are the rows of the
                next depth, in order. Not used at the last depth.
            confidences: by depth, (n,) float32 of the rows, if the head says.
        """
        depths, k = len(tokens), tokens[0].shape[1]
        m = max(len(rows) for rows in tokens)
        table_tokens = np.zeros((depths, m, k), np.int32)
        table_log_probs = np.full((depths, m, k), -np.inf, np.float32)
        next_row = np.full((depths, m, k), -1, np.int32)
        table_confidences = None if confidences is None else np.ones((depths, m), np.float32)
        for depth, rows in enumerate(tokens):
            n = len(rows)
            table_tokens[depth, :n] = rows
            table_log_probs[depth, :n] = log_probs[depth]
            if depth + 1 < depths:
                next_row[depth].reshape(-1)[kept[depth]] = np.arange(len(kept[depth]))
            if confidences is not None and table_confidences is not None:
                table_confidences[depth, :n] = confidences[depth]
        return cls(table_tokens, table_log_probs, next_row, table_confidences)

    def until(self, depth: int) -> TransitionTable:
        """The table of the first `depth` depths (1 or more), or all of it if it has no more."""
        if depth >= self.depths:
            return self
        next_row = self.next_row[:depth].copy()
        next_row[-1] = -1
        confidences = None if self.confidences is None else self.confidences[:depth]
        return TransitionTable(self.tokens[:depth], self.log_probs[:depth], next_row, confidences)

    @property
    def depths(self) -> int:
        """Depths that the table covers: the drafter's, or fewer."""
        return len(self.tokens)


def _positions(previous: NDArray[np.int32], tokens: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each token stands among its depth's previous tokens; -1 if it is not there.

    Sorts and searches, so that memory grows with the number of rows and not with its square.

    Args:
        previous: (D, M), at least one; -1 matches no token.
        tokens: (D, M, K), 0 or more.

    Returns:
        (D, M, K) indices below M, or -1.
    """
    depth = np.arange(len(previous), dtype=np.int64) << 32
    keys = (previous + depth[:, None]).ravel()
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    wanted = tokens + depth[:, None, None]
    found = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[found] == wanted, order[found] % previous.shape[1], -1)
