"""Sequences that run together, join and leave: each has the tokens that it would have alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator
from numpy.typing import NDArray

from treeflash.config import (
    METHODS,
    Budget,
    DecodeConfig,
    LoadConfig,
    Penalties,
    SamplingConfig,
)
from treeflash.decoding import Request, Scheduler, SchedulerConfig, Step
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.interfaces import Backend, Loader, SequenceState, TableOptions
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.probe import relative_difference
from treeflash.decoding.sampling import Noise, only
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.suffix import SuffixCache
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import SIZES, VerifyCosts
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash.testing.comparisons import (
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
from treeflash.testing.pairs import (
    EXAMPLES,
    SAMPLINGS,
    Pair,
    PairMaker,
    repeated,
    two_samplings,
)
from treeflash.testing.trees import noise_of_depths

few = settings(repeated, max_examples=max(3, EXAMPLES // 8))
"""Settings of properties whose examples run several schedules each."""


class BatchTests:
    @repeated
    @given(seed=st.integers(0, 10**6))
    def test_states_equal_prefills_after_forks_and_truncations(
        self, pair: PairMaker, representative: str, seed: int
    ) -> None:
        backend = pair(representative).tested
        rng = np.random.default_rng(seed)
        sequences = [TrackedSequence(backend, rng) for _ in range(3)]
        for _ in range(12):
            sequence = sequences[int(rng.integers(len(sequences)))]
            match int(rng.integers(6)):
                case 0:
                    sequence.truncate()
                case 1:
                    sequences.append(sequence.branch())
                case 2 if len(sequences) > 2:
                    sequences.remove(sequence)
                    sequence.close()
                case 3:
                    sequence.state.snapshot()
                case _:
                    advance(backend, rng, [x for x in sequences if rng.random() < 0.7])
        for sequence in sequences:
            sequence.check()

    @repeated
    @given(seed=st.integers(0, 10**6))
    def test_logits_of_a_batch_equal_those_alone(
        self, pair: PairMaker, representative: str, seed: int
    ) -> None:
        backend = pair(representative).tested
        rng = np.random.default_rng(seed)
        sequences = [TrackedSequence(backend, rng) for _ in range(int(rng.integers(2, 5)))]
        trees = [sequence.tree() for sequence in sequences]
        states = [sequence.state for sequence in sequences]
        work = list(zip(states, trees, strict=True))
        together, reverse = map(backend.verifier.logits, (work, work[::-1]))
        reversed_logits = reverse.logits[::-1]
        for each, logits, again in zip(work, together.logits, reversed_logits, strict=True):
            (alone,) = backend.verifier.logits([each]).logits
            assert_close(logits, alone)
            assert_close(again, alone)

    @repeated
    @given(seed=st.integers(0, 10**6))
    def test_drafts_of_a_batch_equal_those_alone(self, backend: Backend, seed: int) -> None:
        drafter, head = backend.drafter, backend.head
        assert drafter is not None
        assert head is not None
        rng = np.random.default_rng(seed)
        sequences = [TrackedSequence(backend, rng) for _ in range(int(rng.integers(2, 5)))]
        roots = random_tokens(rng, backend.vocab_size, len(sequences))
        forks = [sequence.state.fork(sequence.length, 400) for sequence in sequences]

        def draft(
            states: Sequence[SequenceState], roots: Sequence[int], noise: Noise | None
        ) -> list[Any]:
            blocks = drafter.draft(list(zip(states, roots, strict=True)))
            options = TableOptions(m=4, k=5, temperature=0.8, noise=noise)
            few = replace(options, shortlist=12, rows=9)
            tables = [head.transitions(blocks, each) for each in (options, few)]
            log_probs = map(drafter.log_probs, blocks)
            return list(zip(log_probs, drafter.marginals(blocks, options), *tables, strict=True))

        noise = noise_of_depths(backend, 0.7, len(sequences)) if rng.random() < 0.5 else None
        together = draft([sequence.state for sequence in sequences], roots, noise)
        parts = [None] * len(sequences) if noise is None else noise.split(len(sequences))
        alone = zip(forks, roots, parts, together, strict=True)
        for fork, root, part, (log_probs, *tables) in alone:
            ((expected, *expected_tables),) = draft([fork], [root], part)
            assert_close(log_probs, expected)
            for table, other in zip(tables, expected_tables, strict=True):
                assert_equal_tables(table, other)


class TrackedSequence(SequenceSession):
    """A sequence that grows by random `tokens` and paths, is truncated and forked."""

    def __init__(self, backend: Backend, rng: Generator) -> None:
        super().__init__(backend, drafts=True, capacity=400)
        self.rng = rng
        self.tokens = random_tokens(rng, backend.vocab_size, int(rng.integers(1, 12)))
        self.extend(self.tokens)

    def tree(self) -> DraftTree:
        vocab_size = self.backend.vocab_size
        (root,) = random_tokens(self.rng, vocab_size, 1)
        return random_tree(self.rng, root, int(self.rng.integers(1, 20)), vocab_size)

    def truncate(self) -> None:
        length = self.restorable()
        inspectable(self.state).truncate(length)
        del self.tokens[length:]

    def branch(self) -> TrackedSequence:
        length = self.restorable()
        new = self.fork(length, 400)
        new.tokens = self.tokens[:length]
        return new

    def restorable(self) -> int:
        """Draw a length to go back to, at least 1."""
        length = self.state.restorable(int(self.rng.integers(1, len(self.tokens) + 1)))
        return length or len(self.tokens)

    def check(self) -> None:
        assert self.backend.drafter is not None
        (fresh,) = prompted([self.backend], self.tokens, drafts=True, capacity=400)
        assert self.length == fresh.length == len(self.tokens)
        assert_equal_states(self.state, fresh.state)
        tree = self.tree()
        assert_close(self.logits(tree), fresh.logits(tree))
        blocks = [sequence.draft(int(tree.tokens[0])) for sequence in (self, fresh)]
        assert_close(*(self.backend.drafter.log_probs(block) for block in blocks))
        assert_equal_drafter_caches(self.state, fresh.state)


def advance(backend: Backend, rng: Generator, sequences: Sequence[TrackedSequence]) -> None:
    """Verify and commit random trees of some sequences together; some of them are drafted for."""
    if not sequences:
        return
    assert backend.drafter is not None
    trees = [sequence.tree() for sequence in sequences]
    paths = [path_to(tree, int(rng.integers(len(tree)))) for tree in trees]
    states = [sequence.state for sequence in sequences]
    verified = backend.verifier.logits(list(zip(states, trees, strict=True)))
    backend.verifier.commit(verified, list(zip(states, paths, strict=True)))
    for sequence, tree, path in zip(sequences, trees, paths, strict=True):
        sequence.tokens += tree.tokens[path].tolist()
    if rng.random() < 0.5:
        backend.drafter.draft([(state, 1) for state in states])


PENALTIES = Penalties(repetition=1.3, presence=0.4, frequency=0.2, logit_bias=((3, 1.5), (5, -9.0)))


class Alternating:
    """A constraint: even and odd tokens take turns."""

    end_tokens: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int) -> None:
        tokens = np.arange(-(-vocab_size // 32) * 32)
        bits = [(tokens % 2 == parity) & (tokens < vocab_size) for parity in (0, 1)]
        self.masks = [np.packbits(x, bitorder="little").view("<u4") for x in bits]
        self.count = 0

    def allowed(self) -> NDArray[np.uint32]:
        return self.masks[self.count % 2]

    def advance(self, token: int) -> None:
        assert token % 2 == self.count % 2
        self.count += 1

    def rollback(self, tokens: int) -> None:
        self.count -= tokens


class Forcing:
    """A constraint: any token, three tokens that it forces, and one of three, take turns."""

    end_tokens: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.tokens: list[int] = []

    def allowed(self) -> NDArray[np.uint32]:
        turn = len(self.tokens) % 5
        choices = np.arange(self.vocab_size)
        if turn:
            steps = np.array([0, 3, 5] if turn == 4 else [0])
            choices = (self.tokens[-turn] + turn + steps) % self.vocab_size
        masks = only(choices.astype(np.int32), self.vocab_size)
        return np.asarray(np.bitwise_or.reduce(masks), np.uint32)

    def advance(self, token: int) -> None:
        assert self.allowed()[token // 32] >> np.uint32(token % 32) & 1
        self.tokens.append(token)

    def rollback(self, tokens: int) -> None:
        assert tokens
        del self.tokens[-tokens:]


@dataclass(frozen=True, kw_only=True)
class ScheduledSequence:
    prompt_ids: list[int]
    config: DecodeConfig
    constraint: type[Alternating | Forcing] | None
    joins: int  # the iteration that it joins before
    cancelled: int | None  # the iteration that it is cancelled before; None if it runs to its end

    def request(self, backend: Backend) -> Request:
        constraint = None if self.constraint is None else self.constraint(backend.vocab_size)
        return Request(prompt_ids=self.prompt_ids, config=self.config, constraint=constraint)


def schedules(vocab_size: int) -> st.SearchStrategy[list[ScheduledSequence]]:
    """Return several sequences, some with prompts that share a beginning."""

    def build(seed: int, count: int) -> list[ScheduledSequence]:
        rng = np.random.default_rng(seed)
        shared = random_tokens(rng, vocab_size, 12)
        return [_random_sequence(rng, vocab_size, shared) for _ in range(count)]

    return st.builds(build, st.integers(0, 10**6), st.integers(2, 6))


def _random_sequence(rng: Generator, vocab_size: int, shared: list[int]) -> ScheduledSequence:
    def below(limit: int) -> int:
        return int(rng.integers(limit))

    budgets: tuple[Budget, ...] = 1, 4, 24, "auto"
    joins = below(12)
    return ScheduledSequence(
        prompt_ids=shared[: below(13)] + random_tokens(rng, vocab_size, 1 + below(19)),
        config=DecodeConfig(
            method=METHODS[below(len(METHODS))],
            budget=budgets[below(len(budgets))],
            suffix=bool(rng.random() < 0.7),
            max_tokens=1 + below(15),
            sampling=replace(list(SAMPLINGS.values())[below(len(SAMPLINGS))], seed=below(1000)),
            penalties=PENALTIES if rng.random() < 0.3 else Penalties(),
            log_probs=2 if rng.random() < 0.3 else None,
        ),
        constraint=(None, None, Alternating, Forcing)[below(4)],
        joins=joins,
        cancelled=joins + 1 + below(19) if rng.random() < 0.25 else None,
    )


scheduler_configs = st.builds(
    SchedulerConfig,
    max_parallel=st.integers(1, 4),
    prefill_chunk=st.integers(1, 9),
    lone_prefill_chunk=st.integers(1, 30),
)


class ScheduleTests:
    @repeated
    @given(
        data=st.data(), config=scheduler_configs, cache_bytes=st.sampled_from([0, 40_000, 1 << 30])
    )
    def test_texts_of_a_schedule_equal_texts_alone(
        self,
        pair: PairMaker,
        representative: str,
        data: st.DataObject,
        config: SchedulerConfig,
        cache_bytes: int,
    ) -> None:
        backend = pair(representative).tested
        sequences = data.draw(schedules(backend.vocab_size))
        cache, copied = PrefixCache(cache_bytes), SuffixCache(cache_bytes)
        steps = run_schedule(scheduler_of(backend, config, cache, copied), sequences)
        cache.close()
        for sequence, together in zip(sequences, steps, strict=True):
            emitted = tokens_of(together)
            alone = plain_steps(backend, sequence)
            plain = tokens_of(alone)
            assert emitted == (plain if sequence.cancelled is None else plain[: len(emitted)])
            actual, expected = sampled_log_probs(together), sampled_log_probs(alone)
            assert_close(actual, expected[: len(actual)])

    @two_samplings
    def test_finished_answers_are_copied(
        self, pair: PairMaker, representative: str, sampling: SamplingConfig
    ) -> None:
        """Two sequences repeat answers together, in trees deeper than the drafter's block."""
        backend = pair(representative).tested
        assert backend.drafter_config is not None
        config = DecodeConfig(budget=24, max_tokens=30, sampling=sampling)
        rng = np.random.default_rng(1)
        prompts = [random_tokens(rng, backend.vocab_size, 9) for _ in range(2)]
        plain = [generate(backend, prompt, replace(config, method="ar")) for prompt in prompts]
        for method in ("suffix", "treeflash"):
            own = replace(config, method=method)
            requests = [Request(prompt_ids=prompt, config=own) for prompt in prompts]
            scheduler = scheduler_of(backend, copied=SuffixCache(1 << 20))
            for repeats in (False, True):
                steps: list[list[Step]] = [[], []]
                for request, step in scheduler.decode(requests):
                    steps[requests.index(request)].append(step)
                assert [tokens_of(answer) for answer in steps] == plain, method
                for answer in steps if repeats else []:
                    longest = max(len(step.path) for step in answer if step.path is not None)
                    assert longest > backend.drafter_config.depths + 2, method

    @two_samplings
    def test_forced_tokens_are_drafted(
        self, pair: PairMaker, representative: str, sampling: SamplingConfig
    ) -> None:
        """Without copies too, whatever the drafter proposes."""
        backend = pair(representative).tested
        config = DecodeConfig(budget=8, max_tokens=31, sampling=sampling, suffix=False)
        texts = []
        for method in METHODS:
            one = replace(config, method=method)
            request = Request(
                prompt_ids=[5, 6, 7], config=one, constraint=Forcing(backend.vocab_size)
            )
            steps = [step for _, step in scheduler_of(backend).decode([request])]
            texts.append(tokens_of(steps))
            # After the first token, three of five are forced, and one of three is often right.
            assert len(steps) == 31 if method == "ar" else len(steps) <= 14, method
        assert texts == [texts[0]] * len(METHODS)

    @few
    @given(data=st.data())
    def test_a_group_shares_one_prefill(
        self, pair: PairMaker, representative: str, data: st.DataObject
    ) -> None:
        backend = pair(representative).tested
        drawn = data.draw(schedules(backend.vocab_size))
        sequences = [replace(sequence, prompt_ids=drawn[0].prompt_ids) for sequence in drawn]
        scheduler = scheduler_of(backend, SchedulerConfig(max_parallel=len(sequences)))
        requests = scheduler.submit_group([sequence.request(backend) for sequence in sequences])
        steps: dict[Request, list[Step]] = {}
        for request, event in scheduler.run():
            assert not isinstance(event, Exception), event
            steps.setdefault(request, []).append(event)
        ended = len(steps[requests[0]]) == 1
        for number, (request, sequence) in enumerate(zip(requests, sequences, strict=True)):
            assert tokens_of(steps[request]) == tokens_of(plain_steps(backend, sequence))
            # A sequence that has ended cannot be forked, nor one without a drafter's state.
            if number and not ended and sequence.config.drafts == drawn[0].config.drafts:
                assert steps[request][0].cached_tokens == len(sequence.prompt_ids) - 1


