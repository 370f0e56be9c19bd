"""How many depths a head drafts that runs depth by depth."""

import numpy as np
import pytest
from fake_models import PROMPT, SCRIPT, config_of, scripted
from recordings import recording

from treeflash.decoding.adaptive_budget import DraftDepths
from treeflash.decoding.tree import DraftTree
from treeflash.testing.comparisons import steps_of, tokens_of

CHAIN = DraftTree.chain(np.arange(9, dtype=np.int32))


def observed(accepted: int, depth_s: float, sequences: int = 1) -> DraftDepths:
    """After many iterations of chains of 8 drafts, of which some are accepted."""
    depths = DraftDepths()
    for _ in range(100):
        depths.choose(8, 0.0)
        path = np.arange(accepted + 1, dtype=np.int32)
        depths.observe([CHAIN] * sequences, [path] * sequences, 8 * depth_s)
    return depths


@pytest.mark.parametrize("accepted", [1, 3, 7])
def test_depths_that_are_accepted_are_drafted(accepted: int) -> None:
    assert observed(accepted, 0.01).choose(8, rate=30.0) == accepted


def test_expensive_depths_are_not_drafted() -> None:
    assert observed(7, 0.1).choose(8, rate=30.0) == 1


def test_free_depths_are_all_drafted() -> None:
    assert observed(7, 1e-9).choose(8, rate=30.0) == 8
    assert DraftDepths().choose(5, rate=30.0) == 5


def test_sequences_share_the_price() -> None:
    assert observed(4, 0.03, sequences=4).choose(8, rate=100.0, sequences=4) == 4
    assert observed(4, 0.03).choose(8, rate=100.0) == 1


def test_depths_are_tried_again() -> None:
    depths = observed(1, 0.01)
    short = DraftTree.chain(np.arange(2, dtype=np.int32))
    tried = []
    for _ in range(100):
        tried.append(depths.choose(8, rate=30.0))
        depths.observe([short], [np.arange(2, dtype=np.int32)], None)
    assert tried[0] == 1
    assert max(tried) > 1


def test_one_slow_draft_changes_little() -> None:
    depths = observed(4, 0.01)
    assert depths.seconds_per_depth is not None
    before = depths.seconds_per_depth
    depths.choose(8, 0.0)
    depths.observe([CHAIN], [np.arange(3, dtype=np.int32)], 100.0)
    assert depths.seconds_per_depth < 1.1 * before


@pytest.mark.parametrize("method", ["ddtree", "dflash"])
@pytest.mark.parametrize("depths", [1, 2, 9])
def test_a_setting_limits_the_depths(method: str, depths: int) -> None:
    backend = scripted(SCRIPT)
    room = len(SCRIPT) - len(PROMPT)
    settings = {"method": method, "budget": 16, "suffix": False, "max_tokens": room}
    with recording(backend.drafter, "draft") as drafts:
        steps = steps_of(backend, PROMPT, config_of(**settings, draft_depths=depths))
    assert tokens_of(steps) == SCRIPT[len(PROMPT) :]
    trees = [step.tree for step in steps[1:-1] if step.tree is not None]
    assert max(int(tree.depths.max()) for tree in trees) == min(depths, 5)
    assert {most for _, most in drafts} == {min(depths, 5)}
