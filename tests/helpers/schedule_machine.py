"""A random walk through the scheduler, with a model of what each sequence must emit.

Requests come, alone and in groups, and are cancelled. Calls of the backend fail: once, or for one
sequence always, or with an error that nobody expects. After each iteration the machine checks that

- the tokens of every sequence are those that plain decoding of the sequence alone emits,
- every request ends exactly once, and with an error only if a call for it alone raised it,
- every sequence that decodes takes one step in each iteration, and requests start in order,
- memory stays below its limit, also in the middle of an iteration,
- the only open states belong to running sequences and to the prefix cache, and hold their tokens.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from treeflash.config import METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig, Step
from treeflash.decoding.adaptive_budget import AdaptiveBudget, AdaptiveBudgets
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import SIZES, VerifyCosts
from treeflash.errors import NumericalError
from treeflash.reference.backend import ReferenceBackend, load
from treeflash.reference.drafter import Drafter
from treeflash.reference.verifier import State, Verifier
from treeflash.testing.batches import Forcing
from treeflash.testing.models import edit_config, write_drafter, write_target

FAMILIES = "llama", "qwen3_5"
PLACES = "open", "fork", "draft", "table", "run", "commit", "one commit", "constraint"
ERRORS = (
    lambda: NumericalError("injected: not finite"),
    lambda: MemoryError("injected: out of memory"),
    lambda: RuntimeError("injected: CUDA out of memory"),
)
SAMPLINGS = [
    SamplingConfig(),
    SamplingConfig(temperature=1.0, seed=1),
    SamplingConfig(temperature=1.5, top_k=6, seed=2),
]
MAX_TOKENS = 12
SHARED = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
"""A beginning that many prompts share."""


class BugError(Exception):
    """An error that nobody expects."""


@functools.cache
def folders(family: str) -> tuple[Path, Path]:
    folder = Path(tempfile.mkdtemp())
    target, drafter = folder / "target", folder / "drafter"
    write_target(target, family, seed=5, layers=2, hidden_size=16)
    edit_config(target, lambda config: config.pop("eos_token_id", None))
    write_drafter(drafter, target, seed=4, layers=1, block_size=5, target_layer_ids=(0, 1))
    return target, drafter


@functools.cache
def healthy(family: str) -> ReferenceBackend:
    """A backend whose calls do not fail."""
    return load(*folders(family), LoadConfig())


@functools.cache
def alone(
    family: str, prompt: tuple[int, ...], config: DecodeConfig, constrained: bool
) -> tuple[int, ...]:
    """The tokens of a sequence, decoded plainly and alone to `MAX_TOKENS`."""
    backend = healthy(family)
    constraint = Forcing(backend.vocab_size) if constrained else None
    request = Request(prompt_ids=prompt, config=config, constraint=constraint)
    steps = Scheduler(backend).decode([request])
    return tuple(token for _, step in steps for token in step.tokens)


@functools.cache
def logits_after(family: str, tokens: tuple[int, ...]) -> np.ndarray:
    """The target's logits after a fresh prefill of the tokens and one more."""
    state = healthy(family).open(len(tokens) + 1, drafts=False)
    healthy(family).verifier.run([Prefill(state, tokens, None)])
    return root_logits(family, state)


def root_logits(family: str, state: State) -> np.ndarray:
    return healthy(family).verifier.forward(state, DraftTree.root_only(7))[0]


@dataclass(eq=False)
class Faults:
    """The errors that calls of the backend are to raise, and those that they have raised.

    Attributes:
        pending: by place, the calls until it fails, and the error.
        poisoned: by state, the place that always fails for it.
        lone: errors of calls for one sequence, each with its state; None before it has a state.
        tolerated: errors that end no sequence.
        raised: how often a call has failed.
        bug: whether the next call of the backend raises a `BugError`.
    """

    pending: dict[str, tuple[int, Exception]] = field(default_factory=dict)
    poisoned: dict[State, str] = field(default_factory=dict)
    lone: dict[Exception, State | None] = field(default_factory=dict)
    raised: int = 0
    bug: bool = False

    def visit(self, place: str, states: Sequence[State], *, tolerated: bool = False) -> None:
        """Raise what is to be raised in a call for these states."""
        if self.bug and place != "constraint":  # whose errors, even this one, end one sequence
            self.bug = False
            raise BugError
        error: Exception | None = None
        if place in self.pending:
            calls, error = self.pending.pop(place)
            if calls:
                self.pending[place] = calls - 1, error
                error = None
        if any(self.poisoned.get(state) == place for state in states):
            error = NumericalError("injected: poisoned")
        if error is None:
            return
        self.raised += 1
        if len(states) <= 1 and not tolerated:
            self.lone[error] = states[0] if states else None
        raise error


