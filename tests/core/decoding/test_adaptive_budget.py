"""The budget `auto`: the size that pays, drafting that rests, and what is learned."""

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import decode
from treeflash.decoding.adaptive_budget import FIRST_REST, LONGEST_REST, AdaptiveBudget
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import OUTLIER_FACTOR, SIZES, VerifyCosts
from treeflash.errors import ConfigError
from treeflash.reference.backend import load


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
    """A forward takes one second, and `slope` more for each further node."""
    return VerifyCosts({size: 1 + slope * (size - 1) for size in SIZES})


def path(length):
    return np.arange(length, dtype=np.int32)


def iterate(budget, tree, accepted, draft_s=0.0):
    """One iteration of the loop; returns the number of nodes that were verified."""
    if not budget.begin():
        budget.observe(DraftTree.root_only(0), path(1), {"verify": budget.costs.seconds[1]})
        return 0
    cut = budget.cut(tree)
    seconds = {"draft": draft_s, "verify": budget.costs.seconds[len(cut)]}
    budget.observe(cut, path(min(accepted, len(cut))), seconds)
    return len(cut)


@pytest.mark.parametrize(("slope", "nodes"), [(0.0, 64), (0.005, 64), (0.02, 1), (1.0, 1)])
def test_nodes_pay_while_they_bring_more_than_they_cost(slope, nodes):
    assert len(AdaptiveBudget(costs(slope)).cut(fan(64, 0.01))) == nodes


def test_sure_nodes_are_verified_and_doubtful_ones_are_not():
    tree = chain(*[0.99] * 7, *[0.01] * 40)
    assert len(AdaptiveBudget(costs(0.05)).cut(tree)) == 8


def test_a_staircase_is_climbed_to_its_edges():
    steps = {size: 1.0 if size <= 8 else 2.0 if size <= 32 else 9.0 for size in SIZES}
    assert len(AdaptiveBudget(VerifyCosts(steps)).cut(fan(64, 1 / 64))) == 8
    assert len(AdaptiveBudget(VerifyCosts(steps)).cut(fan(64, 1 / 20))) == 32


def test_a_tree_that_ends_between_two_sizes_may_stay_whole():
    assert len(AdaptiveBudget(costs(0.05)).cut(chain(*[0.99] * 9))) == 10


def test_small_trees_stay_whole():
    assert len(AdaptiveBudget(costs(0.0)).cut(chain(0.9, 0.9))) == 3
    assert len(AdaptiveBudget(costs(0.0)).cut(DraftTree.root_only(3))) == 1


def test_what_the_drafter_is_too_sure_of_is_believed_less():
    tree = chain(*[0.9] * 15)
    budget = AdaptiveBudget(costs(0.1))
    before = len(budget.cut(tree))
    for _ in range(30):
        iterate(budget, tree, accepted=2)
    assert len(budget.cut(tree)) < before


def test_what_it_is_too_unsure_of_is_believed_more():
    tree = chain(*[0.3] * 15)
    budget = AdaptiveBudget(costs(0.02))
    before = len(budget.cut(tree))
    for _ in range(30):
        iterate(budget, tree, accepted=16)
    assert len(budget.cut(tree)) > before


def test_drafting_rests_longer_and_longer_where_it_never_pays():
    budget = AdaptiveBudget(costs(0.02))
    verified = [iterate(budget, chain(*[0.5] * 7), accepted=1, draft_s=0.4) for _ in range(2000)]
    rests = "".join("d" if nodes else "-" for nodes in verified).split("d")
    lengths = [len(rest) for rest in rests if rest]
    assert lengths[0] == FIRST_REST - 1
    assert lengths == sorted(lengths[:-1]) + lengths[-1:]
    assert max(lengths) == LONGEST_REST - 1
    # What it costs: the drafts, each 0.4 of a plain iteration and a little more.
    assert sum(nodes > 0 for nodes in verified) < 2000 * 0.03 / 0.5


def test_drafting_comes_back_when_it_pays():
    budget = AdaptiveBudget(costs(0.02))
    for _ in range(100):
        iterate(budget, chain(*[0.5] * 7), accepted=1, draft_s=0.4)
    verified = [iterate(budget, chain(*[0.5] * 7), accepted=5, draft_s=0.4) for _ in range(400)]
    assert all(verified[-100:])
    assert budget.next_rest == FIRST_REST


def test_nodes_must_pay_at_the_rate_that_drafting_has_reached():
    """A node that brings half a token in 0.2 s pays at one token a second, but not at three."""
    budget, tree = AdaptiveBudget(costs(0.2)), fan(3, 0.5)
    assert len(budget.cut(tree)) == 3
    budget.tokens, budget.seconds = 30.0, 10.0
    assert len(budget.cut(tree)) == 1
    budget.tokens, budget.seconds = 1.0, 10.0  # plain decoding is always possible
    assert len(budget.cut(fan(3, 0.15))) == 1


def test_the_first_drafted_iteration_says_nothing_about_the_rate():
    budget = AdaptiveBudget(costs(0.1))
    seconds = {"draft": 5.0, "verify": 1.1}
    budget.observe(chain(0.5), path(2), seconds, first=True)
    assert (budget.tokens, budget.seconds, budget.balance) == (0, 0, 0)
    assert budget.accepted == {1: 1.0}
    budget.observe(chain(0.5), path(2), seconds)
    assert (budget.tokens, budget.seconds) == (2, pytest.approx(6.1))


def test_an_outlier_counts_as_the_longest_plausible_forward_pass():
    budget = AdaptiveBudget(costs(0.1))
    budget.observe(chain(0.5), path(2), {"draft": 0.5, "verify": 1000.0})
    assert budget.seconds == pytest.approx(0.5 + OUTLIER_FACTOR * 1.1)


def test_probabilities_of_children_are_those_after_their_parent():
    budget = AdaptiveBudget(costs(0.1))
    budget.observe(chain(0.5, 0.5, 0.25), path(3), {"draft": 0.0, "verify": 1.0})
    assert budget.expected == {1: pytest.approx(0.5), 2: pytest.approx(0.5), 3: pytest.approx(0.25)}
    assert budget.accepted == {1: 1, 2: 1, 3: 0}


@pytest.fixture
def backend(tiny_pair):
    return load(*tiny_pair, LoadConfig())


def test_a_text_without_a_shared_budget_measures_its_own_costs(backend):
    prompt = [5, 6, 7]
    steps = [
        [
            t
            for s in decode(backend, prompt, DecodeConfig(budget=budget, max_tokens=12))
            for t in s.tokens
        ]
        for budget in (16, "auto")
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("budget", [0, -1, "all", 2.5])
def test_other_budgets_are_refused(budget):
    with pytest.raises(ConfigError, match="budget must be auto, or from 1 to 1024"):
        DecodeConfig(budget=budget)
