"""The decode loop, against a scripted backend that checks how it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, Method, SamplingConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Step, check, decode
from treeflash.decoding.sampling import choose, uniforms
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.errors import ConfigError, NumericalError, PromptError

DRAFTING = METHODS[1:]
BUDGETS = (1, 2, 16, 64, 256)
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "temperature": SamplingConfig(temperature=1, seed=1),
    "top-k": SamplingConfig(temperature=1, top_k=5, seed=2),
    "top-p": SamplingConfig(temperature=1.2, top_p=0.8, seed=2**64 - 1),
    "min-p": SamplingConfig(temperature=1, min_p=0.1, seed=2**63),
    "all": SamplingConfig(temperature=1.5, top_k=12, top_p=0.95, min_p=0.02, seed=5),
}
# Exceeded with probability 0.001 at 35 degrees of freedom.
CHI_SQUARE_LIMIT = 66.62

Logits = Callable[[Sequence[int]], np.ndarray]
Proposal = Callable[[Sequence[int], int, int], TransitionTable]


@dataclass
class FakeVerifier:
    """A target that is a function of the text so far. Its features are the tokens themselves."""

    logits_of: Logits
    features: bool
    draws: list[tuple[int, float]]

    def __post_init__(self) -> None:
        self.text: list[int] = []
        self.tree: DraftTree | None = None
        self.closed = False

    @property
    def length(self) -> int:
        return len(self.text)

    def prefill(
        self, token_ids: Sequence[int], sampling: SamplingConfig, uniforms: np.ndarray | None
    ) -> tuple[int, Any]:
        self.text += token_ids
        tree = DraftTree.root_only(self.text.pop())
        token = int(self.verify(tree, sampling, uniforms)[0])
        self.text.append(int(tree.tokens[0]))
        self.tree = None
        return token, list(token_ids) if self.features else None

    def verify(
        self, tree: DraftTree, sampling: SamplingConfig, uniforms: np.ndarray | None
    ) -> np.ndarray:
        assert (uniforms is None) == sampling.greedy
        if uniforms is not None:
            assert uniforms.shape == (len(tree),)
            following = (tree.positions(self.length) + 1).tolist()
            self.draws += zip(following, uniforms.tolist(), strict=True)
        self.tree = tree
        return choose(self.logits(tree), sampling, uniforms)

    def commit(self, path: np.ndarray) -> Any:
        assert self.tree is not None, "commit without verify"
        assert path[0] == 0
        assert (self.tree.parents[path[1:]] == path[:-1]).all()
        tokens = self.tree.tokens[path].tolist()
        self.text += tokens
        self.tree = None
        return tokens if self.features else None

    def logits(self, tree: DraftTree) -> np.ndarray:
        texts: list[list[int]] = []
        for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
            texts.append([*(self.text if parent < 0 else texts[parent]), token])
        return np.array([self.logits_of(text) for text in texts], np.float32)

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeDrafter:
    """Proposes from the committed text, which it must have been told whole and once."""

    verifiers: list[FakeVerifier]
    propose: Proposal

    def __post_init__(self) -> None:
        self.text: list[int] = []

    def draft(self, features: list[int], root: int) -> list[int]:
        self.text += features
        assert self.text == self.verifiers[-1].text
        return [*self.text, root]

    def marginals(self, block: list[int], k: int, temperature: float) -> TransitionTable:
        assert temperature == 0.5
        return self.propose(block, 1, k)


@dataclass
class FakeHead:
    propose: Proposal
    rows: list[int | None] = field(default_factory=list)

    def transitions(
        self,
        block: list[int],
        m: int,
        k: int,
        temperature: float,
        *,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> TransitionTable:
        assert temperature == 0.5
        self.rows.append(rows)
        return self.propose(block, m, k)


class FakeBackend:
    """Any function as the target, any function as the drafter."""

    name = device = dtype = "fake"

    def __init__(
        self, logits: Logits, propose: Proposal, vocab_size: int, max_positions: int = 1000
    ) -> None:
        self.logits, self.propose = logits, propose
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.drafter_config: Any = "anything but None"
        self.head: FakeHead | None = FakeHead(propose)
        self.verifiers: list[FakeVerifier] = []
        self.draws: list[tuple[int, float]] = []

    def verifier(self, *, features: bool) -> FakeVerifier:
        self.verifiers.append(FakeVerifier(self.logits, features, self.draws))
        return self.verifiers[-1]

    def drafter(self) -> FakeDrafter:
        return FakeDrafter(self.verifiers, self.propose)

    def memory_bytes(self) -> int:
        return 0


def scripted(script: Sequence[int], *, right: int = 5, max_positions: int = 1000) -> FakeBackend:
    """A target that continues every text with the script, and a drafter that knows it.

    The draft's first child is the script's token for `right` depths of five, then a wrong one.
    """
    vocab_size = 100

    def token_at(position: int) -> int:
        return script[position] if position < len(script) else 99

    def logits(text: Sequence[int]) -> np.ndarray:
        return np.eye(vocab_size)[token_at(len(text))]

    def propose(text: Sequence[int], m: int, k: int) -> TransitionTable:
        tokens = np.array([[token_at(len(text) + d), 98] for d in range(5)], np.int32)
        tokens[right:] = [97, 98]
        log_probs = np.tile(np.array([[-0.1, -3]], np.float32), (5, 1))
        return TransitionTable.from_marginals(tokens[:, :k], log_probs[:, :k])

    return FakeBackend(logits, propose, vocab_size, max_positions)


SCRIPT = list(range(10, 60))
PROMPT = SCRIPT[:4]


def config_of(**settings: Any) -> DecodeConfig:
    return DecodeConfig(**({"draft_temperature": 0.5, "method": "ddtree", "budget": 6} | settings))


def run(backend: Backend, prompt: Sequence[int] = PROMPT, **settings: Any) -> list[Step]:
    return list(decode(backend, prompt, config_of(**settings)))


def tokens_of(steps: Sequence[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]


class TestSteps:
    @pytest.mark.parametrize("method", DRAFTING)
    def test_a_perfect_draft_is_accepted_whole(self, method: Method) -> None:
        steps = run(scripted(SCRIPT), method=method, max_tokens=14)
        assert [step.tokens for step in steps] == [
            (14,),
            (15, 16, 17, 18, 19, 20),
            (21, 22, 23, 24, 25, 26),
            (27,),
        ]
        assert [step.finish_reason for step in steps] == [None, None, None, "length"]

    def test_plain_decoding_brings_one_token_a_step(self) -> None:
        steps = run(scripted(SCRIPT), method="ar", max_tokens=4)
        assert [step.tokens for step in steps] == [(14,), (15,), (16,), (17,)]
        assert steps[0].tree is None
        for step in steps[1:]:
            assert step.tree is not None
            assert len(step.tree) == 1
            assert step.path.tolist() == [0]
            assert list(step.seconds) == ["verify", "commit"]

    def test_the_first_step_is_the_prefill(self) -> None:
        first, *rest = run(scripted(SCRIPT), max_tokens=9)
        assert first.tokens == (14,)
        assert first.tree is None
        assert first.path is None
        assert list(first.seconds) == ["prefill"]
        for step in rest:
            assert list(step.seconds) == ["draft", "tree", "verify", "commit"]
            assert min(step.seconds.values()) >= 0

    def test_trees_and_paths(self) -> None:
        """Two depths right: the path has the root and two nodes, and the bonus comes on top."""
        steps = run(scripted(SCRIPT, right=2), budget=6, max_tokens=7)
        assert [step.tokens for step in steps] == [(14,), (15, 16, 17), (18, 19, 20)]
        tree, path = steps[1].tree, steps[1].path
        assert tree.tokens.tolist() == [14, 15, 16, 97, 97, 97]
        assert tree.is_chain
        assert path.tolist() == [0, 1, 2]
        assert steps[2].tree.tokens[0] == 17  # the bonus token is the next root

    def test_a_second_child_is_found(self) -> None:
        script = [*SCRIPT[:5], 98, *SCRIPT[6:]]
        backend = scripted(script, right=0)
        (_, step, *_) = run(backend, budget=64, max_tokens=3)
        assert step.tokens[0] == 98
        assert len(step.path) == 2
        assert step.tree.tokens[step.path].tolist() == [14, 98]

    def test_chains_have_no_branches(self) -> None:
        for method in ("dflash", "treeflash-chain"):
            steps = run(scripted(SCRIPT, right=2), method=method, budget=64)[1:]
            assert all(step.tree.is_chain for step in steps)
            assert {len(step.tree) for step in steps[:-1]} == {6}

    @pytest.mark.parametrize("method", DRAFTING)
    def test_a_step_has_the_table_of_its_tree(self, method: Method) -> None:
        prefill, *steps = run(scripted(SCRIPT, right=2), method=method, budget=64)
        assert prefill.table is None
        for step in steps:
            assert step.tree.tokens[1] == step.table.tokens[0, 0, 0]
        assert all(step.table is None for step in run(scripted(SCRIPT), method="ar"))

    @pytest.mark.parametrize("method", METHODS)
    def test_budget_one_is_plain_decoding(self, method: Method) -> None:
        steps = run(scripted(SCRIPT), method=method, budget=1, max_tokens=6)
        assert [step.tokens for step in steps] == [(t,) for t in SCRIPT[4:10]]

    def test_the_head_gets_its_settings_and_the_drafter_its_own(self) -> None:
        asked = []

        def spy(text: Sequence[int], m: int, k: int) -> TransitionTable:
            asked.append((m, k))
            return scripted(SCRIPT).propose(text, m, k)

        for method in DRAFTING:
            backend = scripted(SCRIPT)
            backend.propose = spy
            backend.head = FakeHead(spy)
            run(backend, method=method, top_m=7, top_k_children=2, max_tokens=3)
        assert asked == [(1, 1), (1, 2), (7, 2), (1, 2)]

    @pytest.mark.parametrize(
        ("settings", "rows"),
        [
            ({"budget": 6}, 32),
            ({"budget": 16}, 64),
            ({"budget": 16, "head_rows": 5}, 5),
            ({"budget": 16, "head_rows": None}, None),
        ],
    )
    def test_the_head_scores_as_many_rows_as_the_budget_can_use(
        self, settings: dict[str, Any], rows: int | None
    ) -> None:
        backend = scripted(SCRIPT)
        backend.head = head = FakeHead(backend.propose)
        run(backend, method="treeflash", max_tokens=14, **settings)
        assert set(head.rows) == {rows}

    def test_or_as_the_last_tree_could_where_the_budget_is_auto(self) -> None:
        class Timed(AdaptiveBudget):
            """The fake's forwards take no time."""

            def observe(
                self, tree: DraftTree, path: np.ndarray, seconds: object, *, first: bool = False
            ) -> None:
                verify_s = self.costs.seconds[len(tree)]
                super().observe(tree, path, {"draft": 0.0, "verify": verify_s}, first=first)

        backend = scripted(SCRIPT)
        backend.head = head = FakeHead(backend.propose)
        adaptive_budget = Timed(VerifyCosts({1: 1.0, 16: 1.1, 64: 50.0}))
        config = config_of(method="treeflash", budget="auto", max_tokens=14)
        list(decode(backend, PROMPT, config, adaptive_budget))
        assert head.rows[0] == 4 * 64
        assert set(head.rows[1:]) == {4 * 16}

    def test_features_are_asked_for_only_where_a_drafter_needs_them(self) -> None:
        for method in METHODS:
            backend = scripted(SCRIPT)
            run(backend, method=method, max_tokens=8)
            assert [verifier.features for verifier in backend.verifiers] == [method != "ar"]


