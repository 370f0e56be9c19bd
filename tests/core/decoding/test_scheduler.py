"""Sequences that join, leave, wait and fail; each has the tokens that it has alone."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from failures import failing
from memory import watch_states
from recordings import recording

from treeflash.config import METHODS, DecodeConfig, LoadConfig, Penalties, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig, Step
from treeflash.decoding.disk_cache import CacheKey, Prefix
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.errors import (
    ConfigError,
    DeviceError,
    MemoryInUseError,
    NumericalError,
    PromptError,
    is_device_lost,
)
from treeflash.reference.backend import load
from treeflash.reference.verifier import State, Verifier
from treeflash.testing.comparisons import generate

SAMPLED = SamplingConfig(temperature=0.9, seed=3)
PROMPTS = [[5, 6, 7], [9, 8], [4, 4, 4, 4, 4, 1], [30]]


class Spy(Verifier):
    """Notes the work of each forward pass; fails on one kind of work of poisoned sequences."""

    def __init__(self, target):
        super().__init__(target)
        self.passes = []
        self.poison = None  # a prompt's token, and the kind of work that fails
        self.poisoned = []

    def run(self, work):
        self.passes.append(list(work))
        for item in work:
            if self.poison and isinstance(item, Prefill) and self.poison[0] in item.token_ids:
                self.poisoned.append(item.state)
            if item.state in self.poisoned and isinstance(item, self.poison[1]):
                raise NumericalError("poisoned")
        return super().run(work)

    @property
    def extended(self):
        """Prompt tokens of each forward pass."""
        return [
            sum(len(item.token_ids) for item in work if isinstance(item, Prefill))
            for work in self.passes
        ]


@pytest.fixture
def backend(tiny_pair):
    backend = load(*tiny_pair, LoadConfig())
    backend.verifier = Spy(backend.target)
    return backend


def config_of(**settings):
    return DecodeConfig(**({"budget": 6, "max_tokens": 9} | settings))


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


@pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_texts_of_all_methods_at_once_equal_themselves_alone(backend, sampling):
    scheduler = Scheduler(backend)
    wanted = {}
    for n, method in enumerate(METHODS):
        prompt = PROMPTS[n % len(PROMPTS)]
        config = config_of(method=method, sampling=replace(sampling, seed=n), max_tokens=6 + n)
        request_id = scheduler.submit(Request(prompt_ids=prompt, config=config))
        wanted[request_id] = generate(backend, prompt, config)
    assert finish(scheduler) == wanted


def test_texts_join_and_leave_between_iterations(backend):
    scheduler, found, wanted = Scheduler(backend), {}, {}
    for n, prompt in enumerate(PROMPTS):
        config = config_of(max_tokens=4 + 3 * n)
        request_id = scheduler.submit(Request(prompt_ids=prompt, config=config))
        wanted[request_id] = generate(backend, prompt, config)
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


def test_texts_of_any_temperature_are_drafted_together(backend):
    samplings = [SamplingConfig(), SAMPLED, replace(SAMPLED, temperature=1.4, top_k=9, seed=8)]
    configs = [config_of(sampling=sampling) for sampling in samplings]
    wanted = [generate(backend, PROMPTS[0], config) for config in configs]
    assert len(set(map(tuple, wanted))) == 3
    scheduler = Scheduler(backend)
    for config in configs:
        scheduler.submit(Request(prompt_ids=PROMPTS[0], config=config))
    with recording(backend.head, "transitions") as tables:
        assert list(finish(scheduler).values()) == wanted
    blocks, _ = tables[0]
    assert len(blocks) == 3


def test_cancelled_texts_say_no_more_and_others_continue(backend):
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=2))
    request_ids = [
        scheduler.submit(Request(prompt_ids=prompt, config=config_of())) for prompt in PROMPTS
    ]
    found = {}
    step(scheduler, found)
    scheduler.cancel(request_ids[0])  # runs
    scheduler.cancel(request_ids[3])  # waits
    before = len(found[request_ids[0]])
    finish(scheduler, found)
    assert len(found.pop(request_ids[0])) == before
    assert found == {request_ids[n]: generate(backend, PROMPTS[n], config_of()) for n in (1, 2)}
    scheduler.cancel(request_ids[1])  # has finished: nothing happens


def test_texts_beyond_the_limit_wait_in_order(backend):
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=1))
    request_ids = [
        scheduler.submit(Request(prompt_ids=prompt, config=config_of())) for prompt in PROMPTS
    ]
    found = {}
    while scheduler.busy:
        step(scheduler, found)
        assert scheduler.running <= 1
    assert list(found) == request_ids


def test_the_memory_of_all_texts_stays_below_the_limit(backend):
    config = config_of(max_tokens=30)
    capacity = 3 + 30 + 6
    each = backend.state_nbytes(capacity, drafts=True)
    scheduler = Scheduler(backend, SchedulerConfig(max_bytes=2 * each + each // 2))
    request_ids = [
        scheduler.submit(Request(prompt_ids=[5, 6, 7 + n], config=config)) for n in range(4)
    ]
    found = {}
    while scheduler.busy:
        step(scheduler, found)
        assert scheduler.running <= 2
    assert list(found) == request_ids
    assert found[request_ids[3]] == generate(backend, [5, 6, 10], config)


def test_a_text_that_never_fits_is_refused(backend):
    scheduler = Scheduler(backend, SchedulerConfig(max_bytes=100))
    with pytest.raises(ConfigError, match=r"the limit is 9\.54e-05 MiB"):
        scheduler.submit(Request(prompt_ids=[5], config=config_of()))
    assert not scheduler.busy


@pytest.mark.parametrize("kind", [Prefill, Verify])
def test_an_error_in_one_text_ends_only_that_text(backend, kind):
    scheduler = Scheduler(backend)
    backend.verifier.poison = 77, kind
    bad = scheduler.submit(Request(prompt_ids=[77, 1], config=config_of()))
    good = [scheduler.submit(Request(prompt_ids=x, config=config_of())) for x in PROMPTS]
    found = finish(scheduler)
    assert isinstance(found.pop(bad), NumericalError)
    assert found == {
        request_id: generate(backend, prompt, config_of())
        for request_id, prompt in zip(good, PROMPTS, strict=True)
    }


@pytest.mark.parametrize("end", ["failure", "cancellation", "close"])
def test_only_states_of_finished_sequences_are_cached(backend, end):
    """Nobody knows the state of a sequence that failed."""
    cache = PrefixCache(10**9)
    scheduler = Scheduler(backend, prefix_cache=cache)
    backend.verifier.poison = 77, Verify
    prompt = [77 if end == "failure" else 9, 1, 2, 3]
    request_id = scheduler.submit(Request(prompt_ids=prompt, config=config_of()))
    scheduler.step()
    if end == "failure":
        ((_, event),) = scheduler.step()
        assert isinstance(event, NumericalError)
    elif end == "cancellation":
        scheduler.cancel(request_id)
    else:
        scheduler.close()
    assert not scheduler.busy
    assert len(cache) == 0


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
        assert len(found[first]) == 2 + n, "the running sequence waits"
    assert backend.verifier.extended == [8, 8, 8, 8, 8, 5]
    finish(scheduler, found)
    assert found[second] == generate(backend, prompt, config)
    backend.verifier.passes.clear()
    scheduler.submit(Request(prompt_ids=prompt, config=config))
    finish(scheduler)
    assert backend.verifier.extended[:2] == [32, 13]


@pytest.mark.parametrize("scored", [False, True])
def test_how_much_of_a_prompt_has_run(backend, scored):
    limits = SchedulerConfig(prefill_chunk=8, lone_prefill_chunk=32)
    scheduler = Scheduler(backend, limits, prefix_cache=PrefixCache(10**9))
    config = config_of(max_tokens=2, method="ar", log_probs=0)
    scheduler.submit(Request(prompt_ids=[n % 250 for n in range(40)], config=config))
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


def test_prompts_that_run_together_share_the_room(backend):
    """A sequence that decodes waits for a bounded number of tokens, however many prompts come."""
    limits = SchedulerConfig(prefill_chunk=8, lone_prefill_chunk=32)
    scheduler, found = Scheduler(backend, limits), {}
    config = config_of(max_tokens=20, budget=1)
    first = scheduler.submit(Request(prompt_ids=PROMPTS[0], config=config))
    step(scheduler, found)
    prompts = [[n] * length for n, length in ((20, 10), (21, 3), (22, 14))]
    others = [scheduler.submit(Request(prompt_ids=x, config=config)) for x in prompts]
    backend.verifier.passes.clear()
    for n in range(4):
        step(scheduler, found)
        assert len(found[first]) == 2 + n, "the running sequence waits"
    assert backend.verifier.extended == [8, 8, 8, 3]
    assert list(found) == [first, *others], "the earliest prompt has the room first"
    scheduler.close()
    backend.verifier.passes.clear()
    for prompt in prompts:
        scheduler.submit(Request(prompt_ids=prompt * 2, config=config))
    scheduler.step()
    assert backend.verifier.extended == [32]


def test_the_prefix_cache_makes_room_for_sequences(backend):
    """Memory is for what runs; the rest may be states of finished sequences."""
    config = config_of(max_tokens=4)
    each = backend.state_nbytes(2 + 4 + 6, drafts=True)
    cache = PrefixCache(10**9)
    scheduler = Scheduler(backend, SchedulerConfig(max_bytes=2 * each), prefix_cache=cache)
    for n in range(8):
        scheduler.submit(Request(prompt_ids=[n, 30], config=config))
        finish(scheduler)
        assert cache.nbytes <= 2 * each
    assert len(cache) > 1
    for n in range(2):
        scheduler.submit(Request(prompt_ids=[n, 40], config=config))
    scheduler.step()
    assert scheduler.running == 2
    assert len(cache) == 0


def test_the_state_that_a_sequence_continues_is_the_last_to_make_room(backend):
    """Small requests that came after it do not cost a conversation its beginning."""
    config, cache = config_of(max_tokens=4), PrefixCache(10**9)
    scheduler = Scheduler(backend, prefix_cache=cache)
    conversation, sizes = list(range(10, 50)), []
    for prompt in (conversation, [5, 6], [7, 8]):
        scheduler.submit(Request(prompt_ids=prompt, config=config))
        finish(scheduler)
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
        scheduler.submit(Request(prompt_ids=each, config=config))
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
    scheduler.submit(Request(prompt_ids=[5, 6], config=config_of(max_tokens=4)))
    finish(scheduler)
    assert len(scheduler.prefix_cache) == cached


@pytest.mark.parametrize("chunk", [2048, 18], ids=["whole", "all but two tokens"])
def test_a_group_runs_its_prompt_once(backend, chunk):
    scheduler = Scheduler(backend, SchedulerConfig(lone_prefill_chunk=chunk))
    prompt = list(range(20, 40))
    configs = [config_of(sampling=replace(SAMPLED, seed=n), max_tokens=12) for n in range(4)]
    request_ids = scheduler.submit_group([Request(prompt_ids=prompt, config=c) for c in configs])
    found = finish(scheduler)
    assert sum(backend.verifier.extended) == len(prompt) + 3  # and each chooses its first token
    assert [found[request_id] for request_id in request_ids] == [
        generate(backend, prompt, c) for c in configs
    ]


def test_a_group_of_drafted_and_plain_texts(backend):
    scheduler = Scheduler(backend)
    configs = [config_of(method=method) for method in ("ar", "treeflash", "ddtree", "ar")]
    requests = [Request(prompt_ids=PROMPTS[0], config=config) for config in configs]
    request_ids = scheduler.submit_group(requests)
    found = finish(scheduler)
    assert [found[t] for t in request_ids] == [generate(backend, PROMPTS[0], c) for c in configs]


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


def test_finished_sequences_serve_prompts_with_the_same_beginning(backend):
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
        tokens += [token for _, event in scheduler.run() for token in event.tokens]
        assert tokens == generate(backend, other, config_of())
    scheduler.submit(Request(prompt_ids=prompt, config=config_of(), cache_salt="another caller"))
    ((_, first),) = scheduler.step()
    assert first.cached_tokens == 0
    scheduler.close()
    cache.close()
    assert cache.nbytes == 0


METAL_MESSAGES = (
    "[malloc] Unable to allocate 1073741824 bytes.",
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed "
    "buffer size of 8 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
)
LOST = (
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPU...Timeout)",
    "[METAL] Command buffer execution failed: Ignored (for causing prior/excessive GPU errors) "
    "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)",
)


@pytest.mark.parametrize("message", [*METAL_MESSAGES, *LOST])
def test_memory_that_runs_out_on_metal_ends_one_sequence(backend, message):
    """A GPU that refuses all work ends them all."""
    run = backend.verifier.run

    def fail(work):
        if any(isinstance(item, Prefill) and item.token_ids == [9] for item in work):
            raise RuntimeError(message)
        return run(work)

    scheduler = Scheduler(backend)
    good, bad = (
        scheduler.submit(Request(prompt_ids=prompt, config=config_of())) for prompt in ([5, 6], [9])
    )
    backend.verifier.run = fail
    if message in LOST:
        with pytest.raises(RuntimeError, match="GPU"):
            finish(scheduler)
        assert is_device_lost(RuntimeError(message))
        return
    found = {}
    events = scheduler.step()
    (error,) = (event for request_id, event in events if request_id == bad)
    assert str(error) == message
    (first,) = (event for request_id, event in events if request_id == good)
    found[good] = [*first.tokens, *finish(scheduler)[good]]
    assert found[good] == generate(backend, [5, 6], config_of())


def test_an_error_of_earlier_work_ends_all_sequences_that_run(backend):
    """It belongs to no call, so every state is forgotten. A request that waits starts later."""
    message = "[METAL] Command buffer execution failed: Insufficient Memory"
    cache = PrefixCache(10**9)
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=2), prefix_cache=cache)
    scheduler.submit(Request(prompt_ids=[5, 6], config=config_of()))
    finish(scheduler)
    assert len(cache) == 1
    *started, waiting = (
        scheduler.submit(Request(prompt_ids=prompt, config=config_of()))
        for prompt in ([5, 6, 7], [9], [30])
    )
    scheduler.step()
    with failing(backend.verifier, "run", RuntimeError(message)):
        events = dict(scheduler.step())
    assert list(events) == started
    for error in events.values():
        assert isinstance(error, DeviceError)
        assert str(error) == f"the GPU failed in work that was under way; try again ({message})"
    assert len(cache) == 0
    assert finish(scheduler) == {waiting: generate(backend, [30], config_of())}


def test_an_error_of_earlier_work_while_a_state_is_forked_ends_all_that_run(backend):
    """Also where a finished sequence is copied: its text is complete. Nothing is lost."""
    error = RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
    scheduler = Scheduler(backend, prefix_cache=PrefixCache(10**9))
    short, long = (
        scheduler.submit(Request(prompt_ids=prompt, config=config_of(max_tokens=n, method="ar")))
        for prompt, n in (([5, 6], 2), ([9], 9))
    )
    with failing(State, "fork", error):
        found = finish(scheduler)
    assert found[short] == generate(backend, [5, 6], config_of(max_tokens=2))
    assert isinstance(found[long], DeviceError)
    finish(scheduler)
    scheduler.submit(Request(prompt_ids=[5, 6, 7], config=config_of()))
    finish(scheduler)
    again = scheduler.submit(Request(prompt_ids=[5, 6, 7, 8], config=config_of()))
    with failing(State, "fork", error, 1):
        found = finish(scheduler)
    assert found == {again: generate(backend, [5, 6, 7, 8], config_of())}


def test_a_state_that_the_prefix_cache_cannot_hold_is_not_copied(backend):
    """An agent's prompt would be copied, and dropped at once."""
    nbytes = backend.state_nbytes(2 + 4 - 1, drafts=True)
    for missing, copies in ((1, 0), (0, 1)):
        scheduler = Scheduler(backend, prefix_cache=PrefixCache(nbytes - missing))
        scheduler.submit(Request(prompt_ids=[5, 6], config=config_of(max_tokens=4)))
        with recording(State, "fork") as forks:
            finish(scheduler)
        assert len(forks) == len(scheduler.prefix_cache) == copies


