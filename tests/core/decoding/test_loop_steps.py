"""The decode loop: its steps, trees, paths and budgets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from fake_models import DRAFTING, PROMPT, SCRIPT, FakeHead, config_of, run, scripted

from treeflash.config import METHODS
from treeflash.decoding import Request, decode
from treeflash.decoding.adaptive_budget import AdaptiveBudget, AdaptiveBudgets
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import VerifyCosts


class TestSteps:
    @pytest.mark.parametrize("method", DRAFTING)
    def test_a_perfect_draft_is_accepted_whole(self, method):
        steps = run(scripted(SCRIPT), method=method, max_tokens=14)
        assert [step.tokens for step in steps] == [
            (14,),
            (15, 16, 17, 18, 19, 20),
            (21, 22, 23, 24, 25, 26),
            (27,),
        ]
        assert [step.finish_reason for step in steps] == [None, None, None, "length"]

    def test_plain_decoding_commits_one_token_a_step(self):
        steps = run(scripted(SCRIPT), method="ar", max_tokens=4)
        assert [step.tokens for step in steps] == [(14,), (15,), (16,), (17,)]
        assert steps[0].tree is None
        for step in steps[1:]:
            assert step.tree is not None
            assert len(step.tree) == 1
            assert step.path.tolist() == [0]
            assert list(step.seconds) == ["verify", "commit"]

    def test_the_first_step_is_the_prefill(self):
        first, *rest = run(scripted(SCRIPT), max_tokens=9)
        assert first.tokens == (14,)
        assert first.tree is None
        assert first.path is None
        assert list(first.seconds) == ["prefill"]
        for step in rest:
            assert list(step.seconds) == ["draft", "tree", "verify", "commit"]
            assert min(step.seconds.values()) >= 0

    def test_printed_steps_are_one_line(self):
        first, second = map(repr, run(scripted(SCRIPT), max_tokens=7))
        cached = "cached_tokens=0, disk_tokens=0"
        assert first == f"Step(tokens=(14,), tree=None, finish_reason=None, {cached})"
        assert second == (
            "Step(tokens=(15, 16, 17, 18, 19, 20), tree=DraftTree(nodes=6, depth=5), "
            f"finish_reason='length', {cached})"
        )

    def test_trees_and_paths(self):
        """Two depths right: the path has the root and two nodes, and the bonus comes on top."""
        steps = run(scripted(SCRIPT, right=2), budget=6, max_tokens=7)
        assert [step.tokens for step in steps] == [(14,), (15, 16, 17), (18, 19, 20)]
        tree, path = steps[1].tree, steps[1].path
        assert tree.tokens.tolist() == [14, 15, 16, 97, 97, 97]
        assert tree.is_chain
        assert path.tolist() == [0, 1, 2]
        assert steps[2].tree.tokens[0] == 17  # the bonus token is the next root

    def test_a_second_child_is_found(self):
        script = [*SCRIPT[:5], 98, *SCRIPT[6:]]
        backend = scripted(script, right=0)
        (_, step, *_) = run(backend, budget=64, max_tokens=3)
        assert step.tokens[0] == 98
        assert len(step.path) == 2
        assert step.tree.tokens[step.path].tolist() == [14, 98]

    def test_chains_have_no_branches(self):
        for method in ("dflash", "treeflash-chain"):
            steps = run(scripted(SCRIPT, right=2), method=method, budget=64)[1:]
            assert all(step.tree.is_chain for step in steps)
            assert {len(step.tree) for step in steps[:-1]} == {6}

    @pytest.mark.parametrize("method", DRAFTING)
    def test_a_step_has_the_table_of_its_tree(self, method):
        prefill, *steps = run(scripted(SCRIPT, right=2), method=method, budget=64)
        assert prefill.table is None
        for step in steps:
            assert step.tree.tokens[1] == step.table.tokens[0, 0, 0]
        assert all(step.table is None for step in run(scripted(SCRIPT), method="ar"))

    @pytest.mark.parametrize("calibration", [False, True])
    @pytest.mark.parametrize("method", ["ddtree", "treeflash"])
    def test_only_calibrated_tables_change(self, method, calibration):
        drafted = []
        backend = scripted(SCRIPT, right=2)
        propose = backend.propose

        def spy(sequence: Sequence[int], m: int, k: int) -> TransitionTable:
            drafted.append(propose(sequence, m, k))
            return drafted[-1]

        backend.propose, backend.head = spy, FakeHead(spy)
        _, *steps = run(backend, method=method, budget=8, calibration=calibration)
        assert len(steps) > 2
        changed = [
            not np.array_equal(step.table.log_probs, table.truncate(step.table.depths).log_probs)
            for step, table in zip(steps[1:], drafted[1:], strict=True)
        ]
        assert changed == [calibration] * len(changed)

    @pytest.mark.parametrize("method", METHODS)
    def test_budget_one_is_plain_decoding(self, method):
        steps = run(scripted(SCRIPT), method=method, budget=1, max_tokens=6)
        assert [step.tokens for step in steps] == [(t,) for t in SCRIPT[4:10]]

    def test_the_head_gets_its_settings_and_the_drafter_its_own(self):
        asked = []

        def spy(sequence: Sequence[int], m: int, k: int) -> TransitionTable:
            asked.append((m, k))
            return scripted(SCRIPT).propose(sequence, m, k)

        for method in DRAFTING:
            backend = scripted(SCRIPT)
            backend.propose = spy
            backend.head = FakeHead(spy)
            run(backend, method=method, top_m=7, top_k_children=2, max_tokens=3)
        assert asked == [(1, 1), (1, 2), (7, 2), (7, 2)]

    @pytest.mark.parametrize(
        ("settings", "rows"),
        [
            ({"budget": 3}, 16),
            ({"budget": 6}, 24),
            ({"budget": 16}, 64),
            ({"budget": 16, "head_rows": 5}, 5),
            ({"budget": 16, "head_rows": None}, None),
        ],
    )
    def test_the_head_scores_as_many_rows_as_the_budget_can_use(self, settings, rows):
        backend = scripted(SCRIPT)
        backend.head = head = FakeHead(backend.propose)
        run(backend, method="treeflash", max_tokens=14, **settings)
        assert set(head.rows) == {rows}

    def test_or_as_the_last_tree_could_where_the_budget_is_auto(self):
        class Timed(AdaptiveBudget):
            """The fake's forwards take no time."""

            def observe(
                self,
                trees: Sequence[DraftTree],
                paths: Sequence[np.ndarray],
                lengths: Sequence[int],
                seconds: object,
                *,
                first: bool = False,
            ) -> None:
                timed = {"draft": 0.0, "verify": self.costs.seconds[len(trees[0])]}
                super().observe(trees, paths, lengths, timed, first=first)

        backend = scripted(SCRIPT)
        backend.head = head = FakeHead(backend.propose)
        timed = Timed(VerifyCosts({1: 1.0, 16: 1.1, 64: 50.0}))
        config = config_of(method="treeflash", budget="auto", max_tokens=14)
        list(
            decode(
                backend,
                Request(prompt_ids=PROMPT, config=config),
                AdaptiveBudgets(by_method={"treeflash": timed}),
            )
        )
        assert head.rows[0] == 4 * 64
        assert set(head.rows[1:]) == {4 * 16}

    def test_texts_are_opened_for_drafting_only_if_they_are_drafted_for(self):
        for method in METHODS:
            backend = scripted(SCRIPT)
            run(backend, method=method, max_tokens=8)
            assert [state.drafts for state in backend.states] == [method not in ("ar", "suffix")]
