"""Comparisons of the results of two backends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.loop import Step
from treeflash.decoding.text_state import TextState
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree

TOLERANCE = 5e-5
"""Largest difference of two float32 values of tiny models, absolute and relative: logits, log
probabilities, keys, values. Backends differ by some 1e-6; a wrong position or mask by far more."""
LONG_TOLERANCE = 2e-3
"""The same where positions reach thousands: a float32 angle is then off by some 1e-4 radians."""


def assert_close(
    actual: NDArray[np.floating], expected: NDArray[np.floating], *, tolerance: float = TOLERANCE
) -> None:
    """Types and shapes equal, values within a tolerance."""
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, strict=True)


def assert_equal_states(
    actual: TextState, expected: TextState, *, tolerance: float = TOLERANCE
) -> None:
    """The target's keys, values and recurrent states of two texts."""
    assert_close(actual.keys_values(), expected.keys_values(), tolerance=tolerance)
    for mine, theirs in zip(actual.states(), expected.states(), strict=True):
        assert_close(mine, theirs, tolerance=tolerance)


def assert_equal_tables(actual: TransitionTable, expected: TransitionTable) -> None:
    """Tokens and rows equal wherever a child exists, log probabilities close."""
    assert actual.tokens.dtype == np.int32
    assert actual.next_row.dtype == np.int32
    exists = np.isfinite(expected.log_probs)
    np.testing.assert_array_equal(np.isfinite(actual.log_probs), exists)
    np.testing.assert_array_equal(actual.tokens[exists], expected.tokens[exists])
    np.testing.assert_array_equal(actual.next_row[exists], expected.next_row[exists])
    assert_close(actual.log_probs, expected.log_probs)
    assert (actual.confidences is None) == (expected.confidences is None)
    if actual.confidences is not None and expected.confidences is not None:
        scored = exists.any(-1)
        assert_close(actual.confidences[scored], expected.confidences[scored])


def assert_equal_trees(actual: DraftTree, expected: DraftTree) -> None:
    """The same nodes in the same order, log probabilities close."""
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.parents, expected.parents)
    np.testing.assert_array_equal(actual.depths, expected.depths)
    assert_close(actual.log_probs, expected.log_probs)
    assert (actual.confidences is None) == (expected.confidences is None)
    if actual.confidences is not None and expected.confidences is not None:
        assert_close(actual.confidences, expected.confidences)


def assert_trees_equal_but_for_ties(
    actual: DraftTree, expected: DraftTree, tolerance: float
) -> None:
    """The same nodes, but that nodes closer than a tolerance may change places.

    For real models, whose float32 log probabilities differ by some 1e-5 between frameworks: a
    node in one tree only must be as probable, within the tolerance, as the other tree's last.
    """
    mine, theirs = (dict(zip(paths(t), t.log_probs, strict=True)) for t in (actual, expected))
    for path in mine.keys() & theirs.keys():
        assert abs(mine[path] - theirs[path]) <= tolerance, path
    for path in mine.keys() - theirs.keys():
        assert mine[path] - expected.log_probs.min() <= tolerance, path
    for path in theirs.keys() - mine.keys():
        assert theirs[path] - actual.log_probs.min() <= tolerance, path


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    """The tokens from the root down to each node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def assert_equal_steps(actual: Sequence[Step], expected: Sequence[Step]) -> None:
    """Iteration by iteration: the same tree, the same accepted path, the same tokens."""
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine.tree is None) == (theirs.tree is None)
        if mine.tree is not None and theirs.tree is not None:
            assert_equal_trees(mine.tree, theirs.tree)
            np.testing.assert_array_equal(mine.path, theirs.path)
        assert mine.tokens == theirs.tokens
        assert mine.finish_reason == theirs.finish_reason


def tokens_of(steps: Sequence[Step]) -> list[int]:
    """The tokens of all steps, in order."""
    return [token for step in steps for token in step.tokens]