def test_long_prompts_leave_snapshots_on_the_way(backend, monkeypatch):
    """So that a prompt that differs in the middle need not start anew."""
    monkeypatch.setattr(State, "needs_snapshots", True)
    taken = []
    monkeypatch.setattr(State, "snapshot", lambda state: taken.append(state.length))
    config = SchedulerConfig(snapshot_interval=8)
    for cache, lengths in ((PrefixCache(10**9), [8, 16, 24, 26]), (None, [])):
        scheduler = Scheduler(backend, config, prefix_cache=cache)
        scheduler.submit(Request(prompt_ids=list(range(2, 29)), config=config_of(method="ar")))
        while not scheduler.step():
            pass
        assert taken == lengths
        taken.clear()
        scheduler.close()


def test_no_two_salts_share_a_state(backend):
    """Equal prompts of two salts share nothing."""
    scheduler = Scheduler(backend, prefix_cache=PrefixCache(10**9))
    salts = ["", "a", "aa", "ab", "ba", "A", "a ", "0" * 64, "0" * 63 + "1", "1" + "0" * 63]
    for wanted in (0, 3):
        for salt in salts:
            request = Request(prompt_ids=[5, 6, 7, 8], config=config_of(), cache_salt=salt)
            scheduler.submit(request)
            ((_, first),) = scheduler.step()
            assert first.cached_tokens == wanted
            finish(scheduler)


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
    scheduler.submit(Request(prompt_ids=[5, 6, 7, 8], config=config_of()))
    finish(scheduler)
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
    scheduler.submit(Request(prompt_ids=[5, 6, 7, 8], config=config_of(method="treeflash")))
    started = time.perf_counter()
    steps = [step for _, step in scheduler.run()]
    passed = time.perf_counter() - started
    assert {phase for step in steps for phase in step.seconds} >= {"prefill", "draft", "verify"}
    assert all(seconds > 0 for step in steps for seconds in step.seconds.values())
    assert sum(seconds for step in steps for seconds in step.seconds.values()) < passed


