"""How deep batches are drafted, when the drafter rests, and from which iterations budgets learn."""

import numpy as np
import pytest
from fake_models import PROMPT, SCRIPT, FakeBackend, config_of, scripted
from memory import Failing
from recordings import recording

from treeflash.config import METHODS, LoadConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.adaptive_budget import MIN_PLAIN, AdaptiveBudget, AdaptiveBudgets
from treeflash.decoding.suffix import SuffixDrafter
from treeflash.decoding.transitions import Calibration
from treeflash.decoding.verify_costs import SIZES, VerifyCosts
from treeflash.reference.backend import load
from treeflash.testing.comparisons import tokens_of
from treeflash.testing.costs import SteadyCosts

COSTS = {1: 1000.0, 4: 1010.0, 8: 1020.0}
"""So large that drafts cost nothing."""


def submit(scheduler, prompt=PROMPT, **settings):
    config = config_of(**({"max_tokens": 90} | settings))
    return scheduler.submit(Request(prompt_ids=prompt, config=config))


def drafts(backend: FakeBackend):
    """The sequences and the depths of every draft of a backend."""
    calls, draft = [], backend.drafter.draft

    def spy(roots, depths=None):
        calls.append((len(roots), depths))
        return draft(roots, depths)

    backend.drafter.draft = spy
    return calls


class WatchedBudget(AdaptiveBudget):
    """An adaptive budget that keeps what it was asked and told.

    Attributes:
        rows: rows of other sequences in each iteration whose trees it pruned.
        learned: trees of each iteration that it learned from.
        first: whether a sequence was drafted for the first time in each of these.
    """

    def __init__(self):
        super().__init__(SteadyCosts(dict(COSTS)))
        self.rows, self.learned, self.first = [], [], []

    def prune(self, trees, lengths, others=()):
        self.rows.append(sum(number for number, _ in others))
        return super().prune(trees, lengths, others)

    def observe(self, trees, *args, first=False, **options):
        self.learned.append(len(trees))
        self.first.append(first)
        super().observe(trees, *args, first=first, **options)


def adaptive(backend, config=None, budget=None):
    """A scheduler whose sequences of all methods share the budget, if one is given."""
    budgets = AdaptiveBudgets(SteadyCosts(dict(COSTS)))
    if budget is not None:
        budgets.by_method = dict.fromkeys(METHODS, budget)
    return Scheduler(backend, config, budgets=budgets)


@pytest.mark.parametrize("budgets", [(2,), (2, 4), (4, 2), (3, 1, 2)])
def test_a_batch_is_drafted_as_deep_as_its_largest_tree_may_be(budgets):
    backend = scripted(SCRIPT)
    calls, scheduler = drafts(backend), Scheduler(backend)
    for budget in budgets:
        submit(scheduler, budget=budget)
    scheduler.step()
    scheduler.step()
    assert calls == [(len(budgets), max(budgets))]


def test_the_drafter_does_nothing_while_drafting_rests():
    """Sequences of a fixed budget beside it are still drafted for."""
    backend = scripted(SCRIPT)
    calls, scheduler = drafts(backend), adaptive(backend)
    budget = scheduler.budgets.get("ddtree", backend)
    budget.pace(1).drafting.left = 20
    submit(scheduler, budget="auto")
    for _ in range(8):
        scheduler.step()
    assert calls == []
    submit(scheduler, budget=4)
    scheduler.step()
    scheduler.step()
    assert [sequences for sequences, _ in calls] == [1]


def test_several_sequences_first_measure_plain_decoding():
    backend = scripted(SCRIPT)
    calls, scheduler = drafts(backend), adaptive(backend)
    for _ in range(3):
        submit(scheduler, budget="auto")
    for _ in range(3):
        scheduler.step()
    assert calls == []
    scheduler.step()
    assert [sequences for sequences, _ in calls] == [3]


