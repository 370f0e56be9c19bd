"""Sequences that start, wait, share and fail, the scheduler's thread, and turns of threads.

`test_schedules.py` compares random schedules with each sequence alone.
"""

import queue
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from failures import failing
from fake_models import PROMPT, SCRIPT, scripted
from fake_models import config_of as scripted_config
from memory import watch_states
from recordings import recording

from treeflash.config import DecodeConfig, LoadConfig, Penalties, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig, Step
from treeflash.decoding.disk_cache import CacheKey, Prefix
from treeflash.decoding.interfaces import Prefill
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.scheduler_thread import SchedulerThread
from treeflash.decoding.turns import Turns
from treeflash.errors import (
    ConfigError,
    DeviceError,
    DeviceMemoryError,
    MemoryInUseError,
    PromptError,
    is_out_of_memory,
)
from treeflash.reference.backend import load
from treeflash.reference.verifier import State
from treeflash.testing.comparisons import generate

SAMPLED = SamplingConfig(temperature=0.9, seed=3)

PROMPTS = [[5, 6, 7], [9, 8], [4, 4, 4, 4, 4, 1], [30]]


@pytest.fixture
def backend(tiny_pair):
    return load(*tiny_pair, LoadConfig())


def config_of(**settings):
    return DecodeConfig(**({"budget": 6, "max_tokens": 9} | settings))


def submit(scheduler, prompt, config=None, **settings):
    """Submit a prompt with the settings of `config_of`, or with a configuration."""
    return scheduler.submit(Request(prompt_ids=prompt, config=config or config_of(**settings)))


def answer(scheduler, prompt, config=None, **settings):
    """Return the tokens of a prompt that is submitted alone."""
    submit(scheduler, prompt, config, **settings)
    (found,) = finish(scheduler).values()
    return found


def finish(scheduler, found=None):
    """Run to the end; returns the tokens, or the error, by request."""
    found = {} if found is None else found
    for event in scheduler.run():
        note(found, *event)
    return found


def step(scheduler, found):
    for event in scheduler.step():
        note(found, *event)


def note(found, request_id, event):
    if isinstance(event, Step):
        found.setdefault(request_id, []).extend(event.tokens)
    else:
        found[request_id] = event


def test_texts_of_any_temperature_are_drafted_together(backend):
    samplings = [SamplingConfig(), SAMPLED, replace(SAMPLED, temperature=1.4, top_k=9, seed=8)]
    configs = [config_of(sampling=sampling) for sampling in samplings]
    wanted = [generate(backend, PROMPTS[0], config) for config in configs]
    assert len(set(map(tuple, wanted))) == 3
    scheduler = Scheduler(backend)
    for config in configs:
        submit(scheduler, PROMPTS[0], config)
    with recording(backend.head, "transitions") as tables:
        assert list(finish(scheduler).values()) == wanted
    blocks, _ = tables[0]
    assert len(blocks) == 3


def test_a_text_that_never_fits_is_refused(backend):
    scheduler = Scheduler(backend, SchedulerConfig(max_bytes=100))
    with pytest.raises(ConfigError, match=r"the limit is 9\.54e-05 MiB"):
        submit(scheduler, [5])
    assert not scheduler.busy


@pytest.mark.parametrize("scored", [False, True])
def test_how_much_of_a_prompt_has_run(backend, scored):
    limits = SchedulerConfig(prefill_chunk=8, lone_prefill_chunk=32)
    scheduler = Scheduler(backend, limits, prefix_cache=PrefixCache(10**9))
    config = config_of(max_tokens=2, method="ar", log_probs=0)
    submit(scheduler, [n % 250 for n in range(40)], config)
    list(scheduler.run())
    prompt = [n % 250 for n in range(150)]
    first = scheduler.submit(Request(prompt_ids=prompt, config=config, scores_prompt=scored))
    assert scheduler.prompts == {}, "it has not started"
    cached, done = 0 if scored else 40, []
    while not scheduler.step():
        progress = scheduler.prompts[first]
        assert (progress.total, progress.cached) == (150, cached)
        assert progress.seconds > 0
        done.append(progress.done)
    assert done == sorted(set(done))
    assert cached < done[0] < done[-1] < 150
    assert scheduler.prompts == {}, "it has a token"
    assert scheduler.busy


def prompt_tokens(passes):
    """The number of tokens of prompts in each forward pass."""
    return [sum(len(x.token_ids) for x in work if isinstance(x, Prefill)) for (work,) in passes]


