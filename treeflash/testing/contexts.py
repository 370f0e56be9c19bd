"""Long contexts, prefilled in pieces, across every size at which storage may be made anew."""

from __future__ import annotations

import numpy as np

from treeflash.config import DecodeConfig
from treeflash.decoding import decode
from treeflash.decoding.text_session import TextSession
from treeflash.testing.comparisons import (
    LONG_TOLERANCE,
    assert_close,
    assert_equal_states,
    tokens_of,
)
from treeflash.testing.pairs import PairMaker
from treeflash.testing.texts import path_to, random_tokens, random_tree

# Ends shortly before, at, and after multiples of 256, with commits of a few tokens in between.
PIECES = (250, 1, 1, 240, 3, 255, 1, 260, 1, 500, 17, 490, 2, 240)


class ContextTests:
    """Mixin of `BackendSuite`."""

    def test_long_contexts_match_reference(self, pair: PairMaker, family: str) -> None:
        models = pair(family)
        rng = np.random.default_rng(12)
        vocab_size = models.reference.vocab_size
        texts = [TextSession(backend, drafts=True, capacity=4096) for backend in models.both]
        for piece in PIECES:
            tokens = random_tokens(rng, vocab_size, piece)
            (root,) = random_tokens(rng, vocab_size, 1)
            tree = random_tree(rng, root, 20, vocab_size)
            path = path_to(tree, int(rng.integers(len(tree))))
            logits = []
            for text in texts:
                text.extend(tokens)
                text.draft(root)
                logits.append(text.logits(tree))
                text.commit(path)
                text.draft(root)
            assert_close(*logits, tolerance=LONG_TOLERANCE)
        assert texts[0].length == texts[1].length > 2300
        assert_equal_states(*(text.state for text in texts), tolerance=LONG_TOLERANCE)
        assert_close(
            *(text.state.drafter_keys_values() for text in texts), tolerance=LONG_TOLERANCE
        )

    def test_pieces_equal_one_prefill(self, pair: PairMaker, family: str) -> None:
        backend = pair(family).tested
        tokens = random_tokens(np.random.default_rng(13), backend.vocab_size, 300)
        assert backend.drafter is not None
        whole = TextSession(backend, drafts=True)
        expected = whole.extend(tokens)
        log_probs = backend.drafter.log_probs(whole.draft(expected))
        for drafts_each in (True, False):  # the drafter reads the pieces one by one, or together
            pieces = TextSession(backend, drafts=True)
            for first, last in ((0, 1), (1, 30), (30, 257), (257, 300)):
                chosen = pieces.extend(tokens[first:last])
                if drafts_each or last == 300:
                    block = pieces.draft(chosen)
            assert chosen == expected
            assert_close(backend.drafter.log_probs(block), log_probs)
            assert pieces.length == whole.length == 300
            assert_equal_states(pieces.state, whole.state)
            assert_close(pieces.state.drafter_keys_values(), whole.state.drafter_keys_values())

    def test_a_draft_can_be_repeated(self, pair: PairMaker) -> None:
        """Of two texts drafted together, one may fail later; both are then drafted anew."""
        backend = pair().tested
        assert backend.drafter is not None
        text = TextSession(backend, drafts=True)
        root = text.extend(random_tokens(np.random.default_rng(16), backend.vocab_size, 30))
        drafts = [backend.drafter.log_probs(text.draft(root)) for _ in range(2)]
        assert_close(*drafts)

    def test_trees_larger_than_the_text(self, pair: PairMaker) -> None:
        """Storage must have room for the whole tree, though little of it is ever committed."""
        models = pair()
        rng = np.random.default_rng(15)
        tree = random_tree(rng, 3, 1100, models.reference.vocab_size)
        tokens = random_tokens(rng, models.reference.vocab_size, 5)
        texts = [TextSession(backend, capacity=1200) for backend in models.both]
        for text in texts:
            text.extend(tokens)
        assert_close(*(text.logits(tree) for text in texts))
        for text in texts:
            text.commit(path_to(tree, len(tree) - 1))
        assert_close(*(text.state.keys_values() for text in texts))

    def test_long_texts_equal_plain_decoding(self, pair: PairMaker) -> None:
        backend = pair().tested
        prompt = random_tokens(np.random.default_rng(14), backend.vocab_size, 200)
        texts = [
            tokens_of(list(decode(backend, prompt, DecodeConfig(method=method, max_tokens=340))))
            for method in ("ar", "treeflash")
        ]
        assert len(texts[0]) == 340
        assert texts[1] == texts[0]