class TestStopping:
    def test_end_token_inside_an_accepted_path(self) -> None:
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset({17}))
        assert [step.tokens for step in steps] == [(14,), (15, 16, 17)]
        assert steps[-1].finish_reason == "stop"
        assert steps[-1].path.tolist() == [0, 1, 2, 3, 4, 5]  # as it was before the cut

    @pytest.mark.parametrize("end", [15, 20])
    def test_end_token_first_or_last_in_a_step(self, end: int) -> None:
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset({end}))
        assert tokens_of(steps) == list(range(14, end + 1))
        assert steps[-1].finish_reason == "stop"
        assert len(steps) == 2

    def test_end_token_as_the_first_token(self) -> None:
        (step,) = run(scripted(SCRIPT), stop_token_ids=frozenset({14}))
        assert step.tokens == (14,)
        assert step.finish_reason == "stop"

    def test_several_end_tokens_the_first_met_ends(self) -> None:
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset({19, 17, 18, 5}))
        assert tokens_of(steps) == [14, 15, 16, 17]
        assert steps[-1].finish_reason == "stop"

    def test_end_tokens_in_the_prompt_do_not_count(self) -> None:
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset(PROMPT), max_tokens=8)
        assert tokens_of(steps) == SCRIPT[4:12]

    def test_drafted_end_tokens_that_are_not_accepted_do_not_count(self) -> None:
        steps = run(scripted(SCRIPT, right=1), stop_token_ids=frozenset({97, 98}), max_tokens=8)
        assert tokens_of(steps) == SCRIPT[4:12]
        assert steps[-1].finish_reason == "length"

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("max_tokens", range(1, 16))
    def test_max_tokens_is_exact(self, method: Method, max_tokens: int) -> None:
        steps = run(scripted(SCRIPT), method=method, max_tokens=max_tokens)
        assert tokens_of(steps) == SCRIPT[4 : 4 + max_tokens]
        assert all(step.tokens for step in steps)
        assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + ["length"]

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("limit", range(1, 16))
    def test_no_node_lies_where_nothing_can_be_emitted(self, method: Method, limit: int) -> None:
        """Nor beyond the positions of the model, some of which have a table of them."""
        for backend, max_tokens in (
            (scripted(SCRIPT), limit),
            (scripted(SCRIPT, max_positions=4 + limit), 99),
        ):
            emitted = 0
            for step in decode(backend, PROMPT, config_of(method=method, max_tokens=max_tokens)):
                if step.tree is not None:
                    assert emitted + step.tree.depths.max() + 1 <= limit
                emitted += len(step.tokens)
            assert emitted == limit

    def test_end_token_right_at_the_limit_is_a_stop(self) -> None:
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset({17}), max_tokens=4)
        assert tokens_of(steps) == [14, 15, 16, 17]
        assert steps[-1].finish_reason == "stop"

    def test_end_token_beyond_the_limit_is_not_met(self) -> None:
        steps = run(scripted(SCRIPT), stop_token_ids=frozenset({17}), max_tokens=3)
        assert tokens_of(steps) == [14, 15, 16]
        assert steps[-1].finish_reason == "length"

    @pytest.mark.parametrize("method", METHODS)
    def test_the_models_limit(self, method: Method) -> None:
        steps = run(scripted(SCRIPT, max_positions=13), method=method)
        assert tokens_of(steps) == SCRIPT[4:13]
        assert steps[-1].finish_reason == "length"

    def test_a_prompt_one_short_of_the_models_limit(self) -> None:
        (step,) = run(scripted(SCRIPT, max_positions=5))
        assert step.tokens == (14,)
        assert step.finish_reason == "length"

    def test_closing_early_leaves_what_was_yielded(self) -> None:
        backend = scripted(SCRIPT)
        steps = decode(backend, PROMPT, config_of())
        first, second = next(steps), next(steps)
        steps.close()
        assert list(steps) == []
        assert (first.tokens, second.tokens) == ((14,), (15, 16, 17, 18, 19, 20))
        assert backend.verifiers[0].text == SCRIPT[:10]  # nothing was computed ahead

    def test_the_verifier_is_closed_when_a_text_ends(self) -> None:
        backend = scripted(SCRIPT)
        steps = decode(backend, PROMPT, config_of())
        next(steps)
        assert not backend.verifiers[0].closed
        list(steps)
        assert backend.verifiers[0].closed

    def test_the_verifier_is_closed_when_the_iterator_is(self) -> None:
        backend = scripted(SCRIPT)
        steps = decode(backend, PROMPT, config_of())
        next(steps)
        steps.close()
        assert backend.verifiers[0].closed

    def test_the_verifier_is_closed_after_an_error(self) -> None:
        backend = scripted(SCRIPT)
        steps = decode(backend, PROMPT, config_of())
        next(steps)
        backend.verifiers[0].logits_of = lambda text: [np.nan] * len(SCRIPT)
        with pytest.raises(NumericalError):
            list(steps)
        assert backend.verifiers[0].closed

    def test_nothing_runs_before_the_first_step_is_asked_for(self) -> None:
        backend = scripted(SCRIPT)
        decode(backend, PROMPT, config_of())
        assert backend.verifiers == []

    def test_interleaved_texts_do_not_meet(self) -> None:
        alone = [step.tokens for step in run(scripted(SCRIPT), method="ar", max_tokens=5)]
        backend = scripted(SCRIPT)
        one = decode(backend, PROMPT, config_of(method="ar", max_tokens=5))
        two = decode(backend, PROMPT, config_of(method="ar", max_tokens=5))
        pairs = list(zip(one, two, strict=True))
        assert [a.tokens for a, _ in pairs] == [b.tokens for _, b in pairs] == alone


