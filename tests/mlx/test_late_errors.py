"""Errors of Metal that arrive late: a command buffer failed, and a later call raises its error.

MLX raises such an error once, at the next call that reads an array or needs the device, and then
goes on. What the buffer should have written is unknown, so nothing that was computed may be used.
Here the keys and values of all sequences are damaged, and the next call at a place raises MLX's
message, before or after its own work. Four texts run together; each must be plain decoding's, or
end with a line that names the GPU, and so must the texts that follow.
"""

from functools import partial

import numpy as np
import pytest
from stand_ins import stand_in

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig, Step
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_pair

require("mlx_lm")

import mlx.core as mx
from treeflash_mlx.backend import load
from treeflash_mlx.state import State

MESSAGES = (
    "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
    "Discarded (victim of GPU error/recovery) "
    "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)",
)
PLACES = ("prefill", "draft", "verify", "commit", "fork")
METHODS = ("treeflash", "ddtree", "dflash", "suffix", "ar")
SHARED = [3, 4, 5, 6] * 4
PROMPTS = [[*SHARED, 7], [*SHARED, 8, 9], [9, 9, 4], [7, 8, 9] * 5]


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    pair = write_pair(tmp_path_factory.mktemp("pair"), "qwen3", hidden_size=32, vocab_size=60)
    return load(*pair, LoadConfig(dtype="float32", device="cpu"))


class FailingBuffer:
    """A command buffer that fails before the call of a number at a place.

    Attributes:
        raised: whether a call has raised the error.
    """

    def __init__(self, backend, rng, place, number, patch):
        self.rng, self.place, self.left, self.raised = rng, place, number, False
        self.message = f"[METAL] Command buffer execution failed: {rng.choice(MESSAGES)}."
        self.states = []
        verifier, drafter, watch = backend.verifier, backend.drafter, self.watch
        run, commit, draft, fork = verifier.run, verifier.commit, drafter.draft, State.fork

        def run_at_place(work):
            prefills = any(isinstance(item, Prefill) for item in work)
            verifies = any(isinstance(item, Verify) for item in work)
            here = ["prefill"] * prefills + ["verify"] * verifies
            return watch(here, partial(run, work), [item.state for item in work])

        def fork_at_place(state, *sizes):
            new = watch(["fork"], partial(fork, state, *sizes), [state])
            self.states.append(new)
            return new

        stand_in(
            patch,
            verifier,
            run=run_at_place,
            commit=lambda *paths: watch(["commit"], partial(commit, *paths), []),
        )
        stand_in(patch, drafter, draft=lambda *a: watch(["draft"], partial(draft, *a), []))
        stand_in(patch, State, fork=fork_at_place)

    def watch(self, places, call, states):
        """Call, or let the buffer fail and raise its error."""
        self.states += [state for state in states if state not in self.states]
        self.left -= self.place in places
        if self.raised or self.left:
            return call()
        self.raised = True
        self.damage()
        if self.rng.random() < 0.5:
            call()
        raise RuntimeError(self.message)

    def damage(self):
        """Let the keys and values of all sequences be others from some position on."""
        for state in self.states:
            cache = state.kv_cache
            if cache.storage is None or not cache.length:
                continue
            first = int(self.rng.integers(cache.length))
            for arrays in cache.storage.layers:
                for i, x in enumerate(arrays):
                    x[cache.row, :, first : cache.length] = 0
                    arrays[i] = x
            mx.eval(cache.storage.layers)


def run_together(scheduler, requests):
    """Return the tokens of each request, or the error that ended it."""
    for request in requests:
        scheduler.submit(request)
    found = {request: [] for request in requests}
    for request, event in scheduler.run():
        if isinstance(event, Step):
            found[request] += event.tokens
        else:
            found[request] = event
    return [found[request] for request in requests]


@pytest.fixture(scope="module")
def plain(backend):
    """Texts of plain decoding, each made once."""
    made = {}

    def text(request):
        config = request.config
        key = tuple(request.prompt_ids), config.sampling, config.max_tokens
        if key not in made:
            alone = DecodeConfig(
                method="ar", sampling=config.sampling, max_tokens=config.max_tokens
            )
            made[key] = generate(backend, list(request.prompt_ids), alone)
        return made[key]

    return text


def check(backend, plain, seed):
    """Run four texts of which a late error ends some, then four more; returns whether it came."""
    rng = np.random.default_rng(seed)
    place = PLACES[seed % len(PLACES)]
    cache = PrefixCache(1 << 30)
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=4), prefix_cache=cache)

    def requests():
        return [
            Request(
                prompt_ids=prompt,
                config=DecodeConfig(
                    method=str(rng.choice(METHODS)) if i else "treeflash",
                    budget=8,
                    max_tokens=int(rng.integers(6, 24)),
                    sampling=SamplingConfig(temperature=0.8 * int(rng.integers(2)), seed=i),
                ),
            )
            for i, prompt in enumerate(PROMPTS)
        ]

    run_together(scheduler, [requests()[0]])  # a state that others fork
    with pytest.MonkeyPatch.context() as patch:
        number = int(rng.integers(1, 3 if place in ("prefill", "fork") else 6))
        buffer = FailingBuffer(backend, rng, place, number, patch)
        asked = requests()
        found = run_together(scheduler, asked)
    ended = [x for x in found if isinstance(x, Exception)]
    for request, text in zip(asked, found, strict=True):
        if isinstance(text, Exception):
            assert "GPU" in str(text), seed
            assert "\n" not in str(text)
        else:
            assert text == plain(request), (seed, place)
    if ended:
        assert buffer.raised
    asked = requests()
    assert run_together(scheduler, asked) == [plain(request) for request in asked], (seed, place)
    scheduler.close()
    cache.close()
    return buffer.raised


@pytest.mark.sample(1)
@pytest.mark.parametrize("place", PLACES)
def test_a_late_error_leaves_no_wrong_text(backend, plain, place):
    seeds = [PLACES.index(place) + len(PLACES) * n for n in range(3)]
    assert sum(check(backend, plain, seed) for seed in seeds) > 0


# Two hundred random places; the test above has three of each kind.
@pytest.mark.nightly
@pytest.mark.parametrize("tens", range(20))
def test_random_late_errors_leave_no_wrong_text(backend, plain, tens):
    assert sum(check(backend, plain, 100 + 10 * tens + n) for n in range(10)) > 0