class WatchedState(State):
    """A state of a faulty backend, which knows its states until they are closed."""

    backend: FaultyBackend

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.backend.opened.append(self)

    @property
    def nbytes(self) -> int:
        """As on a device, all that it may need is allocated at once."""
        if self not in self.backend.opened:
            return 0
        return self.backend.state_nbytes(self.capacity, drafts=self.drafter is not None)

    def fork(self, length: int, capacity: int) -> WatchedState:
        # A fork without room for more tokens is for the prefix cache.
        self.backend.faults.visit("fork", [], tolerated=capacity == length)
        new = super().fork(length, capacity)
        self.backend.check_memory()
        return new

    def close(self) -> None:
        super().close()
        if self in self.backend.opened:
            self.backend.opened.remove(self)


class FaultyVerifier(Verifier):
    def __init__(self, backend: FaultyBackend) -> None:
        super().__init__(backend.target)
        self.backend = backend
        self.states: list[State] = []  # of the latest call
        self.commits = 0  # of that call

    def run(self, work: Any) -> Any:
        self.states, self.commits = [item.state for item in work], 0
        self.backend.faults.visit("run", self.states)
        assert all(state in self.backend.opened for state in self.states), "a closed state was run"
        self.backend.passes.append(list(work))
        found = super().run(work)
        self.backend.check_memory()
        return found

    def commit(self, verified: Any, paths: Any) -> None:
        self.states, self.commits = [state for state, _ in paths], 0
        super().commit(verified, paths)
        self.backend.check_memory()

    def commit_one(self, state: Any, outputs: Any, path: Any) -> None:
        if not self.commits:
            self.backend.faults.visit("commit", self.states)
        self.commits += 1
        super().commit_one(state, outputs, path)
        self.backend.faults.visit("one commit", self.states)


class FaultyDrafter(Drafter):
    def __init__(self, backend: FaultyBackend) -> None:
        assert backend.drafter_model is not None
        super().__init__(backend.drafter_model, None)
        self.backend = backend
        self.states: list[State] = []  # of the latest draft

    def draft(self, roots: Any, depths: int | None = None) -> Any:
        self.states = [state for state, _ in roots]
        self.backend.faults.visit("draft", self.states)
        return super().draft(roots, depths)

    def marginals(self, blocks: Any, options: Any) -> Any:
        self.backend.faults.visit("table", self.states)
        return super().marginals(blocks, options)


class FaultyHead:
    def __init__(self, backend: FaultyBackend, head: Any) -> None:
        self.backend, self.head = backend, head

    def transitions(self, blocks: Any, options: Any) -> Any:
        self.backend.faults.visit("table", self.backend.drafter.states)
        return self.head.transitions(blocks, options)


class FaultyBackend(ReferenceBackend):
    """The reference, whose calls fail when they are told to.

    Attributes:
        opened: states that are not closed.
        passes: the work of the forward passes of the latest iteration.
        max_bytes: of the states that are not closed, and of the prefix cache.
    """

    def __init__(self, family: str) -> None:
        whole = healthy(family)
        super().__init__(whole.target, whole.drafter_model)
        self.faults = Faults()
        self.opened: list[WatchedState] = []
        self.passes: list[list[Prefill | Verify]] = []
        self.max_bytes: int | None = None
        self.verifier = FaultyVerifier(self)
        self.drafter = FaultyDrafter(self)
        self.head = FaultyHead(self, self.head)
        self.state_class = type("WatchedState", (WatchedState,), {"backend": self})

    def open(self, capacity: int, *, drafts: bool) -> State:
        self.faults.visit("open", [])
        state: State = self.state_class(
            self.target, self.drafter_model if drafts else None, capacity
        )
        return state

    def check_memory(self) -> None:
        if self.max_bytes is not None:
            held = sum(state.nbytes for state in self.opened)
            assert held <= self.max_bytes, f"{held} bytes of {self.max_bytes}"


