"""The decode loop: its steps, checks, ends and samples, with a scripted target.

The conformance suite has the loop's laws for real targets.
"""

from unittest.mock import Mock

import numpy as np
import pytest
from fake_models import (
    DRAFTING,
    PROMPT,
    SAMPLINGS,
    SCRIPT,
    FakeBackend,
    FakeHead,
    config_of,
    run,
    scripted,
)

from treeflash.config import METHODS, Penalties, SamplingConfig
from treeflash.decoding import Request, check, decode
from treeflash.decoding.adaptive_budget import AdaptiveBudget, AdaptiveBudgets
from treeflash.decoding.images import Image, PromptImages
from treeflash.decoding.sampling import position_keys
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.errors import ConfigError, PromptError, UnsupportedModelError
from treeflash.testing.comparisons import tokens_of


def request_of(prompt=PROMPT, **settings):
    return Request(prompt_ids=prompt, config=config_of(**settings))


class TestSteps:
    @pytest.mark.parametrize("method", DRAFTING)
    def test_a_perfect_draft_is_accepted_whole(self, method):
        steps = run(scripted(SCRIPT), method=method, max_tokens=14)
        tokens = [(14,), (15, 16, 17, 18, 19, 20), (21, 22, 23, 24, 25, 26), (27,)]
        assert [step.tokens for step in steps] == tokens
        assert [step.finish_reason for step in steps] == [None, None, None, "length"]

    def test_plain_decoding_commits_one_token_a_step(self):
        first, *steps = run(scripted(SCRIPT), method="ar", max_tokens=4)
        assert [step.tokens for step in (first, *steps)] == [(14,), (15,), (16,), (17,)]
        assert first.tree is None
        for step in steps:
            assert (len(step.tree), step.path.tolist()) == (1, [0])
            assert list(step.seconds) == ["verify", "commit"]

    def test_the_first_step_is_the_prefill(self):
        first, *rest = run(scripted(SCRIPT), max_tokens=9)
        assert (first.tokens, first.tree, first.path) == ((14,), None, None)
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
        drafted, backend = [], scripted(SCRIPT, right=2)
        propose = backend.propose

        def spy(sequence, m, k):
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

    def test_the_head_gets_its_settings_and_the_drafter_its_own(self):
        asked = []

        def spy(sequence, m, k):
            asked.append((m, k))
            return scripted(SCRIPT).propose(sequence, m, k)

        for method in DRAFTING:
            backend = scripted(SCRIPT)
            backend.propose, backend.head = spy, FakeHead(spy)
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
        run(backend, method="treeflash", max_tokens=14, **settings)
        assert set(backend.head.rows) == {rows}

    def test_or_as_the_last_tree_could_where_the_budget_is_auto(self):
        class Timed(AdaptiveBudget):
            """The fake's forwards take no time."""

            def observe(self, trees, paths, lengths, seconds, *, first=False):
                timed = {"draft": 0.0, "verify": self.costs.seconds[len(trees[0])]}
                super().observe(trees, paths, lengths, timed, first=first)

        backend = scripted(SCRIPT)
        timed = Timed(VerifyCosts({1: 1.0, 16: 1.1, 64: 50.0}))
        request = request_of(method="treeflash", budget="auto", max_tokens=14)
        list(decode(backend, request, AdaptiveBudgets(by_method={"treeflash": timed})))
        assert backend.head.rows[0] == 4 * 64
        assert set(backend.head.rows[1:]) == {4 * 16}

    def test_texts_are_opened_for_drafting_only_if_they_are_drafted_for(self):
        for method in METHODS:
            backend = scripted(SCRIPT)
            run(backend, method=method, max_tokens=8)
            assert [state.drafts for state in backend.states] == [method not in ("ar", "suffix")]