def test_copies_are_looked_for_in_pauses_but_not_while_plain_decoding_is_timed():
    scheduler = adaptive(scripted(SCRIPT))
    with recording(SuffixDrafter, "propose") as sought:
        for _ in range(3):
            submit(scheduler, budget="auto")
        for _ in range(3):
            scheduler.step()
        assert sought == []
        scheduler.budgets.by_method["ddtree"].pace(3).drafting.left = 10
        for calls in (3, 6):
            scheduler.step()
            assert len(sought) == calls
        scheduler.budgets.by_method["ddtree"].pace(3).copying.left = 10
        scheduler.step()
        assert len(sought) == calls  # copies have a pause of their own


def test_a_sequence_that_drafts_nothing_counts_as_one_of_the_pass():
    """Only one token may follow in the second text, so no draft is of use to it."""
    asked = []

    class Asked(WatchedBudget):
        def begin(self, sequences=1):
            asked.append(sequences)
            return super().begin(sequences)

    scheduler = adaptive(scripted(SCRIPT), budget=Asked())
    submit(scheduler, budget="auto")
    submit(scheduler, budget="auto", max_tokens=2)
    scheduler.step()
    scheduler.step()
    assert asked == [2]


@pytest.mark.parametrize("batch", [2, 3])
def test_a_sequence_whose_trees_are_cut_to_the_root_is_drafted_for_more_and_more_rarely(batch):
    """The others of the batch are drafted for as before, until it has a tree again."""

    class Cutting(WatchedBudget):
        def begin(self, sequences=1):
            return True

        def prune(self, trees, lengths, others=()):
            whole = [np.arange(len(tree)) for tree in trees]
            return [whole[0][:1], *whole[1:]] if cut and len(trees) == batch else whole

    backend = scripted(SCRIPT)
    calls, scheduler = drafts(backend), adaptive(backend, budget=Cutting())
    cut = True
    for _ in range(batch):
        submit(scheduler, budget="auto", suffix=False, max_tokens=200)
    for _ in range(13):
        scheduler.step()
    without = [batch - sequences for sequences, _ in calls]
    assert without == [0, 1, 0, 1, 1, 0, *[1] * 4, 0, 1]
    cut = False
    for _ in range(9):
        scheduler.step()
    assert [batch - sequences for sequences, _ in calls[12:]] == [*[1] * 7, 0, 0]


def test_nothing_is_learned_from_iterations_that_also_run_prompts():
    """Their time says nothing about trees."""
    budget = WatchedBudget()
    scheduler = adaptive(scripted(SCRIPT), SchedulerConfig(prefill_chunk=2), budget)
    submit(scheduler, budget="auto")
    scheduler.step()
    scheduler.step()
    assert budget.learned == [1]
    submit(scheduler, SCRIPT[:7], budget="auto")
    for _ in range(4):
        scheduler.step()
    assert budget.learned == [1]
    scheduler.step()
    assert budget.learned == [1, 2]


def test_a_budget_learns_from_a_scored_text_but_not_from_its_scores(tiny_pair):
    """The scores are passes over chains of the prompt."""
    budget = WatchedBudget()
    scheduler = adaptive(load(*tiny_pair, LoadConfig()), budget=budget)
    config = config_of(budget="auto", max_tokens=9)
    scheduler.submit(Request(prompt_ids=[5, 6, 7], config=config, scores_prompt=True))
    learned = []
    for _ in range(3):  # scores, the last token of the prompt, a tree
        scheduler.step()
        learned.append(len(budget.learned))
    assert learned == [0, 0, 1]


@pytest.mark.parametrize("other", [{"budget": 4}, {"budget": "auto", "method": "dflash"}])
def test_nothing_is_learned_from_iterations_of_different_kinds_of_sequences(other):
    """An adaptive budget cannot tell its trees' part of the time from the rest."""
    ddtree, dflash = WatchedBudget(), WatchedBudget()
    scheduler = adaptive(scripted(SCRIPT))
    scheduler.budgets.by_method = {"ddtree": ddtree, "dflash": dflash}
    submit(scheduler, budget="auto")
    second = submit(scheduler, **other)
    for _ in range(3):
        scheduler.step()
    assert ddtree.learned == dflash.learned == []
    scheduler.cancel(second)
    scheduler.step()
    assert ddtree.learned == [1]