class FaultyConstraint(Forcing):
    """Free, forced and chosen tokens take turns, until a call fails."""

    def __init__(self, backend: FaultyBackend) -> None:
        super().__init__(backend.vocab_size)
        self.faults = backend.faults

    def allowed(self) -> Any:
        self.faults.visit("constraint", [])
        return super().allowed()


class SteadyBudget(AdaptiveBudget):
    """Learns from seconds that no clock tells, so that a schedule can be repeated."""

    def observe(self, trees: Any, paths: Any, lengths: Any, seconds: Any, **options: Any) -> None:
        super().observe(trees, paths, lengths, dict.fromkeys(seconds, 1e-4), **options)


@dataclass(eq=False)
class Submitted:
    """A request, and what has become of it."""

    request: Request
    expected: tuple[int, ...]  # its tokens alone
    tokens: list[int] = field(default_factory=list)
    ended: bool = False  # by its last step, by an error, or because it was dropped
    finished: bool = False  # by its last step, or by a stop string

    @property
    def all_tokens(self) -> list[int]:
        return [*self.request.prompt_ids, *self.tokens]


tokens = st.lists(st.integers(0, 23), min_size=1, max_size=4)
prompts = st.builds(lambda shared, rest: [*SHARED[:shared], *rest], st.integers(0, 12), tokens)
configs = st.builds(
    DecodeConfig,
    method=st.sampled_from(METHODS),
    budget=st.sampled_from([1, 4, 12, "auto"]),
    max_tokens=st.integers(1, MAX_TOKENS),
    sampling=st.sampled_from(SAMPLINGS),
    stop_token_ids=st.sampled_from([frozenset(), frozenset({2, 11, 17})]),
)
salts = st.sampled_from(["", "another caller"])