@pytest.mark.parametrize("methods", [("ar", "treeflash"), ("treeflash", "ar")])
def test_drafted_and_plain_sequences_do_not_share_states(backend, methods):
    """A state that was opened for plain decoding has nothing to draft from."""
    scheduler = Scheduler(backend, prefix_cache=PrefixCache(10**9))
    for method in methods:
        config = config_of(method=method)
        scheduler.submit(Request(prompt_ids=[5, 6, 7, 8], config=config))
        ((_, first),) = scheduler.step()
        assert first.cached_tokens == 0
        (rest,) = finish(scheduler).values()
        assert [*first.tokens, *rest] == generate(backend, [5, 6, 7, 8], config)


def test_a_state_that_does_not_fit_beside_its_text_is_not_cached(backend, monkeypatch):
    made = watch_states(monkeypatch, State)
    scheduler = Scheduler(backend, prefix_cache=PrefixCache(1 << 20))
    long = scheduler.submit(Request(prompt_ids=[9, 8], config=config_of()))
    short = scheduler.submit(Request(prompt_ids=[5, 6], config=config_of(max_tokens=1)))
    with failing(State, "fork", MemoryError("out of memory")):
        found = finish(scheduler)
    assert found[long] == generate(backend, [9, 8], config_of())
    assert found[short] == generate(backend, [5, 6], config_of(max_tokens=1))
    assert len(scheduler.prefix_cache) == 0
    assert not any(state.nbytes for state in made)


