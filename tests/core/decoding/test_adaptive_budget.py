"""The budget `auto`: the size and the depths that pay, drafting that pauses, what is learned."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from fake_models import PROMPT, SCRIPT, config_of, scripted
from recordings import recording

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding.adaptive_budget import (
    MIN_ADVANTAGE,
    MIN_PLAIN,
    PLAIN_EVERY,
    SMALLEST,
    Acceptance,
    AdaptiveBudget,
    AdaptiveBudgets,
    Pause,
    Rate,
)
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import FORGETTING, SIZES, VerifyCosts
from treeflash.errors import ConfigError
from treeflash.reference.backend import load
from treeflash.testing.comparisons import generate, steps_of, tokens_of

LENGTH = 100


def chain(*probabilities):
    """A tree whose nodes follow one another, each accepted with that probability."""
    log_probs = np.concatenate([[0.0], np.cumsum(np.log(probabilities))])
    return DraftTree.chain(np.zeros(len(log_probs), np.int32), log_probs)


def fan(nodes, share):
    """The root and children of equal probability."""
    parents = np.minimum(np.arange(nodes, dtype=np.int32), 1) - 1
    tree = DraftTree.from_parents(np.zeros(nodes, np.int32), parents)
    return replace(tree, log_probs=np.where(parents < 0, 0.0, np.log(share)))


def costs(slope):
    """A forward takes one second, and `slope` more for each node after the first."""
    return VerifyCosts({size: 1 + slope * (size - 1) for size in SIZES})


def path(length):
    return np.arange(length, dtype=np.int32)


def sizes(budget, trees, lengths=None, **options):
    """How many nodes of each tree pay."""
    lengths = lengths or [LENGTH] * len(trees)
    return [len(nodes) for nodes in budget.prune(trees, lengths, **options)]


def observe(budget, trees, accepted, verify_s=None, draft_s=None, **options):
    """An iteration in which each tree has this number of accepted nodes.

    Verification takes what the budget expects, if nothing else is said.
    """
    rows = sum(map(len, trees))
    if verify_s is None:
        verify_s = float(budget.costs.predict([rows], [LENGTH * rows], len(trees))[0])
    seconds = {"verify": verify_s} | ({} if draft_s is None else {"draft": draft_s})
    paths = [path(min(accepted, len(tree))) for tree in trees]
    budget.observe(trees, paths, [LENGTH] * len(trees), seconds, **options)


def iterate(budget, tree, accepted, draft_s, sequences=1):
    """An iteration of sequences with such a tree each; returns whether they drafted."""
    drafts = budget.begin(sequences)
    trees = [tree if drafts else DraftTree.root_only(0)] * sequences
    if drafts:
        kept = budget.prune(trees, [LENGTH] * sequences)
        trees = [tree.subset(nodes) for tree, nodes in zip(trees, kept, strict=True)]
    observe(budget, trees, accepted, draft_s=draft_s if drafts else None)
    return drafts


class TestPruning:
    @pytest.mark.parametrize(
        ("slope", "tree", "nodes"),
        [
            pytest.param(0.0, fan(64, 0.01), 64, id="free nodes"),
            pytest.param(0.005, fan(64, 0.01), 64, id="nodes that bring more than they cost"),
            pytest.param(0.02, fan(64, 0.01), SMALLEST, id="nodes that do not"),
            pytest.param(0.05, chain(*[0.99] * 7, *[0.01] * 40), 8, id="sure, then doubtful"),
            pytest.param(0.05, chain(*[0.99] * 9), 10, id="a tree that ends between sizes"),
            pytest.param(0.0, chain(0.9, 0.9), 3, id="a small tree"),
            pytest.param(9.0, chain(0.9, 0.9), 3, id="a small tree where nodes are expensive"),
            pytest.param(0.0, DraftTree.root_only(3), 1, id="a root"),
        ],
    )
    def test_nodes_pay_while_they_bring_more_than_they_cost(self, slope, tree, nodes):
        assert sizes(AdaptiveBudget(costs(slope)), [tree]) == [nodes]

    @pytest.mark.parametrize(("share", "nodes"), [(1 / 64, 8), (1 / 20, 32)])
    def test_a_staircase_is_climbed_to_its_edges(self, share, nodes):
        steps = {size: 1.0 if size <= 8 else 2.0 if size <= 32 else 9.0 for size in SIZES}
        budget = AdaptiveBudget(VerifyCosts(steps))
        budget.pace(1).rate = Rate(1.0, 1.0)
        assert sizes(budget, [fan(64, share)]) == [nodes]

    @pytest.mark.parametrize(
        ("rate", "tree", "nodes"),
        [(1.0, fan(9, 0.5), 9), (3.0, fan(9, 0.5), SMALLEST), (0.1, fan(9, 0.15), SMALLEST)],
    )
    def test_nodes_must_pay_at_the_rate_of_decoding(self, rate, tree, nodes):
        """That of plain decoding, if it is the faster one."""
        budget = AdaptiveBudget(costs(0.2))
        budget.pace(1).rate = Rate(10 * rate, 10.0)
        assert sizes(budget, [tree]) == [nodes]

    def test_copies_may_be_cut_to_the_root(self):
        """Without a draft, a plain pass is as good."""
        copy = replace(fan(9, 0.01), matches=np.full(9, 3, np.int32))
        assert sizes(AdaptiveBudget(costs(0.1)), [copy]) == [1]

    def test_the_trees_of_several_texts_are_cut_together(self):
        """Nodes are ranked whichever tree they are of, and cut where the next costs too much."""
        budget = AdaptiveBudget(VerifyCosts({size: 0.5 + 0.25 * size for size in SIZES}))
        trees = [chain(0.99, 0.99, 0.99, 0.01), chain(0.02, 0.9), fan(4, 0.05)]
        assert sizes(budget, trees) == [4, 1, 1]

    def test_no_root_is_cut(self):
        budget = AdaptiveBudget(costs(10.0))
        assert sizes(budget, [chain(0.99, 0.99), fan(5, 0.2)], [LENGTH, 3]) == [1, 1]

    def test_nodes_of_long_texts_cost_more(self):
        table = {size: 1 + 0.01 * size for size in SIZES}
        budget = AdaptiveBudget(VerifyCosts(table, position_s={1: 1e-4}))
        assert sizes(budget, [chain(0.3), chain(0.3)], [10, 10_000]) == [2, 1]

    def test_other_rows_of_the_pass_move_the_cut_to_where_rows_cost_more(self):
        steps = {size: 1.0 if size <= 32 else 1.0 + 0.2 * (size - 32) for size in SIZES}
        budget = AdaptiveBudget(VerifyCosts(steps))
        assert sizes(budget, [fan(16, 0.05)]) == [16]
        assert sizes(budget, [fan(16, 0.05)], others=[(40, LENGTH)]) == [1]

    def test_copies_of_one_text_must_pay_at_the_rate_of_all(self):
        """A plain pass over 8 texts emits 4.7 tokens per second, and a node takes 0.1 seconds."""
        budget = AdaptiveBudget(costs(0.1))
        budget.pace(8).rate = budget.pace(1).rate = Rate(1.0, 1.0)
        copy = replace(fan(4, 0.3), matches=np.full(4, 3, np.int32))
        assert sizes(budget, [copy]) == [4]
        assert sizes(budget, [copy], others=[(1, LENGTH)] * 7) == [1]


def learned(*lessons, times=30):
    """What was accepted of trees, by pairs of a tree and the number of accepted nodes."""
    acceptance = Acceptance()
    for _ in range(times):
        for tree, accepted in lessons:
            acceptance.observe([tree], [path(accepted)])
    return acceptance


def confident(*confidences):
    """A chain of even chances whose rows the drafter is so confident of."""
    tree = chain(*[0.5] * len(confidences))
    return replace(tree, confidences=np.array([1, *confidences], np.float32))


def copied(*lengths):
    """A chain of even chances that continues matches of these lengths."""
    return replace(chain(*[0.5] * len(lengths)), matches=np.array([0, *lengths], np.int32))


class TestTrials:
    """A table may be wrong about trees of other sizes than those that are verified."""

    def verified(self, tree, cost=lambda n: 1 if n <= 5 else 10, passes=40):
        """The sizes of trees whose passes take a second, whatever the table says."""
        budget = AdaptiveBudget(VerifyCosts({n: cost(n) for n in SIZES}))
        found = []
        for _ in range(passes):
            found += sizes(budget, [tree])
            budget.costs.observe(found[-1], LENGTH * found[-1], 1, 1.0)
        return found

    def test_a_larger_tree_that_promises_much_is_verified(self):
        found = self.verified(chain(*[0.95] * 15))
        assert found[:2] == [5, 8]
        assert min(found[5:]) > 5
        assert found[-1] == 16

    def test_no_larger_tree_is_verified_that_promises_little(self):
        assert self.verified(chain(*[0.9] * 4, *[0.05] * 11)) == [5] * 40


class TestAcceptance:
    def test_before_anything_was_seen_the_drafter_is_believed(self):
        for tree in (chain(0.9, 0.5), fan(4, 0.2), confident(0.1, 0.99), copied(4, 5)):
            assert Acceptance().gains(tree) == pytest.approx(np.exp(tree.log_probs))

    @pytest.mark.parametrize(
        ("lessons", "tree", "expected"),
        [
            pytest.param([(chain(0.9), 1)], chain(0.9), 0.53, id="too sure"),
            pytest.param([(chain(0.3), 2)], chain(0.3), 0.43, id="too unsure"),
            pytest.param([(chain(0.9, 0.5), 1)], chain(0.1, 0.5), 0.017, id="at every depth"),
            pytest.param([(chain(0.5), 1)], chain(0.5, 0.5, 0.5), 0.048, id="along a path"),
            pytest.param([(confident(0.1), 1)], confident(0.1), 0.36, id="confidence"),
            pytest.param([(confident(0.1), 1)], confident(0.99), 0.5, id="another confidence"),
            pytest.param([(copied(4), 1)], copied(4), 0.5, id="copies learn in their sequences"),
            pytest.param([(copied(4), 1)], chain(0.5), 0.5, id="a match says nothing of drafts"),
            pytest.param([(chain(0.9), 1)], copied(4), 0.5, id="nor drafts of a match"),
        ],
    )
    def test_nodes_are_corrected_by_what_was_accepted_of_their_kind(self, lessons, tree, expected):
        assert learned(*lessons).gains(tree)[-1] == pytest.approx(expected, abs=0.01)

    def test_no_node_is_likelier_than_its_parent(self):
        """One of a level that is accepted more often than the drafter says."""
        acceptance = learned((confident(0.1), 1), (confident(0.9), 2))
        tree = replace(chain(0.6, 0.99, 0.99), confidences=np.array([1, 0.1, 0.9, 0.9], np.float32))
        gains = acceptance.gains(tree)
        assert gains[0] > gains[1] == gains[2] == gains[3]

    def test_what_is_not_seen_any_more_is_forgotten(self):
        lesson = chain(0.5, 0.5), 1
        acceptance = learned(lesson)
        for _ in range(100):
            acceptance.observe([copied(4)], [path(2)])
        assert acceptance.gains(chain(0.5))[1] == pytest.approx(0.5, rel=0.01)
        acceptance = learned(lesson)
        for _ in range(100):  # nothing is learned from plain iterations
            acceptance.observe([DraftTree.root_only(0)], [path(1)])
        assert acceptance.gains(chain(0.5))[1] < 0.4

    def test_corrections_choose_the_nodes_of_a_tree(self):
        """The drafter ranks a node first that experience ranks last."""
        tree = fan(3, 0.4)
        known = np.array([1, 0.1, 0.99], np.float32)
        trees = [replace(tree, log_probs=np.log([1, 0.4, 0.35]), confidences=known), chain(0.01)]
        budget = AdaptiveBudget(VerifyCosts({1: 1.0, 3: 1.0, 4: 9.0}))
        assert budget.prune(trees, [LENGTH] * 2)[0].tolist() == [0, 1]
        budget.acceptance = learned((confident(0.1), 1))
        assert budget.prune(trees, [LENGTH] * 2)[0].tolist() == [0, 2]


class TestPause:
    def test_a_step_that_never_pays_pauses_longer_and_longer(self):
        pause, tried = Pause(first=4, longest=20), []
        for i in range(200):
            if pause.begin():
                tried.append(i)
                pause.add(-2.0)
        assert np.diff(tried)[:8].tolist() == [4, 7, 13, 20, 20, 20, 20, 20]

    @pytest.mark.parametrize("paid", [20, 2000])
    def test_a_step_that_stops_paying_pauses_however_long_it_has_paid(self, paid):
        pause, lost = Pause(), 0
        for _ in range(paid):
            pause.add(1.0)
        while pause.begin():
            pause.add(-0.5)
            lost += 1
        assert lost == 20

    def test_a_pause_is_short_again_after_the_step_paid(self):
        pause = Pause(first=4)
        for gained in (-2.0, -2.0, 3.0, -9.0):
            pause.add(gained)
        assert pause.left == 4


class TestDrafting:
    def test_drafts_that_never_pay_cost_little(self):
        budget = AdaptiveBudget(costs(0.02))
        tried = sum(iterate(budget, chain(*[0.5] * 7), 1, 0.4) for _ in range(2000))
        # Each costs 0.4 of a plain iteration and a little more.
        assert 0 < tried < 2000 * 0.03 / 0.5

    def test_drafting_comes_back_when_it_pays(self):
        budget = AdaptiveBudget(costs(0.02))
        for _ in range(100):
            iterate(budget, chain(*[0.5] * 7), 1, 0.4)
        assert all([iterate(budget, chain(*[0.5] * 7), 5, 0.4) for _ in range(400)][-100:])

    def test_the_first_pause_ends_when_plain_decoding_was_timed(self):
        """The table may say that plain passes are fast."""
        budget, drafts = AdaptiveBudget(VerifyCosts({1: 0.1, 8: 1.0})), []
        for _ in range(100):
            drafts.append(budget.begin())
            tree = chain(*[0.9] * 7) if drafts[-1] else DraftTree.root_only(0)
            observe(budget, [tree], 4, verify_s=1.0, draft_s=0.5 if drafts[-1] else None)
        assert drafts[:60].count(False) == 1
        assert drafts.count(False) <= 2, "once more when the plain pass is forgotten"

    def test_all_methods_must_pause_for_drafting_to_be_paused(self):
        budgets = AdaptiveBudgets(costs(1))
        assert not budgets.is_paused(1)
        first, second = AdaptiveBudget(costs(1)), AdaptiveBudget(costs(1))
        budgets.by_method |= {"treeflash": first, "ddtree": second}
        first.pace(1).drafting.left = 3
        assert not budgets.is_paused(1)
        second.pace(1).drafting.left = 1
        assert budgets.is_paused(1)
        assert not budgets.is_paused(16)

    def test_the_first_drafted_iteration_says_nothing_about_the_rate(self):
        """It reads the prompt, and compiles."""
        budget = AdaptiveBudget(costs(0.1))
        observe(budget, [chain(0.5)], 2, draft_s=5.0, first=True)
        now = budget.pace(1)
        assert (now.rate, now.drafting.balance) == (Rate(), 0)
        assert budget.acceptance.accepted.sum() == 1
        observe(budget, [chain(0.5)], 2, draft_s=0.5)
        assert now.rate == Rate(2.0, pytest.approx(1.6))
        observe(budget, [chain(0.5)], 2, draft_s=5.0, first=True)  # of another sequence
        assert now.rate.seconds == pytest.approx((1 - FORGETTING) * 1.6 + 1.6)

    @pytest.mark.parametrize("disturbed", [{"verify_s": 1000.0}, {"draft_s": 1000.0}])
    def test_a_disturbed_iteration_says_nothing_about_the_rate(self, disturbed):
        budget = AdaptiveBudget(costs(0.1))
        for number in range(30):
            seconds = {"verify_s": 1.1, "draft_s": 0.5} | (disturbed if number % 5 == 4 else {})
            observe(budget, [chain(0.5)], 2, **seconds)
        assert budget.pace(1).rate.per_s == pytest.approx(2 / 1.6)

    def test_rates_are_of_the_latest_iterations(self):
        budget = AdaptiveBudget(costs(0.0))
        for tokens in (3, 1):
            for _ in range(80):
                observe(budget, [chain(0.9, 0.9)], tokens, draft_s=0.0)
            now = budget.pace(1)
            assert now.rate.per_s == pytest.approx(tokens, rel=0.01)

    def test_depths_are_drafted_a_little_beyond_what_trees_reached_lately(self):
        budget = AdaptiveBudget(costs(0.1))
        assert budget.depths_to_draft() is None  # all, as long as nothing was seen
        observe(budget, [chain(*[0.5] * 5)], 1, draft_s=0.0)
        wanted = [budget.depths_to_draft()]
        for _ in range(60):
            observe(budget, [chain(0.5)], 1, draft_s=0.0)
            wanted.append(budget.depths_to_draft())
        assert wanted == sorted(wanted, reverse=True)
        assert wanted[:3] == [6, 6, 6]  # slowly, because trees vary
        assert wanted[-1] <= 3
        observe(budget, [chain(0.5), chain(*[0.5] * 4)], 1, draft_s=0.0)
        assert budget.depths_to_draft(2) == 5  # of the deepest tree

    def test_trees_are_built_with_more_nodes_than_they_are_expected_to_keep(self):
        budget = AdaptiveBudget(costs(0.1))
        assert budget.nodes_to_build(2) == budget.expected_nodes(2) == budget.largest // 2
        trees = [chain(0.5), chain(*[0.5] * 3)]  # three nodes each, on average
        observe(budget, trees, 1, draft_s=0.0)
        assert budget.expected_nodes(2) == 3
        assert budget.nodes_to_build(2) == 2 * SMALLEST
        assert budget.nodes_to_build(100) == 32  # or what a small tree needs before it is pruned


class TestBatches:
    def test_what_was_learned_with_few_texts_does_not_bind_many(self):
        budget = AdaptiveBudget(costs(0.02))
        for _ in range(100):
            iterate(budget, chain(*[0.5] * 7), 1, 0.4)
        assert not budget.begin()
        assert [budget.begin(8) for _ in range(4)] == [False, False, True, True]
        assert budget.pace(8) is budget.pace(5)

    @pytest.mark.parametrize(("plain_s", "drafted"), [(0.4, False), (1.2, True)])
    @pytest.mark.parametrize("slow_first", [1, 5])
    def test_several_texts_draft_only_while_that_beats_a_measured_plain_iteration(
        self, plain_s, drafted, slow_first
    ):
        """The costs of single trees would say 1.0 s; the first one after prompts is slow."""
        budget, drafts = AdaptiveBudget(VerifyCosts({1: 1.0, 4: 1.0, 8: 1.0})), []
        for i in range(60):
            drafts.append(budget.begin(4))
            if drafts[-1]:
                observe(budget, [chain(0.5)] * 4, 1, 0.9, 0.1)
            else:
                observe(budget, [DraftTree.root_only(0)] * 4, 1, plain_s * (slow_first, 1)[i > 0])
        assert (sum(drafts) == 60 - MIN_PLAIN - 60 // PLAIN_EVERY) == drafted
        assert sum(drafts) < 30 or drafted

    def test_copies_of_several_texts_pause_while_they_lose(self):
        """One text alone goes on: its own copies tell it how good they are."""
        for sequences, goes_on in ((1, True), (4, False)):
            budget, copies = AdaptiveBudget(costs(0.1)), []
            for _ in range(200):
                budget.begin(sequences)
                copies.append(budget.copies(sequences))
                tree = copied(4) if copies[-1] else DraftTree.root_only(0)
                observe(budget, [tree] * sequences, 1)
            assert all(copies) == goes_on
            assert goes_on or 0 < sum(copies) < 30

    def test_copies_of_several_texts_go_on_while_they_win(self):
        budget, copies = AdaptiveBudget(costs(0.01)), []
        for _ in range(200):
            budget.begin(4)
            copies.append(budget.copies(4))
            observe(budget, [copied(4) if copies[-1] else DraftTree.root_only(0)] * 4, 2)
        assert sum(copies) == 200 - MIN_PLAIN - 200 // PLAIN_EVERY

    def test_a_wrong_time_of_plain_decoding_does_not_stay_while_all_passes_have_copies(self):
        """Plain passes took four times as long at first, so copies seemed to win."""
        budget, copies = AdaptiveBudget(costs(0.1)), []
        for number in range(200):
            budget.begin(4)
            copies.append(budget.copies(4))
            tree = copied(4) if copies[-1] else DraftTree.root_only(0)
            observe(budget, [tree] * 4, 1, verify_s=(4.0 if number < 3 else 1.0) + 0.3 * len(tree))
        assert sum(copies[: PLAIN_EVERY - 2]) > 20
        assert sum(copies[100:]) < 10

    def test_the_time_of_a_tree_is_more_than_the_time_of_its_pass(self):
        """Trees of copies are pruned, and several paths are committed."""
        budget = AdaptiveBudget(costs(0.0))
        seconds = {"verify": 1.0, "tree": 0.5, "commit": 0.5}
        budget.observe([copied(4)], [path(2)], [LENGTH], seconds)
        assert budget.costs.predict([2], [2 * LENGTH])[0] == pytest.approx(2.0)

    @pytest.mark.parametrize("sequences", [1, 4])
    def test_the_balance_is_in_units_of_its_noise(self, sequences):
        """Each brings one token more than plain decoding, in the time of a plain iteration."""
        budget = AdaptiveBudget(costs(0.0))
        observe(budget, [chain(0.5)] * sequences, 2, draft_s=0.0)
        advantage = MIN_ADVANTAGE if sequences > 1 else 1
        assert budget.pace(sequences).drafting.balance == pytest.approx(
            sequences * (2 - advantage) / sequences**0.5
        )

    @pytest.mark.parametrize(("sequences", "pays"), [(1, True), (4, False)])
    def test_equally_fast_drafts_pay_for_one_sequence_alone(self, sequences, pays):
        """In a batch they would make the drafter read all prompts for nothing."""
        budget = AdaptiveBudget(costs(0.0))
        drafts = [iterate(budget, chain(0.5), 2, 1.0, sequences) for _ in range(400)]
        assert all(drafts) == pays

    @pytest.mark.parametrize("sequences", [4, 16, 32])
    @pytest.mark.parametrize("draft_s", [0.5, 3.0])
    def test_a_batch_tries_drafts_that_do_not_pay_as_rarely_as_they_cost(self, sequences, draft_s):
        """Ten groups of sequences, each with 63 new tokens; a group's first draft reads prompts."""
        budget, tried = AdaptiveBudget(costs(0.0)), 0
        for _ in range(10):
            first = True
            for _ in range(63):
                drafts = budget.begin(sequences)
                trees = [chain(0.5) if drafts else DraftTree.root_only(0)] * sequences
                seconds = draft_s + 5 * first if drafts else None
                observe(budget, trees, 1, 1.0, seconds, first=first and drafts)
                first, tried = first and not drafts, tried + drafts
        # Without anything accepted, an iteration costs a draft. What is lost is about 3 %.
        assert tried * draft_s < 0.035 * 630


