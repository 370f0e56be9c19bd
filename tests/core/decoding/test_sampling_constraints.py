"""Exact decoding under constraints, and constraints that fail."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler
from treeflash.reference.backend import load

VOCAB = 40


class Alternates:
    """A token may follow one of another remainder modulo `modulus`."""

    end_tokens = frozenset()

    def __init__(self, vocab_size=VOCAB, modulus=3):
        self.vocab_size, self.modulus = vocab_size, modulus
        self.tokens = []

    def permitted(self, tokens):
        """The allowed tokens after these, one by one."""
        last = tokens[-1] % self.modulus if tokens else None
        return [t for t in range(self.vocab_size) if t % self.modulus != last]

    def allowed(self):
        words = np.zeros(-(-self.vocab_size // 32), np.uint32)
        for token in self.permitted(self.tokens):
            words[token // 32] |= np.uint32(1 << (token % 32))
        return words

    def advance(self, token):
        assert token in self.permitted(self.tokens)
        self.tokens.append(token)

    def rollback(self, tokens):
        assert tokens
        del self.tokens[-tokens:]


@pytest.fixture
def backend(tiny_pair):
    return load(*tiny_pair, LoadConfig())


@pytest.mark.sample(3)
@pytest.mark.parametrize("budget", [1, 12, 64])
@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(temperature=0.9, seed=5)], ids=["greedy", "seed"]
)
def test_constrained_decoding_equals_plain_constrained_decoding(backend, sampling, budget):
    scheduler = Scheduler(backend)
    found = {}
    for method in METHODS:
        config = DecodeConfig(method=method, budget=budget, max_tokens=20, sampling=sampling)
        request_id = scheduler.submit(
            Request(
                prompt_ids=[5, 6, 7], config=config, constraint=Alternates(backend.vocab_size, 2)
            )
        )
        found[request_id] = []
    accepted = 0
    for request_id, step in scheduler.run():
        found[request_id] += step.tokens
        accepted += 0 if step.path is None else len(step.path) - 1
    plain, *others = found.values()
    assert len(plain) == 20
    assert all(a % 2 != b % 2 for a, b in pairwise(plain))
    assert others == [plain] * len(others)
    assert accepted or budget == 1


def test_an_error_of_a_constraint_ends_its_text_alone(backend):
    class Fails(Alternates):
        def advance(self, token):
            raise ValueError("no such rule")

    scheduler = Scheduler(backend)
    config = DecodeConfig(budget=6, max_tokens=8)
    for constraint in (Fails(backend.vocab_size), None):
        scheduler.submit(Request(prompt_ids=[5, 6], config=config, constraint=constraint))
    found = {}
    for request_id, event in scheduler.run():
        found.setdefault(request_id, []).append(event)
    bad, good = found.values()
    assert str(bad[-1]) == "no such rule"
    assert sum(len(step.tokens) for step in good) == 8