class TestStopping:
    @pytest.mark.parametrize(
        ("ends", "max_tokens", "tokens", "reason"),
        [
            pytest.param({15}, 99, [14, 15], "stop", id="first in a step"),
            pytest.param({20}, 99, range(14, 21), "stop", id="last in a step"),
            pytest.param({14}, 99, [14], "stop", id="first of the text"),
            pytest.param({19, 17, 18, 5}, 99, [14, 15, 16, 17], "stop", id="the first one met"),
            pytest.param({*PROMPT}, 8, SCRIPT[4:12], "length", id="in the prompt"),
            pytest.param({17}, 4, [14, 15, 16, 17], "stop", id="at the limit"),
            pytest.param({17}, 3, [14, 15, 16], "length", id="beyond the limit"),
        ],
    )
    def test_end_tokens(self, ends, max_tokens, tokens, reason):
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset(ends), max_tokens=max_tokens)
        assert tokens_of(steps) == list(tokens)
        assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + [reason]

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("limit", range(1, 16))
    def test_no_node_lies_where_nothing_can_be_emitted(self, method, limit):
        """Some models have a table of positions, beyond which no node may be."""
        whole = scripted(SCRIPT, max_positions=4 + limit)
        for backend, max_tokens in ((scripted(SCRIPT), limit), (whole, 99)):
            emitted = 0
            for step in run(backend, method=method, max_tokens=max_tokens):
                if step.tree is not None:
                    assert emitted + step.tree.depths.max() + 1 <= limit
                emitted += len(step.tokens)
            assert (emitted, step.finish_reason) == (limit, "length")

    def test_closing_early_leaves_what_was_yielded(self):
        backend = scripted(SCRIPT)
        steps = decode(backend, request_of())
        assert backend.states == [], "nothing runs before the first step is asked for"
        first, second = next(steps), next(steps)
        assert not backend.states[0].closed
        steps.close()
        assert list(steps) == []
        assert (first.tokens, second.tokens) == ((14,), (15, 16, 17, 18, 19, 20))
        assert backend.states[0].tokens == SCRIPT[:10]  # nothing was computed ahead
        assert backend.states[0].closed


TOO_LONG = "tokens and the target's limit is 20, new tokens included; shorten the prompt"
UNKNOWN = (
    "the prompt has token ids outside the target's vocabulary of 100; "
    "was it encoded with another model's tokenizer?"
)

NO_DRAFTER = "a drafter and none was loaded; load a drafter (--drafter), or use method suffix or ar"
NO_HEAD = "an AR head, and the loaded drafter has no AR head; use method ddtree or dflash"


class TestChecks:
    """All of them come before the iterator is asked for its first step."""

    @pytest.mark.parametrize(
        ("missing", "method", "message"),
        [
            *(("drafter_config", method, NO_DRAFTER) for method in DRAFTING),
            *(("head", method, NO_HEAD) for method in ("treeflash", "treeflash-chain")),
        ],
    )
    def test_no_drafter_and_no_head(self, missing, method, message):
        backend = scripted(SCRIPT)
        setattr(backend, missing, None)
        with pytest.raises(ConfigError) as caught:
            decode(backend, request_of(method=method))
        assert str(caught.value) == f"method {method} needs {message}"

    def test_what_works_with_less(self):
        backend = scripted(SCRIPT)
        backend.head = None
        for method in ("ar", "dflash", "ddtree"):
            assert tokens_of(run(backend, method=method, max_tokens=9)) == SCRIPT[4:13]
        backend.drafter_config = None
        assert tokens_of(run(backend, method="ar", max_tokens=9)) == SCRIPT[4:13]

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([], "the prompt is empty; give at least one token"),
            ([1] * 20, f"the prompt has 20 {TOO_LONG}"),
            ([1] * 21, f"the prompt has 21 {TOO_LONG}"),
            ([5, 100], UNKNOWN),
            ([-1, 5], UNKNOWN),
        ],
    )
    @pytest.mark.parametrize("entry", [decode, check])
    def test_bad_prompts(self, entry, prompt, message):
        with pytest.raises(PromptError) as caught:
            entry(scripted(SCRIPT, max_positions=20), request_of(prompt))
        assert str(caught.value) == message

    @pytest.mark.parametrize("entry", [decode, check])
    def test_a_target_that_runs_no_trees(self, entry):
        """Loading a drafter checks it too; copies need no drafter."""
        backend = scripted(SCRIPT)
        backend.check_trees = Mock(side_effect=UnsupportedModelError("no trees"))
        entry(backend, request_of(method="ar"))
        with pytest.raises(UnsupportedModelError, match="no trees"):
            entry(backend, request_of(method="suffix"))

    @pytest.mark.parametrize("token", [100, -1])
    def test_a_head_that_drafts_an_unknown_token(self, token):
        backend = scripted(SCRIPT)
        drafted = backend.propose(PROMPT, 1, 2)
        drafted.tokens[2] = [SCRIPT[6], token]
        backend.head = FakeHead(lambda *_: drafted)
        with pytest.raises(ConfigError, match=f"drafted the token {token}, .* has 100 tokens"):
            run(backend, method="treeflash")
        drafted.log_probs[2, :, 1] = -np.inf  # the child is absent
        assert tokens_of(run(backend, method="treeflash", max_tokens=3)) == SCRIPT[4:7]


