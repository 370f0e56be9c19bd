"""Long contexts, prefilled in pieces, across every size at which storage may be made anew."""

from __future__ import annotations

import numpy as np

from treeflash.config import DecodeConfig
from treeflash.decoding import decode
from treeflash.testing.comparisons import LONG_TOLERANCE, assert_close, tokens_of
from treeflash.testing.pairs import PairMaker
from treeflash.testing.samplings import GREEDY
from treeflash.testing.texts import path_to, random_tokens, random_tree

# Ends shortly before, at, and after multiples of 256, with commits of a few tokens in between.
PIECES = (250, 1, 1, 240, 3, 255, 1, 260, 1, 500, 17, 490, 2, 240)


class ContextTests:
    """Mixin of `BackendSuite`."""

    def test_long_contexts_match_reference(self, pair: PairMaker, family: str) -> None:
        models = pair(family)
        rng = np.random.default_rng(12)
        vocab_size = models.reference.vocab_size
        verifiers = [backend.verifier(features=True) for backend in models.both]
        drafters = [backend.drafter() for backend in models.both]
        for piece in PIECES:
            tokens = random_tokens(rng, vocab_size, piece)
            (root,) = random_tokens(rng, vocab_size, 1)
            tree = random_tree(rng, root, 20, vocab_size)
            path = path_to(tree, int(rng.integers(len(tree))))
            logits = []
            for verifier, drafter in zip(verifiers, drafters, strict=True):
                _, features = verifier.prefill(tokens, GREEDY, None)
                drafter.draft(features, root)
                logits.append(verifier.logits(tree))
                drafter.draft(verifier.commit(path), root)
            assert_close(*logits, tolerance=LONG_TOLERANCE)
        assert verifiers[0].length == verifiers[1].length > 2300
        assert_close(*(verifier.keys_values() for verifier in verifiers), tolerance=LONG_TOLERANCE)
        assert_close(*(drafter.keys_values() for drafter in drafters), tolerance=LONG_TOLERANCE)

    def test_pieces_equal_one_prefill(self, pair: PairMaker, family: str) -> None:
        backend = pair(family).tested
        tokens = random_tokens(np.random.default_rng(13), backend.vocab_size, 300)
        whole = backend.verifier(features=True)
        pieces = backend.verifier(features=True)
        drafters = [backend.drafter() for _ in range(3)]
        expected, features = whole.prefill(tokens, GREEDY, None)
        blocks = [drafters[0].draft(features, expected)]
        for first, last in ((0, 1), (1, 30), (30, 257), (257, 300)):
            chosen, features = pieces.prefill(tokens[first:last], GREEDY, None)
            block = drafters[1].draft(features, chosen)
            if last < 300:
                drafters[2].extend(features)
        blocks += [block, drafters[2].draft(features, chosen)]
        assert chosen == expected
        for other, block in zip(drafters[1:], blocks[1:], strict=True):
            assert_close(other.log_probs(block), drafters[0].log_probs(blocks[0]))
            assert_close(other.keys_values(), drafters[0].keys_values())
        assert pieces.length == whole.length == 300
        assert_close(pieces.keys_values(), whole.keys_values())

    def test_trees_larger_than_the_text(self, pair: PairMaker) -> None:
        """Storage must have room for the whole tree, though little of it is ever committed."""
        models = pair()
        rng = np.random.default_rng(15)
        tree = random_tree(rng, 3, 1100, models.reference.vocab_size)
        tokens = random_tokens(rng, models.reference.vocab_size, 5)
        verifiers = [backend.verifier(features=False) for backend in models.both]
        for verifier in verifiers:
            verifier.prefill(tokens, GREEDY, None)
        assert_close(*(verifier.logits(tree) for verifier in verifiers))
        for verifier in verifiers:
            verifier.commit(path_to(tree, len(tree) - 1))
        assert_close(*(verifier.keys_values() for verifier in verifiers))

    def test_long_texts_equal_plain_decoding(self, pair: PairMaker) -> None:
        backend = pair().tested
        prompt = random_tokens(np.random.default_rng(14), backend.vocab_size, 200)
        texts = [
            tokens_of(list(decode(backend, prompt, DecodeConfig(method=method, max_tokens=340))))
            for method in ("ar", "treeflash")
        ]
        assert len(texts[0]) == 340
        assert texts[1] == texts[0]
