"""Recurrent layers of hybrid targets: states after commits, passes in between, and snapshots."""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, Method, SamplingConfig
from treeflash.decoding import Request, Scheduler, Step, decode
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.testing.comparisons import assert_close, assert_equal_states, tokens_of
from treeflash.testing.pairs import PairMaker
from treeflash.testing.samplings import SAMPLINGS
from treeflash.testing.texts import path_to, random_tokens, random_tree

PROMPT = 9


class RecurrenceTests:
    """Mixin of `BackendSuite`."""

    def test_states_match_reference(self, pair: PairMaker, hybrid: str) -> None:
        """Whatever is verified in between: only a commit changes them."""
        models = pair(hybrid)
        rng = np.random.default_rng(21)
        vocab_size = models.reference.vocab_size
        texts = [TextSession(backend) for backend in models.both]
        prompt = random_tokens(rng, vocab_size, PROMPT)
        for text in texts:
            text.extend(prompt)
        for nodes in (1, 16, 5, 1, 33, 2):
            tree = random_tree(rng, 3, nodes, vocab_size)
            path = path_to(tree, int(rng.integers(nodes)))
            ignored = random_tree(rng, 4, 9, vocab_size)
            for text in texts:
                text.logits(ignored)
                text.logits(DraftTree.root_only(5))
                text.logits(tree)
                text.commit(path)
            assert_equal_states(*(text.state for text in texts))
        assert len(texts[0].state.states()) >= 2

    def test_part_of_a_chain_can_be_committed(self, pair: PairMaker, hybrid: str) -> None:
        backend = pair(hybrid).tested
        chain = DraftTree.chain(np.array([3, 4, 5, 6, 7, 8], np.int32))
        for kept in (1, 2, 5, 6):
            text, fresh = TextSession(backend), TextSession(backend)
            text.extend([1, 2])
            text.logits(chain)
            text.commit(np.arange(kept, dtype=np.int32))
            fresh.extend([1, 2, *chain.tokens[:kept].tolist()])
            assert_equal_states(text.state, fresh.state)

    def test_texts_shorter_than_a_convolution(self, pair: PairMaker, hybrid: str) -> None:
        models = pair(hybrid)
        tree = random_tree(np.random.default_rng(22), 3, 12, models.reference.vocab_size)
        for length in (1, 2, 3):
            texts = [TextSession(backend) for backend in models.both]
            for text in texts:
                text.extend(list(range(1, 1 + length)))
            assert_close(*(text.logits(tree) for text in texts))
            for text in texts:
                text.commit(path_to(tree, 1))
            assert_equal_states(*(text.state for text in texts))

    def test_a_state_is_restored_where_a_snapshot_was_taken(
        self, pair: PairMaker, hybrid: str
    ) -> None:
        backend = pair(hybrid).tested
        tokens = random_tokens(np.random.default_rng(23), backend.vocab_size, 12)
        text = TextSession(backend, drafts=True)
        assert text.state.needs_snapshots
        text.extend(tokens[:5])
        before = text.state.nbytes
        text.state.snapshot()
        text.extend(tokens[5:])
        assert text.state.nbytes > before
        assert [text.state.restorable(n) for n in (4, 5, 11, 12, 99)] == [0, 5, 5, 12, 12]
        whole = text.state.fork(12, 40)
        short = text.state.fork(5, 40)
        text.state.truncate(5)
        for state, length in ((whole, 12), (short, 5), (text.state, 5)):
            with TextSession(backend, drafts=True) as fresh:
                fresh.extend(tokens[:length])
                assert state.length == length
                assert_equal_states(state, fresh.state)
        text.extend(tokens[5:])
        assert_equal_states(text.state, whole)
        assert [text.state.restorable(n) for n in (5, 11)] == [5, 5]
        text.state.truncate(0)
        assert text.state.length == 0

    def test_two_prompts_in_one_pass(self, pair: PairMaker, hybrid: str) -> None:
        """A short one leaves the state of a long one alone, and the other way round."""
        backend = pair(hybrid).tested
        rng = np.random.default_rng(24)
        prompts = [random_tokens(rng, backend.vocab_size, n) for n in (1, 30, 2)]
        scheduler = Scheduler(backend)
        config = DecodeConfig(method="ddtree", budget=8, max_tokens=12)
        tickets = [
            scheduler.submit(Request(prompt_ids=prompt, config=config)) for prompt in prompts
        ]
        texts: dict[int, list[int]] = {ticket: [] for ticket in tickets}
        while scheduler.busy:
            for ticket, event in scheduler.step():
                assert not isinstance(event, Exception), event
                texts[ticket] += event.tokens
        for prompt, ticket in zip(prompts, tickets, strict=True):
            assert texts[ticket] == tokens_of(list(decode(backend, prompt, config)))

    def test_a_prompt_that_was_run_before_is_forked(self, pair: PairMaker, hybrid: str) -> None:
        backend = pair(hybrid).tested
        prompt = random_tokens(np.random.default_rng(25), backend.vocab_size, 20)
        config = DecodeConfig(method="ar", max_tokens=6)
        cache = PrefixCache(1 << 30)
        scheduler = Scheduler(backend, prefix_cache=cache)

        def answer(text: list[int], cached: int) -> list[int]:
            scheduler.submit(Request(prompt_ids=text, config=config))
            steps: list[Step] = []
            while scheduler.busy:
                steps += [event for _, event in scheduler.step() if isinstance(event, Step)]
            assert steps[0].cached_tokens == cached
            assert tokens_of(steps) == tokens_of(list(decode(backend, text, config)))
            return tokens_of(steps)

        tokens = answer(prompt, 0)
        answer([*prompt, *tokens, 9, 8], len(prompt) + len(tokens) - 1)  # continues the text
        answer([*prompt, 5, 6, 7], len(prompt) - 1)  # leaves it after the prompt
        cache.close()

    @pytest.mark.parametrize(
        "sampling", [SAMPLINGS["greedy"], SAMPLINGS["all"]], ids=["greedy", "all"]
    )
    @pytest.mark.parametrize("method", METHODS[1:])
    def test_hybrid_texts_equal_plain_decoding(
        self, pair: PairMaker, hybrid: str, method: Method, sampling: SamplingConfig
    ) -> None:
        backend = pair(hybrid).tested
        prompt = random_tokens(np.random.default_rng(26), backend.vocab_size, PROMPT)
        plain = DecodeConfig(method="ar", max_tokens=60, sampling=sampling)
        drafted = DecodeConfig(method=method, budget=16, max_tokens=60, sampling=sampling)
        assert tokens_of(list(decode(backend, prompt, drafted))) == tokens_of(
            list(decode(backend, prompt, plain))
        )
