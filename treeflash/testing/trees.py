"""Trees, the target's choices on them, and what is accepted agree with the reference."""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.acceptance import accept
from treeflash.decoding.gumbel import position_keys
from treeflash.decoding.sampling import choose
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree, build_tree
from treeflash.testing.comparisons import assert_equal_trees
from treeflash.testing.margins import is_settled_choice
from treeflash.testing.pairs import PairMaker
from treeflash.testing.samplings import SAMPLINGS
from treeflash.testing.texts import random_tokens, random_tree
from treeflash.testing.transitions import settled_prompt, transitions

PROMPT = 5
NODES = 24


class TreeTests:
    """Mixin of `BackendSuite`."""

    @pytest.mark.parametrize("budget", [1, 2, 16, 64])
    def test_trees_match_reference(self, pair: PairMaker, budget: int) -> None:
        models = pair()
        prompt = settled_prompt(models.reference)
        assert_equal_trees(
            *(
                build_tree(transitions(backend, prompt, 16, 16), 3, budget)
                for backend in models.both
            )
        )

    @pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
    def test_choices_match_reference(self, pair: PairMaker, sampling: SamplingConfig) -> None:
        models = pair()
        rng = np.random.default_rng(1)
        vocab_size = models.reference.vocab_size
        prompt = random_tokens(rng, vocab_size, PROMPT)
        tested, reference = (TextSession(backend) for backend in models.both)
        for text in (tested, reference):
            text.extend(prompt)
        compared = 0
        for _ in range(30):
            tree = random_tree(rng, 3, NODES, vocab_size)
            keys = position_keys(sampling.seed, tree.positions(PROMPT + 1))
            logits = reference.logits(tree)
            if not is_settled_choice(logits, sampling, keys):
                continue
            compared += 1
            expected = choose(logits, sampling, keys)
            chosen = tested.verify(tree, sampling)
            assert chosen.dtype == np.int32
            np.testing.assert_array_equal(chosen, expected)
            np.testing.assert_array_equal(accept(tree, chosen).path, accept(tree, expected).path)
        assert compared >= 5

    def test_drafts_of_the_target_itself_are_accepted_whole(self, pair: PairMaker) -> None:
        models = pair()
        tested = TextSession(models.tested)
        root = tested.extend([1, 2, 3])
        text = continuation(TextSession(models.reference), [1, 2, 3], 9)
        assert text[0] == root
        chain = DraftTree.chain(np.array(text[:8], np.int32))
        accepted = accept(chain, tested.verify(chain))
        assert accepted.path.tolist() == list(range(8))
        assert accepted.tokens == tuple(text[1:])


def continuation(text: TextSession, prompt: list[int], length: int) -> list[int]:
    """The first tokens that the target greedily appends to a prompt, one forward pass each."""
    tokens = [text.extend(prompt)]
    while len(tokens) < length:
        tokens.append(text.extend(tokens[-1:]))
    return tokens
