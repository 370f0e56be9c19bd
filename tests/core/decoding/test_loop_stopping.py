"""Where the decode loop ends a sequence."""

from __future__ import annotations

import numpy as np
import pytest
from fake_models import PROMPT, SCRIPT, config_of, run, scripted

from treeflash.config import METHODS
from treeflash.decoding import Request, decode
from treeflash.errors import NumericalError
from treeflash.testing.comparisons import tokens_of


class TestStopping:
    def test_end_token_inside_an_accepted_path(self):
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset({17}))
        assert [step.tokens for step in steps] == [(14,), (15, 16, 17)]
        assert steps[-1].finish_reason == "stop"
        assert steps[-1].path.tolist() == [0, 1, 2, 3, 4, 5]  # as it was before the cut

    @pytest.mark.parametrize("end", [15, 20])
    def test_end_token_first_or_last_in_a_step(self, end):
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset({end}))
        assert tokens_of(steps) == list(range(14, end + 1))
        assert steps[-1].finish_reason == "stop"
        assert len(steps) == 2

    def test_end_token_as_the_first_token(self):
        (step,) = run(scripted(SCRIPT), stop_token_ids=frozenset({14}))
        assert step.tokens == (14,)
        assert step.finish_reason == "stop"

    def test_several_end_tokens_the_first_met_ends(self):
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset({19, 17, 18, 5}))
        assert tokens_of(steps) == [14, 15, 16, 17]
        assert steps[-1].finish_reason == "stop"

    def test_end_tokens_in_the_prompt_do_not_count(self):
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset(PROMPT), max_tokens=8)
        assert tokens_of(steps) == SCRIPT[4:12]

    def test_drafted_end_tokens_that_are_not_accepted_do_not_count(self):
        steps = run(scripted(SCRIPT, right=1), stop_token_ids=frozenset({97, 98}), max_tokens=8)
        assert tokens_of(steps) == SCRIPT[4:12]
        assert steps[-1].finish_reason == "length"

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("max_tokens", range(1, 16))
    def test_max_tokens_is_exact(self, method, max_tokens):
        steps = run(scripted(SCRIPT), method=method, max_tokens=max_tokens)
        assert tokens_of(steps) == SCRIPT[4 : 4 + max_tokens]
        assert all(step.tokens for step in steps)
        assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + ["length"]

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("limit", range(1, 16))
    def test_no_node_lies_where_nothing_can_be_emitted(self, method, limit):
        """Some models have a table of positions, beyond which no node may be."""
        for backend, max_tokens in (
            (scripted(SCRIPT), limit),
            (scripted(SCRIPT, max_positions=4 + limit), 99),
        ):
            emitted = 0
            for step in decode(
                backend,
                Request(prompt_ids=PROMPT, config=config_of(method=method, max_tokens=max_tokens)),
            ):
                if step.tree is not None:
                    assert emitted + step.tree.depths.max() + 1 <= limit
                emitted += len(step.tokens)
            assert emitted == limit

    def test_end_token_right_at_the_limit_is_a_stop(self):
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset({17}), max_tokens=4)
        assert tokens_of(steps) == [14, 15, 16, 17]
        assert steps[-1].finish_reason == "stop"

    def test_end_token_beyond_the_limit_is_not_met(self):
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset({17}), max_tokens=3)
        assert tokens_of(steps) == [14, 15, 16]
        assert steps[-1].finish_reason == "length"

    @pytest.mark.parametrize("method", METHODS)
    def test_the_models_limit(self, method):
        steps = run(scripted(SCRIPT, max_positions=13), method=method)
        assert tokens_of(steps) == SCRIPT[4:13]
        assert steps[-1].finish_reason == "length"

    def test_a_prompt_one_short_of_the_models_limit(self):
        (step,) = run(scripted(SCRIPT, max_positions=5))
        assert step.tokens == (14,)
        assert step.finish_reason == "length"

    def test_closing_early_leaves_what_was_yielded(self):
        backend = scripted(SCRIPT)
        steps = decode(backend, Request(prompt_ids=PROMPT, config=config_of()))
        first, second = next(steps), next(steps)
        steps.close()
        assert list(steps) == []
        assert (first.tokens, second.tokens) == ((14,), (15, 16, 17, 18, 19, 20))
        assert backend.states[0].tokens == SCRIPT[:10]  # nothing was computed ahead

    def test_the_state_is_closed_when_a_text_ends(self):
        backend = scripted(SCRIPT)
        steps = decode(backend, Request(prompt_ids=PROMPT, config=config_of()))
        next(steps)
        assert not backend.states[0].closed
        list(steps)
        assert backend.states[0].closed

    def test_the_state_is_closed_when_the_iterator_is(self):
        backend = scripted(SCRIPT)
        steps = decode(backend, Request(prompt_ids=PROMPT, config=config_of()))
        next(steps)
        steps.close()
        assert backend.states[0].closed

    def test_the_state_is_closed_after_an_error(self):
        backend = scripted(SCRIPT)
        steps = decode(backend, Request(prompt_ids=PROMPT, config=config_of()))
        next(steps)
        backend.states[0].logits_of = lambda sequence: [np.nan] * len(SCRIPT)
        with pytest.raises(NumericalError, match="not finite"):
            list(steps)
        assert backend.states[0].closed

    def test_nothing_runs_before_the_first_step_is_asked_for(self):
        backend = scripted(SCRIPT)
        decode(backend, Request(prompt_ids=PROMPT, config=config_of()))
        assert backend.states == []

    def test_interleaved_texts_do_not_meet(self):
        alone = [step.tokens for step in run(scripted(SCRIPT), method="ar", max_tokens=5)]
        backend = scripted(SCRIPT)
        one = decode(
            backend, Request(prompt_ids=PROMPT, config=config_of(method="ar", max_tokens=5))
        )
        two = decode(
            backend, Request(prompt_ids=PROMPT, config=config_of(method="ar", max_tokens=5))
        )
        pairs = list(zip(one, two, strict=True))
        assert [a.tokens for a, _ in pairs] == [b.tokens for _, b in pairs] == alone
