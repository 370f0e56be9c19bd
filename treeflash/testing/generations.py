"""Whole generations agree with the reference, and have the target's distribution."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import count, product, zip_longest
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from treeflash.config import METHODS, DecodeConfig, Method, Penalties, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig, decode, iteration
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Step
from treeflash.decoding.sampling import LogProbs
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import SIZES
from treeflash.drafters.config import DrafterConfig
from treeflash.testing.comparisons import (
    assert_close,
    assert_equal_steps,
    generate,
    prompt_of,
    prompted,
    settled_generation,
    steps_of,
    tokens_of,
)
from treeflash.testing.costs import SteadyCosts
from treeflash.testing.pairs import (
    EXAMPLES,
    SAMPLINGS,
    Pair,
    PairMaker,
    combine,
    each_sampling,
    two_samplings,
)
from treeflash.text.async_stream import AsyncDecoder

MAX_TOKENS = 10
BUDGETS = (1, 2, 16, 64, 256)
DRAFTING = METHODS[1:]
TREES: tuple[Method, ...] = ("ddtree", "treeflash")


class GenerationTests:
    @pytest.mark.parametrize(("method", "budget", "name"), combine(DRAFTING, BUDGETS, SAMPLINGS))
    def test_iterations_match_reference(
        self, pair: PairMaker, method: Method, budget: int, name: str
    ) -> None:
        """Any two of a method, a budget and a sampling meet, and all three in a nightly run."""
        config = DecodeConfig(
            method=method, budget=budget, sampling=SAMPLINGS[name], max_tokens=MAX_TOKENS
        )
        check_generation(pair(), config)

    @pytest.mark.parametrize(
        ("method", "name"),
        product(TREES, SAMPLINGS) if EXAMPLES else [("ddtree", "greedy"), ("treeflash", "all")],
    )
    def test_iterations_of_each_family_match_reference(
        self, pair: PairMaker, family: str, method: Method, name: str
    ) -> None:
        sampling = SAMPLINGS[name]
        config = DecodeConfig(method=method, budget=24, sampling=sampling, max_tokens=MAX_TOKENS)
        check_generation(pair(family), config)

    @each_sampling
    def test_plain_decoding_matches_reference(self, models: Pair, sampling: SamplingConfig) -> None:
        config = DecodeConfig(method="ar", sampling=sampling, max_tokens=40)
        prompt, expected = settled_generation(models.reference, config)
        assert_equal_steps(steps_of(models.tested, prompt, config), expected)

    def test_sliding_drafter_matches_reference(self, pair: PairMaker) -> None:
        models = pair(drafter={"sliding_window": 4})
        check_generation(models, DecodeConfig(budget=24, max_tokens=24))

    def test_settings_of_the_tree_match_reference(self, pair: PairMaker) -> None:
        config = DecodeConfig(budget=12, top_m=3, top_k_children=5, draft_temperature=0.7)
        check_generation(pair(), replace(config, max_tokens=MAX_TOKENS))

    @(each_sampling if EXAMPLES else two_samplings)
    def test_budget_auto_equals_plain_decoding(
        self, models: Pair, sampling: SamplingConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With every tree size, and while drafting pauses."""
        ticks = count()
        clock = SimpleNamespace(perf_counter=lambda: 1e-3 * next(ticks))
        monkeypatch.setattr(iteration, "time", clock)  # every phase takes a millisecond
        prompt = prompt_of(models.reference, 3)
        auto = DecodeConfig(budget="auto", sampling=sampling, max_tokens=16)
        plain = generate(models.tested, prompt, replace(auto, method="ar"))
        # Drafting always pays, then it never does.
        for method, pauses in product(DRAFTING, (False, True)):
            costs = {size: 1e-6 * size**3 if pauses else 1000.0 for size in SIZES}
            request = Request(prompt_ids=prompt, config=replace(auto, method=method))
            budgets = AdaptiveBudgets(SteadyCosts(costs))
            steps = list(decode(models.tested, request, budgets))
            assert tokens_of(steps) == plain, method
            # The last iteration may have room for one token only.
            trees = [step.tree for step in steps[1:-1] if step.table is None]
            plain_iterations = any(tree is not None and len(tree) == 1 for tree in trees)
            if method == "suffix":  # nothing is drafted where nothing repeats
                assert plain_iterations or not pauses
            else:
                assert plain_iterations == pauses

    @pytest.mark.parametrize("size", [1, 6])
    @pytest.mark.parametrize("what", ["head_vocab", "head_rows"])
    def test_a_head_that_scores_less_equals_plain_decoding(
        self, models: Pair, what: str, size: int
    ) -> None:
        prompt = prompt_of(models.reference, 4)
        plain = models.plain(prompt, DecodeConfig(max_tokens=24))
        settings: dict[str, Any] = {what: size, "max_tokens": 24}
        assert generate(models.tested, prompt, DecodeConfig(**settings)) == plain

    @pytest.mark.parametrize("method", DRAFTING)
    def test_several_drafts_are_accepted_at_once(self, models: Pair, method: Method) -> None:
        """The other tests would mean little if the drafts were always wrong.

        The noise that target and drafter share brings random models together; greedy texts repeat.
        """
        sampling = SamplingConfig(temperature=0.0 if method == "suffix" else 1.0)
        config = DecodeConfig(method=method, budget=64, max_tokens=24, sampling=sampling)
        prompts = [prompt_of(models.reference, seed) for seed in range(8)]
        steps = [step for prompt in prompts for step in steps_of(models.tested, prompt, config)]
        paths = [len(step.path) for step in steps if step.path is not None]
        assert max(paths) >= (3 if method in TREES else 2)
        assert sum(length >= 2 for length in paths) >= 8

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("edited", [False, True])
    @two_samplings
    def test_every_token_has_the_log_probs_of_the_model(
        self, models: Pair, method: Method, edited: bool, sampling: SamplingConfig
    ) -> None:
        """Log probabilities are reported before penalties, biases, temperature and filters."""
        bias = tuple(dict.fromkeys(range(0, models.reference.vocab_size, 3), -9.0).items())
        penalties = Penalties(presence=1.0, repetition=1.5, logit_bias=bias)
        config = DecodeConfig(
            method=method,
            budget=8,
            max_tokens=20,
            sampling=sampling,
            penalties=penalties if edited else Penalties(),
            log_probs=2,
        )
        prompt = prompt_of(models.reference, 5)
        steps = steps_of(models.tested, prompt, config)
        tokens = tokens_of(steps)
        with SequenceSession(models.reference) as session:
            session.extend(prompt[:-1])
            chain = DraftTree.chain(np.array([prompt[-1], *tokens[:-1]], np.int32))
            logits = session.logits(chain).astype(np.float64)
        expected = (logits - np.logaddexp.reduce(logits, -1, keepdims=True)).astype(np.float32)
        parts = [step.log_probs for step in steps if step.log_probs is not None]
        assert len(parts) == len(steps) > 1
        reported = LogProbs.concatenate(parts)
        assert_close(reported.sampled, expected[np.arange(len(tokens)), tokens])
        assert_close(reported.values, -np.sort(-expected, -1)[:, :2])

    def test_interleaved_texts_equal_texts_alone(self, backend: Backend) -> None:
        configs = [
            DecodeConfig(budget=16, max_tokens=MAX_TOKENS),
            DecodeConfig(method="ddtree", budget=8, max_tokens=MAX_TOKENS),
        ]
        requests = [
            Request(prompt_ids=prompt_of(backend, seed), config=config)
            for seed, config in enumerate(configs, 1)
        ]
        alone = [list(decode(backend, request)) for request in requests]
        running = [decode(backend, request) for request in requests]
        together: list[list[Step]] = [[], []]
        for turn in zip_longest(*running):
            for steps, step in zip(together, turn, strict=True):
                steps += [step] if step else []
        for actual, expected in zip(together, alone, strict=True):
            assert_equal_steps(actual, expected)

    def test_texts_of_an_event_loop_equal_texts_alone(self, backend: Backend) -> None:
        """They are decoded together, in a thread that did not load the models."""
        config = DecodeConfig(budget=16, max_tokens=MAX_TOKENS)
        prompts = [prompt_of(backend, seed) for seed in range(3)]
        decoder = AsyncDecoder(backend, AdaptiveBudgets())

        async def tokens(prompt: list[int]) -> list[int]:
            mailbox = decoder.submit(Request(prompt_ids=prompt, config=config))
            steps: list[Step] = []
            while not steps or steps[-1].finish_reason is None:
                step = await mailbox.get()
                assert isinstance(step, Step), step
                steps.append(step)
            return tokens_of(steps)

        async def texts() -> list[list[int]]:
            return await asyncio.gather(*map(tokens, prompts))

        assert asyncio.run(texts()) == [generate(backend, prompt, config) for prompt in prompts]


