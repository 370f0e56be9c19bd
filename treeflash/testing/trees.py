"""Transition tables, trees, masks and the target's tokens agree with the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.interfaces import Backend, Block, TableOptions
from treeflash.decoding.sampling import Noise, position_keys, sample_tokens
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, accept, build_tree
from treeflash.reference.numerics import Array, Ints
from treeflash.testing.comparisons import (
    MARGIN,
    assert_close,
    assert_equal_tables,
    assert_equal_trees,
    chain_to,
    is_settled_choice,
    is_settled_table,
    path_to,
    prompt_of,
    prompted,
    random_tokens,
    random_tree,
)
from treeflash.testing.models import HEAD_TENSORS
from treeflash.testing.pairs import Pair, PairMaker, each_sampling

SIZES = (1, 4, 16, 100)  # the last is larger than the vocabulary
OPTIONS = TableOptions(m=16, k=16)


class TransitionTests:
    @pytest.mark.parametrize("k", SIZES)
    @pytest.mark.parametrize("m", SIZES)
    def test_transitions_match_reference(self, pair: PairMaker, m: int, k: int) -> None:
        check_transitions(pair(), TableOptions(m=m, k=k))

    @pytest.mark.parametrize("k", SIZES)
    def test_marginals_match_reference(self, models: Pair, k: int) -> None:
        check_marginals(models, settled_prompt(models.reference), TableOptions(k=k))

    def test_transitions_of_each_family_match_reference(self, pair: PairMaker, family: str) -> None:
        check_transitions(pair(family))

    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_draft_temperature_divides_logits(self, models: Pair, temperature: float) -> None:
        options = replace(OPTIONS, temperature=temperature)
        prompt = settled_prompt(models.reference, options)
        check_transitions(models, options)
        check_marginals(models, prompt, options)

    @pytest.mark.parametrize("scale", [0.5, 2.0])
    def test_noise_is_added_to_logits(self, models: Pair, scale: float) -> None:
        """Of the marginals and of the head, before the draft temperature divides them."""
        plain = replace(OPTIONS, temperature=0.7)
        noisy = replace(plain, noise=noise_of_depths(models.reference, scale))
        prompt = settled_prompt(models.reference, noisy)
        check_marginals(models, prompt, noisy)
        for m, k, shortlist in ((100, 100, None), (4, 6, 8)):
            options = replace(noisy, m=m, k=k, shortlist=shortlist)
            assert_equal_tables(*(transitions(backend, prompt, options) for backend in models.both))
        tokens = [marginals(models.tested, prompt, options).tokens for options in (plain, noisy)]
        assert (tokens[0] != tokens[1]).any()

    @pytest.mark.parametrize("shortlist", [1, 3, 8, 100])
    def test_transitions_of_a_shortlist_match_reference(self, models: Pair, shortlist: int) -> None:
        options = TableOptions(m=4, k=6, shortlist=shortlist)
        check_transitions(models, options)
        check_transitions(models, replace(options, temperature=0.5))

    @pytest.mark.parametrize("rows", [1, 5, 11])
    @pytest.mark.parametrize("shortlist", [None, 8])
    def test_transitions_of_some_rows_match_reference(
        self, models: Pair, shortlist: int | None, rows: int
    ) -> None:
        options = TableOptions(m=4, k=6, shortlist=shortlist, rows=rows)
        prompt = settled_prompt(models.reference, options)
        tables = [transitions(backend, prompt, options) for backend in models.both]
        assert_equal_tables(*tables)
        scored = np.isfinite(tables[0].log_probs).any(-1)
        assert scored.sum() == 1 + rows  # and the root's

    def test_all_rows_are_the_published_head(self, pair: PairMaker) -> None:
        check_published_head(pair(), TableOptions(m=4, k=6, rows=1000))

    def test_a_shortlist_of_everything_is_the_published_head(self, pair: PairMaker) -> None:
        shortlist = pair().tested.vocab_size
        check_published_head(pair(), TableOptions(m=4, k=6, shortlist=shortlist))

    def test_transitions_of_a_block_of_two(self, pair: PairMaker) -> None:
        models = pair(drafter={"block_size": 2})
        check_transitions(models)
        table = marginals(models.tested, settled_prompt(models.reference), TableOptions(k=4))
        assert table.tokens.shape == (1, 1, 4)
        assert (table.next_row == -1).all()

    def test_transitions_of_a_linear_head_match_reference(self, pair: PairMaker) -> None:
        check_transitions(pair(drafter={"head": "linear"}))

    def test_transitions_of_a_sliding_drafter_match_reference(self, pair: PairMaker) -> None:
        for length in (3, 20):
            check_transitions(pair(drafter={"sliding_window": 4}), length=length)


def check_transitions(pair: Pair, options: TableOptions = OPTIONS, *, length: int = 7) -> None:
    prompt = settled_prompt(pair.reference, options, length)
    assert_equal_tables(*(transitions(backend, prompt, options) for backend in pair.both))


def check_marginals(pair: Pair, prompt: list[int], options: TableOptions) -> None:
    assert_equal_tables(*(marginals(backend, prompt, options) for backend in pair.both))


def check_published_head(pair: Pair, limited: TableOptions) -> None:
    """Compare a table with one whose options name a limit that leaves nothing out."""
    prompt = settled_prompt(pair.reference)
    options = limited, replace(limited, shortlist=None, rows=None)
    assert_equal_tables(*(transitions(pair.tested, prompt, x) for x in options))


def transitions(backend: Backend, prompt: list[int], options: TableOptions) -> TransitionTable:
    assert backend.head is not None
    block, _ = draft(backend, prompt)
    (table,) = backend.head.transitions([block], options)
    return table


def marginals(backend: Backend, prompt: list[int], options: TableOptions) -> TransitionTable:
    assert backend.drafter is not None
    block, _ = draft(backend, prompt)
    (table,) = backend.drafter.marginals([block], options)
    return table


def draft(backend: Backend, prompt: list[int]) -> tuple[Block, int]:
    """Draft the block after a prompt; its root is the target's greedy choice."""
    sequence = SequenceSession(backend, drafts=True)
    root = sequence.extend(prompt)
    return sequence.draft(root), root


