"""Tables, calibration and trees of many sequences at once: bit for bit what each has alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeflash.decoding.batch_trees import Outcome, draft_trees, observe
from treeflash.decoding.transitions import (
    EXPONENTS,
    Calibration,
    PathBatch,
    RowBatch,
    TransitionTable,
)
from treeflash.decoding.tree import build_tree
from treeflash.errors import NumericalError
from treeflash.testing.pairs import EXAMPLES, repeated

VOCAB, ROOT = 40, 7
FIELDS = "tokens", "parents", "depths", "log_probs", "confidences"


class Batch:
    """Rows of random heads, whose children are often previous tokens of the next depth."""

    def __init__(self, seed, *, equal=False):
        self.random = random = np.random.default_rng(seed)
        self.count = int(random.integers(1, 9))
        depths, m, k = (int(random.integers(1, 7)) for _ in range(3))
        n = int(random.integers(0, (depths - 1) * m + 1))
        self.shape = depths, m
        permuted = random.permuted(np.tile(np.arange((depths - 1) * m), (self.count, 1)), axis=1)
        self.places = (np.sort(permuted[:, :n]) + m).astype(np.int32)
        tokens = np.tile(np.arange(VOCAB, dtype=np.int32), (self.count, depths + 1, 1))
        tokens = random.permuted(tokens, axis=2)
        self.previous = np.take_along_axis(
            tokens[:, :depths, :m].reshape(self.count, -1), self.places, 1
        )
        depth = np.concatenate([np.zeros((self.count, 1), int), self.places // m], 1)
        following = tokens[np.arange(self.count)[:, None], depth + 1, : max(m, k) + 1]
        self.tokens = random.permuted(following, axis=2)[..., :k]
        self.log_probs = self.random_log_probs((self.count, 1 + n, k), equal=equal)
        self.confidences = None
        if seed % 3 == 0:
            self.confidences = random.random((self.count, 1 + n)).astype(np.float32)

    def random_log_probs(self, shape, *, equal):
        probs = self.random.dirichlet(np.full(shape[2], 0.4), shape[:2])
        log_probs = np.log(0.97 * -np.sort(-probs) + 1e-9)
        if equal:
            log_probs = np.minimum(np.round(2 * log_probs) / 2, 0)
        present = self.random.integers(0, 2 * shape[2] + 1, (*shape[:2], 1))
        absent = np.arange(shape[2]) >= present
        return np.where(absent, -np.inf, log_probs).astype(np.float32)

    def tables(self):
        return RowBatch(*self.arguments()).tables()

    def arguments(self):
        return self.places, self.previous, self.tokens, self.log_probs, self.shape, self.confidences

    def plain(self, i):
        """The table of one sequence, made alone."""
        arrays = self.places, self.previous, self.tokens, self.log_probs
        known = None if self.confidences is None else self.confidences[i : i + 1]
        return RowBatch(*(x[i : i + 1] for x in arrays), self.shape, known).dense(0)

    def calibrations(self):
        """Two equal calibrations of each sequence, which have learned something."""
        pairs = []
        for _ in range(self.count):
            seen = self.random.normal(size=len(EXPONENTS))
            pairs.append([Calibration(VOCAB, Calibration(VOCAB).log_weights + seen) for _ in "ab"])
        return zip(*pairs, strict=True)

    def text(self, i):
        """Tokens that follow the table of a sequence for a while."""
        table, row, tokens = self.plain(i), 0, []
        for depth in range(self.shape[0]):
            rank = int(self.random.integers(table.tokens.shape[2]))
            tokens.append(int(table.tokens[depth, row, rank]))
            if (row := int(table.next_row[depth, row, rank])) < 0:
                break
        return [*tokens, int(self.random.integers(VOCAB))]


class Paths(Batch):
    """Rows of random heads that follow paths; some children have equal tokens."""

    def __init__(self, seed, *, equal=False):
        self.random = random = np.random.default_rng(seed)
        self.count = int(random.integers(1, 9))
        depths, m, k = (int(random.integers(1, 7)) for _ in range(3))
        self.shape, n = (depths, m), 1
        self.parts = [], [], [], []
        for _ in range(depths):
            tokens = np.tile(np.arange(VOCAB, dtype=np.int32), (self.count, n, 1))
            children = (
                random.permuted(tokens, axis=2)[..., :k],
                self.random_log_probs((self.count, n, k), equal=equal),
            )
            order = random.permuted(np.tile(np.arange(n * k), (self.count, 1)), axis=1)
            stated = random.random((self.count, n)).astype(np.float32)
            for part, x in zip(self.parts, (*children, order[:, :m], stated), strict=True):
                part.append(x)
            n = min(m, n * k)
        if seed % 3:
            self.parts = self.parts[:3]

    def tables(self):
        flat = [[x.reshape(self.count, -1) for x in part] for part in self.parts]
        return PathBatch(*flat).tables()

    def plain(self, i):
        return TransitionTable.from_paths(*([x[i] for x in part] for part in self.parts))


def assert_equal_arrays(actual, expected, names):
    for name in names:
        one, other = getattr(actual, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype, name
            np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("equal", [False, True], ids=["", "equal probabilities"])
@pytest.mark.parametrize("kind", [Batch, Paths])
@settings(repeated, max_examples=EXAMPLES or 20)
@given(seed=st.integers(0, 10**6))
def test_trees_are_those_of_each_sequence_alone(together, equal, kind, seed):
    batch = kind(seed, equal=equal)
    tables = batch.tables()
    ours, theirs = batch.calibrations()
    nodes = batch.random.integers(1, 20, batch.count).tolist()
    steps = 1000 if together else 0
    drafts = draft_trees(tables, ours, [ROOT] * batch.count, nodes, steps_per_tree=steps)
    for i, (table, tree) in enumerate(drafts):
        expected = theirs[i].correct(batch.plain(i))
        assert_equal_arrays(tree, build_tree(expected, ROOT, nodes[i]), FIELDS)
        assert table.depths == expected.depths
        names = "tokens", "log_probs", "next_row", "confidences"
        assert_equal_arrays(table, expected, names)


@pytest.mark.parametrize("kind", [Batch, Paths])
@settings(repeated, max_examples=EXAMPLES or 20)
@given(seed=st.integers(0, 10**6))
def test_calibrations_learn_what_each_would_alone(kind, seed):
    batch = kind(seed)
    tables = batch.tables()
    ours, theirs = batch.calibrations()
    texts = [batch.text(i) for i in range(batch.count)]
    observe([Outcome(*parts) for parts in zip(ours, tables, texts, strict=True)])
    for i, calibration in enumerate(theirs):
        calibration.observe(batch.plain(i), texts[i])
        np.testing.assert_array_equal(ours[i].log_weights, calibration.log_weights)


def test_tables_of_several_kinds_are_drafted_together():
    """Of two batches, and of a head that has no rows."""
    first, second = Batch(1), Batch(2)
    plain = TransitionTable.from_marginals(
        np.array([[1, 2], [3, 4]], np.int32), np.array([[-0.5, -1], [-1, -2]], np.float32)
    )
    tables = [RowBatch(*x.arguments()).tables()[0] for x in (first, second)]
    tables.insert(1, plain)
    calibrations = [Calibration(VOCAB) for _ in tables]
    drafts = draft_trees(tables, calibrations, [1, 2, 3], [5, 6, 7])
    for i, table in enumerate((first.plain(0), plain, second.plain(0))):
        expected = build_tree(Calibration(VOCAB).correct(table), i + 1, 5 + i)
        assert_equal_arrays(drafts[i][1], expected, FIELDS)


def test_a_table_of_a_batch_is_like_any_other():
    batch = Batch(5)
    table = RowBatch(*batch.arguments()).tables()[0]
    assert table.depths == batch.shape[0]
    expected = batch.plain(0)
    changed = table.with_log_probs(expected.log_probs - np.float32(1))
    np.testing.assert_array_equal(changed.tokens, expected.tokens)
    np.testing.assert_array_equal(table.truncate(1).tokens, expected.tokens[:1])
    assert repr(table) == repr(expected)
    with pytest.raises(AttributeError, match="no attribute 'rows'"):
        table.rows  # noqa: B018 - it has none


@pytest.mark.parametrize(("value", "error"), [(np.nan, NumericalError), (0.5, ValueError)])
def test_rows_that_are_no_log_probabilities_are_an_error(value, error):
    batch = Batch(5)
    batch.log_probs[-1, -1, 0] = value
    with pytest.raises(error):
        RowBatch(*batch.arguments()).tables()


def test_log_probabilities_above_0_by_rounding_become_0():
    batch = Batch(5)
    batch.log_probs[0, 0, 0] = 1e-3
    (table, *_) = RowBatch(*batch.arguments()).tables()
    ((corrected, _), *_) = draft_trees([table], [Calibration(VOCAB)], [ROOT], [4])
    assert table.log_probs.max() <= 0
    np.testing.assert_array_equal(
        corrected.log_probs, Calibration(VOCAB).correct(batch.plain(0)).log_probs
    )
