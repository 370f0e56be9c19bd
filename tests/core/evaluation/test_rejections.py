"""Rejection reasons, on tables made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.decoding.loop import Step
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.evaluation.rejections import rejection_reason

ROOT = 9
# Depth 1 offers 1, 2 and 3; after 1 come 4 and 5, after 2 come 6 and 4; depth 3 knows 4 alone.
TABLE = TransitionTable.from_candidates(
    np.array([[1, 2], [4, 7]], np.int32),
    np.array(
        [[[1, 2, 3], [0, 0, 0]], [[4, 5, 0], [6, 4, 0]], [[7, 8, 0], [1, 2, 0]]],
        np.int32,
    ),
    np.log([[[0.5, 0.3, 0.2]] * 2, [[0.6, 0.4, 1e-9]] * 2, [[0.6, 0.4, 1e-9]] * 2]).astype(
        np.float32
    ),
)
ABSENT = np.where(TABLE.tokens == 0, -np.inf, TABLE.log_probs).astype(np.float32)
TABLE = TransitionTable(TABLE.tokens, ABSENT, TABLE.next_row)


def step(*tokens: int, accepted: int | None = None, table=TABLE, finish_reason=None) -> Step:
    """An iteration that accepted all tokens but the last, unless it accepted more."""
    drafted = np.array([ROOT, *tokens], np.int32)
    tree = DraftTree.chain(drafted, np.zeros(len(drafted)))
    path = np.arange(len(tokens) if accepted is None else accepted + 1, dtype=np.int32)
    return Step(tokens, {}, tree, path, finish_reason, table)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ((8,), "child"),  # not among the three of depth 1
        ((3,), "budget_limit"),
        ((3, 1), "candidate"),  # no row of depth 2 follows 3
        ((1, 6), "child"),  # 6 follows 2, not 1
        ((2, 6), "budget_limit"),
        ((1, 0), "child"),  # 0 fills the row, but is impossible
        ((1, 5, 7), "candidate"),
        ((2, 4, 8), "budget_limit"),  # 4 is found after 2 too
        ((2, 4, 3), "child"),
        ((1, 4, 7, 1), "block"),
    ],
)
def test_reasons(tokens, reason):
    assert rejection_reason(step(*tokens)) == reason


def test_marginals_have_every_parent():
    tokens = np.array([[1, 2], [3, 4]], np.int32)
    table = TransitionTable.from_marginals(tokens, np.log(np.full((2, 2), 0.5, np.float32)))
    assert rejection_reason(step(2, 4, table=table)) == "budget_limit"
    assert rejection_reason(step(2, 5, table=table)) == "child"
    assert rejection_reason(step(2, 4, 1, table=table)) == "block"


def test_nothing_is_rejected_if_nothing_was_drafted():
    assert rejection_reason(Step((1,), {})) is None
    assert rejection_reason(step(1, table=None)) is None


def test_nothing_is_rejected_if_the_text_ended_before():
    assert rejection_reason(step(1, 4, accepted=2)) is None


def test_nothing_is_rejected_if_the_limit_kept_the_tree_from_going_deeper():
    cut = TABLE.until(2)
    assert rejection_reason(step(1, 4, 7, table=cut, finish_reason="length")) is None
    assert rejection_reason(step(1, 5, table=cut, finish_reason="length")) == "budget_limit"