VOCAB = 6
BIGRAMS = np.random.default_rng(11).normal(0, 1.2, (VOCAB, VOCAB)).astype(np.float32)


def bigram_backend():
    """A target whose next token depends on the last alone, and drafts that are half right."""
    noise = np.random.default_rng(12).normal(0, 1, (VOCAB, VOCAB))
    logits = BIGRAMS + noise
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def propose(sequence, m, k):
        previous = np.tile(np.arange(min(m, VOCAB), dtype=np.int32), (3, 1))
        first = np.full((1, previous.shape[1]), sequence[-1], np.int32)
        rows = log_probs[np.concatenate([first, previous])]
        tokens = np.argsort(-rows, -1)[..., : min(k, VOCAB)].astype(np.int32)
        best = np.take_along_axis(rows, tokens, -1).astype(np.float32)
        if m == 1:
            return TransitionTable.from_marginals(tokens[:, 0], best[:, 0])
        return TransitionTable.from_candidates(previous, tokens, best)

    return FakeBackend(lambda sequence: BIGRAMS[sequence[-1]], propose, VOCAB)


class TestSampling:
    """A seed gives one text; the conformance suite compares its distribution with the target's."""

    @pytest.mark.parametrize("method", METHODS)
    def test_each_node_has_the_key_of_the_position_after_it(self, method):
        backend, sampling = bigram_backend(), SamplingConfig(temperature=1, seed=77)
        run(backend, [1, 2, 3], method=method, sampling=sampling, max_tokens=20)
        assert backend.verifier.keys[0][0] == 3  # the first new token's position
        for position, key in backend.verifier.keys:
            assert key == position_keys(77, np.array([position], np.int32))[0].tolist()

    @pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
    @pytest.mark.parametrize("method", DRAFTING)
    def test_drafts_have_the_noise_of_the_tokens_that_they_propose(self, method, sampling):
        backend = bigram_backend()
        run(backend, [1, 2, 3], method=method, sampling=sampling, max_tokens=20, budget=3)
        drafted = [*backend.drafter.noise, *backend.head.noise]
        assert drafted[0][0] == 4  # after the prompt and the first new token
        for position, noise in drafted:
            assert (noise is None) == sampling.greedy
            if noise is not None:
                positions = position + np.arange(3, dtype=np.int32)  # three nodes reach no deeper
                expected = position_keys(sampling.seed, positions)
                np.testing.assert_array_equal(noise.keys, expected)
                assert noise.scales.tolist() == [np.float32(sampling.temperature)] * 3

    def test_penalties_leave_the_placeholders_of_images_alone(self):
        """They are no text, and the vocabulary need not have them."""
        backend = scripted(SCRIPT)
        backend.images = Mock()
        outside = backend.vocab_size
        prompt = [*PROMPT[:2], outside, outside, *PROMPT[2:]]
        images = PromptImages([Image(2, 4, {})], np.array(prompt) == outside)
        config = config_of(max_tokens=4, penalties=Penalties(repetition=1.5))
        request = Request(prompt_ids=prompt, config=config, images=images)
        steps = list(decode(backend, request))
        assert tokens_of(steps) == SCRIPT[6:10]
