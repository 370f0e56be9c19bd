"""The budget `auto`: the size that pays, drafting that pauses, and what is learned."""

from dataclasses import replace

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding.adaptive_budget import (
    EXTRA_DEPTHS,
    FIRST_PAUSE,
    MAX_PAUSE,
    MAX_PLAIN,
    MIN_ADVANTAGE,
    MIN_SPARE,
    AdaptiveBudget,
    AdaptiveBudgets,
)
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import OUTLIER_FACTOR, SIZES, VerifyCosts
from treeflash.errors import ConfigError
from treeflash.reference.backend import load
from treeflash.testing.comparisons import generate

LENGTH = 100


def chain(*probabilities):
    """A tree whose nodes follow one another, each accepted with that probability."""
    log_probs = np.concatenate([[0.0], np.cumsum(np.log(probabilities))])
    return DraftTree.chain(np.zeros(len(log_probs), np.int32), log_probs)


def fan(nodes, share):
    """The root and children of equal probability."""
    parents = np.zeros(nodes, np.int32)
    parents[0] = -1
    depths = np.minimum(np.arange(nodes), 1).astype(np.int32)
    log_probs = np.where(depths > 0, np.log(share), 0.0)
    return DraftTree(np.zeros(nodes, np.int32), parents, depths, log_probs)


def costs(slope):
    """A forward takes one second, and `slope` more for each node after the first."""
    return VerifyCosts({size: 1 + slope * (size - 1) for size in SIZES})


def path(length):
    return np.arange(length, dtype=np.int32)


def iterate(budget, tree, accepted, draft_s=0.0):
    """One iteration of one sequence; returns the number of nodes that were verified."""
    if not budget.begin():
        seconds = {"verify": budget.costs.seconds[1]}
        budget.observe([DraftTree.root_only(0)], [path(1)], [LENGTH], seconds)
        return 0
    nodes = cut(budget, tree)
    seconds = {"draft": draft_s, "verify": budget.costs.seconds[nodes]}
    budget.observe([tree.subset(np.arange(nodes))], [path(min(accepted, nodes))], [LENGTH], seconds)
    return nodes


def cut(budget, tree):
    """How many nodes of a single sequence's tree pay."""
    (nodes,) = sizes(budget, [tree], [LENGTH])
    return nodes


def sizes(budget, trees, lengths, **options):
    """How many nodes of each tree pay."""
    return [len(nodes) for nodes in budget.prune(trees, lengths, **options)]


@pytest.mark.parametrize(("slope", "nodes"), [(0.0, 64), (0.005, 64), (0.02, 1), (1.0, 1)])
def test_nodes_pay_while_they_bring_more_than_they_cost(slope, nodes):
    assert cut(AdaptiveBudget(costs(slope)), fan(64, 0.01)) == nodes


def test_sure_nodes_are_verified_and_doubtful_ones_are_not():
    tree = chain(*[0.99] * 7, *[0.01] * 40)
    assert cut(AdaptiveBudget(costs(0.05)), tree) == 8


def test_a_staircase_is_climbed_to_its_edges():
    steps = {size: 1.0 if size <= 8 else 2.0 if size <= 32 else 9.0 for size in SIZES}
    assert cut(AdaptiveBudget(VerifyCosts(steps)), fan(64, 1 / 64)) == 8
    assert cut(AdaptiveBudget(VerifyCosts(steps)), fan(64, 1 / 20)) == 32


def test_a_tree_that_ends_between_two_sizes_may_stay_whole():
    assert cut(AdaptiveBudget(costs(0.05)), chain(*[0.99] * 9)) == 10


def test_small_trees_stay_whole():
    assert cut(AdaptiveBudget(costs(0.0)), chain(0.9, 0.9)) == 3
    assert cut(AdaptiveBudget(costs(0.0)), DraftTree.root_only(3)) == 1


def test_what_the_drafter_is_too_sure_of_is_believed_less():
    tree = chain(*[0.9] * 15)
    budget = AdaptiveBudget(costs(0.1))
    before = cut(budget, tree)
    for _ in range(30):
        iterate(budget, tree, accepted=2)
    assert cut(budget, tree) < before


def test_what_it_is_too_unsure_of_is_believed_more():
    tree = chain(*[0.3] * 15)
    budget = AdaptiveBudget(costs(0.02))
    before = cut(budget, tree)
    for _ in range(30):
        iterate(budget, tree, accepted=16)
    assert cut(budget, tree) > before


