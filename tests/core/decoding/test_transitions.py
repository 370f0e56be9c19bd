"""Transition tables: which rows follow which children, and what is absent."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from treeflash.decoding.transitions import RowBatch, TransitionTable
from treeflash.errors import NumericalError


def test_marginals_share_one_row_a_depth():
    tokens = np.array([[5, 3], [3, 9], [1, 5]], np.int32)
    log_probs = np.array([[-0.5, -1], [-0.25, -2], [-1, -1]], np.float32)
    table = TransitionTable.from_marginals(tokens, log_probs)
    assert table.depths == 3
    assert table.tokens.tolist() == [[[5, 3]], [[3, 9]], [[1, 5]]]
    assert table.log_probs.tolist() == [[[-0.5, -1]], [[-0.25, -2]], [[-1, -1]]]
    assert table.next_row.tolist() == [[[0, 0]], [[0, 0]], [[-1, -1]]]
    assert table.next_row.dtype == np.int32


def test_marginals_of_one_depth_are_leaves():
    table = TransitionTable.from_marginals(
        np.array([[5, 3]], np.int32), np.array([[-1, -2]], np.float32)
    )
    assert table.next_row.tolist() == [[[-1, -1]]]


def test_a_table_cut_short_ends_in_leaves():
    tokens = np.array([[5, 3], [3, 9], [1, 5]], np.int32)
    table = TransitionTable.from_marginals(tokens, np.zeros((3, 2), np.float32))
    cut = table.truncate(2)
    assert cut.tokens.tolist() == [[[5, 3]], [[3, 9]]]
    assert cut.next_row.tolist() == [[[0, 0]], [[-1, -1]]]
    assert table.next_row.tolist() == [[[0, 0]], [[0, 0]], [[-1, -1]]]
    assert table.truncate(3) is table.truncate(9) is table


def test_candidates_by_hand():
    """Two depths, two rows, two children: of 4, 7 (after the root) only 7 has a row."""
    tokens = np.array([[[4, 7], [0, 0]], [[1, 2], [3, 4]]], np.int32)
    log_probs = np.full((2, 2, 2), -1, np.float32)
    table = TransitionTable.from_candidates(np.array([[9, 7]], np.int32), tokens, log_probs)
    assert table.next_row[0, 0].tolist() == [-1, 1]
    assert table.next_row[1].tolist() == [[-1, -1], [-1, -1]]
    assert table.log_probs[0].tolist() == [[-1, -1], [-np.inf, -np.inf]]
    assert table.log_probs[1].tolist() == [[-1, -1], [-1, -1]]


def table_of(*arrays: np.ndarray, shape: tuple[int, int]) -> TransitionTable:
    """The table of one sequence from its scored rows."""
    *rows, confidences = (*arrays, None) if len(arrays) == 4 else arrays
    known = None if confidences is None else confidences[None]
    return RowBatch(*(x[None] for x in rows), shape, known).dense(0)


def test_rows_that_were_not_scored_are_absent():
    """Of 2 rows at 3 depths the root's, the second of depth 2 and the first of depth 3."""
    tokens = np.array([[5, 6], [7, 8], [1, 2]], np.int32)
    log_probs = np.array([[-1, -2], [-3, -4], [-5, -6]], np.float32)
    places, previous = np.array([3, 4], np.int32), np.array([6, 7], np.int32)
    table = table_of(places, previous, tokens, log_probs, shape=(3, 2))
    absent = [-np.inf, -np.inf]
    assert table.log_probs.tolist() == [[[-1, -2], absent], [absent, [-3, -4]], [[-5, -6], absent]]
    assert table.confidences is None
    assert table.next_row[0, 0].tolist() == [-1, 1]  # nothing follows 5
    assert table.next_row[1, 1].tolist() == [0, -1]
    assert table.tokens[1, 1].tolist() == [7, 8]


def test_confidences_stay_with_their_rows():
    tokens, log_probs = np.array([[5, 6], [7, 8]], np.int32), np.full((2, 2), -1, np.float32)
    places, previous = np.array([3], np.int32), np.array([6], np.int32)
    confidences = np.array([0.75, 0.25], np.float32)
    table = table_of(places, previous, tokens, log_probs, confidences, shape=(2, 2))
    assert table.confidences is not None
    assert table.confidences.tolist() == [[0.75, 1], [1, 0.25]]
    cut = table.truncate(1)
    assert cut.confidences is not None
    assert cut.confidences.tolist() == [[0.75, 1]]


def test_rows_that_follow_paths():
    """The same token after 4 and after 7 has separate rows."""
    tokens = [np.array(x, np.int32) for x in ([[4, 7]], [[1, 2], [1, 3]], [[5, 6], [6, 5]])]
    log_probs = [np.full(x.shape, -1, np.float32) for x in tokens]
    kept = [np.array([0, 1]), np.array([2, 0]), np.array([0])]
    confidences = [np.array(x, np.float32) for x in ([0.5], [0.25, 0.125], [0, 1])]
    table = TransitionTable.from_paths(tokens, log_probs, kept, confidences)
    assert table.next_row[0].tolist() == [[0, 1], [-1, -1]]
    assert table.next_row[1].tolist() == [[1, -1], [0, -1]]
    assert (table.next_row[2] == -1).all()
    assert table.log_probs[0].tolist() == [[-1, -1], [-np.inf, -np.inf]]
    assert table.tokens[2].tolist() == [[5, 6], [6, 5]]
    assert table.confidences is not None
    assert table.confidences.tolist() == [[0.5, 1], [0.25, 0.125], [0, 1]]


