"""Whole generations agree with the reference, iteration by iteration, and with plain decoding."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, Method, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Step
from treeflash.decoding.verify_costs import SIZES, VerifyCosts
from treeflash.testing.comparisons import assert_equal_steps, tokens_of
from treeflash.testing.margins import settled_generation
from treeflash.testing.pairs import Pair, PairMaker
from treeflash.testing.samplings import SAMPLINGS
from treeflash.testing.texts import random_tokens

MAX_TOKENS = 10
BUDGETS = (1, 2, 16, 64, 256)
DRAFTING = METHODS[1:]
TREES: tuple[Method, ...] = ("ddtree", "treeflash")

each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)


class GenerationTests:
    """Mixin of `BackendSuite`."""

    @each_sampling
    @pytest.mark.parametrize("budget", BUDGETS)
    @pytest.mark.parametrize("method", DRAFTING)
    def test_iterations_match_reference(
        self, pair: PairMaker, method: Method, budget: int, sampling: SamplingConfig
    ) -> None:
        check_generation(
            pair(),
            DecodeConfig(method=method, budget=budget, sampling=sampling, max_tokens=MAX_TOKENS),
        )

    @pytest.mark.parametrize(
        "sampling", [SAMPLINGS["greedy"], SAMPLINGS["all"]], ids=["greedy", "all"]
    )
    @pytest.mark.parametrize("method", TREES)
    def test_iterations_of_each_family_match_reference(
        self, pair: PairMaker, family: str, method: Method, sampling: SamplingConfig
    ) -> None:
        check_generation(
            pair(family),
            DecodeConfig(method=method, budget=24, sampling=sampling, max_tokens=MAX_TOKENS),
        )

    @each_sampling
    def test_plain_decoding_matches_reference(
        self, pair: PairMaker, sampling: SamplingConfig
    ) -> None:
        models = pair()
        config = DecodeConfig(method="ar", sampling=sampling, max_tokens=40)
        prompt, expected = settled_generation(models.reference, config)
        assert_equal_steps(list(decode(models.tested, prompt, config)), expected)

    def test_sliding_drafter_matches_reference(self, pair: PairMaker) -> None:
        models = pair(drafter={"sliding_window": 4})
        check_generation(models, DecodeConfig(budget=24, max_tokens=24))

    def test_settings_of_the_tree_match_reference(self, pair: PairMaker) -> None:
        check_generation(
            pair(),
            DecodeConfig(
                budget=12, top_m=3, top_k_children=5, draft_temperature=0.7, max_tokens=MAX_TOKENS
            ),
        )

    @each_sampling
    @pytest.mark.parametrize("method", DRAFTING)
    def test_budget_auto_equals_plain_decoding(
        self, pair: PairMaker, method: Method, sampling: SamplingConfig
    ) -> None:
        """Whatever it verifies, and though it rests."""
        models = pair()
        prompt = prompt_of(models.reference, 3)
        config = DecodeConfig(method=method, budget="auto", sampling=sampling, max_tokens=40)
        plain = DecodeConfig(method="ar", sampling=sampling, max_tokens=40)
        # Drafting always pays, then it never does.
        for costs, rests in (
            (dict.fromkeys(SIZES, 1.0), False),
            ({size: 1e-6 * size**3 for size in SIZES}, True),
        ):
            steps = list(decode(models.tested, prompt, config, AdaptiveBudget(VerifyCosts(costs))))
            assert tokens_of(steps) == tokens_of(list(decode(models.tested, prompt, plain)))
            # The prefill drafts nothing, nor does an iteration that can bring one token alone.
            assert any(step.table is None for step in steps[1:-1]) == rests

    @pytest.mark.parametrize("size", [1, 6])
    @pytest.mark.parametrize("what", ["head_vocab", "head_rows"])
    def test_a_head_that_scores_less_equals_plain_decoding(
        self, pair: PairMaker, what: str, size: int
    ) -> None:
        models = pair()
        prompt = prompt_of(models.reference, 4)
        plain = tokens_of(
            list(decode(models.tested, prompt, DecodeConfig(method="ar", max_tokens=40)))
        )
        settings: dict[str, Any] = {what: size, "max_tokens": 40}
        steps = list(decode(models.tested, prompt, DecodeConfig(**settings)))
        assert tokens_of(steps) == plain

    @pytest.mark.parametrize("method", DRAFTING)
    def test_several_drafts_are_accepted_at_once(self, pair: PairMaker, method: Method) -> None:
        """The other tests would mean little if the drafts were always wrong."""
        models = pair()
        config = DecodeConfig(method=method, budget=64, max_tokens=24)
        paths = [
            len(step.path)
            for seed in range(8)
            for step in decode(models.tested, prompt_of(models.reference, seed), config)
            if step.path is not None
        ]
        assert max(paths) >= (3 if method in TREES else 2)
        assert sum(length >= 2 for length in paths) >= 8

    def test_interleaved_texts_equal_texts_alone(self, pair: PairMaker) -> None:
        backend = pair().tested
        configs = [
            DecodeConfig(budget=16, max_tokens=MAX_TOKENS),
            DecodeConfig(method="ddtree", budget=8, max_tokens=MAX_TOKENS),
        ]
        prompts = [prompt_of(backend, seed) for seed in (1, 2)]
        alone = [list(decode(backend, *text)) for text in zip(prompts, configs, strict=True)]
        running = [decode(backend, *text) for text in zip(prompts, configs, strict=True)]
        together: list[list[Step]] = [[], []]
        for turn in zip_longest(*running):
            for steps, step in zip(together, turn, strict=True):
                steps += [step] if step else []
        for mine, theirs in zip(together, alone, strict=True):
            assert_equal_steps(mine, theirs)


def check_generation(pair: Pair, config: DecodeConfig) -> None:
    """Compare with the reference step by step, and with the backend's own plain decoding."""
    prompt, expected = settled_generation(pair.reference, config)
    steps = list(decode(pair.tested, prompt, config))
    assert_equal_steps(steps, expected)
    plain = list(decode(pair.tested, prompt, replace(config, method="ar")))
    assert tokens_of(steps) == tokens_of(plain)


def prompt_of(backend: Backend, seed: int) -> list[int]:
    """A short random prompt."""
    return random_tokens(np.random.default_rng(seed), backend.vocab_size, 7)