def test_prompts_that_run_together_share_the_room(backend):
    """A sequence that decodes waits for a bounded number of tokens, however many prompts come."""
    limits = SchedulerConfig(prefill_chunk=8, lone_prefill_chunk=32)
    scheduler, found = Scheduler(backend, limits), {}
    config = config_of(max_tokens=20, budget=1)
    first = submit(scheduler, PROMPTS[0], config)
    step(scheduler, found)
    prompts = [[n] * length for n, length in ((20, 10), (21, 3), (22, 14))]
    others = [submit(scheduler, x, config) for x in prompts]
    with recording(backend.verifier, "run") as passes:
        for n in range(4):
            step(scheduler, found)
            assert len(found[first]) == 2 + n, "the running sequence waits"
    assert prompt_tokens(passes) == [8, 8, 8, 3]
    assert list(found) == [first, *others], "the earliest prompt has the room first"
    scheduler.close()
    for prompt in prompts:
        submit(scheduler, prompt * 2, config)
    with recording(backend.verifier, "run") as passes:
        scheduler.step()
    assert prompt_tokens(passes) == [32]


def test_the_state_that_a_sequence_continues_is_the_last_to_make_room(backend):
    """Small requests that came after it do not cost a conversation its beginning."""
    config, cache = config_of(max_tokens=4), PrefixCache(10**9)
    scheduler = Scheduler(backend, prefix_cache=cache)
    conversation, sizes = list(range(10, 50)), []
    for prompt in (conversation, [5, 6], [7, 8]):
        answer(scheduler, prompt, config)
        sizes.append(cache.nbytes)
    request = Request(prompt_ids=[*conversation, 9, 8], config=config)
    scheduler.config = SchedulerConfig(max_bytes=scheduler.state_bytes(request) + sizes[0])
    scheduler.submit(request)
    ((_, first),) = scheduler.step()
    assert first.cached_tokens >= len(conversation)
    assert cache.nbytes == sizes[0] < sizes[-1]


def test_a_longer_state_takes_the_place_of_the_one_it_replaces(backend):
    """The turn of a conversation does not cost others their states."""
    config, cache = config_of(max_tokens=4), PrefixCache(10**9)
    scheduler = Scheduler(backend, prefix_cache=cache)
    prompt = list(range(10, 50))
    for each in ([5, 6], prompt):
        submit(scheduler, each, config)
        (answer,) = finish(scheduler).values()
    following = [*prompt, *answer, 9, 8]
    request = Request(prompt_ids=following, config=config)
    # Beside the sequence there is room for two of the three states.
    copied = backend.state_nbytes(len(following) + 4 - 1, drafts=True)
    other = backend.state_nbytes(2 + 4 - 1, drafts=True)
    limit = scheduler.state_bytes(request) + copied + other
    scheduler.config = SchedulerConfig(max_bytes=limit)
    scheduler.submit(request)
    finish(scheduler)
    assert len(cache) == 2
    assert cache.find(Prefix(CacheKey(backend, True, ""), [5, 6])) is not None


@pytest.mark.parametrize(("missing", "cached"), [(0, 1), (1, 0)])
def test_a_finished_state_is_copied_only_where_both_fit(backend, missing, cached):
    """The copy is made before the state of the sequence is closed."""
    state = backend.state_nbytes(2 + 4 + 6, drafts=True)
    copy = backend.state_nbytes(2 + 4 - 1, drafts=True)
    limits = SchedulerConfig(max_bytes=state + copy - missing)
    scheduler = Scheduler(backend, limits, prefix_cache=PrefixCache(10**9))
    answer(scheduler, [5, 6], max_tokens=4)
    assert len(scheduler.prefix_cache) == cached


def test_a_group_has_one_prompt(backend):
    requests = [Request(prompt_ids=prompt, config=config_of()) for prompt in PROMPTS[:2]]
    with pytest.raises(PromptError, match="same prompt"):
        Scheduler(backend).submit_group(requests)


@pytest.mark.parametrize("call", ["submit_group", "decode"])
def test_requests_of_which_one_is_refused_are_all_refused(backend, call):
    scheduler = Scheduler(backend)
    configs = [config_of(), config_of(penalties=Penalties(logit_bias=((10**6, 1.0),)))]
    requests = [Request(prompt_ids=[5, 6], config=config) for config in configs]
    with pytest.raises(ConfigError, match="logit_bias"):
        getattr(scheduler, call)(requests)
    assert not scheduler.busy


LOST = "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPU...)"