def test_drafting_pauses_longer_and_longer_if_it_never_pays():
    budget = AdaptiveBudget(costs(0.02))
    verified = [iterate(budget, chain(*[0.5] * 7), accepted=1, draft_s=0.4) for _ in range(2000)]
    pauses = "".join("d" if nodes else "-" for nodes in verified).split("d")
    lengths = [len(pause) for pause in pauses if pause]
    assert lengths[0] == FIRST_PAUSE - 1
    assert lengths == sorted(lengths[:-1]) + lengths[-1:]
    assert max(lengths) == MAX_PAUSE - 1
    # What it costs: the drafts, each 0.4 of a plain iteration and a little more.
    assert sum(nodes > 0 for nodes in verified) < 2000 * 0.03 / 0.5


def test_all_methods_must_pause_for_drafting_to_be_paused():
    budgets = AdaptiveBudgets(costs(1))
    assert not budgets.is_paused(1)
    first, second = AdaptiveBudget(costs(1)), AdaptiveBudget(costs(1))
    budgets.by_method |= {"treeflash": first, "ddtree": second}
    first.throughput_with(1).drafting.pause = 3
    assert not budgets.is_paused(1)
    second.throughput_with(1).drafting.pause = 1
    assert budgets.is_paused(1)
    assert not budgets.is_paused(16)


def test_drafting_comes_back_when_it_pays():
    budget = AdaptiveBudget(costs(0.02))
    for _ in range(100):
        iterate(budget, chain(*[0.5] * 7), accepted=1, draft_s=0.4)
    verified = [iterate(budget, chain(*[0.5] * 7), accepted=5, draft_s=0.4) for _ in range(400)]
    assert all(verified[-100:])
    assert budget.throughput_with(1).drafting.next_pause is None


def observe(budget, tree, length, seconds, **options):
    """One sequence's iteration in which this number of nodes was accepted."""
    budget.observe([tree], [path(length)], [LENGTH], seconds, **options)


def test_nodes_must_pay_at_the_rate_that_drafting_has_reached():
    """A node that brings half a token in 0.2 s pays at one token a second, but not at three."""
    budget, tree = AdaptiveBudget(costs(0.2)), fan(3, 0.5)
    assert cut(budget, tree) == 3
    now = budget.throughput_with(1)
    now.tokens, now.seconds = 30.0, 10.0
    assert cut(budget, tree) == 1
    now.tokens, now.seconds = 1.0, 10.0  # plain decoding is always possible
    assert cut(budget, fan(3, 0.15)) == 1


def test_the_first_drafted_iteration_says_nothing_about_the_rate():
    budget = AdaptiveBudget(costs(0.1))
    seconds = {"draft": 5.0, "verify": 1.1}
    observe(budget, chain(0.5), 2, seconds, first=True)
    now = budget.throughput_with(1)
    assert (now.tokens, now.seconds, now.drafting.balance) == (0, 0, 0)
    assert budget.accepted == {1: 1.0}
    observe(budget, chain(0.5), 2, seconds)
    assert (now.tokens, now.seconds) == (2, pytest.approx(6.1))


def test_an_outlier_counts_as_the_longest_plausible_forward_pass():
    budget = AdaptiveBudget(costs(0.1))
    observe(budget, chain(0.5), 2, {"draft": 0.5, "verify": 1000.0})
    assert budget.throughput_with(1).seconds == pytest.approx(0.5 + OUTLIER_FACTOR * 1.1)


def test_probabilities_of_children_are_those_after_their_parent():
    budget = AdaptiveBudget(costs(0.1))
    observe(budget, chain(0.5, 0.5, 0.25), 3, {"draft": 0.0, "verify": 1.0})
    assert budget.expected == {1: pytest.approx(0.5), 2: pytest.approx(0.5), 3: pytest.approx(0.25)}
    assert budget.accepted == {1: 1, 2: 1, 3: 0}


def confident(*confidences):
    """A chain of even chances whose rows the drafter is so confident of."""
    tree = chain(*[0.5] * len(confidences))
    return replace(tree, confidences=np.array([1, *confidences], np.float32))


def learned(low, high):
    """A budget after drafts of low and of high confidence, with the numbers of accepted nodes."""
    budget = AdaptiveBudget(VerifyCosts({size: 0.5 + 0.25 * size for size in SIZES}))
    for _ in range(30):
        for confidence, length in ((0.1, low), (0.99, high)):
            observe(budget, confident(confidence), length, {"draft": 0.0, "verify": 1.0})
    return budget


