"""Figures of a generation, from steps made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.decoding.loop import Step
from treeflash.decoding.tree import DraftTree
from treeflash.text.generation import PHASES, Stats, mean

PREFILL = Step((3,), {"prefill": 2.0})


def iteration(tokens: int, finish_reason: str | None = None) -> Step:
    return Step(
        tuple(range(tokens)),
        {"draft": 0.1, "tree": 0.2, "verify": 0.3, "commit": 0.4},
        DraftTree.root_only(1),
        np.zeros(1, np.int32),
        finish_reason,
    )


def stats_of(*lengths: int) -> Stats:
    stats = Stats()
    stats.add(PREFILL)
    for length in lengths:
        stats.add(iteration(length))
    return stats


def test_figures() -> None:
    stats = stats_of(3, 1, 4, 3)
    assert stats.tokens == 12
    assert stats.accepted_lengths == [3, 1, 4, 3]
    assert stats.block_efficiency == 11 / 4
    assert stats.prefill_s == 2
    assert stats.decode_s == pytest.approx(4)
    assert stats.tokens_per_s == pytest.approx(11 / 4)
    assert stats.histogram == {1: 1, 3: 2, 4: 1}
    assert list(stats.histogram) == [1, 3, 4]
    assert stats.seconds == pytest.approx(
        {"prefill": 2, "draft": 0.4, "tree": 0.8, "verify": 1.2, "commit": 1.6}
    )


def test_nothing_counted_yet() -> None:
    stats = Stats()
    assert stats.tokens == 0
    assert stats.block_efficiency == 0
    assert stats.tokens_per_s == 0
    assert stats.histogram == {}
    assert stats.seconds == dict.fromkeys(PHASES, 0.0)


def test_prefill_alone_is_no_iteration() -> None:
    stats = stats_of()
    assert stats.tokens == 1
    assert stats.accepted_lengths == []
    assert stats.block_efficiency == 0
    assert stats.tokens_per_s == 0


def test_plain_decoding_has_efficiency_one() -> None:
    assert stats_of(1, 1, 1).block_efficiency == 1


def test_two_generations_share_nothing() -> None:
    first = stats_of(2)
    assert Stats().accepted_lengths == []
    assert first.accepted_lengths == [2]


@pytest.mark.parametrize(
    ("kept", "lengths"),
    [
        (8, [3, 1, 3]),  # nothing is cut
        (7, [3, 1, 2]),
        (6, [3, 1, 1]),
        (5, [3, 1]),  # an iteration of which nothing is left is none
        (4, [3]),
        (2, [1]),
        (1, []),
        (0, []),  # the prefill's token too
    ],
)
def test_cut(kept: int, lengths: list[int]) -> None:
    stats = stats_of(3, 1, 3)
    stats.truncate(kept)
    assert stats.tokens == kept
    assert stats.accepted_lengths == lengths
    assert stats.decode_s == pytest.approx(3)  # the time was spent all the same


def test_mean() -> None:
    assert mean([1, 2, 6]) == 3
    assert mean(iter([0.5])) == 0.5
    assert mean([]) == 0