@pytest.mark.parametrize("message", ["[malloc] Unable to allocate 1073741824 bytes.", LOST])
def test_memory_that_runs_out_on_metal_ends_one_sequence(backend, message):
    """A GPU that refuses all work ends them all."""
    run = backend.verifier.run

    def fail(work):
        if any(isinstance(item, Prefill) and item.token_ids == [9] for item in work):
            raise RuntimeError(message)
        return run(work)

    scheduler = Scheduler(backend)
    good, bad = (submit(scheduler, prompt) for prompt in ([5, 6], [9]))
    backend.verifier.run = fail
    if message == LOST:
        with pytest.raises(RuntimeError, match="GPU"):
            finish(scheduler)
        return
    found = {}
    events = scheduler.step()
    (error,) = (event for request_id, event in events if request_id == bad)
    assert str(error) == message
    (first,) = (event for request_id, event in events if request_id == good)
    found[good] = [*first.tokens, *finish(scheduler)[good]]
    assert found[good] == generate(backend, [5, 6], config_of())


@pytest.mark.parametrize(
    ("reason", "kind", "says"),
    [
        ("Internal Error", DeviceError, "the GPU failed in work that was under way; try again"),
        ("Insufficient Memory", DeviceMemoryError, "the GPU ran out of memory in work that was"),
    ],
)
def test_an_error_of_earlier_work_ends_all_sequences_that_run(backend, reason, kind, says):
    """It belongs to no call, so every state is forgotten. A request that waits starts later."""
    message = f"[METAL] Command buffer execution failed: {reason}"
    cache = PrefixCache(10**9)
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=2), prefix_cache=cache)
    answer(scheduler, [5, 6])
    assert len(cache) == 1
    *started, waiting = (submit(scheduler, prompt) for prompt in ([5, 6, 7], [9], [30]))
    scheduler.step()
    with failing(backend.verifier, "run", RuntimeError(message)):
        events = dict(scheduler.step())
    assert list(events) == started
    for error in events.values():
        assert type(error) is kind
        assert is_out_of_memory(error) == (kind is DeviceMemoryError)
        assert str(error).startswith(says)
        assert str(error).endswith(f" ({message})")
    assert len(cache) == 0
    assert finish(scheduler) == {waiting: generate(backend, [30], config_of())}


def test_an_error_of_earlier_work_while_a_state_is_forked_ends_all_that_run(backend):
    """Also where a finished sequence is copied: its text is complete. Nothing is lost."""
    error = RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
    scheduler = Scheduler(backend, prefix_cache=PrefixCache(10**9))
    short, long = (
        submit(scheduler, prompt, max_tokens=n, method="ar")
        for prompt, n in (([5, 6], 2), ([9], 9))
    )
    with failing(State, "fork", error):
        found = finish(scheduler)
    assert found[short] == generate(backend, [5, 6], config_of(max_tokens=2))
    assert isinstance(found[long], DeviceError)
    finish(scheduler)
    answer(scheduler, [5, 6, 7])
    again = submit(scheduler, [5, 6, 7, 8])
    with failing(State, "fork", error, 1):
        found = finish(scheduler)
    assert found == {again: generate(backend, [5, 6, 7, 8], config_of())}


def test_a_state_that_the_prefix_cache_cannot_hold_is_not_copied(backend):
    """An agent's prompt would be copied, and dropped at once."""
    nbytes = backend.state_nbytes(2 + 4 - 1, drafts=True)
    for missing, copies in ((1, 0), (0, 1)):
        scheduler = Scheduler(backend, prefix_cache=PrefixCache(nbytes - missing))
        submit(scheduler, [5, 6], max_tokens=4)
        with recording(State, "fork") as forks:
            finish(scheduler)
        assert len(forks) == len(scheduler.prefix_cache) == copies


def test_long_prompts_leave_snapshots_on_the_way(backend):
    """So that a prompt that differs in the middle need not start anew."""
    taken = []

    class Recurrent(State):
        needs_snapshots = True

        def snapshot(self):
            taken.append(self.length)

    backend.open = lambda capacity, drafts: Recurrent(backend.target, None, capacity)
    config = SchedulerConfig(snapshot_interval=8)
    for cache, lengths in ((PrefixCache(10**9), [8, 16, 24, 26]), (None, [])):
        scheduler = Scheduler(backend, config, prefix_cache=cache)
        submit(scheduler, list(range(2, 29)), method="ar")
        while not scheduler.step():
            pass
        assert taken == lengths
        taken.clear()
        scheduler.close()