def test_confidence_is_not_believed_before_it_was_observed():
    budget = learned(1, 1)
    budget.expected.clear()
    budget.accepted.clear()
    first, second = (sizes(budget, [confident(x), confident(1 - x)], [LENGTH] * 2) for x in (0, 1))
    assert first == second


@pytest.mark.parametrize(("low", "high"), [(1, 2), (2, 1)])
def test_levels_of_confidence_count_as_often_as_their_drafts_were_accepted(low, high):
    """It does not matter whether the drafter is right to be more confident."""
    trees = [confident(0.1), confident(0.99)]
    assert sizes(learned(low, high), trees, [LENGTH] * 2) == [low, high]


def test_levels_of_confidence_multiply_along_a_path():
    budget = learned(1, 2)
    sure, doubtful, mixed = (
        budget._corrections(confident(*row)) for row in ((0.99, 0.99), (0.1, 0.99), (0.99, 0.1))
    )
    assert sure[1] == mixed[1] > doubtful[1]
    # Nothing is known of depth 2.
    assert sure[2] == sure[1]
    assert doubtful[2] == doubtful[1]


def test_a_level_of_confidence_that_was_not_seen_counts_as_its_depth():
    budget = AdaptiveBudget(costs(0.1), expected={1: 10.0}, accepted={1: 5.0})
    by_depth = budget._corrections(chain(0.5))[1]
    assert by_depth < 0.7
    assert budget._corrections(confident(0.99))[1] == pytest.approx(by_depth)


def test_rates_are_of_the_latest_iterations():
    budget = AdaptiveBudget(costs(0.0))
    for tokens in (3, 1):
        for _ in range(80):
            seconds = {"draft": 0.0, "verify": 1.0}
            budget.observe([chain(0.9, 0.9)], [path(tokens)], [LENGTH], seconds)
        now = budget.throughput_with(1)
        assert now.tokens / now.seconds == pytest.approx(tokens, rel=0.01)
        assert now.drafted_tokens / now.drafted_seconds == pytest.approx(tokens, rel=0.01)


def test_the_trees_of_several_texts_are_cut_together():
    """Nodes are ranked whichever tree they are of, and cut where the next costs too much."""
    budget = AdaptiveBudget(VerifyCosts({size: 0.5 + 0.25 * size for size in SIZES}))
    trees = [chain(0.99, 0.99, 0.99, 0.01), chain(0.02, 0.9), fan(4, 0.05)]
    assert sizes(budget, trees, [LENGTH] * 3) == [4, 1, 1]


def test_no_root_is_cut():
    budget = AdaptiveBudget(costs(10.0))
    assert sizes(budget, [chain(0.99, 0.99), fan(5, 0.2)], [LENGTH, 3]) == [1, 1]


def test_no_node_is_kept_without_its_parent():
    """The correction makes the node likelier than its parent."""
    budget = AdaptiveBudget(VerifyCosts({1: 1.0, 2: 1.01, 3: 9.0}))
    budget.expected, budget.accepted = {1: 50.0, 2: 0.5}, {1: 5.0, 2: 50.0}
    (nodes,) = budget.prune([chain(0.5, 0.9)], [LENGTH])
    assert nodes.tolist() == [0, 1]


def test_corrections_choose_the_nodes_of_a_tree():
    """A node two deep that the drafter ranks last, and that experience ranks above its siblings."""
    parents = np.array([-1, 0, 0, 0, 1], np.int32)
    shares = np.array([1, 0.4, 0.2, 0.1, 0.05])
    tree = DraftTree.from_parents(np.arange(5, dtype=np.int32), parents)
    tree = replace(tree, log_probs=np.log(shares))
    budget = AdaptiveBudget(VerifyCosts({1: 1.0, 2: 1.01, 3: 1.02, 4: 9.0}))
    (nodes,) = budget.prune([tree], [LENGTH])
    assert nodes.tolist() == [0, 1, 2]
    budget.expected, budget.accepted = {2: 0.5}, {2: 50.0}
    (nodes,) = budget.prune([tree], [LENGTH])
    assert nodes.tolist() == [0, 1, 4]


def test_nodes_of_long_texts_cost_more():
    budget = AdaptiveBudget(
        VerifyCosts({size: 1 + 0.01 * size for size in SIZES}, position_s={1: 1e-4})
    )
    assert sizes(budget, [chain(0.3), chain(0.3)], [10, 10_000]) == [2, 1]


