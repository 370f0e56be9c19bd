"""Sequences that start and end in every way, and the memory of their states."""

import contextlib

import numpy as np
import pytest
from failures import failing

from treeflash.config import METHODS, DecodeConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig, decode
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.errors import NumericalError


class Failing:
    """A constraint that fails after some tokens."""

    end_tokens = frozenset()

    def __init__(self, vocab_size, tokens):
        self.mask = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
        self.left = tokens

    def allowed(self):
        return self.mask

    def advance(self, token):
        self.left -= 1
        if self.left < 0:
            raise ValueError("no more tokens")

    def rollback(self, tokens):
        self.left += tokens


def watch_states(monkeypatch, state_class):
    """All states that are made from now on."""
    made, plain = [], state_class.__init__

    def init(state, *args, **options):
        plain(state, *args, **options)
        made.append(state)

    monkeypatch.setattr(state_class, "__init__", init)
    return made


def check_memory(monkeypatch, backend, state_class, held, texts=41):
    """Run sequences that end in every way; no state stays open, and held memory does not grow.

    Args:
        monkeypatch: the fixture.
        backend: a loaded pair.
        state_class: of its states.
        held: gives the allocated memory as a number.
        texts: the number of sequences.
    """
    made = watch_states(monkeypatch, state_class)
    rng = np.random.default_rng(0)
    cache = PrefixCache(4 * backend.state_nbytes(16, drafts=True))
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=6), prefix_cache=cache)
    most = []
    for number in range(texts):
        come(backend, scheduler, rng, number)
        scheduler.step()
        # Finished sequences hold nothing but what the cache has taken over.
        assert sum(state.nbytes for state in made) == scheduler.nbytes + cache.nbytes
        assert cache.nbytes <= cache.max_bytes
        made[:] = [state for state in made if state.nbytes]
        most.append(held())
    assert scheduler.busy
    scheduler.close()
    assert sum(state.nbytes for state in made) == cache.nbytes > 0
    cache.close()
    assert not any(state.nbytes for state in made)
    assert max(most[texts // 2 :]) <= max(most[: texts // 2])


def come(backend, scheduler, rng, number):
    """A sequence joins, which is to end in one of the ways."""
    prompt = [5, 6, 7][: rng.integers(4)] + rng.integers(0, backend.vocab_size, 4).tolist()
    config = DecodeConfig(
        method=METHODS[rng.integers(len(METHODS))], budget=6, max_tokens=int(rng.integers(1, 9))
    )
    match number % 7:
        case 0:  # ends by its length
            scheduler.submit(Request(prompt_ids=prompt, config=config))
        case 1:  # by a stop token
            stops = frozenset(range(0, backend.vocab_size, 3))
            config = DecodeConfig(budget=6, max_tokens=30, stop_token_ids=stops)
            scheduler.submit(Request(prompt_ids=prompt, config=config))
        case 2:  # by an error of its constraint
            constraint = Failing(backend.vocab_size, 2)
            scheduler.submit(Request(prompt_ids=prompt, config=config, constraint=constraint))
        case 3:  # is cancelled
            request = scheduler.submit(Request(prompt_ids=prompt, config=config))
            scheduler.step()
            scheduler.cancel(request)
        case 4:  # answers to one prompt
            scheduler.submit_group([Request(prompt_ids=prompt, config=config) for _ in range(3)])
        case 5:  # a generator is closed early
            steps = decode(backend, Request(prompt_ids=prompt, config=config))
            next(steps)
            steps.close()
        case 6:  # the target fails, with its own error and with one of ours
            for error in (NumericalError, RuntimeError):
                request = Request(prompt_ids=prompt, config=DecodeConfig(budget=6, max_tokens=9))
                steps = decode(backend, request)
                next(steps)
                with failing(backend.verifier, "run", error("broken")), pytest.raises(error):
                    list(steps)
                with contextlib.suppress(StopIteration):
                    next(steps)