def test_a_group_shares_its_prompt_among_equal_salts_alone(backend):
    requests = [
        Request(prompt_ids=[5, 6, 7, 8], config=config_of(), cache_salt=salt) for salt in "aab"
    ]
    scheduler = Scheduler(backend)
    request_ids = scheduler.submit_group(requests)
    cached = {}
    for request_id, step in scheduler.run():
        cached.setdefault(request_id, step.cached_tokens)
    assert [cached[request_id] for request_id in request_ids] == [0, 3, 0]


def test_a_prompt_that_is_scored_is_run_as_a_whole(backend):
    """Its beginning is cached, but logits of cached positions are not kept."""

    def scores(scheduler):
        request = Request(prompt_ids=[5, 6, 7, 8], config=config_of(), scores_prompt=True)
        (first, *_) = [step for _, step in scheduler.decode([request])]
        assert first.cached_tokens == 0
        return first.prompt_log_probs.sampled

    scheduler = Scheduler(backend, prefix_cache=PrefixCache(10**9))
    answer(scheduler, [5, 6, 7, 8])
    assert len(scheduler.prefix_cache)
    expected = scores(Scheduler(backend))
    assert len(expected) == 3
    assert scores(scheduler) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 66])
def test_every_token_of_a_prompt_but_the_first_is_scored(backend, length):
    """The end of the prompt may be the end of a part that is scored at once."""
    request = Request(prompt_ids=[5] * length, config=config_of(max_tokens=1), scores_prompt=True)
    ((_, step),) = Scheduler(backend).decode([request])
    scores = step.prompt_log_probs
    assert (0 if scores is None else len(scores.sampled)) == length - 1


def test_the_seconds_of_steps_are_parts_of_the_time_that_has_passed(backend):
    scheduler = Scheduler(backend)
    submit(scheduler, [5, 6, 7, 8], method="treeflash")
    started = time.perf_counter()
    steps = [step for _, step in scheduler.run()]
    passed = time.perf_counter() - started
    assert {phase for step in steps for phase in step.seconds} >= {"prefill", "draft", "verify"}
    assert all(seconds > 0 for step in steps for seconds in step.seconds.values())
    assert sum(seconds for step in steps for seconds in step.seconds.values()) < passed


def test_a_state_that_cannot_be_copied_for_an_unknown_reason_is_closed(backend, monkeypatch):
    made = watch_states(monkeypatch, State)
    scheduler = Scheduler(backend, prefix_cache=PrefixCache(1 << 20))
    submit(scheduler, [5, 6], max_tokens=1)
    with failing(State, "fork", ZeroDivisionError), pytest.raises(ZeroDivisionError):
        scheduler.step()
    assert [state.nbytes for state in made] == [0]


class Room:
    """Lets a backend open states as long as some of them fit, the prefix cache's states included.

    Attributes:
        refused: states that did not fit.
    """

    def __init__(self, backend, scheduler, states):
        self.refused = 0
        open_state = backend.open

        def open_if_it_fits(*args, **kwargs):
            if scheduler.running + len(scheduler.prefix_cache or ()) >= states:
                self.refused += 1
                raise MemoryInUseError("the memory for keys and values has no room")
            return open_state(*args, **kwargs)

        backend.open = open_if_it_fits


def test_a_text_waits_until_reserved_memory_has_room(backend):
    scheduler = Scheduler(backend)
    room = Room(backend, scheduler, 2)
    prompts = [[5, 6, 7 + n] for n in range(4)]
    request_ids = [submit(scheduler, x) for x in prompts]
    found = {}
    while scheduler.busy:
        step(scheduler, found)
        assert scheduler.running <= 2
    assert room.refused
    del backend.open  # from here on it has room
    assert found == {
        request_id: generate(backend, prompt, config_of())
        for request_id, prompt in zip(request_ids, prompts, strict=True)
    }


def test_cached_states_leave_reserved_memory_one_by_one(backend):
    config = SchedulerConfig(max_parallel=1)
    scheduler = Scheduler(backend, config, prefix_cache=PrefixCache(10**9))
    for prompt in ([5, 6], [7, 8], [9, 10], [15, 16]):
        answer(scheduler, prompt, max_tokens=2)
    assert len(scheduler.prefix_cache) == 4
    room = Room(backend, scheduler, 2)
    first, _ = (submit(scheduler, x) for x in ([11, 12], [13, 14]))
    ((request_id, _),) = scheduler.step()
    assert request_id == first, "a request overtook another"
    assert (scheduler.running, len(scheduler.prefix_cache), room.refused) == (1, 1, 3)