DRAFT_S, HIT = 0.012, 0.8
"""Seconds of a draft, and the probability that it is accepted, as the drafter states it."""


def true_s(rows):
    """The seconds of a pass on the idle machine: a plain pass takes 25 ms, 16 rows take 46 ms."""
    return 0.025 * (1 + 0.055 * (rows - 1))


@dataclass
class Text:
    """A text that is decoded by the clock of a stub, with a table that is wrong by a factor."""

    wrong: Callable[[int], float]  # the factor, by size
    hit: float = HIT
    disturbed: float = 0.0  # share of passes that take ten times as long for the budget

    def speeds(self, first=100, later=400):
        """Tokens per second of the first tokens of sixteen texts, and of the later ones."""
        marks = [self.decode((first, first + later), seed) for seed in range(16)]
        tokens, seconds = np.sum(marks, 0).T
        return tokens[0] / seconds[0], (tokens[1] - tokens[0]) / (seconds[1] - seconds[0])

    def decode(self, ends, seed):
        """The tokens and the seconds of a text when it is at least as long as each of the ends."""
        table = {size: self.wrong(size) * true_s(size) for size in SIZES if size <= 64}
        budget, random = AdaptiveBudget(VerifyCosts(table)), np.random.default_rng(seed)
        hits = random.random(2 * ends[-1]) < self.hit  # by position, so policies can be compared
        done, all_s, marks = 0, 0.0, []
        for end in ends:
            while done < end:
                tree, seconds = DraftTree.root_only(0), {}
                if budget.begin():
                    drafted = chain(*[HIT] * 15)
                    (kept,) = budget.prune([drafted], [LENGTH])
                    tree, seconds = drafted.subset(kept), {"draft": DRAFT_S}
                accepted = 1 + int(np.cumprod(hits[done : done + len(tree) - 1]).sum())
                seconds["verify"] = true_s(len(tree))
                all_s += sum(seconds.values())
                done += accepted
                seconds["verify"] *= 10 if random.random() < self.disturbed else 1
                budget.observe([tree], [path(accepted)], [LENGTH], seconds)
            marks.append((done, all_s))
        return marks