@pytest.mark.parametrize(("place", "states"), [("open", 0), ("fork", 1)])
def test_an_error_of_another_kind_is_raised_and_the_state_closed(
    backend, monkeypatch, place, states
):
    made = watch_states(monkeypatch, State)
    scheduler = Scheduler(backend, prefix_cache=PrefixCache(1 << 20))
    scheduler.submit(Request(prompt_ids=[5, 6], config=config_of(max_tokens=1)))
    owner = State if place == "fork" else backend
    with failing(owner, place, ZeroDivisionError), pytest.raises(ZeroDivisionError):
        scheduler.step()
    assert [state.nbytes for state in made] == [0] * states


@pytest.mark.parametrize("place", ["open", "fork"])
def test_a_text_that_cannot_start_ends_with_the_error_alone(backend, place):
    scheduler = Scheduler(backend, prefix_cache=PrefixCache(1 << 20))
    scheduler.submit(Request(prompt_ids=[5, 6, 7], config=config_of(max_tokens=1)))
    scheduler.step()
    first = scheduler.submit(Request(prompt_ids=[9, 8], config=config_of()))
    found = {}
    step(scheduler, found)
    prompt = [5, 6, 7] if place == "fork" else [30]
    bad = scheduler.submit(Request(prompt_ids=prompt, config=config_of()))
    with failing(State if place == "fork" else backend, place, MemoryError("out of memory")):
        step(scheduler, found)
    assert isinstance(found.pop(bad), MemoryError)
    assert (scheduler.running, scheduler.waiting) == (1, 0)
    assert finish(scheduler, found) == {first: generate(backend, [9, 8], config_of())}


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
    request_ids = [scheduler.submit(Request(prompt_ids=x, config=config_of())) for x in prompts]
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
        scheduler.submit(Request(prompt_ids=prompt, config=config_of(max_tokens=2)))
        finish(scheduler)
    assert len(scheduler.prefix_cache) == 4
    room = Room(backend, scheduler, 2)
    first, _ = (
        scheduler.submit(Request(prompt_ids=x, config=config_of())) for x in ([11, 12], [13, 14])
    )
    ((request_id, _),) = scheduler.step()
    assert request_id == first, "a request overtook another"
    assert (scheduler.running, len(scheduler.prefix_cache), room.refused) == (1, 1, 3)


def test_a_text_without_room_ends_if_nothing_can_make_room(backend):
    scheduler = Scheduler(backend)
    Room(backend, scheduler, 0)
    bad = scheduler.submit(Request(prompt_ids=[5, 6], config=config_of()))
    ((request_id, error),) = scheduler.step()
    assert request_id == bad
    assert isinstance(error, MemoryInUseError)
    assert not scheduler.busy