def test_cached_states_make_room_after_memory_has_run_out(backend):
    """Else each later sequence would end in the same way."""
    cache, run = PrefixCache(10**9), backend.verifier.run
    scheduler = Scheduler(backend, prefix_cache=cache)
    expected = generate(backend, [30], config_of())
    for prompt in ([5, 6], [7, 8], [9, 10], [15, 16]):
        answer(scheduler, prompt, max_tokens=2)

    def run_if_it_fits(work):
        if len(cache) > 2:
            raise MemoryError("out of memory")
        return run(work)

    backend.verifier.run = run_if_it_fits
    assert isinstance(answer(scheduler, [40]), MemoryError)
    assert len(cache) == 2
    assert answer(scheduler, [30]) == expected


def test_nothing_of_a_failed_call_is_in_memory_when_it_is_repeated(backend):
    run, computed = backend.verifier.run, []

    def fail_together(work):
        assert [x for x in computed if x() is not None] == []
        found = np.zeros(3)
        computed.append(weakref.ref(found))
        if len(work) > 1:
            raise MemoryError("out of memory")
        return run(work)

    scheduler = Scheduler(backend)
    requests = [submit(scheduler, prompt, max_tokens=1) for prompt in ([5, 6], [7, 8])]
    backend.verifier.run = fail_together
    assert set(finish(scheduler)) == set(requests)
    assert len(computed) == 3


def test_a_text_without_room_ends_if_nothing_can_make_room(backend):
    scheduler = Scheduler(backend)
    Room(backend, scheduler, 0)
    bad = submit(scheduler, [5, 6])
    ((request_id, error),) = scheduler.step()
    assert request_id == bad
    assert isinstance(error, MemoryInUseError)
    assert not scheduler.busy


def test_an_error_of_the_receiver_ends_the_sequences_and_not_the_thread():
    """Nobody would answer later requests, and they would wait for ever."""
    backend, answers = scripted(SCRIPT), queue.SimpleQueue()

    def receive(events):
        for request, step in events:
            if request.tag == "faulty":
                raise KeyError("no such token")
            answers.put(step)

    thread = SchedulerThread(lambda: Scheduler(backend), receive, answers.put, stays=True)
    thread.start()
    scheduler = thread.made.result()
    for tag in ("faulty", "good"):
        request = Request(prompt_ids=PROMPT, config=scripted_config(max_tokens=1), tag=tag)
        assert thread.call(lambda request=request: scheduler.submit(request))
        if tag == "faulty":
            assert isinstance(answers.get(timeout=60), KeyError)
    assert answers.get(timeout=60).tokens == (SCRIPT[4],)
    thread.stop()
    assert all(state.closed for state in backend.states)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fails", ["make", "close"])
def test_a_thread_that_an_error_ended_takes_no_command(fails):
    """Who gave it one would wait for ever."""
    backend = scripted(SCRIPT)

    def make():
        if fails == "make":
            raise MemoryError
        return Scheduler(backend)

    def receive(events):
        raise ValueError("no such token")

    errors = queue.SimpleQueue()
    thread = SchedulerThread(make, receive, errors.put, stays=True)
    with failing(Scheduler, "close", MemoryError):
        thread.start()
        if fails == "close":
            scheduler = thread.made.result()
            assert thread.call(lambda: submit(scheduler, PROMPT))
            assert isinstance(errors.get(timeout=60), ValueError)
        thread.join(60)
    assert not thread.call(lambda: None)


def test_one_thread_at_a_time_in_order():
    turns, order, inside = Turns(), [], []

    def take(number: int) -> None:
        with turns:
            inside.append(number)
            assert inside == [number]
            order.append(number)
            inside.remove(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    with turns:
        for number, thread in enumerate(threads):
            thread.start()
            while len(turns.waiting) <= number:
                pass
        assert order == []
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_two_busy_threads_alternate():
    """With a lock of Python, one of them would get nearly all turns."""
    turns, order = Turns(), []

    def work(name: str) -> None:
        for _ in range(200):
            with turns:
                order.append(name)

    with ThreadPoolExecutor(2) as threads:
        with turns:
            done = [threads.submit(work, name) for name in "ab"]
            while len(turns.waiting) < 2:
                pass
        for one in done:
            one.result()
    assert sum(x != y for x, y in pairwise(order)) > 100


def test_an_error_ends_a_turn():
    turns = Turns()
    for _ in range(2):
        with pytest.raises(KeyError), turns:
            raise KeyError
