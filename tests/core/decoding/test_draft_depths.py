"""How many depths a head drafts that runs depth by depth."""

import numpy as np
import pytest
from fake_models import PROMPT, SCRIPT, config_of, scripted
from recordings import recording

from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.testing.comparisons import steps_of, tokens_of

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
@pytest.mark.parametrize("depths", [1, 2, 9])
def test_a_setting_limits_the_depths(method, depths):
    backend = scripted(SCRIPT)
    room = len(SCRIPT) - len(PROMPT)
    settings = {"method": method, "budget": 16, "suffix": False, "max_tokens": room}
    with recording(backend.drafter, "draft") as drafts:
        steps = steps_of(backend, PROMPT, config_of(**settings, draft_depths=depths))
    assert tokens_of(steps) == SCRIPT[len(PROMPT) :]
    trees = [step.tree for step in steps[1:-1] if step.tree is not None]
    assert max(int(tree.depths.max()) for tree in trees) == min(depths, 5)
    assert {most for _, most in drafts} == {min(depths, 5)}
