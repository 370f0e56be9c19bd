"""Texts that join, leave, wait and fail; each has the tokens that it has alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from treeflash.config import METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig, Step, decode
from treeflash.decoding.interfaces import Extension, Verification
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.errors import ConfigError, NumericalError, PromptError
from treeflash.reference.backend import load
from treeflash.reference.state import State
from treeflash.reference.verifier import Verifier

SAMPLED = SamplingConfig(temperature=0.9, seed=3)
PROMPTS = [[5, 6, 7], [9, 8], [4, 4, 4, 4, 4, 1], [30]]


class Spy(Verifier):
    """Notes the work of each forward pass; fails on one kind of work of poisoned texts."""

    def __init__(self, target):
        super().__init__(target)
        self.passes = []
        self.poison = None  # a prompt's token, and the kind of work that fails
        self.poisoned = []

    def run(self, work):
        self.passes.append(list(work))
        for item in work:
            if self.poison and isinstance(item, Extension) and self.poison[0] in item.token_ids:
                self.poisoned.append(item.state)
            if item.state in self.poisoned and isinstance(item, self.poison[1]):
                raise NumericalError("poisoned")
        return super().run(work)

    @property
    def extended(self):
        """Prompt tokens of each forward pass."""
        return [
            sum(len(item.token_ids) for item in work if isinstance(item, Extension))
            for work in self.passes
        ]


@pytest.fixture
def backend(tiny_pair):
    backend = load(*tiny_pair, LoadConfig())
    backend.verifier = Spy(backend.target)
    return backend


def config_of(**settings):
    return DecodeConfig(**({"budget": 6, "max_tokens": 9} | settings))


def alone(backend, prompt, config):
    return [token for step in decode(backend, prompt, config) for token in step.tokens]


def finish(scheduler, found=None):
    """Run to the end; tokens, or the error, by ticket."""
    found = {} if found is None else found
    while scheduler.busy:
        step(scheduler, found)
    return found


def step(scheduler, found):
    for ticket, event in scheduler.step():
        if isinstance(event, Step):
            found.setdefault(ticket, []).extend(event.tokens)
        else:
            found[ticket] = event


@pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_texts_of_all_methods_at_once_equal_themselves_alone(backend, sampling):
    scheduler = Scheduler(backend)
    wanted = {}
    for n, method in enumerate(METHODS):
        prompt = PROMPTS[n % len(PROMPTS)]
        config = config_of(method=method, sampling=replace(sampling, seed=n), max_tokens=6 + n)
        ticket = scheduler.submit(Request(prompt_ids=prompt, config=config))
        wanted[ticket] = alone(backend, prompt, config)
    assert finish(scheduler) == wanted


def test_texts_join_and_leave_between_iterations(backend):
    scheduler, found, wanted = Scheduler(backend), {}, {}
    for n, prompt in enumerate(PROMPTS):
        config = config_of(max_tokens=4 + 3 * n)
        ticket = scheduler.submit(Request(prompt_ids=prompt, config=config))
        wanted[ticket] = alone(backend, prompt, config)
        step(scheduler, found)
    assert finish(scheduler, found) == wanted
    assert (scheduler.running, scheduler.waiting) == (0, 0)


def test_trees_of_all_texts_are_one_forward_pass(backend):
    scheduler = Scheduler(backend)
    for prompt in PROMPTS:
        scheduler.submit(Request(prompt_ids=prompt, config=config_of()))
    scheduler.step()
    backend.verifier.passes.clear()
    scheduler.step()
    assert [len(work) for work in backend.verifier.passes] == [len(PROMPTS)]


def test_texts_of_any_temperature_are_drafted_together(backend, monkeypatch):
    samplings = [SamplingConfig(), SAMPLED, replace(SAMPLED, temperature=1.4, top_k=9, seed=8)]
    configs = [config_of(sampling=sampling) for sampling in samplings]
    wanted = [alone(backend, PROMPTS[0], config) for config in configs]
    assert len(set(map(tuple, wanted))) == 3
    calls, transitions = [], backend.head.transitions

    def spy(blocks, *args, **options):
        calls.append(len(blocks))
        return transitions(blocks, *args, **options)

    monkeypatch.setattr(backend.head, "transitions", spy)
    scheduler = Scheduler(backend)
    for config in configs:
        scheduler.submit(Request(prompt_ids=PROMPTS[0], config=config))
    assert list(finish(scheduler).values()) == wanted
    assert calls[0] == 3


def test_cancelled_texts_say_no_more_and_others_continue(backend):
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=2))
    tickets = [
        scheduler.submit(Request(prompt_ids=prompt, config=config_of())) for prompt in PROMPTS
    ]
    found = {}
    step(scheduler, found)
    scheduler.cancel(tickets[0])  # runs
    scheduler.cancel(tickets[3])  # waits
    before = len(found[tickets[0]])
    finish(scheduler, found)
    assert len(found.pop(tickets[0])) == before
    assert found == {tickets[n]: alone(backend, PROMPTS[n], config_of()) for n in (1, 2)}
    scheduler.cancel(tickets[1])  # has finished: nothing happens


def test_texts_beyond_the_limit_wait_in_order(backend):
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=1))
    tickets = [
        scheduler.submit(Request(prompt_ids=prompt, config=config_of())) for prompt in PROMPTS
    ]
    found = {}
    while scheduler.busy:
        step(scheduler, found)
        assert scheduler.running <= 1
    assert list(found) == tickets


def test_the_memory_of_all_texts_stays_below_the_limit(backend):
    config = config_of(max_tokens=30)
    capacity = 3 + 30 + 6
    each = backend.state_nbytes(capacity, drafts=True)
    scheduler = Scheduler(backend, SchedulerConfig(max_bytes=2 * each + each // 2))
    tickets = [scheduler.submit(Request(prompt_ids=[5, 6, 7 + n], config=config)) for n in range(4)]
    found = {}
    while scheduler.busy:
        step(scheduler, found)
        assert scheduler.running <= 2
    assert list(found) == tickets
    assert found[tickets[3]] == alone(backend, [5, 6, 10], config)


def test_a_text_that_never_fits_is_refused(backend):
    scheduler = Scheduler(backend, SchedulerConfig(max_bytes=100))
    with pytest.raises(ConfigError, match="the limit is 100"):
        scheduler.submit(Request(prompt_ids=[5], config=config_of()))
    assert not scheduler.busy


@pytest.mark.parametrize("kind", [Extension, Verification])
def test_an_error_in_one_text_ends_only_that_text(backend, kind):
    scheduler = Scheduler(backend)
    backend.verifier.poison = 77, kind
    bad = scheduler.submit(Request(prompt_ids=[77, 1], config=config_of()))
    good = [scheduler.submit(Request(prompt_ids=x, config=config_of())) for x in PROMPTS]
    found = finish(scheduler)
    assert isinstance(found.pop(bad), NumericalError)
    assert found == {
        ticket: alone(backend, prompt, config_of())
        for ticket, prompt in zip(good, PROMPTS, strict=True)
    }


def test_long_prompts_run_in_chunks_beside_running_texts(backend):
    limits = SchedulerConfig(prefill_chunk=8, lone_prefill_chunk=32)
    scheduler, found = Scheduler(backend, limits), {}
    config = config_of(max_tokens=20, budget=1)
    first = scheduler.submit(Request(prompt_ids=PROMPTS[0], config=config))
    step(scheduler, found)
    prompt = [n % 250 for n in range(45)]
    second = scheduler.submit(Request(prompt_ids=prompt, config=config))
    backend.verifier.passes.clear()
    for n in range(6):
        step(scheduler, found)
        assert len(found[first]) == 2 + n, "the running text waits"
    assert backend.verifier.extended == [8, 8, 8, 8, 8, 5]
    finish(scheduler, found)
    assert found[second] == alone(backend, prompt, config)
    backend.verifier.passes.clear()
    scheduler.submit(Request(prompt_ids=prompt, config=config))
    finish(scheduler)
    assert backend.verifier.extended[:2] == [32, 13]


def test_a_group_runs_its_prompt_once(backend):
    scheduler = Scheduler(backend)
    prompt = list(range(20, 40))
    configs = [config_of(sampling=replace(SAMPLED, seed=n), max_tokens=12) for n in range(4)]
    tickets = scheduler.submit_group([Request(prompt_ids=prompt, config=c) for c in configs])
    found = finish(scheduler)
    assert sum(backend.verifier.extended) == len(prompt) + 3  # and each chooses its first token
    assert [found[ticket] for ticket in tickets] == [alone(backend, prompt, c) for c in configs]


def test_a_group_of_drafted_and_plain_texts(backend):
    scheduler = Scheduler(backend)
    configs = [config_of(method=method) for method in ("ar", "treeflash", "ddtree", "ar")]
    requests = [Request(prompt_ids=PROMPTS[0], config=config) for config in configs]
    tickets = scheduler.submit_group(requests)
    found = finish(scheduler)
    assert [found[t] for t in tickets] == [alone(backend, PROMPTS[0], c) for c in configs]


def test_a_group_has_one_prompt(backend):
    requests = [Request(prompt_ids=prompt, config=config_of()) for prompt in PROMPTS[:2]]
    with pytest.raises(PromptError, match="same prompt"):
        Scheduler(backend).submit_group(requests)


def test_finished_texts_serve_prompts_that_begin_alike(backend):
    cache = PrefixCache(10**9)
    scheduler = Scheduler(backend, prefix_cache=cache)
    prompt = list(range(20, 50))
    scheduler.submit(Request(prompt_ids=prompt, config=config_of()))
    finish(scheduler)
    for other, cached in ((prompt, 29), ([*prompt[:25], 7, 8], 25), ([1, *prompt], 0)):
        backend.verifier.passes.clear()
        scheduler.submit(Request(prompt_ids=other, config=config_of()))
        ((_, first),) = scheduler.step()
        assert first.cached_tokens == cached
        assert backend.verifier.extended == [len(other) - cached]
        tokens = list(first.tokens)
        while scheduler.busy:
            tokens += [token for _, event in scheduler.step() for token in event.tokens]
        assert tokens == alone(backend, other, config_of())
    scheduler.submit(Request(prompt_ids=prompt, config=config_of(), salt="another caller"))
    ((_, first),) = scheduler.step()
    assert first.cached_tokens == 0
    scheduler.close()
    cache.close()
    assert cache.nbytes == 0


def test_a_text_is_closed_if_the_cache_cannot_take_its_state(backend, monkeypatch):
    closed = []
    monkeypatch.setattr(State, "close", lambda state: closed.append(state))
    monkeypatch.setattr(State, "fork", lambda *_: 1 / 0)
    scheduler = Scheduler(backend, prefix_cache=PrefixCache(1 << 20))
    scheduler.submit(Request(prompt_ids=[5, 6], config=config_of(max_tokens=1)))
    with pytest.raises(ZeroDivisionError):
        scheduler.step()
    assert len(closed) == 1