def test_a_block_of_two_has_the_roots_row_alone():
    nothing = np.zeros(0, np.int32)
    children = np.array([[5]], np.int32), np.array([[-1]], np.float32)
    table = table_of(nothing, nothing, *children, shape=(1, 2))
    assert table.log_probs.tolist() == [[[-1], [-np.inf]]]
    assert (table.next_row == -1).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 4), (2, 1, 5), (6, 4, 3), (15, 16, 16)])
def test_candidates_equal_a_naive_search(shape):
    rng = np.random.default_rng(shape)
    depths, rows, _ = shape
    vocab_size = 30
    tokens = rng.integers(0, vocab_size, shape).astype(np.int32)
    previous = np.array(
        [rng.permutation(vocab_size)[:rows] for _ in range(depths - 1)], np.int32
    ).reshape(depths - 1, rows)
    log_probs = -rng.exponential(size=shape).astype(np.float32)
    table = TransitionTable.from_candidates(previous, tokens, log_probs)
    for at in np.ndindex(shape):
        candidates = previous[at[0]].tolist() if at[0] < depths - 1 else []
        token = int(tokens[at])
        expected = candidates.index(token) if token in candidates else -1
        assert table.next_row[at] == expected
    assert table.next_row.dtype == np.int32
    np.testing.assert_array_equal(table.tokens, tokens)
    np.testing.assert_array_equal(table.log_probs[1:], log_probs[1:])
    np.testing.assert_array_equal(table.log_probs[0, 0], log_probs[0, 0])
    assert (table.log_probs[0, 1:] == -np.inf).all()


def test_candidates_leave_their_arguments_alone():
    log_probs = np.full((2, 2, 2), -1, np.float32)
    TransitionTable.from_candidates(
        np.array([[1, 2]], np.int32), np.zeros((2, 2, 2), np.int32), log_probs
    )
    assert (log_probs == -1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_raise_with_a_way_out(value):
    log_probs = np.array([[-1, value]], np.float32)
    with pytest.raises(
        NumericalError, match=r"not finite \(NaN or infinity\).*dtype float32.*method ar"
    ):
        TransitionTable.from_marginals(np.array([[1, 2]], np.int32), log_probs)


def test_nan_in_the_unused_rows_of_depth_one_is_harmless():
    log_probs = np.full((1, 2, 2), -1, np.float32)
    log_probs[0, 1] = np.nan
    table = TransitionTable.from_candidates(
        np.zeros((0, 2), np.int32), np.zeros((1, 2, 2), np.int32), log_probs
    )
    assert table.log_probs[0, 1].tolist() == [-np.inf, -np.inf]


@pytest.mark.parametrize("above", [np.finfo(np.float32).eps, 2.4e-7, 1e-3])
def test_log_probabilities_above_0_by_rounding_are_0(above):
    log_probs = np.array([[above, -1], [above, -np.inf]], np.float32)
    table = TransitionTable.from_marginals(np.array([[1, 2], [3, 4]], np.int32), log_probs)
    assert table.log_probs.tolist() == [[[0, -1]], [[0, -np.inf]]]
    assert log_probs[0, 0] == np.float32(above)  # the argument is left alone


@pytest.mark.parametrize("above", [0.02, 3.0])
def test_values_that_are_no_log_probabilities_are_refused(above):
    log_probs = np.array([[above, -1]], np.float32)
    with pytest.raises(ValueError, match=r"^log probabilities must be at most 0, got "):
        TransitionTable.from_marginals(np.array([[1, 2]], np.int32), log_probs)


def test_arrays_of_different_shapes_are_refused():
    zeros = np.zeros((2, 1, 3), np.int32)
    with pytest.raises(ValueError, match=r"must have one shape, got .*\(2, 1, 2\)"):
        TransitionTable(zeros, np.zeros((2, 1, 2), np.float32), zeros)


def test_memory_of_a_table_is_linear_in_its_rows():
    """1,000 rows at 15 depths: comparing every child with every row would take 224 MB."""
    rng = np.random.default_rng(0)
    depths, rows, children = 15, 1000, 16
    previous = np.array([rng.permutation(5000)[:rows] for _ in range(depths - 1)], np.int32)
    tokens = rng.integers(0, 5000, (depths, rows, children)).astype(np.int32)
    log_probs = np.full(tokens.shape, -1, np.float32)
    tracemalloc.start()
    table = TransitionTable.from_candidates(previous, tokens, log_probs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert table.next_row.max() > 0
    assert peak < 100 * tokens.size  # bytes
