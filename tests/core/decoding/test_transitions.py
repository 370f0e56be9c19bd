"""Transition tables: which rows follow which children, from logits and heads, and calibrated."""

import tracemalloc
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from random_tables import KINDS, random_table

from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.logit_tables import head_table, marginal_table
from treeflash.decoding.transitions import (
    EXPONENTS,
    MIN_REST,
    Calibration,
    RowBatch,
    TransitionTable,
)
from treeflash.errors import NumericalError
from treeflash.reference.backend import load
from treeflash.reference.numerics import log_softmax
from treeflash.testing.comparisons import assert_equal_tables
from treeflash.testing.models import write_dialect, write_target
from treeflash.testing.pairs import LOAD
from treeflash.testing.trees import draft, noise_of_depths


def test_marginals_share_one_row_a_depth():
    tokens = np.array([[5, 3], [3, 9], [1, 5]], np.int32)
    log_probs = np.array([[-0.5, -1], [-0.25, -2], [-1, -1]], np.float32)
    table = TransitionTable.from_marginals(tokens, log_probs)
    assert table.depths == 3
    assert table.tokens.tolist() == [[[5, 3]], [[3, 9]], [[1, 5]]]
    assert table.log_probs.tolist() == [[[-0.5, -1]], [[-0.25, -2]], [[-1, -1]]]
    assert table.next_row.tolist() == [[[0, 0]], [[0, 0]], [[-1, -1]]]
    assert table.next_row.dtype == np.int32


def test_a_table_cut_short_ends_in_leaves():
    tokens = np.array([[5, 3], [3, 9], [1, 5]], np.int32)
    table = TransitionTable.from_marginals(tokens, np.zeros((3, 2), np.float32))
    cut = table.truncate(2)
    assert cut.tokens.tolist() == [[[5, 3]], [[3, 9]]]
    assert cut.next_row.tolist() == [[[0, 0]], [[-1, -1]]]
    assert table.next_row.tolist() == [[[0, 0]], [[0, 0]], [[-1, -1]]]
    assert table.truncate(3) is table.truncate(9) is table


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
    assert table.confidences.tolist() == [[0.75, 1], [1, 0.25]]
    cut = table.truncate(1)
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
    assert table.confidences.tolist() == [[0.5, 1], [0.25, 0.125], [0, 1]]


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
    assert np.isfinite(log_probs).all()  # the argument is left alone


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


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """A pair with a Markov head, whose scores are the marginals' and a low-rank bias."""
    folder = tmp_path_factory.mktemp("pair")
    write_target(folder / "target", "llama", seed=1)
    write_dialect(folder / "drafter", folder / "target", "deepspec", seed=2)
    return load(folder / "target", folder / "drafter", LOAD)


SIZES = list(product((1, 4, 100), (1, 5, 100), (None, 1, 8, 100), (None, 1, 7, 100)))


@pytest.mark.sample(2)
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tables_of_all_sizes(backend, temperature, noisy):
    block, root = draft(backend, [3, 1, 4, 1, 5])
    logits = backend.drafter.model.logits(block.hidden)
    first, second = (backend.drafter_model.head_tensors[f"markov_w{n}.weight"] for n in (1, 2))

    def score(slots, previous, tokens):
        return logits[slots][:, tokens] + first[previous] @ second[tokens].T

    def confidence(slots, previous):
        return np.array(
            [
                backend.head.scores.confidence(block.hidden[[slot]], np.array([[token]]))[0, 0]
                for slot, token in zip(slots, previous, strict=True)
            ],
            np.float32,
        )

    options = TableOptions(k=9, temperature=temperature)
    if noisy:
        options = replace(options, noise=noise_of_depths(backend, 0.8))
    (expected,) = backend.drafter.marginals([block], options)
    assert_equal_tables(marginal_table(logits, options), expected)
    for m, k, shortlist, rows in SIZES:
        options = replace(options, m=m, k=k, shortlist=shortlist, rows=rows)
        (expected,) = backend.head.transitions([block], options)
        table = head_table(logits, root, score, options, confidence)
        assert_equal_tables(table, expected)


def test_a_single_depth_has_the_row_of_the_root_alone():
    logits = np.array([[0, 2, 1]], np.float32)
    options = TableOptions(m=1, k=2, shortlist=2, rows=1)
    table = head_table(logits, 0, lambda slots, before, tokens: logits[slots][:, tokens], options)
    assert table.tokens.tolist() == [[[1, 2]]]
    assert_equal_tables(table, marginal_table(logits, options))


def test_tokens_that_cannot_be_drafted_have_no_rows():
    logits = np.array([[1, -np.inf, 0], [0, -np.inf, 1]], np.float32)
    options = TableOptions(m=3, k=3)
    table = head_table(logits, 0, lambda slots, before, tokens: logits[slots], options)
    assert np.isfinite(table.log_probs).sum(-1).max() == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shortlist", [None, 2])
def test_logits_that_are_not_finite_are_refused(value, shortlist):
    logits = np.zeros((3, 5), np.float32)
    logits[1, 2] = value
    options = TableOptions(m=2, k=2, shortlist=shortlist)
    for table in (
        lambda: marginal_table(logits, options),
        lambda: head_table(logits, 0, lambda slots, before, x: logits[slots][:, x], options),
    ):
        with pytest.raises(NumericalError, match="the drafter's output is not finite"):
            table()


VOCAB, CHILDREN, DEPTHS = 60, 16, 6