def test_other_rows_of_the_pass_move_the_cut_to_where_rows_cost_more():
    steps = VerifyCosts({size: 1.0 if size <= 32 else 1.0 + 0.2 * (size - 32) for size in SIZES})
    assert sizes(AdaptiveBudget(steps), [fan(16, 0.05)], [LENGTH]) == [16]
    assert sizes(AdaptiveBudget(steps), [fan(16, 0.05)], [LENGTH], other_rows=40) == [1]


def test_what_was_learned_with_few_texts_does_not_bind_many():
    budget = AdaptiveBudget(costs(0.02))
    for _ in range(100):
        iterate(budget, chain(*[0.5] * 7), accepted=1, draft_s=0.4)
    assert budget.throughput_with(1).drafting.next_pause > FIRST_PAUSE
    assert [budget.begin(8) for _ in range(4)] == [False, False, True, True]
    assert (
        budget.throughput_with(8).drafting.next_pause
        is budget.throughput_with(5).drafting.next_pause
        is None
    )


def test_several_texts_draft_only_while_that_beats_a_measured_plain_iteration():
    """The costs of single trees would say 1.0 s, and that drafting pays."""
    for plain_s, pays in ((0.4, False), (1.2, True)):
        budget = AdaptiveBudget(VerifyCosts({1: 1.0, 4: 1.0, 8: 1.0}))
        trees, lengths = [chain(0.5)] * 4, [LENGTH] * 4
        drafted = 0
        for _ in range(60):
            drafts = budget.begin(4)
            drafted += drafts
            kept, accepted = (trees, path(1)) if drafts else ([chain()] * 4, path(0))
            seconds = {"draft": 0.1, "verify": 0.9} if drafts else {"verify": plain_s}
            budget.observe(kept, [accepted] * 4, lengths, seconds)
        assert (drafted == 58) == pays


def test_one_slow_plain_iteration_does_not_make_drafts_pay():
    """As the first one after the prompts of several sequences is."""
    budget = AdaptiveBudget(VerifyCosts({1: 1.0, 4: 1.0, 8: 1.0}))
    drafted = 0
    for i in range(60):
        drafts = budget.begin(4)
        drafted += drafts
        kept, accepted = ([chain(0.5)] * 4, path(1)) if drafts else ([chain()] * 4, path(0))
        seconds = {"draft": 0.1, "verify": 0.9} if drafts else {"verify": 0.4 if i else 2.0}
        budget.observe(kept, [accepted] * 4, [LENGTH] * 4, seconds)
    assert drafted < 30


def drafted(budget, trees, accepted, draft_s=0.0):
    """An iteration of several sequences; verification takes what the costs say."""
    lengths = [LENGTH] * len(trees)
    rows = sum(map(len, trees))
    verify_s = float(budget.costs.predict([rows], [LENGTH * rows], len(trees))[0])
    seconds = {"draft": draft_s, "verify": verify_s}
    budget.observe(trees, [path(accepted)] * len(trees), lengths, seconds)


def test_depths_are_drafted_a_little_beyond_what_trees_reached_lately():
    budget = AdaptiveBudget(costs(0.1))
    assert budget.depths_to_draft() is None  # all, as long as nothing was seen
    drafted(budget, [chain(0.5, 0.5, 0.5)], 1)
    assert budget.depths_to_draft() == 3 + EXTRA_DEPTHS
    wanted = []
    for _ in range(12):
        drafted(budget, [chain(0.5)], 1)
        wanted.append(budget.depths_to_draft() - EXTRA_DEPTHS)
    assert wanted == [3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1]  # slowly, because trees vary
    drafted(budget, [chain(0.5), chain(0.5, 0.5)], 1)
    assert budget.depths_to_draft(2) == 2 + EXTRA_DEPTHS  # of the deepest tree
    assert budget.depths_to_draft() == 1 + EXTRA_DEPTHS


def test_trees_are_built_with_more_nodes_than_they_are_expected_to_keep():
    budget = AdaptiveBudget(costs(0.1))
    assert budget.nodes_to_build(2) == budget.expected_nodes(2) == budget.largest // 2
    drafted(budget, [chain(0.5), chain(*[0.5] * 3)], 1)  # three nodes each, on average
    assert budget.expected_nodes(2) == 3
    assert budget.nodes_to_build(2) == 2 * 3 + MIN_SPARE
    assert budget.nodes_to_build(100) == 32  # or what a small tree needs before it is pruned