def check_generation(pair: Pair, config: DecodeConfig) -> None:
    """Compare with the reference step by step, and with the backend's own plain decoding."""
    prompt, expected = settled_generation(pair.reference, config)
    steps = steps_of(pair.tested, prompt, config)
    assert_equal_steps(steps, expected)
    assert tokens_of(steps) == pair.plain(prompt, config)


CONFIG = DecodeConfig(budget=64, max_tokens=40)


class StopTests:
    def test_end_token_inside_an_accepted_path(self, models: Pair) -> None:
        prompt, sequence, inside = models.once(sequence_with_new_token_inside_path)
        config = replace(CONFIG, stop_token_ids=frozenset({sequence[inside]}))
        steps = steps_of(models.tested, prompt, config)
        assert tokens_of(steps) == sequence[: inside + 1]
        assert steps[-1].finish_reason == "stop"
        assert steps[-1].path is not None
        assert len(steps[-1].tokens) < len(steps[-1].path)

    def test_several_end_tokens(self, models: Pair) -> None:
        prompt, sequence, inside = models.once(sequence_with_new_token_inside_path)
        unused = set(range(models.tested.vocab_size)) - set(sequence)
        stops = {sequence[inside], sequence[inside + 1]} | unused
        steps = steps_of(models.tested, prompt, replace(CONFIG, stop_token_ids=frozenset(stops)))
        first = min(sequence.index(stop) for stop in stops & set(sequence))
        assert tokens_of(steps) == sequence[: first + 1]
        assert steps[-1].finish_reason == "stop"

    def test_end_token_right_after_the_prompt(self, backend: Backend) -> None:
        prompt = prompt_of(backend, 0)
        first = generate(backend, prompt, CONFIG)[0]
        config = replace(CONFIG, stop_token_ids=frozenset({first}))
        (step,) = steps_of(backend, prompt, config)
        assert step.tokens == (first,)
        assert step.finish_reason == "stop"

    def test_max_tokens_reached_inside_a_path(self, models: Pair) -> None:
        """The tree is then no deeper than the tokens that can be emitted."""
        prompt, sequence, inside = models.once(sequence_with_new_token_inside_path)
        steps = steps_of(models.tested, prompt, replace(CONFIG, max_tokens=inside + 1))
        assert tokens_of(steps) == sequence[: inside + 1]
        assert steps[-1].finish_reason == "length"
        assert steps[-1].path is not None
        assert len(steps[-1].tokens) == len(steps[-1].path)

    def test_one_new_token(self, backend: Backend) -> None:
        prompt = prompt_of(backend, 0)
        (step,) = steps_of(backend, prompt, replace(CONFIG, max_tokens=1))
        assert list(step.tokens) == generate(backend, prompt, CONFIG)[:1]
        assert step.finish_reason == "length"

    def test_the_models_limit_ends_a_text(self, pair: PairMaker) -> None:
        models = pair(target={"max_positions": 32})
        assert models.tested.max_positions == 32
        prompt = prompt_of(models.tested, 0)
        expected = steps_of(models.reference, prompt, CONFIG)
        steps = steps_of(models.tested, prompt, CONFIG)
        assert tokens_of(steps) == tokens_of(expected)
        assert len(prompt) + len(tokens_of(steps)) == 32
        assert steps[-1].finish_reason == "length"

    def test_prompt_of_one_token(self, models: Pair) -> None:
        config = replace(CONFIG, max_tokens=MAX_TOKENS)
        for token in (0, models.tested.vocab_size - 1):
            expected = steps_of(models.reference, [token], config)
            assert generate(models.tested, [token], config) == tokens_of(expected)

    def test_prompt_with_the_mask_token(self, models: Pair) -> None:
        config = models.tested.drafter_config
        assert isinstance(config, DrafterConfig)
        mask = config.mask_token_id
        prompt = [3, mask, 5, mask, mask]
        expected = steps_of(models.reference, prompt, CONFIG)
        assert_equal_steps(steps_of(models.tested, prompt, CONFIG), expected)

    def test_budget_beyond_the_table(self, pair: PairMaker) -> None:
        models = pair(drafter={"block_size": 3})
        config = replace(
            CONFIG, budget=1000, top_m=2, top_k_children=2, max_tokens=12, suffix=False
        )
        check_generation(models, config)
        _, steps = settled_generation(models.reference, config)
        sizes = [len(step.tree) for step in steps if step.tree is not None]
        assert max(sizes) <= 1 + 2 + 4


