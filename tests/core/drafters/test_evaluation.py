"""The evaluation in a drafter's folder, which may hold anything."""

from __future__ import annotations

import json

import pytest

from treeflash.drafters.evaluation import EVALUATION, DrafterEvaluation, read_evaluation
from treeflash.hub.models import resolve_drafter

RECORD = {"max_length": 512, "top1_marginal": [0.5, 0.25], "kl_marginal": [1.5, 2.0]}


def test_with_a_head_its_shares_count(tmp_path):
    for record, by_depth in (
        (RECORD, (0.5, 0.25)),
        ({**RECORD, "top1_corrected": [0.75, 0.5]}, (0.75, 0.5)),
    ):
        (tmp_path / EVALUATION).write_text(json.dumps(record))
        expected = DrafterEvaluation(by_depth=by_depth, max_length=512)
        assert read_evaluation(tmp_path) == expected


def test_the_bundled_drafter_has_one():
    evaluation = read_evaluation(resolve_drafter(None, None))
    assert evaluation is not None
    assert evaluation.by_depth[0] == 0.730


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"\xff",
        b"[]",
        b"7",
        b'{"accuracy": 0.9}',
        b'{"max_length": 512, "top1_marginal": []}',
        b'{"max_length": 512, "top1_marginal": 0.5}',
        b'{"max_length": 512, "top1_marginal": ["a"]}',
        b'{"max_length": 512, "top1_marginal": [NaN]}',
        b'{"max_length": 512, "top1_marginal": [73]}',
        b'{"max_length": null, "top1_marginal": [0.5]}',
        b'{"max_length": Infinity, "top1_marginal": [0.5]}',
        b"[" * 100_000,
    ],
)
def test_another_file_of_this_name_is_none(tmp_path, contents):
    assert read_evaluation(tmp_path) is None
    (tmp_path / EVALUATION).write_bytes(contents)
    assert read_evaluation(tmp_path) is None
