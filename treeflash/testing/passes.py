"""Forward passes of mixed work: next tokens beside trees, failures, and plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.interfaces import Backend, Prefill, Verify
from treeflash.decoding.sampling import SampledTokens, SamplingParams, sample
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError
from treeflash.testing.comparisons import (
    assert_close,
    assert_equal_states,
    inspectable,
    path_to,
    prompted,
    random_tokens,
    random_tree,
)
from treeflash.testing.pairs import EXAMPLES, SAMPLINGS, PairMaker

ROOT = np.zeros(1, np.int32)
Work: TypeAlias = Prefill | Verify


class PassTests:
    def test_new_tokens_beside_trees_equal_each_alone(self, pair: PairMaker, family: str) -> None:
        """Trees of several sizes, and new tokens, fewer and more than a tree has nodes."""
        backend = pair(family).tested
        assert backend.drafter is not None
        together, alone = mixed_work(backend), mixed_work(backend)
        found = backend.verifier.run(together).sampled
        for one, other, mine in zip(together, alone, found, strict=True):
            (theirs,) = backend.verifier.run([other]).sampled
            assert_equal_samples(mine, theirs)
            assert_equal_lengths(one, other)
            assert_equal_states(one.state, other.state)
            blocks = [backend.drafter.draft([(work.state, 1)])[0] for work in (one, other)]
            assert_close(*map(backend.drafter.log_probs, blocks))

    def test_a_pass_that_fails_changes_no_sequence(
        self, pair: PairMaker, representative: str
    ) -> None:
        """Its last tree may sample no token, which is found after the pass."""
        backend = pair(representative).tested
        work, untouched = mixed_work(backend), mixed_work(backend)
        last = work[-1]
        assert isinstance(last, Verify)
        nothing = replace(
            last.params, allowed=np.zeros((len(last.tree), words(backend)), np.uint32)
        )
        with pytest.raises(NumericalError):
            backend.verifier.run([*work[:-1], replace(last, params=nothing)])
        for one, other in zip(work, untouched, strict=True):
            assert_equal_lengths(one, other)
            if one.state.length:
                assert_equal_states(one.state, other.state)
        found, expected = backend.verifier.run(work), backend.verifier.run(untouched)
        for mine, theirs in zip(found.sampled, expected.sampled, strict=True):
            assert_equal_samples(mine, theirs)

    def test_a_sequence_fills_its_capacity(self, pair: PairMaker, representative: str) -> None:
        """First with a tree, then token by token."""
        backend = pair(representative).tested
        tokens = random_tokens(np.random.default_rng(31), backend.vocab_size, 20)
        with SequenceSession(backend, capacity=20) as sequence:
            sequence.extend(tokens[:10])
            sequence.verify(DraftTree.chain(np.array(tokens[10:], np.int32)))
            sequence.commit(np.arange(4, dtype=np.int32))
            for token in tokens[14:]:
                sequence.verify(DraftTree.root_only(token))
                sequence.commit(ROOT)
            (fresh,) = prompted([backend], tokens)
            assert sequence.length == fresh.length
            assert_equal_states(sequence.state, fresh.state)

    def test_a_closed_state_takes_no_more_memory_than_an_empty_one(
        self, pair: PairMaker, representative: str
    ) -> None:
        backend = pair(representative).tested
        empty = backend.open(1, drafts=True)
        (sequence,) = prompted([backend], [1, 2, 3], drafts=True)
        sequence.draft(4)
        sequence.state.snapshot()
        assert sequence.state.nbytes > empty.nbytes
        for _ in range(2):
            sequence.close()
            assert sequence.state.nbytes <= empty.nbytes


def mixed_work(backend: Backend) -> list[Work]:
    """Open sequences of several lengths and capacities, one of them empty, and give each work."""
    rng = np.random.default_rng(30)
    params = SamplingParams(log_probs=backend.vocab_size)
    work: list[Work] = []
    for length, capacity, nodes, new in (
        *((3, 60, 20, 0), (40, 500, 0, 7), (9, 200, 0, 150)),
        *((0, 700, 0, 12), (17, 100, 1, 0), (30, 300, 9, 0)),
    ):
        state = backend.open(capacity, drafts=True)
        if length:
            prompt = random_tokens(rng, backend.vocab_size, length)
            backend.verifier.run([Prefill(state, prompt, None)])
            state.snapshot()
        if nodes:
            work.append(Verify(state, random_tree(rng, 3, nodes, backend.vocab_size), params))
        else:
            tokens = random_tokens(rng, backend.vocab_size, new)
            work.append(Prefill(state, tokens, params if length else None))
    return work


def words(backend: Backend) -> int:
    """Return the number of words that a bitmask of all tokens has."""
    return -(-backend.vocab_size // 32)


def assert_equal_lengths(actual: Work, expected: Work) -> None:
    """Compare the lengths of two sequences, and the lengths at which they can be forked."""
    states = actual.state, expected.state
    assert states[0].length == states[1].length
    lengths = range(states[0].length + 2)
    first, second = ([state.restorable(n) for n in lengths] for state in states)
    assert first == second


def assert_equal_samples(actual: SampledTokens | None, expected: SampledTokens | None) -> None:
    """Compare sampled tokens, and the log probabilities of the whole vocabulary."""
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    assert_close(*(by_token(x) for x in (actual, expected)))


def by_token(sampled: SampledTokens) -> NDArray[np.float32]:
    """Return (n, vocab) log probabilities by token id."""
    assert sampled.log_probs is not None
    order = np.argsort(sampled.log_probs.tokens, -1)
    return np.take_along_axis(sampled.log_probs.values, order, -1)


class PlainSequence(SequenceSession):
    """A sequence that is decoded token by token.

    It has its committed `tokens`, the `next` token, and what was sampled `after` some lengths.
    """

    def __init__(self, backend: Backend, sampling: SamplingConfig) -> None:
        super().__init__(backend, drafts=True)
        self.sampling = sampling
        self.tokens = [3, 1, 4, 5]
        self.next = self.extend(self.tokens, sampling)
        self.state.snapshot()
        self.after: dict[int, tuple[SamplingParams, SampledTokens]] = {}

    def step(self, allowed: NDArray[np.uint32] | None = None) -> None:
        """Commit the next token, and sample the one after it from those that are allowed."""
        root, position = DraftTree.root_only(self.next), np.array([self.length + 1], np.int32)
        params = SamplingParams.from_positions(
            self.sampling, position, allowed=allowed, log_probs=self.backend.vocab_size
        )
        self.verified = self.backend.verifier.run([Verify(self.state, root, params)])
        (sampled,) = self.verified.sampled
        assert sampled is not None
        self.commit(ROOT)
        self.tokens.append(self.next)
        self.after[self.length] = params, sampled
        self.next = int(sampled.tokens[0])

    def check(self) -> None:
        """Compare the latest samples and the state with a fresh state's, from one pass."""
        (fresh,) = prompted([self.backend], self.tokens[:1], drafts=True)
        logits = fresh.logits(DraftTree.chain(np.array(self.tokens[1:], np.int32)))
        for length, (params, sampled) in self.after.items():
            assert_equal_samples(sampled, sample(logits[length - 2 : length - 1], params))
        fresh.extend(self.tokens[1:])
        assert self.length == fresh.length == len(self.tokens)
        assert_equal_states(self.state, fresh.state)
        drafter = self.backend.drafter
        assert drafter is not None
        assert_close(*(drafter.log_probs(x.draft(self.next)) for x in (self, fresh)))


