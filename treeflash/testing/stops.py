"""Where a text ends, and prompts and budgets at their limits."""

from __future__ import annotations

from dataclasses import replace

from treeflash.config import DecodeConfig
from treeflash.decoding import decode
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Step
from treeflash.testing.comparisons import assert_equal_steps, tokens_of
from treeflash.testing.generations import check_generation, prompt_of
from treeflash.testing.margins import settled_generation
from treeflash.testing.pairs import PairMaker

CONFIG = DecodeConfig(budget=64, max_tokens=40)


class StopTests:
    """Mixin of `BackendSuite`."""

    def test_end_token_inside_an_accepted_path(self, pair: PairMaker) -> None:
        backend = pair().tested
        prompt, text, inside = text_with_new_token_inside_path(backend)
        config = replace(CONFIG, stop_token_ids=frozenset({text[inside]}))
        steps = list(decode(backend, prompt, config))
        assert tokens_of(steps) == text[: inside + 1]
        assert steps[-1].finish_reason == "stop"
        assert steps[-1].path is not None
        assert len(steps[-1].tokens) < len(steps[-1].path)

    def test_several_end_tokens(self, pair: PairMaker) -> None:
        backend = pair().tested
        prompt, text, inside = text_with_new_token_inside_path(backend)
        stops = {text[inside], text[inside + 1]} | set(range(backend.vocab_size)) - set(text)
        steps = list(decode(backend, prompt, replace(CONFIG, stop_token_ids=frozenset(stops))))
        first = min(text.index(stop) for stop in stops & set(text))
        assert tokens_of(steps) == text[: first + 1]
        assert steps[-1].finish_reason == "stop"

    def test_end_token_right_after_the_prompt(self, pair: PairMaker) -> None:
        backend = pair().tested
        prompt = prompt_of(backend, 0)
        first = tokens_of(list(decode(backend, prompt, CONFIG)))[0]
        (step,) = decode(backend, prompt, replace(CONFIG, stop_token_ids=frozenset({first})))
        assert step.tokens == (first,)
        assert step.finish_reason == "stop"

    def test_max_tokens_reached_inside_a_path(self, pair: PairMaker) -> None:
        """The tree is then no deeper than what can be emitted."""
        backend = pair().tested
        prompt, text, inside = text_with_new_token_inside_path(backend)
        steps = list(decode(backend, prompt, replace(CONFIG, max_tokens=inside + 1)))
        assert tokens_of(steps) == text[: inside + 1]
        assert steps[-1].finish_reason == "length"
        assert steps[-1].path is not None
        assert len(steps[-1].tokens) == len(steps[-1].path)

    def test_one_new_token(self, pair: PairMaker) -> None:
        backend = pair().tested
        prompt = prompt_of(backend, 0)
        expected = tokens_of(list(decode(backend, prompt, CONFIG)))[:1]
        (step,) = decode(backend, prompt, replace(CONFIG, max_tokens=1))
        assert list(step.tokens) == expected
        assert step.finish_reason == "length"

    def test_the_models_limit_ends_a_text(self, pair: PairMaker) -> None:
        models = pair(target={"max_positions": 32})
        assert models.tested.max_positions == 32
        prompt = prompt_of(models.tested, 0)
        expected = list(decode(models.reference, prompt, CONFIG))
        steps = list(decode(models.tested, prompt, CONFIG))
        assert tokens_of(steps) == tokens_of(expected)
        assert len(prompt) + len(tokens_of(steps)) == 32
        assert steps[-1].finish_reason == "length"

    def test_prompt_of_one_token(self, pair: PairMaker) -> None:
        models = pair()
        for token in range(0, models.tested.vocab_size, 5):
            expected = list(decode(models.reference, [token], CONFIG))
            assert tokens_of(list(decode(models.tested, [token], CONFIG))) == tokens_of(expected)

    def test_prompt_with_the_mask_token(self, pair: PairMaker) -> None:
        models = pair()
        assert models.tested.drafter_config is not None
        mask = models.tested.drafter_config.mask_token_id
        prompt = [3, mask, 5, mask, mask]
        expected = list(decode(models.reference, prompt, CONFIG))
        assert_equal_steps(list(decode(models.tested, prompt, CONFIG)), expected)

    def test_budget_beyond_the_table(self, pair: PairMaker) -> None:
        models = pair(drafter={"block_size": 3})
        config = replace(CONFIG, budget=1000, top_m=2, top_k_children=2, max_tokens=12)
        check_generation(models, config)
        _, steps = settled_generation(models.reference, config)
        sizes = [len(step.tree) for step in steps if step.tree is not None]
        assert max(sizes) <= 1 + 2 + 4


def text_with_new_token_inside_path(backend: Backend) -> tuple[list[int], list[int], int]:
    """A prompt, its text, and an index in it whose token came in the midst of an accepted path.

    That token and the next one do not occur before, so that stopping there is stopping first.
    """
    for seed in range(200):
        prompt = prompt_of(backend, seed)
        steps = list(decode(backend, prompt, CONFIG))
        text = tokens_of(steps)
        for inside in middles(steps):
            if text[inside] not in text[:inside] and text[inside + 1] not in text[: inside + 1]:
                return prompt, text, inside
    raise AssertionError("no text has a new token inside an accepted path")


def middles(steps: list[Step]) -> list[int]:
    """Indices in the text of tokens that are neither the first nor the last of their step."""
    found: list[int] = []
    start = 0
    for step in steps:
        found += range(start + 1, start + len(step.tokens) - 1)
        start += len(step.tokens)
    return found