def observed(exponent, iterations=150, seed=0):
    """What is learned about a drafter whose probabilities are to be raised to that exponent."""
    rng = np.random.default_rng(seed)
    calibration = Calibration(VOCAB)
    for _ in range(iterations):
        target = log_softmax(rng.normal(0, 3, (DEPTHS, VOCAB)))
        drafted = log_softmax(target / exponent)
        best = np.argsort(-drafted)[:, :CHILDREN].astype(np.int32)
        table = TransitionTable.from_marginals(
            best, np.take_along_axis(drafted, best, 1).astype(np.float32)
        )
        tokens = [int(rng.choice(VOCAB, p=np.exp(row))) for row in target]
        calibration.observe(table, tokens)
    return calibration


def sure(exponent):
    """A calibration that believes in one exponent."""
    return Calibration(VOCAB, np.where(exponent == EXPONENTS, 0.0, -np.inf))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("exponent", [0.6, 1, 1.6, 2.5])
def test_it_finds_the_exponent(exponent, seed):
    assert observed(exponent, seed=seed).exponent == pytest.approx(exponent, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_little_evidence_changes_little(seed):
    assert observed(1, iterations=3, seed=seed).exponent == pytest.approx(1, abs=0.25)


def test_a_chain_of_improbable_tokens_is_learned_quickly():
    """A drafter that is always right and never sure: two blocks are enough to sharpen it."""
    tokens = np.tile(np.arange(CHILDREN, dtype=np.int32), (DEPTHS, 1))
    log_probs = log_softmax(np.r_[2.0, np.zeros(VOCAB - 1)])[:CHILDREN].astype(np.float32)
    table = TransitionTable.from_marginals(tokens, np.tile(log_probs, (DEPTHS, 1)))
    calibration = Calibration(VOCAB)
    for _ in range(2):
        calibration.observe(table, [0] * DEPTHS)
    assert calibration.exponent > 1.5
    calibrated = calibration.correct(table).log_probs[:, 0, 0]
    assert (calibrated > table.log_probs[:, 0, 0] + 0.3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_without_evidence_probabilities_stay(kind):
    table = random_table(kind, (7, 5, 4), 0)
    calibration = Calibration(VOCAB)
    assert calibration.exponent == 1
    rest = 1 - np.exp(table.log_probs.astype(np.float64)).sum(-1)
    kept = rest > MIN_REST  # not where a random table's children have more than everything
    np.testing.assert_allclose(
        calibration.correct(table).log_probs[kept], table.log_probs[kept], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_stay_distributions_in_the_same_order(kind):
    table = random_table(kind, (7, 5, 4), 1)
    for exponent in EXPONENTS:
        found = sure(exponent).correct(table)
        np.testing.assert_array_equal(np.isfinite(found.log_probs), np.isfinite(table.log_probs))
        with np.errstate(invalid="ignore"):
            assert not (np.diff(found.log_probs, axis=-1) > 0).any()
        assert (np.exp(found.log_probs).sum(-1) <= 1 + 1e-6).all()
        np.testing.assert_array_equal(found.tokens, table.tokens)
        np.testing.assert_array_equal(found.next_row, table.next_row)


def test_the_rest_is_raised_as_well():
    """Rows whose other tokens are as probable as the last child are raised exactly."""
    logits = np.r_[5.0, 4.0, 3.0, np.zeros(VOCAB - 3)]
    tokens = np.arange(4, dtype=np.int32)[None]
    table = TransitionTable.from_marginals(tokens, log_softmax(logits)[None, :4].astype(np.float32))
    for exponent in EXPONENTS:
        np.testing.assert_allclose(
            sure(exponent).correct(table).log_probs[0, 0], log_softmax(exponent * logits)[:4], 1e-4
        )


def test_rows_are_followed_as_far_as_they_are_known():
    """At depth 2 the row of the chosen token counts, and no other; without a row it ends."""
    rows = log_softmax(np.array([[[3.0, 0, 0, 0]] * 2, [[0.5, 0, 0, 0], [6.0, 0, 0, 0]]]))
    tokens = np.tile(np.arange(4, dtype=np.int32), (2, 2, 1))
    next_row = np.full((2, 2, 4), -1, np.int32)
    next_row[0, :, 1] = 1
    table = TransitionTable(tokens[..., :3], rows[..., :3].astype(np.float32), next_row[..., :3])

    def weights(*tokens):
        calibration = Calibration(4)
        before = calibration.log_weights
        calibration.observe(table, tokens)
        return calibration.log_weights - before

    def raised(row, token):
        return log_softmax(EXPONENTS[:, None] * row)[:, token]

    first = raised(rows[0, 0], 1)
    np.testing.assert_allclose(weights(1, 0), first + raised(rows[1, 1], 0), 1e-4)
    np.testing.assert_allclose(weights(0, 0), raised(rows[0, 0], 0), 1e-4)
    np.testing.assert_allclose(weights(1, 3, 0), first + raised(rows[1, 1], 3), 1e-4)
    np.testing.assert_allclose(weights(3, 0), raised(rows[0, 0], 3), 1e-4)


def test_an_empty_row_says_nothing():
    table = random_table("smooth", (1, 1, 4), 0)
    empty = TransitionTable(table.tokens, np.full((1, 1, 4), -np.inf, np.float32), table.next_row)
    calibration = Calibration(VOCAB)
    calibration.observe(empty, [0])
    assert calibration.exponent == 1
    np.testing.assert_array_equal(calibration.correct(empty).log_probs, empty.log_probs)