@pytest.fixture(scope="module")
def right():
    """The speeds with a right table."""
    return Text(lambda rows: 1).speeds()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("text", "first", "later"),
    [
        pytest.param(Text(lambda rows: 10), 0.97, 0.97, id="ten times too slow"),
        pytest.param(Text(lambda rows: 0.1), 0.97, 0.97, id="ten times too fast"),
        pytest.param(Text(lambda n: 0.2 if n == 1 else 1), 0.93, 0.97, id="a cheap plain pass"),
        pytest.param(Text(lambda n: 10 if n == 1 else 1), 0.97, 0.97, id="an expensive plain pass"),
        pytest.param(Text(lambda n: 1 if n == 1 else 8), 0.93, 0.97, id="expensive trees"),
        pytest.param(Text(lambda n: 1 if n <= 5 else 8), 0.93, 0.97, id="expensive larger trees"),
        pytest.param(Text(lambda n: 1 if n == 1 else 0.1), 0.97, 0.97, id="cheap trees"),
        pytest.param(
            Text(lambda n: 15 if n == 1 else 0.23 * min(n, 8) / true_s(n)), 0.85, 0.95, id="busy"
        ),
        pytest.param(Text(lambda rows: 1, disturbed=0.1), 0.97, 0.97, id="disturbed passes"),
    ],
)
def test_wrong_costs_are_healed_within_one_text(text, first, later, right):
    """Speeds of the first 100 tokens, and of later ones, relative to a right table."""
    speeds = text.speeds()
    assert speeds[0] > first * right[0]
    assert speeds[1] > later * right[1] > 1.5 / true_s(1)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda rows: 1, id="right"),
        pytest.param(lambda rows: 10, id="ten times too slow"),
        pytest.param(lambda rows: 0.1, id="ten times too fast"),
        pytest.param(lambda n: 1 if n == 1 else 0.1, id="cheap trees"),
        pytest.param(lambda n: 1 if n == 1 else 8, id="expensive trees"),
    ],
)
def test_drafts_that_do_not_pay_cost_little_whatever_the_table_says(wrong):
    """The first 100 tokens, and later ones."""
    first, later = Text(wrong, hit=0.05).speeds(100, 300)
    assert first * true_s(1) > 0.93
    assert later * true_s(1) > 0.97


