"""Transition tables and marginals agree with the reference."""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.gumbel import Noise
from treeflash.decoding.interfaces import Backend, Block
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.transitions import TransitionTable
from treeflash.testing.comparisons import assert_equal_tables
from treeflash.testing.margins import MARGIN, is_settled_table
from treeflash.testing.pairs import Pair, PairMaker
from treeflash.testing.texts import random_tokens

SIZES = (1, 4, 16, 100)  # the last is larger than the vocabulary


class TransitionTests:
    """Mixin of `BackendSuite`."""

    @pytest.mark.parametrize("k", SIZES)
    @pytest.mark.parametrize("m", SIZES)
    def test_transitions_match_reference(self, pair: PairMaker, m: int, k: int) -> None:
        check_transitions(pair(), m=m, k=k)

    @pytest.mark.parametrize("k", SIZES)
    def test_marginals_match_reference(self, pair: PairMaker, k: int) -> None:
        models = pair()
        prompt = settled_prompt(models.reference)
        assert_equal_tables(*(marginals(backend, prompt, k) for backend in models.both))

    def test_transitions_of_each_family_match_reference(self, pair: PairMaker, family: str) -> None:
        check_transitions(pair(family))

    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_draft_temperature_divides_logits(self, pair: PairMaker, temperature: float) -> None:
        models = pair()
        prompt = settled_prompt(models.reference, temperature)
        check_transitions(models, temperature=temperature)
        assert_equal_tables(
            *(marginals(backend, prompt, 16, temperature) for backend in models.both)
        )

    @pytest.mark.parametrize("scale", [0.5, 2.0])
    def test_noise_is_added_to_logits(self, pair: PairMaker, scale: float) -> None:
        """Of the marginals and of the head, before the draft temperature divides them."""
        models = pair()
        noise = noise_of_depths(models.reference, scale)
        prompt = settled_prompt(models.reference, 0.7, noise=noise)
        assert_equal_tables(*(marginals(x, prompt, 16, 0.7, noise) for x in models.both))
        for m, k, shortlist in ((100, 100, None), (4, 6, 8)):
            assert_equal_tables(
                *(transitions(x, prompt, m, k, 0.7, shortlist, noise=noise) for x in models.both)
            )
        plain = marginals(models.tested, prompt, 16, 0.7)
        noisy = marginals(models.tested, prompt, 16, 0.7, noise)
        assert (plain.tokens != noisy.tokens).any()

    @pytest.mark.parametrize("shortlist", [1, 3, 8, 100])
    def test_transitions_of_a_shortlist_match_reference(
        self, pair: PairMaker, shortlist: int
    ) -> None:
        models = pair()
        check_transitions(models, m=4, k=6, shortlist=shortlist)
        check_transitions(models, m=4, k=6, shortlist=shortlist, temperature=0.5)

    @pytest.mark.parametrize("rows", [1, 5, 11])
    @pytest.mark.parametrize("shortlist", [None, 8])
    def test_transitions_of_some_rows_match_reference(
        self, pair: PairMaker, shortlist: int | None, rows: int
    ) -> None:
        models = pair()
        prompt = settled_prompt(models.reference, rows=rows)
        tables = [
            transitions(backend, prompt, 4, 6, shortlist=shortlist, rows=rows)
            for backend in models.both
        ]
        assert_equal_tables(*tables)
        scored = np.isfinite(tables[0].log_probs).any(-1)
        assert scored.sum() == 1 + rows  # the root's is another

    def test_all_rows_are_the_published_head(self, pair: PairMaker) -> None:
        backend = pair().tested
        prompt = settled_prompt(pair().reference)
        assert_equal_tables(*(transitions(backend, prompt, 4, 6, rows=n) for n in (1000, None)))

    def test_a_shortlist_of_everything_is_the_published_head(self, pair: PairMaker) -> None:
        backend = pair().tested
        prompt = settled_prompt(pair().reference)
        whole = backend.vocab_size
        assert_equal_tables(
            *(transitions(backend, prompt, 4, 6, shortlist=size) for size in (whole, None))
        )

    def test_transitions_of_a_block_of_two(self, pair: PairMaker) -> None:
        models = pair(drafter={"block_size": 2})
        check_transitions(models)
        table = marginals(models.tested, settled_prompt(models.reference), 4)
        assert table.tokens.shape == (1, 1, 4)
        assert (table.next_row == -1).all()

    def test_transitions_of_a_linear_head_match_reference(self, pair: PairMaker) -> None:
        check_transitions(pair(drafter={"head": "linear"}))

    def test_transitions_of_a_sliding_drafter_match_reference(self, pair: PairMaker) -> None:
        models = pair(drafter={"sliding_window": 4})
        check_transitions(models, length=3)
        check_transitions(models, length=20)