def scheduler_of(
    backend: Backend,
    config: SchedulerConfig | None = None,
    cache: PrefixCache | None = None,
    copied: SuffixCache | None = None,
) -> Scheduler:
    """Create a scheduler whose adaptive budget changes its size with the number of sequences."""
    costs = VerifyCosts({size: 1e-4 * (1 + 0.05 * size) for size in SIZES})
    budgets = AdaptiveBudgets(costs)
    return Scheduler(backend, config, budgets=budgets, prefix_cache=cache, suffix_cache=copied)


def run_schedule(scheduler: Scheduler, sequences: Sequence[ScheduledSequence]) -> list[list[Step]]:
    """Submit and cancel sequences at their iterations; returns the steps of each."""
    requests: dict[int, Request] = {}
    steps: dict[Request, list[Step]] = {}
    iteration = 0
    while len(requests) < len(sequences) or scheduler.busy:
        for number, sequence in enumerate(sequences):
            if number not in requests and sequence.joins <= iteration:
                requests[number] = scheduler.submit(sequence.request(scheduler.backend))
            if sequence.cancelled is not None and sequence.cancelled == iteration:
                scheduler.cancel(requests[number])
        for request, event in scheduler.step():
            assert not isinstance(event, Exception), event
            steps.setdefault(request, []).append(event)
        iteration += 1
    return [steps.get(requests[number], []) for number in range(len(sequences))]