def verify_a_tree(sequence: PlainSequence) -> None:
    vocab_size = sequence.backend.vocab_size
    sequence.verify(random_tree(np.random.default_rng(32), sequence.next, 9, vocab_size))


def commit_a_path(sequence: PlainSequence) -> None:
    vocab_size = sequence.backend.vocab_size
    tree = random_tree(np.random.default_rng(33), sequence.next, 9, vocab_size)
    path = path_to(tree, 8)
    sequence.verify(tree)
    sequence.commit(path)
    sequence.tokens += tree.tokens[path].tolist()


def truncate(sequence: PlainSequence) -> None:
    length = sequence.state.restorable(len(sequence.tokens) - 2)
    inspectable(sequence.state).truncate(length)
    del sequence.tokens[length:]
    sequence.after.clear()


def fork(sequence: PlainSequence) -> None:
    """Go on with a fork, which the sequence itself leaves alone."""
    old = sequence.state
    sequence.state = old.fork(sequence.length, 100)
    sequence.backend.verifier.run([Prefill(old, [7, 8], None)])


def add_tokens(sequence: PlainSequence) -> None:
    new = [sequence.next, 9]
    sequence.next = sequence.extend(new)
    sequence.tokens += new


def run_beside_another(sequence: PlainSequence) -> None:
    (other,) = prompted([sequence.backend], [6, 7])
    root = DraftTree.root_only(sequence.next)
    sequence.backend.verifier.logits([(x.state, root) for x in (sequence, other)])


def take_another_token(sequence: PlainSequence) -> None:
    sequence.next = (sequence.next + 1) % sequence.backend.vocab_size


def draft(sequence: PlainSequence) -> None:
    sequence.state.snapshot()
    sequence.draft(sequence.next)


def forbid_tokens(sequence: PlainSequence) -> None:
    """Allow every other token alone."""
    sequence.step(np.full((1, words(sequence.backend)), 0x55555555, np.uint32))


Event: TypeAlias = Callable[[PlainSequence], None]
EVENTS: tuple[Event, ...] = (
    verify_a_tree,
    commit_a_path,
    truncate,
    fork,
    add_tokens,
    run_beside_another,
    take_another_token,
    draft,
    forbid_tokens,
)


class PlainDecodingTests:
    @pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
    @pytest.mark.parametrize("name", SAMPLINGS if EXAMPLES else ["all"])
    def test_plain_decoding_goes_on_after_anything(
        self, pair: PairMaker, representative: str, name: str, event: Event
    ) -> None:
        """A backend may run ahead of the tokens that it was asked for."""
        backend = pair(representative).tested
        sequence = PlainSequence(backend, SAMPLINGS[name])
        for _ in range(3):
            sequence.step()
        event(sequence)
        for _ in range(3):
            sequence.step()
        sequence.check()