def test_a_text_without_a_shared_budget_measures_its_own_costs(tiny_pair):
    backend = load(*tiny_pair, LoadConfig())
    steps = [
        generate(backend, [5, 6, 7], DecodeConfig(budget=budget, max_tokens=12))
        for budget in (16, "auto")
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("budget", [0, -1, "all", 2.5])
def test_other_budgets_are_refused(budget):
    with pytest.raises(ConfigError, match="budget must be auto, or from 1 to 1024"):
        DecodeConfig(budget=budget)


CHAIN = DraftTree.chain(np.arange(9, dtype=np.int32))
PASS_S = 0.1
"""Seconds of a pass of the target over any number of rows."""


def observed(accepted: int, depth_s: float, sequences: int = 1, times: int = 50) -> AdaptiveBudget:
    """After iterations of chains of 8 drafts, of which some are accepted."""
    budget = AdaptiveBudget(VerifyCosts({1: PASS_S, 64: PASS_S}))
    lengths, path = [9] * sequences, np.arange(accepted + 1, dtype=np.int32)
    for _ in range(times):
        budget.passes_to_draft(8, lengths)
        budget.pace(sequences).depths = 8
        seconds = {"draft": 8 * depth_s, "verify": PASS_S}
        budget.observe([CHAIN] * sequences, [path] * sequences, lengths, seconds)
    return budget


@pytest.mark.parametrize(
    ("accepted", "depth_s", "sequences", "depths"),
    [
        pytest.param(1, 0.02, 1, 1, id="one is accepted"),
        pytest.param(3, 0.02, 1, 3, id="three are accepted"),
        pytest.param(7, 0.02, 1, 7, id="seven are accepted"),
        pytest.param(7, 1e-9, 1, 8, id="free depths"),
        pytest.param(7, 1.0, 1, 1, id="expensive depths"),
        pytest.param(4, 0.1, 1, 1, id="a token each"),
        pytest.param(4, 0.03, 4, 4, id="sequences share the price"),
    ],
)
def test_depths_are_drafted_that_pay(accepted, depth_s, sequences, depths):
    budget = observed(accepted, depth_s, sequences)
    assert budget.passes_to_draft(8, [9] * sequences) == depths


def test_before_anything_was_seen_all_depths_are_drafted():
    assert observed(1, 1.0, times=0).passes_to_draft(5, [9]) == 5


def test_depths_are_tried_again():
    budget, tried = observed(1, 0.02), []
    short = DraftTree.chain(np.arange(2, dtype=np.int32))
    for _ in range(100):
        tried.append(budget.passes_to_draft(8, [9]))
        seconds = {"draft": 0.02 * tried[-1], "verify": PASS_S}
        budget.observe([short], [np.arange(2, dtype=np.int32)], [9], seconds)
    assert tried[0] == 1
    assert max(tried) > 1


def test_one_slow_draft_changes_nothing():
    budget = observed(4, 0.02)
    before = budget.passes_to_draft(8, [9])
    path = np.arange(5, dtype=np.int32)
    budget.observe([CHAIN], [path], [9], {"draft": 100.0, "verify": PASS_S})
    assert budget.passes_to_draft(8, [9]) == before


@pytest.mark.parametrize("method", ["ddtree", "dflash"])
@pytest.mark.parametrize("depths", [1, 2, 9, None])
def test_the_drafter_and_a_setting_limit_the_depths(method, depths):
    backend = scripted(SCRIPT)
    room = len(SCRIPT) - len(PROMPT)
    settings = {"method": method, "budget": 16, "suffix": False, "max_tokens": room}
    with recording(backend.drafter, "draft") as drafts:
        steps = steps_of(backend, PROMPT, config_of(**settings, draft_depths=depths))
    assert tokens_of(steps) == SCRIPT[len(PROMPT) :]
    trees = [step.tree for step in steps[1:-1] if step.tree is not None]
    assert max(int(tree.depths.max()) for tree in trees) == min(depths or 5, 5)
    assert {most for _, most in drafts} == {min(depths or 5, 5)}
