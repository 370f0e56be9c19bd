"""After any commits the caches are those of a fresh prefill of the same tokens."""

from __future__ import annotations

import numpy as np

from treeflash.decoding.interfaces import Backend
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.testing.comparisons import assert_close, assert_equal_tables
from treeflash.testing.pairs import PairMaker
from treeflash.testing.samplings import GREEDY
from treeflash.testing.texts import path_to, random_tokens, random_tree

ROUNDS = 12


class CacheTests:
    """Mixin of `BackendSuite`."""

    def test_verifier_cache_equals_prefill(self, pair: PairMaker, family: str) -> None:
        backend = pair(family).tested
        text = CommittedText(backend, seed=5)
        for _ in range(ROUNDS):
            text.commit_random_path()
        fresh = backend.verifier(features=False)
        fresh.prefill(text.tokens, GREEDY, None)
        assert text.verifier.length == fresh.length == len(text.tokens)
        assert_close(text.verifier.keys_values(), fresh.keys_values())
        root = DraftTree.root_only(text.root)
        assert_close(text.verifier.logits(root), fresh.logits(root))

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
        assert_close(tested.verifier.keys_values(), reference.verifier.keys_values())
        assert_close(tested.drafter.keys_values(), reference.drafter.keys_values())

    def test_verifying_again_replaces_the_tree(self, pair: PairMaker) -> None:
        backend = pair().tested
        rng = np.random.default_rng(7)
        once, twice = CommittedText(backend, seed=8), CommittedText(backend, seed=8)
        tree = random_tree(rng, once.root, 20, backend.vocab_size)
        twice.verifier.verify(random_tree(rng, once.root, 33, backend.vocab_size), GREEDY, None)
        path = path_to(tree, len(tree) - 1)
        for text in (once, twice):
            text.verifier.verify(tree, GREEDY, None)
            text.verifier.commit(path)
        assert_close(twice.verifier.keys_values(), once.verifier.keys_values())

    def test_a_tree_that_is_not_committed_leaves_no_trace(self, pair: PairMaker) -> None:
        backend = pair().tested
        never, verified = CommittedText(backend, seed=12), CommittedText(backend, seed=12)
        tree = random_tree(np.random.default_rng(13), verified.root, 20, backend.vocab_size)
        verified.verifier.verify(tree, GREEDY, None)
        assert_close(verified.verifier.keys_values(), never.verifier.keys_values())
        for text in (never, verified):
            text.verifier.prefill([3, 4, 5], GREEDY, None)
        assert_close(verified.verifier.keys_values(), never.verifier.keys_values())

    def test_two_texts_do_not_disturb_each_other(self, pair: PairMaker) -> None:
        backend = pair().tested
        first, second = CommittedText(backend, seed=9), CommittedText(backend, seed=10)
        for _ in range(ROUNDS):
            first.commit_random_path()
            second.commit_random_path()
        for together, seed in ((first, 9), (second, 10)):
            alone = CommittedText(backend, seed=seed)
            for _ in range(ROUNDS):
                alone.commit_random_path()
            assert together.tokens == alone.tokens
            assert_close(together.verifier.keys_values(), alone.verifier.keys_values())
            assert_close(together.drafter.keys_values(), alone.drafter.keys_values())

    def test_a_verifier_without_features_gives_none(self, pair: PairMaker) -> None:
        verifier = pair().tested.verifier(features=False)
        root, features = verifier.prefill([1, 2, 3], GREEDY, None)
        assert features is None
        verifier.verify(DraftTree.root_only(root), GREEDY, None)
        assert verifier.commit(np.zeros(1, np.int32)) is None
        assert verifier.length == 4


class CommittedText:
    """A text that grows by random paths of random trees, whatever the target would choose.

    Attributes:
        tokens: of the committed positions.
        root: at the next position.
        table: marginals after the latest draft.
    """

    def __init__(self, backend: Backend, *, seed: int) -> None:
        """Start with a random prompt."""
        self.rng = np.random.default_rng(seed)
        self.vocab_size = backend.vocab_size
        self.verifier = backend.verifier(features=True)
        self.drafter = backend.drafter()
        self.tokens = random_tokens(self.rng, self.vocab_size, int(self.rng.integers(1, 9)))
        _, features = self.verifier.prefill(self.tokens, GREEDY, None)
        self._draft(features)

    def commit_random_path(self) -> None:
        """Verify a random tree, commit a path of it, and draft."""
        tree = random_tree(self.rng, self.root, int(self.rng.integers(1, 40)), self.vocab_size)
        path = path_to(tree, int(self.rng.integers(len(tree))))
        self.verifier.verify(tree, GREEDY, None)
        features = self.verifier.commit(path)
        self.tokens += tree.tokens[path].tolist()
        self._draft(features)

    def _draft(self, features: object) -> None:
        (self.root,) = random_tokens(self.rng, self.vocab_size, 1)
        block = self.drafter.draft(features, self.root)
        self.table: TransitionTable = self.drafter.marginals(block, self.vocab_size, 1.0)


def check_drafter_cache(backend: Backend) -> None:
    """Compare a drafter that followed random commits with one that starts after them."""
    text = CommittedText(backend, seed=11)
    for _ in range(ROUNDS):
        text.commit_random_path()
    _, features = backend.verifier(features=True).prefill(text.tokens, GREEDY, None)
    fresh = backend.drafter()
    block = fresh.draft(features, text.root)
    assert_close(text.drafter.keys_values(), fresh.keys_values())
    assert_equal_tables(text.table, fresh.marginals(block, backend.vocab_size, 1.0))
