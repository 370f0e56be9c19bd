"""Calls with several texts do to each what calls with that text alone would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from treeflash.decoding.gumbel import Noise
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.text_state import TextState
from treeflash.decoding.tree import DraftTree
from treeflash.testing.comparisons import assert_close, assert_equal_states, assert_equal_tables
from treeflash.testing.pairs import PairMaker
from treeflash.testing.repeated import repeated
from treeflash.testing.texts import path_to, random_tokens, random_tree
from treeflash.testing.transitions import noise_of_depths


class BatchTests:
    """Mixin of `BackendSuite`."""

    @repeated
    @given(seed=st.integers(0, 10**6))
    def test_states_equal_prefills_after_forks_and_truncations(
        self, pair: PairMaker, representative: str, seed: int
    ) -> None:
        backend = pair(representative).tested
        rng = np.random.default_rng(seed)
        texts = [StateText(backend, rng) for _ in range(3)]
        for _ in range(12):
            text = texts[int(rng.integers(len(texts)))]
            match int(rng.integers(6)):
                case 0:
                    text.truncate()
                case 1:
                    texts.append(text.fork())
                case 2 if len(texts) > 2:
                    texts.remove(text)
                    text.close()
                case 3:
                    text.state.snapshot()
                case _:
                    advance(backend, rng, [x for x in texts if rng.random() < 0.7])
        for text in texts:
            text.check()

    @repeated
    @given(seed=st.integers(0, 10**6))
    def test_logits_of_a_batch_equal_those_alone(
        self, pair: PairMaker, representative: str, seed: int
    ) -> None:
        backend = pair(representative).tested
        rng = np.random.default_rng(seed)
        texts = [StateText(backend, rng) for _ in range(int(rng.integers(2, 5)))]
        trees = [text.tree() for text in texts]
        states = [text.state for text in texts]
        together = backend.verifier.logits(list(zip(states, trees, strict=True)))
        for state, tree, logits in zip(states, trees, together, strict=True):
            (alone,) = backend.verifier.logits([(state, tree)])
            assert_close(logits, alone)

    @repeated
    @given(seed=st.integers(0, 10**6))
    def test_drafts_of_a_batch_equal_those_alone(self, pair: PairMaker, seed: int) -> None:
        backend = pair().tested
        drafter, head = backend.drafter, backend.head
        assert drafter is not None
        assert head is not None
        rng = np.random.default_rng(seed)
        texts = [StateText(backend, rng) for _ in range(int(rng.integers(2, 5)))]
        roots = random_tokens(rng, backend.vocab_size, len(texts))
        forks = [text.state.fork(text.length, 400) for text in texts]

        def draft(
            states: Sequence[TextState], roots: Sequence[int], noise: Noise | None
        ) -> list[Any]:
            blocks = drafter.draft(list(zip(states, roots, strict=True)))
            marginals = drafter.marginals(blocks, 5, 0.8, noise)
            tables = head.transitions(blocks, 4, 5, 0.8, noise=noise)
            few = head.transitions(blocks, 4, 5, 0.8, noise=noise, shortlist=12, rows=9)
            log_probs = [drafter.log_probs(block) for block in blocks]
            return list(zip(log_probs, marginals, tables, few, strict=True))

        noise = noise_of_depths(backend, 0.7, len(texts)) if rng.random() < 0.5 else None
        together = draft([text.state for text in texts], roots, noise)
        parts = [None] * len(texts) if noise is None else noise.split(len(texts))
        alone = zip(forks, roots, parts, together, strict=True)
        for fork, root, part, (log_probs, *tables) in alone:
            ((expected, *expected_tables),) = draft([fork], [root], part)
            assert_close(log_probs, expected)
            for table, other in zip(tables, expected_tables, strict=True):
                assert_equal_tables(table, other)


class StateText(TextSession):
    """A text that grows by random tokens and paths, is truncated and forked.

    Attributes:
        rng: decides.
        tokens: of the committed positions.
    """

    def __init__(self, backend: Backend, rng: np.random.Generator) -> None:
        """Start with a random prompt."""
        super().__init__(backend, drafts=True, capacity=400)
        self.rng = rng
        self.tokens = random_tokens(rng, backend.vocab_size, int(rng.integers(1, 12)))
        self.extend(self.tokens)

    def tree(self) -> DraftTree:
        """A random tree."""
        vocab_size = self.backend.vocab_size
        (root,) = random_tokens(self.rng, vocab_size, 1)
        return random_tree(self.rng, root, int(self.rng.integers(1, 20)), vocab_size)

    def truncate(self) -> None:
        """Drop some of the last positions."""
        length = self.restorable()
        self.state.truncate(length)
        del self.tokens[length:]

    def fork(self) -> StateText:
        """A text that begins like this one."""
        length = self.restorable()
        new = StateText.__new__(StateText)
        new.backend, new.rng, new.tokens = self.backend, self.rng, self.tokens[:length]
        new.state = self.state.fork(length, 400)
        return new

    def restorable(self) -> int:
        """A length to go back to, at least 1."""
        length = self.state.restorable(int(self.rng.integers(1, len(self.tokens) + 1)))
        return length or len(self.tokens)

    def check(self) -> None:
        """Compare with a fresh prefill: keys and values, what follows, and what is drafted."""
        assert self.backend.drafter is not None
        fresh = TextSession(self.backend, drafts=True, capacity=400)
        fresh.extend(self.tokens)
        assert self.length == fresh.length == len(self.tokens)
        assert_equal_states(self.state, fresh.state)
        tree = self.tree()
        assert_close(self.logits(tree), fresh.logits(tree))
        blocks = [text.draft(int(tree.tokens[0])) for text in (self, fresh)]
        assert_close(*(self.backend.drafter.log_probs(block) for block in blocks))
        assert_close(self.state.drafter_keys_values(), fresh.state.drafter_keys_values())


def advance(backend: Backend, rng: np.random.Generator, texts: Sequence[StateText]) -> None:
    """Verify and commit random trees of some texts together; some of them are drafted for."""
    if not texts:
        return
    assert backend.drafter is not None
    trees = [text.tree() for text in texts]
    paths = [path_to(tree, int(rng.integers(len(tree)))) for tree in trees]
    states = [text.state for text in texts]
    backend.verifier.logits(list(zip(states, trees, strict=True)))
    backend.verifier.commit(list(zip(states, paths, strict=True)))
    for text, tree, path in zip(texts, trees, paths, strict=True):
        text.tokens += tree.tokens[path].tolist()
    if rng.random() < 0.5:
        backend.drafter.draft([(state, 1) for state in states])