def check_transitions(
    pair: Pair,
    *,
    m: int = 16,
    k: int = 16,
    temperature: float = 1.0,
    shortlist: int | None = None,
    length: int = 7,
) -> None:
    """Compare one table with the reference's."""
    prompt = settled_prompt(pair.reference, temperature, length)
    assert_equal_tables(
        *(transitions(backend, prompt, m, k, temperature, shortlist) for backend in pair.both)
    )


def transitions(
    backend: Backend,
    prompt: list[int],
    m: int,
    k: int,
    temperature: float = 1.0,
    shortlist: int | None = None,
    rows: int | None = None,
    noise: Noise | None = None,
) -> TransitionTable:
    """What the AR head predicts after a prompt."""
    assert backend.head is not None
    block, _ = draft(backend, prompt)
    (table,) = backend.head.transitions(
        [block], m, k, temperature, noise=noise, shortlist=shortlist, rows=rows
    )
    return table


def marginals(
    backend: Backend,
    prompt: list[int],
    k: int,
    temperature: float = 1.0,
    noise: Noise | None = None,
) -> TransitionTable:
    """What the drafter predicts after a prompt."""
    assert backend.drafter is not None
    block, _ = draft(backend, prompt)
    (table,) = backend.drafter.marginals([block], k, temperature, noise)
    return table


def draft(backend: Backend, prompt: list[int]) -> tuple[Block, int]:
    """The block after a prompt, and its root: the target's greedy choice."""
    text = TextSession(backend, drafts=True)
    root = text.extend(prompt)
    return text.draft(root), root


def noise_of_depths(backend: Backend, scale: float, texts: int = 1) -> Noise:
    """The noise of one block or more, of another seed and scale each."""
    assert backend.drafter_config is not None
    depths = np.arange(backend.drafter_config.depths, dtype=np.int32)
    samplings = [SamplingConfig(temperature=scale * (1 + n), seed=n) for n in range(texts)]
    return Noise.at([(sampling, depths + 10) for sampling in samplings])


def settled_prompt(
    reference: Backend,
    temperature: float = 1.0,
    length: int = 7,
    rows: int | None = None,
    noise: Noise | None = None,
) -> list[int]:
    """A prompt after which no two children are nearly as probable as each other.

    Args:
        reference: the NumPy backend.
        temperature: of the draft.
        length: of the prompt.
        rows: so many previous tokens are clearly the likeliest of the block.
        noise: of the draft.
    """
    rng = np.random.default_rng(0)
    everything = reference.vocab_size
    while True:
        prompt = random_tokens(rng, everything, length)
        table = transitions(reference, prompt, everything, everything, temperature, noise=noise)
        of_depths = marginals(reference, prompt, everything, temperature, noise)
        ranked = np.sort(of_depths.log_probs[:-1], axis=None)[::-1]
        settled = rows is None or ranked[rows - 1] - ranked[rows] > MARGIN
        if settled and is_settled_table(table) and is_settled_table(of_depths):
            return prompt