def sampled_log_probs(steps: Sequence[Step]) -> NDArray[np.float32]:
    """Return the log probabilities of the emitted tokens; empty if they were not asked for."""
    parts = [step.log_probs.sampled for step in steps if step.log_probs is not None]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def plain_steps(backend: Backend, sequence: ScheduledSequence) -> list[Step]:
    """Return the steps of plain decoding of the sequence alone, to its end."""
    config = replace(sequence.config, method="ar", budget=1)
    alone = replace(sequence, config=config, joins=0, cancelled=None)
    (steps,) = run_schedule(scheduler_of(backend), [alone])
    return steps


class ExactTests:
    exact_dtypes: ClassVar[tuple[str, ...]]

    @pytest.fixture
    def exact(self, load: Loader, models: Pair, exact_dtype: str) -> Backend:
        return load_exact(load, models, exact_dtype)

    def test_exact_mode_is_refused_or_exact(self, load: Loader, models: Pair) -> None:
        assert models.tested.inexact
        if not self.exact_dtypes:
            with pytest.raises((ConfigError, UnsupportedModelError), match="exact"):
                load(models.target, models.drafter, LoadConfig(dtype="float32", exact=True))
        for dtype in self.exact_dtypes:
            assert load_exact(load, models, dtype).inexact is None

    def test_exact_logits_are_near_the_references(self, exact: Backend, models: Pair) -> None:
        """Equal bits alone would not tell that they are right."""
        rng = np.random.default_rng(34)
        tokens = random_tokens(rng, exact.vocab_size, 140)
        tree = random_tree(rng, 3, 30, exact.vocab_size)
        sequences = prompted([exact, models.reference], tokens)
        assert relative_difference(*(x.logits(tree) for x in sequences)) < 0.05

    @few
    @given(data=st.data())
    def test_exact_schedules_equal_plain_decoding(
        self, exact: Backend, data: st.DataObject
    ) -> None:
        """Sequences that join and leave, trees of all methods, and prefix-cache hits."""
        backend = exact
        sequences = data.draw(schedules(backend.vocab_size))
        sequences = [
            replace(x, config=replace(x.config, log_probs=3), constraint=None) for x in sequences
        ]
        cache = PrefixCache(1 << 30)
        scheduler = scheduler_of(backend, data.draw(scheduler_configs), cache)
        steps = run_schedule(scheduler, sequences)
        cache.close()
        for sequence, together in zip(sequences, steps, strict=True):
            alone = plain_steps(backend, sequence)
            emitted = tokens_of(together)
            assert emitted == tokens_of(alone)[: len(emitted)]
            actual = sampled_log_probs(together)
            np.testing.assert_array_equal(actual, sampled_log_probs(alone)[: len(actual)])

    @few
    @given(seed=st.integers(0, 10**6))
    def test_exact_logits_are_equal_in_trees_batches_chunks_and_forks(
        self, exact: Backend, seed: int
    ) -> None:
        backend = exact
        rng = np.random.default_rng(seed)
        tokens = random_tokens(rng, backend.vocab_size, int(rng.integers(110, 140)))
        tree = random_tree(rng, tokens[-1], int(rng.integers(2, 60)), backend.vocab_size)
        with SequenceSession(backend) as chunked, SequenceSession(backend) as plain:
            end = int(rng.integers(1, len(tokens)))
            chunked.extend(tokens[:end])
            chunked.extend(tokens[end:])
            plain.extend(tokens)
            fork = chunked.state.fork(end, 500)
            logits = backend.verifier.logits([(chunked.state, tree), (fork, tree)]).logits
            for node in path_to(tree, int(rng.integers(len(tree)))):
                root = DraftTree.root_only(int(tree.tokens[node]))
                np.testing.assert_array_equal(plain.logits(root)[0], logits[0][node])
                plain.commit(np.zeros(1, np.int32))
            with SequenceSession(backend) as short:
                short.extend(tokens[:end])
                np.testing.assert_array_equal(short.logits(tree), logits[1])
            fork.close()


def load_exact(load: Loader, models: Pair, dtype: str) -> Backend:
    return load(models.target, models.drafter, LoadConfig(dtype=dtype, exact=True))