def noise_of_depths(backend: Backend, scale: float, sequences: int = 1) -> Noise:
    """Create the noise of one block or more, with a seed and a scale for each."""
    assert backend.drafter_config is not None
    depths = np.arange(backend.drafter_config.depths, dtype=np.int32)
    samplings = [SamplingConfig(temperature=scale * (1 + n), seed=n) for n in range(sequences)]
    return Noise.from_positions([(sampling, depths + 10) for sampling in samplings])


def settled_prompt(
    reference: Backend, options: TableOptions = OPTIONS, length: int = 7
) -> list[int]:
    """Find a prompt after which no two children are nearly as probable as each other.

    Of the block, `options.rows` previous tokens are clearly the most probable ones.
    """
    rng = np.random.default_rng(0)
    vocab_size, rows = reference.vocab_size, options.rows
    everything = replace(options, m=vocab_size, k=vocab_size, shortlist=None, rows=None)
    while True:
        prompt = random_tokens(rng, vocab_size, length)
        tables = [make(reference, prompt, everything) for make in (transitions, marginals)]
        ranked = np.sort(tables[1].log_probs[:-1], axis=None)[::-1]
        settled = rows is None or ranked[rows - 1] - ranked[rows] > MARGIN
        if settled and all(map(is_settled_table, tables)):
            return prompt


M, K = 3, 4


class LogProbTests:
    @pytest.mark.parametrize("head", HEAD_TENSORS)
    def test_log_probs_match_reference(self, pair: PairMaker, head: str) -> None:
        models = pair(drafter={"head": head})
        prompt = prompt_of(models.reference)
        actual, expected = (log_probs(backend, prompt) for backend in models.both)
        assert_close(actual, expected)
        np.testing.assert_allclose(np.exp(actual).sum(-1), 1, rtol=1e-5)

    @pytest.mark.parametrize("head", HEAD_TENSORS)
    def test_tables_are_the_best_of_log_probs(self, pair: PairMaker, head: str) -> None:
        backend = pair(drafter={"head": head}).tested
        assert backend.head is not None
        assert backend.drafter is not None
        block, root = draft(backend, prompt_of(backend))
        (best,) = backend.drafter.marginals([block], TableOptions(k=K))
        assert_best(backend.drafter.log_probs(block), best.tokens[:, 0], best.log_probs[:, 0])
        (best,) = backend.drafter.marginals([block], TableOptions(k=M))
        candidates = best.tokens[:-1, 0]
        (table,) = backend.head.transitions([block], TableOptions(m=M, k=K))
        for m in range(M):
            previous = np.concatenate([[root], candidates[:, m]]).astype(np.int32)
            rows = backend.head.log_probs(block, previous)
            first = 0 if m == 0 else 1  # depth 1 has one row
            assert_best(rows[first:], table.tokens[first:, m], table.log_probs[first:, m])


def assert_best(rows: Array, tokens: Ints, best: Array) -> None:
    """Check that a table's (n, K) children are the most probable tokens of (n, vocab) rows."""
    assert_close(np.take_along_axis(rows, tokens, -1), best)
    assert_close(-np.sort(-rows, axis=-1)[:, : best.shape[1]], best)


