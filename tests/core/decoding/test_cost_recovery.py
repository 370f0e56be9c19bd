"""Costs that were measured on a busy machine do not last: passes correct them, and the file."""

import json

import numpy as np
import pytest

from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import SIZES, CostFile, VerifyCosts

LENGTH = 100
DRAFT_S = 0.012
HIT = 0.8
"""The probability that a draft is accepted, as the drafter states it."""


def true_s(rows):
    """The seconds of a pass on the idle machine: a plain pass takes 25 ms, 16 rows take 46 ms."""
    return 0.025 * (1 + 0.055 * (rows - 1))


def table(factor):
    """Costs that are wrong by a factor, which depends on the size."""
    return {size: factor(size) * true_s(size) for size in SIZES if size <= 64}


def busy(rows):
    """A table of a busy machine, in the shape that one had: 8 rows cost 5 times a plain pass."""
    return 0.385 / 0.025 if rows == 1 else 0.23 * min(rows, 8) / true_s(rows)


class Decoding:
    """A text of one sequence, decoded by the clock of a stub."""

    def __init__(self, costs, slow=1.0, hit=HIT):
        self.budget = AdaptiveBudget(costs)
        self.random = np.random.default_rng(0)
        self.slow = slow  # how much slower the machine is now than when it is idle
        self.hit = hit
        self.tokens, self.seconds = 0, 0.0

    def iterate(self):
        """One iteration; returns its tokens and seconds."""
        tree, seconds = DraftTree.root_only(0), {}
        if self.budget.begin():
            log_probs = np.concatenate([[0.0], np.cumsum(np.full(7, np.log(HIT)))])
            drafted = DraftTree.chain(np.zeros(8, np.int32), log_probs)
            (kept,) = self.budget.prune([drafted], [LENGTH])
            tree = drafted.subset(np.arange(len(kept)))
            seconds["draft"] = self.slow * DRAFT_S
        hits = self.random.random(len(tree) - 1) < self.hit
        accepted = 1 + int(np.cumprod(hits).sum())
        seconds["verify"] = self.slow * true_s(len(tree))
        self.budget.observe([tree], [np.arange(accepted, dtype=np.int32)], [LENGTH], seconds)
        return accepted, sum(seconds.values())

    def decode(self, tokens):
        """Tokens per second over some tokens."""
        done, seconds = 0, 0.0
        while done < tokens:
            more, took = self.iterate()
            done, seconds = done + more, seconds + took
        return done / seconds


RIGHT = table(lambda rows: 1)


@pytest.mark.parametrize(
    ("factor", "share"),
    [
        pytest.param(lambda rows: 10, 0.9, id="ten times too slow"),
        pytest.param(lambda rows: 0.2 if rows == 1 else 1, 0.9, id="a cheap plain pass"),
        pytest.param(lambda rows: 1 if rows == 1 else 8, 0.9, id="expensive trees"),
        pytest.param(busy, 0.7, id="a busy machine"),
    ],
)
def test_drafting_recovers_from_wrong_costs_within_100_tokens(factor, share):
    decoding = Decoding(VerifyCosts(table(factor)))
    expected = Decoding(VerifyCosts(dict(RIGHT)))
    assert decoding.decode(100) > 0.75 * expected.decode(100)
    assert decoding.decode(200) > share * expected.decode(200) > 1.5 / true_s(1)


def test_drafts_that_do_not_pay_cost_little_although_they_are_tried():
    decoding = Decoding(VerifyCosts(dict(RIGHT)), hit=0.05)
    decoding.decode(300)
    assert decoding.decode(2000) > 0.95 / true_s(1)


def test_one_disturbed_pass_changes_costs_little():
    costs = VerifyCosts(dict(RIGHT))
    for seconds in (10.0, true_s(8), 10.0, 10.0, true_s(8)):
        costs.observe(8, 0, 1, seconds)
    assert costs.seconds[8] < 1.5 * true_s(8)


def test_passes_that_agree_correct_the_costs_at_once():
    costs = VerifyCosts(table(lambda rows: 10))
    for _ in range(3):
        costs.observe(1, 0, 1, true_s(1))
    assert costs.seconds == pytest.approx(RIGHT, rel=0.1)
    for _ in range(3):
        costs.observe(8, 0, 1, 4 * true_s(8))
    assert costs.seconds[1] == pytest.approx(4 * true_s(1), rel=0.2)


def test_costs_of_a_busy_machine_are_corrected_in_batches_too():
    costs = VerifyCosts(table(lambda rows: 10))
    for _ in range(10):
        costs.observe(32, 0, 4, true_s(32))
    assert costs.predict([32], [0], 4) == pytest.approx([true_s(32)], rel=0.3)


@pytest.fixture
def file(tmp_path):
    return CostFile(tmp_path / "costs" / "a.json", lambda: True)


def kept(file):
    return {int(n): s for n, s in json.loads(file.path.read_text())["seconds"].items()}


def process(file, slow=1.0, tokens=300):
    """Decode in a process that reads the file."""
    costs = file.read()
    costs.file = file
    decoding = Decoding(costs, slow)
    decoding.decode(tokens)
    return decoding


@pytest.mark.parametrize("factor", [lambda rows: 10, busy])
def test_the_file_is_corrected(file, factor):
    file.write(VerifyCosts(table(factor)))
    process(file)
    assert kept(file)[1] < 1.3 * true_s(1)
    assert Decoding(file.read()).decode(100) > 1.5 / true_s(1)


def test_trees_correct_the_cost_of_a_plain_pass_that_was_measured_with_theirs(file):
    """Plain passes are rare in a text that drafts; half an error would make the next rows cheap."""
    file.write(VerifyCosts(table(lambda rows: 1.4)))
    decoding = process(file)
    assert decoding.budget.costs.seconds[1] == pytest.approx(true_s(1), rel=0.02)
    assert kept(file)[8] / kept(file)[1] == pytest.approx(true_s(8) / true_s(1), rel=0.02)


def test_neither_disturbed_passes_nor_costs_in_doubt_change_the_file(file):
    file.write(VerifyCosts(dict(RIGHT)))
    before, costs = file.path.read_text(), file.read()
    costs.file = file
    for number in range(160):
        rows = 8 if number % 5 else 4
        costs.observe(rows, 0, 1, (3 if number < 10 or number % 15 == 5 else 1) * true_s(rows))
        costs.doubt(8)  # larger trees are not tried
    assert costs.seconds[64] < 0.5 * true_s(64)
    costs.observe(16, 0, 1, 3 * true_s(16))  # is believed at once, for now
    assert costs.seconds[16] > 2 * true_s(16)
    for _ in range(16):
        costs.observe(8, 0, 1, true_s(8))
    assert file.path.read_text() == before


def test_a_busy_process_does_not_change_the_file(file):
    file.write(VerifyCosts(dict(RIGHT)))
    before = file.path.read_text()
    process(file, slow=3.0)
    assert file.path.read_text() == before


def test_other_threads_do_not_change_the_file(file):
    file.write(VerifyCosts(table(lambda rows: 10)))
    before = file.path.read_text()
    process(CostFile(file.path, lambda: False))
    assert file.path.read_text() == before


def test_the_file_has_an_age(file):
    assert file.written is None
    file.write(VerifyCosts(dict(RIGHT)))
    first = file.written
    assert first is not None
    assert first.tzinfo is not None


def test_the_file_says_what_it_has_and_how_to_measure_again(file):
    assert "first text" in file.describe()
    file.write(VerifyCosts(dict(RIGHT)))
    assert file.describe().startswith("1 row 25 ms, 8 rows ")
    assert f"delete {file.path} to measure again" in file.describe()
