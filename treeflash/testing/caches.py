"""After any commits the caches are those of a fresh prefill of the same tokens."""

from __future__ import annotations

import numpy as np

from treeflash.decoding.interfaces import Backend
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.testing.comparisons import (
    assert_close,
    assert_equal_states,
    assert_equal_tables,
)
from treeflash.testing.pairs import PairMaker
from treeflash.testing.texts import path_to, random_tokens, random_tree

ROUNDS = 12


class CacheTests:
    """Mixin of `BackendSuite`."""

    def test_verifier_cache_equals_prefill(self, pair: PairMaker, family: str) -> None:
        backend = pair(family).tested
        text = CommittedText(backend, seed=5)
        for _ in range(ROUNDS):
            text.commit_random_path()
        fresh = TextSession(backend)
        fresh.extend(text.tokens)
        assert text.length == fresh.length == len(text.tokens)
        assert_equal_states(text.state, fresh.state)
        root = DraftTree.root_only(text.root)
        assert_close(text.logits(root), fresh.logits(root))

    def test_drafter_cache_equals_prefill(self, pair: PairMaker, family: str) -> None:
        check_drafter_cache(pair(family).tested)

    def test_sliding_drafter_cache_equals_prefill(self, pair: PairMaker) -> None:
        check_drafter_cache(pair(drafter={"sliding_window": 4}).tested)

    def test_keys_values_match_reference(self, pair: PairMaker, family: str) -> None:
        texts = [CommittedText(backend, seed=6) for backend in pair(family).both]
        for text in texts:
            for _ in range(3):
                text.commit_random_path()
        tested, reference = texts
        assert tested.tokens == reference.tokens
        assert_equal_states(tested.state, reference.state)
        assert_close(tested.state.drafter_keys_values(), reference.state.drafter_keys_values())

    def test_verifying_again_replaces_the_tree(self, pair: PairMaker, representative: str) -> None:
        backend = pair(representative).tested
        rng = np.random.default_rng(7)
        once, twice = CommittedText(backend, seed=8), CommittedText(backend, seed=8)
        tree = random_tree(rng, once.root, 20, backend.vocab_size)
        twice.verify(random_tree(rng, once.root, 33, backend.vocab_size))
        path = path_to(tree, len(tree) - 1)
        for text in (once, twice):
            text.verify(tree)
            text.commit(path)
        assert_equal_states(twice.state, once.state)

    def test_a_tree_that_is_not_committed_leaves_no_trace(
        self, pair: PairMaker, representative: str
    ) -> None:
        backend = pair(representative).tested
        never, verified = CommittedText(backend, seed=12), CommittedText(backend, seed=12)
        tree = random_tree(np.random.default_rng(13), verified.root, 20, backend.vocab_size)
        verified.verify(tree)
        assert_equal_states(verified.state, never.state)
        for text in (never, verified):
            text.extend([3, 4, 5])
        assert_equal_states(verified.state, never.state)

    def test_two_texts_do_not_disturb_each_other(
        self, pair: PairMaker, representative: str
    ) -> None:
        backend = pair(representative).tested
        first, second = CommittedText(backend, seed=9), CommittedText(backend, seed=10)
        for _ in range(ROUNDS):
            first.commit_random_path()
            second.commit_random_path()
        for together, seed in ((first, 9), (second, 10)):
            alone = CommittedText(backend, seed=seed)
            for _ in range(ROUNDS):
                alone.commit_random_path()
            assert together.tokens == alone.tokens
            assert_equal_states(together.state, alone.state)
            assert_close(together.state.drafter_keys_values(), alone.state.drafter_keys_values())

    def test_a_text_that_is_not_drafted_for(self, pair: PairMaker) -> None:
        text = TextSession(pair().tested)
        root = text.extend([1, 2, 3])
        text.verify(DraftTree.root_only(root))
        text.commit(np.zeros(1, np.int32))
        assert text.length == 4


class CommittedText(TextSession):
    """A text that grows by random paths of random trees, whatever the target would choose.

    Attributes:
        tokens: of the committed positions.
        root: at the next position.
        table: marginals after the latest draft.
    """

    def __init__(self, backend: Backend, *, seed: int) -> None:
        """Start with a random prompt."""
        super().__init__(backend, drafts=True)
        self.rng = np.random.default_rng(seed)
        self.tokens = random_tokens(self.rng, backend.vocab_size, int(self.rng.integers(1, 9)))
        self.extend(self.tokens)
        self._draft()

    def commit_random_path(self) -> None:
        """Verify a random tree, commit a path of it, and draft."""
        nodes = int(self.rng.integers(1, 40))
        tree = random_tree(self.rng, self.root, nodes, self.backend.vocab_size)
        path = path_to(tree, int(self.rng.integers(len(tree))))
        self.verify(tree)
        self.commit(path)
        self.tokens += tree.tokens[path].tolist()
        self._draft()

    def _draft(self) -> None:
        assert self.backend.drafter is not None
        (self.root,) = random_tokens(self.rng, self.backend.vocab_size, 1)
        block = self.draft(self.root)
        self.table: TransitionTable
        (self.table,) = self.backend.drafter.marginals([block], self.backend.vocab_size, 1.0)


def check_drafter_cache(backend: Backend) -> None:
    """Compare a drafter that followed random commits with one that starts after them."""
    assert backend.drafter is not None
    text = CommittedText(backend, seed=11)
    for _ in range(ROUNDS):
        text.commit_random_path()
    fresh = TextSession(backend, drafts=True)
    fresh.extend(text.tokens)
    block = fresh.draft(text.root)
    assert_close(text.state.drafter_keys_values(), fresh.state.drafter_keys_values())
    (table,) = backend.drafter.marginals([block], backend.vocab_size, 1.0)
    assert_equal_tables(text.table, table)