class ScheduleMachine(RuleBasedStateMachine):
    @initialize(
        family=st.sampled_from(FAMILIES),
        max_parallel=st.sampled_from([1, 3, 5]),
        prefill_chunk=st.integers(1, 9),
        lone_prefill_chunk=st.integers(2, 30),
        sequences_in_memory=st.sampled_from([None, 1.0, 2.5, 6.0]),
        cached_sequences=st.sampled_from([None, 0.6, 3.0, 100.0]),
    )
    def begin(
        self,
        family: str,
        max_parallel: int,
        prefill_chunk: int,
        lone_prefill_chunk: int,
        sequences_in_memory: float | None,
        cached_sequences: float | None,
    ) -> None:
        self.family = family
        self.backend = FaultyBackend(family)
        self.backend.check_trees()  # once, with its own states; requests for `suffix` need it
        self.faults = self.backend.faults
        each = self.backend.state_nbytes(80, drafts=True)
        max_bytes = None if sequences_in_memory is None else int(sequences_in_memory * each)
        self.backend.max_bytes = max_bytes
        self.limits = SchedulerConfig(
            max_parallel=max_parallel,
            max_bytes=max_bytes,
            prefill_chunk=prefill_chunk,
            lone_prefill_chunk=lone_prefill_chunk,
        )
        self.cache = None if cached_sequences is None else PrefixCache(int(cached_sequences * each))
        costs = VerifyCosts({size: 1e-4 * (1 + 0.05 * size) for size in SIZES if size <= 16})
        budgets = AdaptiveBudgets(costs, {x: SteadyBudget(costs) for x in METHODS})
        self.scheduler = Scheduler(
            self.backend, self.limits, budgets=budgets, prefix_cache=self.cache
        )
        self.submitted: dict[Request, Submitted] = {}
        self.checked: list[object] = []  # states of the prefix cache

    # What may happen

    @rule(prompts=st.lists(prompts, min_size=1, max_size=3), config=configs, salt=salts)
    def submit(self, prompts: list[list[int]], config: DecodeConfig, salt: str) -> None:
        for number, prompt in enumerate(prompts):
            self.add([self.request(prompt, config, salt, constrained=number == 1)])

    @precondition(lambda self: self.submitted)
    @rule(
        which=st.integers(0, 99),
        rest=tokens,
        config=configs,
        salt=salts,
        constrained=st.booleans(),
    )
    def follow_up(
        self, which: int, rest: list[int], config: DecodeConfig, salt: str, constrained: bool
    ) -> None:
        """A prompt that repeats a part of an earlier prompt and its answer."""
        earlier = list(self.submitted.values())[which % len(self.submitted)]
        prompt = [*earlier.all_tokens[: 24 - which % 7], *rest]
        self.add([self.request(prompt, config, salt, constrained)])

    @rule(prompt=prompts, answers=st.lists(configs, min_size=2, max_size=4), salt=salts)
    def submit_group(self, prompt: list[int], answers: list[DecodeConfig], salt: str) -> None:
        self.add([self.request(prompt, config, salt, constrained=False) for config in answers])

    @precondition(lambda self: self.submitted)
    @rule(which=st.integers(0, 99), keep=st.booleans())
    def cancel(self, which: int, keep: bool) -> None:
        """A client goes, perhaps after its answer; or, to `keep`, a stop string ends the text."""
        unfinished, ended = (
            [x for x, submitted in self.submitted.items() if submitted.ended == ended]
            for ended in (False, True)
        )
        requests = [*unfinished, *ended[-1:]]
        request = requests[which % len(requests)]
        self.scheduler.cancel(request, keep=keep)
        submitted = self.submitted[request]
        submitted.finished |= keep and not submitted.ended
        submitted.ended = True
        self.check_books()

    @precondition(lambda self: self.scheduler.running)
    @rule(which=st.integers(0, 9), place=st.sampled_from(["draft", "run", "commit"]))
    def poison(self, which: int, place: str) -> None:
        running = self.scheduler.sequences
        self.faults.poisoned[running[which % len(running)].state] = place

    @precondition(lambda self: self.scheduler.running > 1)
    @rule(bug=st.booleans())
    def drop(self, bug: bool) -> None:
        """The caller closes the scheduler, perhaps because of an error that nobody expects."""
        self.faults.bug = bug
        self.iterate() if bug else self.drop_all()

    @precondition(lambda self: self.scheduler.busy)
    @rule(
        iterations=st.integers(1, 8),
        places=st.lists(st.sampled_from(PLACES), max_size=2),
        calls=st.integers(0, 3),
        error=st.sampled_from(ERRORS),
    )
    def step(self, iterations: int, places: list[str], calls: int, error: Any) -> None:
        """Some iterations, in which calls of the backend may fail once."""
        self.faults.pending.update({place: (calls, error()) for place in places})
        for _ in range(iterations):
            self.iterate()

    # What must be so

    def request(
        self, prompt: list[int], config: DecodeConfig, salt: str, constrained: bool
    ) -> Request:
        constraint = FaultyConstraint(self.backend) if constrained else None
        return Request(prompt_ids=prompt, config=config, cache_salt=salt, constraint=constraint)

    def add(self, requests: list[Request]) -> None:
        if len(requests) == 1:
            self.scheduler.submit(requests[0])
        else:
            self.scheduler.submit_group(requests)
        for request in requests:
            assert request not in self.submitted
            plain = replace(request.config, method="ar", budget=1, max_tokens=MAX_TOKENS)
            constrained = request.constraint is not None
            expected = alone(self.family, tuple(request.prompt_ids), plain, constrained)
            expected = expected[: request.config.max_tokens]
            self.submitted[request] = Submitted(request, expected)
        self.check_books()

    def iterate(self) -> None:
        decoding = [x.request for x in self.scheduler.sequences if self.submitted[x.request].tokens]
        self.backend.passes.clear()
        self.faults.lone.clear()
        raised = self.faults.raised
        try:
            events = self.scheduler.step()
        except BugError:  # as the server does
            self.drop_all()
            return
        delivered: list[Exception] = []
        for request, event in events:
            submitted = self.submitted[request]
            assert not submitted.ended, "an ended request has an event"
            if isinstance(event, Step):
                self.check_step(submitted, event)
            else:
                submitted.ended = True
                delivered.append(event)
        assert len(delivered) == len(set(delivered))
        assert set(delivered) == set(self.faults.lone)
        if self.faults.raised == raised:
            counts = [sum(x is request for x, _ in events) for request in decoding]
            assert counts == [1] * len(decoding), "a sequence did not take one step"
            assert len(self.backend.passes) <= 1, "sequences of one kind ran apart"
        self.check_prompts()
        self.check_books()
        self.check_cache()

    def check_step(self, submitted: Submitted, step: Step) -> None:
        if not submitted.tokens and step.cached_tokens:
            begins = submitted.request.prompt_ids[: step.cached_tokens]
            assert any(
                other.all_tokens[: step.cached_tokens] == begins
                and other.request.cache_salt == submitted.request.cache_salt
                and other.request.config.drafts == submitted.request.config.drafts
                for other in self.submitted.values()
                if other is not submitted
            ), "a state is shared with a caller of another salt"
        submitted.tokens += step.tokens
        expected = submitted.expected
        if step.finish_reason is None:
            assert tuple(submitted.tokens) == expected[: len(submitted.tokens)]
            assert len(submitted.tokens) < len(expected)
        else:
            assert tuple(submitted.tokens) == expected
            stopped = expected[-1] in submitted.request.config.stop_token_ids
            assert step.finish_reason == ("stop" if stopped else "length")
            submitted.ended = submitted.finished = True

    def check_prompts(self) -> None:
        """No pass runs more tokens of prompts than its limit."""
        for work in self.backend.passes:
            prompts = sum(len(item.token_ids) for item in work if isinstance(item, Prefill))
            lone = not any(isinstance(item, Verify) for item in work)
            limits = self.limits.prefill_chunk, self.limits.lone_prefill_chunk
            # A pass that failed is repeated for each sequence alone.
            assert prompts <= (max(limits) if self.faults.raised else limits[lone])

    def check_books(self) -> None:
        """Every request is running, waiting or ended, and nothing else is held."""
        scheduler = self.scheduler
        unfinished = [x for x, submitted in self.submitted.items() if not submitted.ended]
        assert scheduler.running + scheduler.waiting == len(unfinished)
        assert scheduler.busy == bool(unfinished)
        assert scheduler.running <= self.limits.max_parallel
        order = list(self.submitted).index
        running = sorted((sequence.request for sequence in self.scheduler.sequences), key=order)
        assert running == unfinished[: len(running)], "a request overtook another"
        for sequence in self.scheduler.sequences:
            held, submitted = sequence.state.length, self.submitted[sequence.request]
            if submitted.tokens:
                assert held == len(submitted.all_tokens) - 1
            else:
                assert held < len(submitted.request.prompt_ids)
        cached = [] if self.cache is None else [entry.state for entry in self.cache.entries]
        held = {id(state) for state in [*cached, *(x.state for x in self.scheduler.sequences)]}
        assert {id(state) for state in self.backend.opened} == held, "a state was not closed"
        self.backend.check_memory()
        if self.cache is not None:
            assert self.cache.nbytes <= self.cache.max_bytes

    def check_cache(self) -> None:
        """New states of the prefix cache equal a fresh prefill's, wherever they are forked."""
        entries = [] if self.cache is None else self.cache.entries
        for entry in entries:
            if entry.state in self.checked:
                continue
            self.checked.append(entry.state)
            all_tokens = tuple(entry.prefix.tokens.tolist())
            assert entry.state.length == len(all_tokens)
            assert any(
                x.finished and tuple(x.all_tokens[: len(all_tokens)]) == all_tokens
                for x in self.submitted.values()
            ), "the state of a sequence that did not finish is cached"
            lengths = {entry.state.restorable(n) for n in range(len(all_tokens) + 1)} - {0}
            for length in sorted(lengths)[-4:]:
                copied = State.fork(entry.state, length, length + 1)
                expected = logits_after(self.family, all_tokens[:length])
                copied_logits = root_logits(self.family, copied)
                copied.close()
                assert np.allclose(copied_logits, expected, atol=1e-4), "a wrong state is cached"

    def drop_all(self) -> None:
        self.scheduler.close()
        for submitted in self.submitted.values():
            submitted.ended = True
        self.check_books()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.faults.pending.clear()
        self.faults.poisoned.clear()
        self.faults.bug = False
        unfinished = [x for x in self.submitted.values() if not x.ended]
        for _ in range(sum(len(x.request.prompt_ids) + MAX_TOKENS + 1 for x in unfinished)):
            if self.scheduler.busy:
                self.iterate()
        assert not self.scheduler.busy, "a request never ends"
        self.scheduler.close()
        if self.cache is not None:
            self.cache.close()
        assert not self.backend.opened