class TestChecks:
    """All of them come before the iterator is asked for its first step."""

    @pytest.mark.parametrize("method", DRAFTING)
    def test_no_drafter(self, method: Method) -> None:
        backend = scripted(SCRIPT)
        backend.drafter_config = backend.head = None
        with pytest.raises(ConfigError) as caught:
            decode(backend, PROMPT, config_of(method=method))
        assert str(caught.value) == (
            f"method {method} needs a drafter and none was loaded; pass --drafter, or --method ar"
        )

    @pytest.mark.parametrize("method", ["treeflash", "treeflash-chain"])
    def test_no_head(self, method: Method) -> None:
        backend = scripted(SCRIPT)
        backend.head = None
        with pytest.raises(ConfigError) as caught:
            decode(backend, PROMPT, config_of(method=method))
        assert str(caught.value) == (
            f"method {method} needs a TreeFlash drafter, and this one has no AR head; "
            "use --method ddtree or --method dflash"
        )

    def test_what_works_with_less(self) -> None:
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
            (
                [1] * 20,
                "the prompt has 20 tokens and the target's limit is 20, new tokens included; "
                "shorten the prompt",
            ),
            (
                [1] * 21,
                "the prompt has 21 tokens and the target's limit is 20, new tokens included; "
                "shorten the prompt",
            ),
            *(
                (
                    prompt,
                    "the prompt has token ids outside the target's vocabulary of 100; "
                    "was it encoded with another model's tokenizer?",
                )
                for prompt in ([5, 100], [-1, 5])
            ),
        ],
    )
    @pytest.mark.parametrize("entry", [decode, check])
    def test_bad_prompts(
        self, entry: Callable[..., object], prompt: list[int], message: str
    ) -> None:
        with pytest.raises(PromptError) as caught:
            entry(scripted(SCRIPT, max_positions=20), prompt, config_of())
        assert str(caught.value) == message

    def test_a_prompt_of_one_token_and_of_extreme_ids(self) -> None:
        assert tokens_of(run(scripted(SCRIPT), [99], max_tokens=3)) == SCRIPT[1:4]
        assert tokens_of(run(scripted(SCRIPT), [0, 99], max_tokens=3)) == SCRIPT[2:5]

    def test_damaged_target(self) -> None:
        backend = scripted(SCRIPT)
        backend.logits = lambda text: np.full(100, np.nan if len(text) > 5 else 1)
        steps = decode(backend, PROMPT, config_of())
        assert next(steps).tokens == (0,)
        with pytest.raises(NumericalError, match="not finite"):
            next(steps)