def log_probs(backend: Backend, prompt: list[int]) -> Array:
    """Return (2, D, vocab) of the drafter and of the head, the latter after arbitrary tokens."""
    assert backend.head is not None
    assert backend.drafter is not None
    block, root = draft(backend, prompt)
    marginals = backend.drafter.log_probs(block)
    others = random_tokens(np.random.default_rng(1), backend.vocab_size, len(marginals) - 1)
    previous = np.array([root, *others], np.int32)
    return np.stack([marginals, backend.head.log_probs(block, previous)])


MASK_PROMPT = 13  # longer than the window of the sliding family


class MaskTests:
    mask_nodes: ClassVar[int]

    def test_nodes_see_their_paths_alone(self, pair: PairMaker, family: str) -> None:
        backend = pair(family).tested
        rng = np.random.default_rng(2)
        (sequence,) = prompted([backend], random_tokens(rng, backend.vocab_size, MASK_PROMPT))
        for _ in range(3):
            tree = random_tree(rng, 3, self.mask_nodes, backend.vocab_size)
            logits = sequence.logits(tree)
            for node in range(self.mask_nodes):
                assert_close(logits[node], sequence.logits(chain_to(tree, node))[-1])

    def test_nodes_see_what_plain_decoding_sees(self, pair: PairMaker, family: str) -> None:
        backend = pair(family).tested
        rng = np.random.default_rng(3)
        prompt = random_tokens(rng, backend.vocab_size, MASK_PROMPT)
        (sequence,) = prompted([backend], prompt)
        tree = random_tree(rng, 3, self.mask_nodes, backend.vocab_size)
        logits = sequence.logits(tree)
        for node in range(0, self.mask_nodes, 5):
            tokens = tree.tokens[path_to(tree, node)].tolist()
            (plain,) = prompted([backend], prompt + tokens[:-1])
            assert_close(logits[node], plain.logits(DraftTree.root_only(tokens[-1]))[0])

    def test_logits_match_reference(self, pair: PairMaker, family: str) -> None:
        models = pair(family)
        rng = np.random.default_rng(4)
        prompt = random_tokens(rng, models.reference.vocab_size, MASK_PROMPT)
        tree = random_tree(rng, 3, self.mask_nodes, models.reference.vocab_size)
        assert_close(*(sequence.logits(tree) for sequence in prompted(models.both, prompt)))

    def test_depth_beyond_the_window(self, pair: PairMaker, family: str) -> None:
        """A chain longer than a sliding window: its end no longer sees its own root."""
        chain = DraftTree.chain(np.arange(20, dtype=np.int32))
        sequences = prompted(pair(family).both, [5, 6, 7])
        assert_close(*(sequence.logits(chain) for sequence in sequences))


PROMPT = 5
NODES = 24


class TreeTests:
    @pytest.mark.parametrize("budget", [1, 2, 16, 64])
    def test_trees_match_reference(self, models: Pair, budget: int) -> None:
        prompt = settled_prompt(models.reference)
        tables = (transitions(backend, prompt, OPTIONS) for backend in models.both)
        assert_equal_trees(*(build_tree(table, 3, budget) for table in tables))

    @each_sampling
    def test_choices_match_reference(self, models: Pair, sampling: SamplingConfig) -> None:
        rng = np.random.default_rng(1)
        vocab_size = models.reference.vocab_size
        prompt = random_tokens(rng, vocab_size, PROMPT)
        tested, reference = prompted(models.both, prompt)
        compared = 0
        for _ in range(30):
            tree = random_tree(rng, 3, NODES, vocab_size)
            keys = position_keys(sampling.seed, tree.positions(PROMPT + 1))
            logits = reference.logits(tree)
            if not is_settled_choice(logits, sampling, keys):
                continue
            compared += 1
            expected = sample_tokens(logits, sampling, keys)
            chosen = tested.verify(tree, sampling)
            assert chosen.dtype == np.int32
            np.testing.assert_array_equal(chosen, expected)
            np.testing.assert_array_equal(accept(tree, chosen).path, accept(tree, expected).path)
        assert compared >= 5

    def test_drafts_of_the_target_itself_are_accepted_whole(self, models: Pair) -> None:
        tested = SequenceSession(models.tested)
        root = tested.extend([1, 2, 3])
        sequence = continuation(SequenceSession(models.reference), [1, 2, 3], 9)
        assert sequence[0] == root
        chain = DraftTree.chain(np.array(sequence[:8], np.int32))
        accepted = accept(chain, tested.verify(chain))
        assert accepted.path.tolist() == list(range(8))
        assert accepted.tokens == tuple(sequence[1:])


def continuation(sequence: SequenceSession, prompt: list[int], length: int) -> list[int]:
    """Return the first tokens that the target greedily appends, one forward pass each."""
    tokens = [sequence.extend(prompt)]
    while len(tokens) < length:
        tokens.append(sequence.extend(tokens[-1:]))
    return tokens
