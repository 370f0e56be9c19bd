"""Over many seeds, tree decoding has the target's distribution."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.testing.comparisons import tokens_of
from treeflash.testing.pairs import PairMaker

VOCAB = 6
SEEDS = range(400)
PROMPT = [1, 4, 2, 0]
TEMPERATURE = 1.5
CHI_SQUARE_LIMIT = 20.5  # exceeded with probability 0.001 at 5 degrees of freedom


class DistributionTests:
    """Mixin of `BackendSuite`."""

    def test_tokens_have_the_targets_distribution(self, pair: PairMaker) -> None:
        """A chi-square test of each token's marginal; the second and third come from trees."""
        models = pair(target={"vocab_size": VOCAB})
        texts = []
        for seed in SEEDS:
            sampling = SamplingConfig(temperature=TEMPERATURE, seed=seed)
            config = DecodeConfig(budget=12, max_tokens=3, sampling=sampling)
            texts.append(tokens_of(list(decode(models.tested, PROMPT, config))))
        for place, expected in enumerate(marginals_of(models.reference)):
            counts = np.bincount([text[place] for text in texts], minlength=VOCAB)
            expected = expected * len(SEEDS)
            assert expected.min() >= 5
            assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_LIMIT

    def test_the_smallest_top_p_is_greedy(self, pair: PairMaker) -> None:
        """It keeps one token, although float32 has no number as small."""
        text = TextSession(pair(target={"vocab_size": VOCAB}).tested)
        text.extend(PROMPT)
        tree = DraftTree.root_only(3)
        best = text.verify(tree)
        for top_p in (1e-300, 1e-45, 1e-9):
            sampling = SamplingConfig(temperature=TEMPERATURE, top_p=top_p)
            chosen = text.verify(tree, sampling)
            np.testing.assert_array_equal(chosen, best)


def marginals_of(backend: Backend) -> list[NDArray[np.float64]]:
    """Exact distributions of the three tokens after the prompt, from the whole tree of texts."""
    texts = [text for depth in range(3) for text in product(range(VOCAB), repeat=depth)]
    numbers = {text: number for number, text in enumerate(texts)}
    tree = DraftTree(
        np.array([text[-1] if text else PROMPT[-1] for text in texts], np.int32),
        np.array([numbers[text[:-1]] if text else -1 for text in texts], np.int32),
        np.array([len(text) for text in texts], np.int32),
        np.zeros(len(texts)),
    )
    with TextSession(backend) as state:
        state.extend(PROMPT[:-1])
        probs = np.exp(state.logits(tree).astype(np.float64) / TEMPERATURE)
    probs /= probs.sum(-1, keepdims=True)
    reached = np.ones(len(texts))
    marginals = [np.zeros(VOCAB) for _ in range(3)]
    for text, number in numbers.items():
        if text:
            reached[number] = reached[numbers[text[:-1]]] * probs[numbers[text[:-1]], text[-1]]
        marginals[len(text)] += reached[number] * probs[number]
    return marginals