def test_trees_of_fixed_budgets_count_as_rows_of_the_pass():
    budget = WatchedBudget()
    scheduler = adaptive(scripted(SCRIPT), budget=budget)
    submit(scheduler, budget="auto")
    submit(scheduler, budget=4)
    for _ in range(2 + MIN_PLAIN):
        scheduler.step()
    assert budget.rows == [4]


def test_an_iteration_is_marked_in_which_a_sequence_is_drafted_for_the_first_time():
    """The drafter then also reads its prompt."""

    class Drafting(WatchedBudget):
        def begin(self, sequences=1):
            return True

    budget = Drafting()
    scheduler = adaptive(scripted(SCRIPT), budget=budget)
    submit(scheduler, budget="auto")
    for _ in range(4):
        scheduler.step()
    submit(scheduler, budget="auto")
    for _ in range(3):
        scheduler.step()
    assert budget.first == [True, False, False, True, False]


def drafted_tables(backend, constraint):
    """The tables of the steps, and what the drafter proposed before each of them."""
    config = config_of(max_tokens=30)
    request = Request(prompt_ids=PROMPT, config=config, constraint=constraint)
    sequence = list(PROMPT)
    for _, step in Scheduler(backend).decode([request]):
        if step.table is not None:
            yield step, backend.propose(sequence, 1, config.top_k_children)
        sequence += step.tokens


def test_a_calibration_learns_from_the_drafter_and_not_from_itself():
    backend = scripted(SCRIPT, right=2)
    calibration, exponents = Calibration(backend.vocab_size), set()
    for step, proposed in drafted_tables(backend, None):
        expected = calibration.correct(proposed.truncate(step.table.depths))
        assert np.array_equal(step.table.log_probs, expected.log_probs)
        calibration.observe(proposed, step.tokens)
        exponents.add(calibration.exponent)
    assert len(exponents) > 3


def test_nothing_is_calibrated_under_a_constraint():
    """Even one that allows every token of this text; others change what the target samples."""
    steps = list(drafted_tables(scripted(SCRIPT, right=2), Failing(100, 99)))
    assert len(steps) > 3
    for step, proposed in steps:
        depths = step.table.depths
        assert np.array_equal(step.table.log_probs, proposed.log_probs[:depths])


def test_the_budgets_of_a_pair_share_costs_that_are_measured_once():
    measured, backend = [], scripted(SCRIPT)

    def measure(of):
        assert of is backend
        measured.append(SteadyCosts(dict(COSTS)))
        return measured[-1]

    budgets = AdaptiveBudgets(measure=measure)
    first, again, other = (budgets.get(m, backend) for m in ("ddtree", "ddtree", "dflash"))
    assert first is again
    assert other is not first
    assert other.costs is first.costs is measured[0]
    assert len(measured) == 1


def test_a_request_is_checked_without_a_pass_of_the_target():
    """Other threads than the scheduler's check requests, and must not run the target."""
    timed = []
    costs = VerifyCosts({1: 1000.0, 4: 1010.0})
    budgets = AdaptiveBudgets(measure=lambda backend: timed.append(backend) or costs)
    backend = scripted(SCRIPT)
    backend.state_nbytes = lambda capacity, *, drafts: capacity
    scheduler = Scheduler(backend, SchedulerConfig(max_bytes=1000), budgets=budgets)
    request = Request(prompt_ids=PROMPT, config=config_of(budget="auto", max_tokens=9))
    scheduler.check(request)
    assert scheduler.state_bytes(request) == len(PROMPT) + 9 + max(SIZES)
    assert not timed
    assert tokens_of(step for _, step in scheduler.decode([request])) == SCRIPT[4:13]
    assert timed == [backend]
    assert scheduler.state_bytes(request) == len(PROMPT) + 9 + 4
