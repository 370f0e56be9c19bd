"""Every node of a tree sees the committed text and its own ancestors, at its own position."""

from __future__ import annotations

import numpy as np

from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.testing.comparisons import assert_close
from treeflash.testing.pairs import PairMaker
from treeflash.testing.texts import chain_to, path_to, random_tokens, random_tree

NODES = 24
PROMPT = 13  # longer than the window of the sliding family


class MaskTests:
    """Mixin of `BackendSuite`."""

    def test_nodes_see_their_paths_alone(self, pair: PairMaker, family: str) -> None:
        backend = pair(family).tested
        rng = np.random.default_rng(2)
        text = TextSession(backend)
        text.extend(random_tokens(rng, backend.vocab_size, PROMPT))
        for _ in range(3):
            tree = random_tree(rng, 3, NODES, backend.vocab_size)
            logits = text.logits(tree)
            for node in range(NODES):
                assert_close(logits[node], text.logits(chain_to(tree, node))[-1])

    def test_nodes_see_what_plain_decoding_sees(self, pair: PairMaker, family: str) -> None:
        backend = pair(family).tested
        rng = np.random.default_rng(3)
        prompt = random_tokens(rng, backend.vocab_size, PROMPT)
        text = TextSession(backend)
        text.extend(prompt)
        tree = random_tree(rng, 3, NODES, backend.vocab_size)
        logits = text.logits(tree)
        for node in range(0, NODES, 5):
            tokens = tree.tokens[path_to(tree, node)].tolist()
            plain = TextSession(backend)
            plain.extend(prompt + tokens[:-1])
            assert_close(logits[node], plain.logits(DraftTree.root_only(tokens[-1]))[0])

    def test_logits_match_reference(self, pair: PairMaker, family: str) -> None:
        models = pair(family)
        rng = np.random.default_rng(4)
        prompt = random_tokens(rng, models.reference.vocab_size, PROMPT)
        tree = random_tree(rng, 3, NODES, models.reference.vocab_size)
        logits = []
        for backend in models.both:
            text = TextSession(backend)
            text.extend(prompt)
            logits.append(text.logits(tree))
        assert_close(*logits)

    def test_depth_beyond_the_window(self, pair: PairMaker, family: str) -> None:
        """A chain longer than a sliding window: its end no longer sees its own root."""
        models = pair(family)
        order = np.arange(20, dtype=np.int32)
        chain = DraftTree(order, order - 1, order, np.zeros(20))
        logits = []
        for backend in models.both:
            text = TextSession(backend)
            text.extend([5, 6, 7])
            logits.append(text.logits(chain))
        assert_close(*logits)