VOCAB = 6
BIGRAMS = np.random.default_rng(11).normal(0, 1.2, (VOCAB, VOCAB)).astype(np.float32)
TEMPERATURE = 1.3


def bigram_backend() -> FakeBackend:
    """A target whose next token depends on the last alone, and drafts that are half right."""
    noise = np.random.default_rng(12).normal(0, 1, (VOCAB, VOCAB))
    logits = BIGRAMS + noise
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def propose(text: Sequence[int], m: int, k: int) -> TransitionTable:
        previous = np.tile(np.arange(min(m, VOCAB), dtype=np.int32), (3, 1))
        first = np.full((1, previous.shape[1]), text[-1], np.int32)
        rows = log_probs[np.concatenate([first, previous])]
        tokens = np.argsort(-rows, -1)[..., : min(k, VOCAB)].astype(np.int32)
        best = np.take_along_axis(rows, tokens, -1).astype(np.float32)
        if m == 1:
            return TransitionTable.from_marginals(tokens[:, 0], best[:, 0])
        return TransitionTable.from_candidates(previous, tokens, best)

    return FakeBackend(lambda text: BIGRAMS[text[-1]], propose, VOCAB)


class TestSampling:
    @pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
    @pytest.mark.parametrize("method", DRAFTING)
    def test_every_budget_equals_plain_decoding(
        self, method: Method, sampling: SamplingConfig
    ) -> None:
        expected = tokens_of(
            run(bigram_backend(), [1, 2], method="ar", sampling=sampling, max_tokens=40)
        )
        for budget in BUDGETS:
            steps = run(
                bigram_backend(),
                [1, 2],
                method=method,
                budget=budget,
                sampling=sampling,
                max_tokens=40,
            )
            assert tokens_of(steps) == expected

    @pytest.mark.parametrize("method", METHODS)
    def test_each_node_draws_the_number_of_the_position_after_it(self, method: Method) -> None:
        backend = bigram_backend()
        sampling = SamplingConfig(temperature=1, seed=77)
        run(backend, [1, 2, 3], method=method, sampling=sampling, max_tokens=20)
        assert backend.draws[0][0] == 3  # the first new token's position
        for position, number in backend.draws:
            assert number == uniforms(77, np.array([position], np.int32))[0]

    def test_seeds_give_different_texts(self) -> None:
        texts = {
            tuple(
                tokens_of(
                    run(
                        bigram_backend(),
                        [1],
                        sampling=SamplingConfig(temperature=1, seed=seed),
                        max_tokens=12,
                    )
                )
            )
            for seed in range(20)
        }
        assert len(texts) == 20

    @pytest.mark.parametrize("method", ["dflash", "ddtree", "treeflash"])
    def test_tree_decoding_has_the_targets_distribution(self, method: Method) -> None:
        """Pairs of tokens that come from trees, over seeds, against the exact probabilities."""
        draws, backend = 4000, bigram_backend()
        counts = np.zeros((VOCAB, VOCAB))
        accepted = 0
        for seed in range(draws):
            sampling = SamplingConfig(temperature=TEMPERATURE, seed=seed)
            steps = run(backend, [2], method=method, budget=12, sampling=sampling, max_tokens=3)
            _, second, third = tokens_of(steps)
            counts[second, third] += 1
            accepted += len(steps[1].path) - 1
        assert accepted > draws / 4
        probs = np.exp(BIGRAMS.astype(np.float64) / TEMPERATURE)
        probs /= probs.sum(-1, keepdims=True)
        expected = draws * (probs[2] @ probs)[:, None] * probs
        assert expected.min() >= 5
        assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_LIMIT