def sequence_with_new_token_inside_path(backend: Backend) -> tuple[list[int], list[int], int]:
    """Find a prompt, its tokens, and the index of a token inside an accepted path.

    That token and the next one do not occur before, so either can be the first stop token.
    """
    config = replace(CONFIG, max_tokens=16)  # later tokens are rarely new
    for seed in range(200):
        prompt = prompt_of(backend, seed)
        steps = steps_of(backend, prompt, config)
        sequence = tokens_of(steps)
        for inside in middles(steps):
            if all(sequence[i] not in sequence[:i] for i in (inside, inside + 1)):
                return prompt, sequence, inside
    raise AssertionError("no sequence has a new token inside an accepted path")


def middles(steps: list[Step]) -> list[int]:
    """List the indices of tokens that are neither the first nor the last of their step."""
    indices: list[int] = []
    start = 0
    for step in steps:
        indices += range(start + 1, start + len(step.tokens) - 1)
        start += len(step.tokens)
    return indices


VOCAB = 6
SEEDS = range(300)
PROMPT = [1, 4, 2, 0]
TEMPERATURE = 1.5
CHI_SQUARE_LIMIT = 20.5  # exceeded with probability 0.001 at 5 degrees of freedom


class DistributionTests:
    def test_tokens_have_the_targets_distribution(self, pair: PairMaker) -> None:
        """A chi-square test of each token's marginal; the second and third come from trees."""
        models = pair(target={"vocab_size": VOCAB})
        requests = []
        for seed in SEEDS:
            sampling = SamplingConfig(temperature=TEMPERATURE, seed=seed)
            config = DecodeConfig(budget=12, max_tokens=3, sampling=sampling)
            requests.append(Request(prompt_ids=PROMPT, config=config, tag=[]))
        scheduler = Scheduler(models.tested, SchedulerConfig(max_parallel=100))
        for request, step in scheduler.decode(requests):
            request.tag.extend(step.tokens)
        sequences = [request.tag for request in requests]
        for place, expected in enumerate(marginals_of(models.reference)):
            counts = np.bincount([sequence[place] for sequence in sequences], minlength=VOCAB)
            expected = expected * len(SEEDS)
            assert expected.min() >= 5
            assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_LIMIT

    def test_the_smallest_top_p_is_greedy(self, pair: PairMaker) -> None:
        """It keeps one token, although float32 cannot represent so small a number."""
        (sequence,) = prompted([pair(target={"vocab_size": VOCAB}).tested], PROMPT)
        tree = DraftTree.root_only(3)
        best = sequence.verify(tree)
        for top_p in (1e-300, 1e-45, 1e-9):
            sampling = SamplingConfig(temperature=TEMPERATURE, top_p=top_p)
            np.testing.assert_array_equal(sequence.verify(tree, sampling), best)


def marginals_of(backend: Backend) -> list[NDArray[np.float64]]:
    """Compute the three next tokens' exact distributions, from the tree of all sequences."""
    sequences = [sequence for depth in range(3) for sequence in product(range(VOCAB), repeat=depth)]
    numbers = {sequence: number for number, sequence in enumerate(sequences)}
    tokens = [sequence[-1] if sequence else PROMPT[-1] for sequence in sequences]
    parents = [numbers[sequence[:-1]] if sequence else -1 for sequence in sequences]
    tree = DraftTree.from_parents(np.array(tokens, np.int32), np.array(parents, np.int32))
    with SequenceSession(backend) as state:
        state.extend(PROMPT[:-1])
        probs = np.exp(state.logits(tree).astype(np.float64) / TEMPERATURE)
    probs /= probs.sum(-1, keepdims=True)
    reached = np.ones(len(sequences))
    marginals = [np.zeros(VOCAB) for _ in range(3)]
    for sequence, number in numbers.items():
        if sequence:
            parent = numbers[sequence[:-1]]
            reached[number] = reached[parent] * probs[parent, sequence[-1]]
        marginals[len(sequence)] += reached[number] * probs[number]
    return marginals
