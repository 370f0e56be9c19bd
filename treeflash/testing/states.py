"""States of sequences: after any commits they equal a fresh prefill of the same tokens."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from safetensors.numpy import load, save

from treeflash.config import METHODS, DecodeConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.interfaces import Backend, Block, TableOptions
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.testing.comparisons import (
    LONG_TOLERANCE,
    assert_close,
    assert_equal_drafter_caches,
    assert_equal_states,
    assert_equal_tables,
    generate,
    inspectable,
    path_to,
    prompted,
    random_tokens,
    random_tree,
    tokens_of,
)
from treeflash.testing.pairs import Pair, PairMaker, two_samplings


class CacheTests:
    rounds: ClassVar[int]

    def test_verifier_cache_equals_prefill(self, pair: PairMaker, family: str) -> None:
        backend = pair(family).tested
        sequence = CommittedSequence(backend, seed=5)
        sequence.commit_random_paths(self.rounds)
        (fresh,) = prompted([backend], sequence.tokens)
        assert sequence.length == fresh.length == len(sequence.tokens)
        assert_equal_states(sequence.state, fresh.state)
        root = DraftTree.root_only(sequence.root)
        assert_close(sequence.logits(root), fresh.logits(root))

    def test_drafter_cache_equals_prefill(self, pair: PairMaker, family: str) -> None:
        check_drafter_cache(pair(family).tested, self.rounds)

    def test_sliding_drafter_cache_equals_prefill(self, pair: PairMaker) -> None:
        check_drafter_cache(pair(drafter={"sliding_window": 4}).tested, self.rounds)

    def test_kv_caches_match_reference(self, pair: PairMaker, family: str) -> None:
        sequences = [CommittedSequence(backend, seed=6) for backend in pair(family).both]
        for sequence in sequences:
            sequence.commit_random_paths(3)
        tested, reference = sequences
        assert tested.tokens == reference.tokens
        assert_equal_states(tested.state, reference.state)
        assert_equal_drafter_caches(tested.state, reference.state)

    def test_verifying_again_replaces_the_tree(self, pair: PairMaker, representative: str) -> None:
        backend = pair(representative).tested
        rng = np.random.default_rng(7)
        once, twice = CommittedSequence(backend, seed=8), CommittedSequence(backend, seed=8)
        tree = random_tree(rng, once.root, 20, backend.vocab_size)
        twice.verify(random_tree(rng, once.root, 33, backend.vocab_size))
        path = path_to(tree, len(tree) - 1)
        for sequence in (once, twice):
            sequence.verify(tree)
            sequence.commit(path)
        assert_equal_states(twice.state, once.state)

    def test_a_tree_that_is_not_committed_leaves_no_trace(
        self, pair: PairMaker, representative: str
    ) -> None:
        backend = pair(representative).tested
        never, verified = CommittedSequence(backend, seed=12), CommittedSequence(backend, seed=12)
        tree = random_tree(np.random.default_rng(13), verified.root, 20, backend.vocab_size)
        verified.verify(tree)
        assert_equal_states(verified.state, never.state)
        for sequence in (never, verified):
            sequence.extend([3, 4, 5])
        assert_equal_states(verified.state, never.state)

    def test_two_texts_do_not_disturb_each_other(
        self, pair: PairMaker, representative: str
    ) -> None:
        backend = pair(representative).tested
        first, second = CommittedSequence(backend, seed=9), CommittedSequence(backend, seed=10)
        for _ in range(self.rounds):
            first.commit_random_paths(1)
            second.commit_random_paths(1)
        for together, seed in ((first, 9), (second, 10)):
            alone = CommittedSequence(backend, seed=seed)
            alone.commit_random_paths(self.rounds)
            assert together.tokens == alone.tokens
            assert_equal_states(together.state, alone.state)
            assert_equal_drafter_caches(together.state, alone.state)

    def test_a_text_that_is_not_drafted_for(self, pair: PairMaker) -> None:
        sequence = SequenceSession(pair().tested)
        root = sequence.extend([1, 2, 3])
        sequence.verify(DraftTree.root_only(root))
        sequence.commit(np.zeros(1, np.int32))
        assert sequence.length == 4


class StorageTests:
    def test_a_stored_state_continues_bit_for_bit(
        self, pair: PairMaker, representative: str
    ) -> None:
        check_storage(pair(representative).tested, read=11)

    def test_features_that_the_drafter_has_not_read_are_stored(
        self, pair: PairMaker, representative: str
    ) -> None:
        check_storage(pair(representative).tested, read=0)


PART_POSITIONS = 4


def check_storage(backend: Backend, *, read: int) -> None:
    """Compare a fork of a state with a state that is made of exported blocks and an end.

    The drafter has read the first `read` of 17 positions.
    """
    if not backend.stores_states:
        pytest.skip("the backend stores no states")
    tokens = random_tokens(np.random.default_rng(17), backend.vocab_size, 17)
    sequence = SequenceSession(backend, drafts=True)
    if read:
        sequence.draft(sequence.extend(tokens[:read]))
    sequence.extend(tokens[read:])
    state = sequence.state
    assert state.read_length == read
    ends = [*range(PART_POSITIONS, len(tokens), PART_POSITIONS), len(tokens)]
    stored = backend.open(40, drafts=True)
    parts = list(zip([0, *ends[:-1]], ends, strict=True))
    exports = [state.export(*part, end=part[1] == len(tokens)) for part in parts]
    for (first, stop), export in zip(parts, exports, strict=True):
        stored.append(tokens[first:stop], load(save(export.arrays())))
    assert (stored.length, stored.read_length) == (len(tokens), read)
    states = [inspectable(x) for x in (state.fork(len(tokens), 40), stored)]
    for values in (
        *zip(*(x.read_recurrent_states() for x in states), strict=True),
        [x.read_kv_cache() for x in states],
    ):
        np.testing.assert_array_equal(*values, strict=True)
    outcomes = []
    for each in states:
        continued = copy(sequence)
        continued.state = each
        root = continued.extend([3, 1, 2])
        block = continued.draft(root)
        options = TableOptions(k=backend.vocab_size)
        table = tables(backend, block, options)
        tree = random_tree(np.random.default_rng(18), root, 12, backend.vocab_size)
        outcomes.append((continued.logits(tree), table.log_probs, table.tokens))
    for actual, expected in zip(*outcomes, strict=True):
        np.testing.assert_array_equal(actual, expected)


def tables(backend: Backend, block: Block, options: TableOptions) -> TransitionTable:
    """Return the table of the head, or of the marginals without one."""
    assert backend.drafter is not None
    if backend.head is not None:
        return backend.head.transitions([block], options)[0]
    return backend.drafter.marginals([block], options)[0]


class CommittedSequence(SequenceSession):
    """A sequence that grows by random paths of random trees, not by the target's tokens.

    It has the `root` at the next position, and the `table` of marginals of the latest draft.
    """

    def __init__(self, backend: Backend, *, seed: int) -> None:
        super().__init__(backend, drafts=True)
        self.rng = np.random.default_rng(seed)
        self.tokens = random_tokens(self.rng, backend.vocab_size, int(self.rng.integers(1, 9)))
        self.extend(self.tokens)
        self._draft()

    def commit_random_paths(self, rounds: int) -> None:
        """Verify a random tree in each round, commit a path of it, and draft."""
        for _ in range(rounds):
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
        options = TableOptions(k=self.backend.vocab_size)
        (self.table,) = self.backend.drafter.marginals([block], options)


def check_drafter_cache(backend: Backend, rounds: int) -> None:
    """Compare a drafter that followed random commits with one that starts after them."""
    assert backend.drafter is not None
    sequence = CommittedSequence(backend, seed=11)
    sequence.commit_random_paths(rounds)
    (fresh,) = prompted([backend], sequence.tokens, drafts=True)
    block = fresh.draft(sequence.root)
    assert_equal_drafter_caches(sequence.state, fresh.state)
    (table,) = backend.drafter.marginals([block], TableOptions(k=backend.vocab_size))
    assert_equal_tables(sequence.table, table)


# Ends shortly before, at, and after multiples of 256, with commits of a few tokens in between.
PIECES = (250, 1, 1, 240, 3, 255, 1, 260, 1, 250)


class ContextTests:
    def test_long_contexts_match_reference(self, pair: PairMaker, family: str) -> None:
        models = pair(family)
        rng = np.random.default_rng(12)
        vocab_size = models.reference.vocab_size
        sequences = [
            SequenceSession(backend, drafts=True, capacity=4096) for backend in models.both
        ]
        for piece in PIECES:
            tokens = random_tokens(rng, vocab_size, piece)
            (root,) = random_tokens(rng, vocab_size, 1)
            tree = random_tree(rng, root, 20, vocab_size)
            path = path_to(tree, int(rng.integers(len(tree))))
            logits = []
            for sequence in sequences:
                sequence.extend(tokens)
                sequence.draft(root)
                logits.append(sequence.logits(tree))
                sequence.commit(path)
                sequence.draft(root)
            assert_close(*logits, tolerance=LONG_TOLERANCE)
        assert sequences[0].length == sequences[1].length > 1250
        for check in (assert_equal_states, assert_equal_drafter_caches):
            check(*(sequence.state for sequence in sequences), tolerance=LONG_TOLERANCE)

    def test_pieces_equal_one_prefill(self, pair: PairMaker, family: str) -> None:
        backend = pair(family).tested
        tokens = random_tokens(np.random.default_rng(13), backend.vocab_size, 300)
        assert backend.drafter is not None
        whole = SequenceSession(backend, drafts=True)
        expected = whole.extend(tokens)
        log_probs = backend.drafter.log_probs(whole.draft(expected))
        for drafts_each in (True, False):  # the drafter reads the pieces one by one, or together
            pieces = SequenceSession(backend, drafts=True)
            for first, last in ((0, 1), (1, 30), (30, 257), (257, 300)):
                chosen = pieces.extend(tokens[first:last])
                if drafts_each or last == 300:
                    block = pieces.draft(chosen)
            assert chosen == expected
            assert_close(backend.drafter.log_probs(block), log_probs)
            assert pieces.length == whole.length == 300
            assert_equal_states(pieces.state, whole.state)
            assert_equal_drafter_caches(pieces.state, whole.state)

    def test_a_draft_can_be_repeated(self, backend: Backend) -> None:
        """Of two sequences drafted together, one may fail later; both are then drafted anew."""
        assert backend.drafter is not None
        sequence = SequenceSession(backend, drafts=True)
        root = sequence.extend(random_tokens(np.random.default_rng(16), backend.vocab_size, 30))
        drafts = [backend.drafter.log_probs(sequence.draft(root)) for _ in range(2)]
        assert_close(*drafts)

    def test_trees_larger_than_the_text(self, models: Pair) -> None:
        """Storage must have room for the whole tree, though little of it is ever committed."""
        rng = np.random.default_rng(15)
        tree = random_tree(rng, 3, 1100, models.reference.vocab_size)
        tokens = random_tokens(rng, models.reference.vocab_size, 5)
        sequences = prompted(models.both, tokens, capacity=1200)
        assert_close(*(sequence.logits(tree) for sequence in sequences))
        for sequence in sequences:
            sequence.commit(path_to(tree, len(tree) - 1))
        assert_close(*(inspectable(sequence.state).read_kv_cache() for sequence in sequences))

    def test_long_texts_equal_plain_decoding(self, backend: Backend) -> None:
        """Past multiples of 256, at which storage may grow."""
        prompt = random_tokens(np.random.default_rng(14), backend.vocab_size, 480)
        sequences = [
            generate(backend, prompt, DecodeConfig(method=method, max_tokens=40))
            for method in ("ar", "treeflash")
        ]
        assert len(sequences[0]) == 40
        assert sequences[1] == sequences[0]


PROMPT = 9


class RecurrenceTests:
    def test_states_match_reference(self, pair: PairMaker, hybrid: str) -> None:
        """Whatever is verified in between: only a commit changes them."""
        models = pair(hybrid)
        rng = np.random.default_rng(21)
        vocab_size = models.reference.vocab_size
        sequences = prompted(models.both, random_tokens(rng, vocab_size, PROMPT))
        for nodes in (1, 16, 5, 1, 33, 2):
            tree = random_tree(rng, 3, nodes, vocab_size)
            path = path_to(tree, int(rng.integers(nodes)))
            ignored = random_tree(rng, 4, 9, vocab_size)
            for sequence in sequences:
                sequence.logits(ignored)
                sequence.logits(DraftTree.root_only(5))
                sequence.logits(tree)
                sequence.commit(path)
            assert_equal_states(*(sequence.state for sequence in sequences))
        assert len(inspectable(sequences[0].state).read_recurrent_states()) >= 2

    def test_part_of_a_chain_can_be_committed(self, pair: PairMaker, hybrid: str) -> None:
        backend = pair(hybrid).tested
        chain = DraftTree.chain(np.array([3, 4, 5, 6, 7, 8], np.int32))
        for kept in (1, 2, 5, 6):
            (sequence,) = prompted([backend], [1, 2])
            sequence.logits(chain)
            sequence.commit(np.arange(kept, dtype=np.int32))
            (fresh,) = prompted([backend], [1, 2, *chain.tokens[:kept].tolist()])
            assert_equal_states(sequence.state, fresh.state)

    def test_texts_shorter_than_a_convolution(self, pair: PairMaker, hybrid: str) -> None:
        models = pair(hybrid)
        tree = random_tree(np.random.default_rng(22), 3, 12, models.reference.vocab_size)
        for length in (1, 2, 3):
            sequences = prompted(models.both, list(range(1, 1 + length)))
            assert_close(*(sequence.logits(tree) for sequence in sequences))
            for sequence in sequences:
                sequence.commit(path_to(tree, 1))
            assert_equal_states(*(sequence.state for sequence in sequences))

    def test_a_state_is_restored_where_a_snapshot_was_taken(
        self, pair: PairMaker, hybrid: str
    ) -> None:
        backend = pair(hybrid).tested
        tokens = random_tokens(np.random.default_rng(23), backend.vocab_size, 12)
        sequence = SequenceSession(backend, drafts=True)
        assert sequence.state.needs_snapshots
        without = SequenceSession(backend, drafts=True)
        for each in (sequence, without):
            each.extend(tokens[:5])
            if each is sequence:
                each.state.snapshot()
            each.extend(tokens[5:])
        assert sequence.state.nbytes > without.state.nbytes
        without.state.close()
        assert [sequence.state.restorable(n) for n in (4, 5, 11, 12, 99)] == [0, 5, 5, 12, 12]
        whole = sequence.state.fork(12, 40)
        short = sequence.state.fork(5, 40)
        inspectable(sequence.state).truncate(5)
        for state, length in ((whole, 12), (short, 5), (sequence.state, 5)):
            with SequenceSession(backend, drafts=True) as fresh:
                fresh.extend(tokens[:length])
                assert state.length == length
                assert_equal_states(state, fresh.state)
        sequence.extend(tokens[5:])
        assert_equal_states(sequence.state, whole)
        assert [sequence.state.restorable(n) for n in (5, 11)] == [5, 5]
        inspectable(sequence.state).truncate(0)
        assert sequence.state.length == 0

    def test_snapshots_of_dropped_tokens_are_dropped(self, pair: PairMaker, hybrid: str) -> None:
        """After other tokens a fork must not take the states of the dropped ones."""
        backend = pair(hybrid).tested
        rng = np.random.default_rng(27)
        first, dropped, others = (random_tokens(rng, backend.vocab_size, n) for n in (5, 7, 12))
        sequence = SequenceSession(backend, drafts=True)
        for tokens in (first, dropped):
            sequence.extend(tokens)
            sequence.state.snapshot()
        assert sequence.state.restorable(11) == 5
        inspectable(sequence.state).truncate(5)
        sequence.extend(others)
        assert [sequence.state.restorable(n) for n in (5, 12, 16, 17)] == [5, 5, 5, 17]
        early = sequence.state.fork(5, 40)
        assert [early.restorable(n) for n in (5, 12)] == [5, 5]
        for state, tokens in ((early, first), (sequence.state.fork(17, 40), [*first, *others])):
            with SequenceSession(backend, drafts=True) as fresh:
                fresh.extend(tokens)
                assert_equal_states(state, fresh.state)
        # A fork has only the snapshots of its own tokens.
        sequence.state.snapshot()
        fork = sequence.state.fork(5, 40)
        assert [fork.restorable(n) for n in (5, 16, 17, 40)] == [5, 5, 5, 5]

    def test_the_latest_snapshots_are_kept_within_the_size_of_a_state(
        self, pair: PairMaker, family: str
    ) -> None:
        """The scheduler reserves the size before it opens a state."""
        backend = pair(family).tested
        rng = np.random.default_rng(28)
        for drafts in (False, True):
            sequence = SequenceSession(backend, drafts=drafts, capacity=60)
            lengths = []
            for n in (5, 3, 1, 6, 2, 4, 7):
                root = sequence.extend(random_tokens(rng, backend.vocab_size, n))
                if drafts:
                    sequence.draft(root)
                sequence.state.snapshot()
                lengths.append(sequence.length)
                assert sequence.state.nbytes <= backend.state_nbytes(60, drafts=drafts)
            assert [sequence.state.restorable(n) for n in lengths[-2:]] == lengths[-2:]
            if sequence.state.needs_snapshots:
                assert len({sequence.state.restorable(n) for n in lengths} - {0}) < len(lengths)

    def test_two_prompts_in_one_pass(self, pair: PairMaker, hybrid: str) -> None:
        """A short one leaves the state of a long one alone, and the other way round."""
        backend = pair(hybrid).tested
        rng = np.random.default_rng(24)
        prompts = [random_tokens(rng, backend.vocab_size, n) for n in (1, 30, 2)]
        scheduler = Scheduler(backend)
        config = DecodeConfig(method="ddtree", budget=8, max_tokens=12)
        sequences: list[list[int]] = [[] for _ in prompts]
        requests = [
            Request(prompt_ids=prompt, config=config, tag=tokens)
            for prompt, tokens in zip(prompts, sequences, strict=True)
        ]
        for request, step in scheduler.decode(requests):
            request.tag.extend(step.tokens)
        for prompt, tokens in zip(prompts, sequences, strict=True):
            assert tokens == generate(backend, prompt, config)

    def test_a_prompt_that_was_run_before_is_forked(self, pair: PairMaker, hybrid: str) -> None:
        backend = pair(hybrid).tested
        prompt = random_tokens(np.random.default_rng(25), backend.vocab_size, 20)
        config = DecodeConfig(method="ar", max_tokens=6)
        cache = PrefixCache(1 << 30)
        scheduler = Scheduler(backend, prefix_cache=cache)

        def answer(sequence: list[int], cached: int) -> list[int]:
            request = Request(prompt_ids=sequence, config=config)
            steps = [step for _, step in scheduler.decode([request])]
            assert steps[0].cached_tokens == cached
            assert tokens_of(steps) == generate(backend, sequence, config)
            return tokens_of(steps)

        tokens = answer(prompt, 0)
        answer([*prompt, *tokens, 9, 8], len(prompt) + len(tokens) - 1)  # continues the sequence
        answer([*prompt, 5, 6, 7], len(prompt) - 1)  # leaves it after the prompt
        cache.close()

    @two_samplings
    def test_hybrid_texts_equal_plain_decoding(
        self, pair: PairMaker, hybrid: str, sampling: SamplingConfig
    ) -> None:
        backend = pair(hybrid).tested
        prompt = random_tokens(np.random.default_rng(26), backend.vocab_size, PROMPT)
        config = DecodeConfig(budget=16, max_tokens=24, sampling=sampling)
        plain = generate(backend, prompt, replace(config, method="ar"))
        for method in METHODS[1:]:
            assert generate(backend, prompt, replace(config, method=method)) == plain, method