def test_the_balance_of_several_sequences_is_in_units_of_its_noise():
    """Each brings one token more than plain decoding, in the time of a plain iteration."""
    alone, together = AdaptiveBudget(costs(0.0)), AdaptiveBudget(costs(0.0))
    drafted(alone, [chain(0.5)], 2)
    drafted(together, [chain(0.5)] * 4, 2)
    assert alone.throughput_with(1).drafting.balance == pytest.approx(1)
    assert together.throughput_with(4).drafting.balance == pytest.approx(
        (8 - 4 * MIN_ADVANTAGE) / 2
    )


def test_equally_fast_drafts_pay_for_one_sequence_alone():
    """In a batch they would make the drafter read all prompts for nothing."""
    for sequences, pays in ((1, True), (4, False)):
        budget = AdaptiveBudget(costs(0.0))
        for _ in range(400):
            drafted(budget, [chain(0.5)] * sequences, 2, draft_s=1.0)
        assert (budget.throughput_with(sequences).drafting.next_pause is None) == pays


@pytest.mark.parametrize("sequences", [4, 16, 32])
def test_a_batch_tries_drafts_that_do_not_pay_as_rarely_as_they_cost(sequences):
    """Ten groups of sequences, each with 63 new tokens; a group's first draft reads its prompts."""
    tried = {}
    for draft_s in (0.5, 3.0):
        budget, tried[draft_s] = AdaptiveBudget(costs(0.0)), 0
        for _ in range(10):
            first = True
            for _ in range(63):
                drafts = budget.begin(sequences)
                trees = [chain(0.5) if drafts else chain()] * sequences
                seconds = {"verify": 1.0} | ({"draft": draft_s + 5 * first} if drafts else {})
                paths, lengths = [path(1)] * sequences, [LENGTH] * sequences
                budget.observe(trees, paths, lengths, seconds, first=first and drafts)
                first, tried[draft_s] = first and not drafts, tried[draft_s] + drafts
    # Without anything accepted, an iteration costs a draft. What is lost is at most 3 %.
    assert tried[0.5] * 0.5 < 0.03 * 630
    assert tried[3.0] * 3.0 < 0.03 * 630


def test_copies_that_fail_are_given_up_in_pauses_of_the_drafter_too():
    """They have a balance beyond plain decoding, and pause; good ones go on."""
    for accepted, pays in ((1, False), (4, True)):
        budget = AdaptiveBudget(costs(0.1))
        budget.throughput_with(4).drafting.pause = 100
        copies = 0
        for _ in range(30):
            assert not budget.begin(4)
            copies += budget.copies_alone(4)
            trees = [chain(0.9, 0.9, 0.9)] * 4 if budget.copies_alone(4) else [chain()] * 4
            paths = [path(min(accepted, len(tree))) for tree in trees]
            rows = sum(map(len, trees))
            seconds = {"verify": float(budget.costs.predict([rows], [0.0], 4)[0])}
            budget.observe(trees, paths, [LENGTH] * 4, seconds)
        assert (copies == 30) == pays
        assert copies > 0


def test_plain_iterations_of_long_ago_are_forgotten():
    """Sequences grow, and machines change their speed."""
    budget = AdaptiveBudget(costs(0.0))
    roots = [DraftTree.root_only(0)] * 2
    for seconds in (0.5, *[1.0] * MAX_PLAIN):
        budget.observe(roots, [path(1)] * 2, [LENGTH] * 2, {"verify": seconds})
    drafted(budget, [chain(0.5)] * 2, 2, draft_s=0.5)
    # Two tokens each in 1.5 s; plain decoding brings one each in 1.0 s, and once did in 0.5 s.
    assert budget.throughput_with(2).drafting.balance > 0


@pytest.fixture
def backend(tiny_pair):
    return load(*tiny_pair, LoadConfig())


def test_a_text_without_a_shared_budget_measures_its_own_costs(backend):
    prompt = [5, 6, 7]
    steps = [
        generate(backend, prompt, DecodeConfig(budget=budget, max_tokens=12))
        for budget in (16, "auto")
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("budget", [0, -1, "all", 2.5])
def test_other_budgets_are_refused(budget):
    with pytest.raises(ConfigError, match="budget must be auto, or from 1 to 1024"):
        DecodeConfig(budget=budget)
