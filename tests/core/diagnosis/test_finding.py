"""Trials of other settings, and the findings that follow from them."""

from __future__ import annotations

import pytest

from treeflash.diagnosis.finding import Trial, judge
from treeflash.diagnosis.scores import Gain


def trial(nats, least=0.1, error=0.0):
    gains = {"changed": None if nats is None else Gain(nats, error)}
    return Trial(check="it", gains=gains, least=least, advice="change it")


@pytest.mark.parametrize(
    ("trials", "ok"),
    [
        ([trial(0.2), trial(0.05), trial(None)], [False, True, True]),
        ([trial(0.2), trial(0.4), trial(0.5)], [True, False, False]),  # by accident, the first
        ([trial(0.2), trial(0.5, least=0.6)], [False, True]),
    ],
)
def test_judging(trials, ok):
    assert [finding.ok for finding in judge(trials)] == ok


def test_messages_of_trials():
    trials = [trial(0.2), trial(0.05), trial(1.58, error=0.6), trial(-0.1, error=0.1), trial(None)]
    assert [judge([each])[0].message for each in trials] == [
        "changed: the target's tokens are 1.22x as probable; change it",
        "no significant improvement (best alternative: changed, 1.05x)",
        "no significant improvement (best alternative: changed, 4.85x, within noise)",
        "no significant improvement (best alternative: changed, 0.90x)",
        "no alternative to try",
    ]
