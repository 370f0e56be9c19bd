"""Plain decoding of one sequence: the next pass is submitted before the token is read."""

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.interfaces import Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError
from treeflash.testing import require
from treeflash.testing.comparisons import random_tokens
from treeflash.testing.models import write_drafter, write_target

require("mlx")

import mlx.core as mx
from treeflash_mlx.backend import load

ROOT = np.zeros(1, np.int32)


@pytest.fixture
def backend(tmp_path):
    write_target(tmp_path / "target", "qwen3", seed=1, vocab_size=40)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=2)
    return load(tmp_path / "target", tmp_path / "drafter", LoadConfig())


@pytest.fixture
def passes(backend, monkeypatch):
    """Token counts of the passes over the target."""
    found, forward = [], backend.target.forward

    def record(token_ids, *args):
        found.append(token_ids.shape[1])
        return forward(token_ids, *args)

    monkeypatch.setattr(backend.target, "forward", record)
    return found


def step(sequence, token):
    """Plain decoding by a token; returns the next one."""
    (chosen,) = sequence.verify(DraftTree.root_only(token))
    sequence.commit(ROOT)
    return int(chosen)


def expected(backend, tokens):
    """The token after these."""
    (logits,) = prefilled(backend, tokens[:-1]).logits(DraftTree.root_only(tokens[-1]))
    return int(logits.argmax())


def prefilled(backend, tokens):
    sequence = SequenceSession(backend)
    sequence.extend(tokens)
    return sequence


def test_a_pass_is_ahead_from_the_second_token_on(backend, passes):
    sequence = SequenceSession(backend, drafts=True)
    token, prompt = sequence.extend([3, 4, 5]), [3, 4, 5]
    del passes[:]
    counts = []
    for _ in range(4):
        prompt.append(token)
        token = step(sequence, token)
        counts.append(len(passes))
    assert counts == [1, 3, 4, 5]
    assert token == expected(backend, prompt)
    fresh = SequenceSession(backend, drafts=True)
    fresh.extend(prompt)
    np.testing.assert_allclose(
        sequence.state.read_kv_cache(), fresh.state.read_kv_cache(), atol=1e-5
    )
    features = [mx.concatenate(each.state.context) for each in (sequence, fresh)]
    np.testing.assert_allclose(*map(np.array, features), atol=1e-5)


@pytest.mark.parametrize("between", ["tree", "truncate", "extend", "batch", "other token"])
def test_what_comes_between_drops_it(backend, between):
    sequence = SequenceSession(backend, drafts=True)
    tokens = [3, 4, 5]
    token = sequence.extend(tokens)
    for _ in range(3):
        tokens.append(token)
        token = step(sequence, token)
    if between == "tree":
        sequence.verify(
            DraftTree.from_parents(np.array([token, 7, 8], np.int32), np.array([-1, 0, 0]))
        )
    elif between == "truncate":
        del tokens[4:]
        sequence.state.truncate(4)
    elif between == "extend":
        tokens += [token, 9]
        sequence.extend([token, 9])
    elif between == "batch":
        other = prefilled(backend, [6, 7])
        backend.verifier.logits([(x.state, DraftTree.root_only(token)) for x in (sequence, other)])
    token = (token + 1) % 40 if between == "other token" else token
    for _ in range(3):
        tokens.append(token)
        token = step(sequence, token)
        assert token == expected(backend, tokens)


def test_a_sequence_fills_its_capacity(backend):
    sequence = SequenceSession(backend, capacity=255)
    token = sequence.extend(random_tokens(np.random.default_rng(0), 40, 240))
    for _ in range(14):
        token = step(sequence, token)
    assert sequence.length == 254


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=1.0, seed=3)])
def test_tokens_are_those_of_drafting(backend, sampling):
    found = [
        [
            token
            for part in decode(
                backend,
                [3, 4, 5],
                DecodeConfig(method=method, budget=budget, max_tokens=30, sampling=sampling),
            )
            for token in part.tokens
        ]
        for method, budget in (("ar", 1), ("treeflash", 8))
    ]
    assert found[0] == found[1]


def test_a_mask_of_tokens_holds(backend):
    sequence = SequenceSession(backend)
    token = sequence.extend([3, 4, 5])
    for _ in range(3):
        token = step(sequence, token)
    allowed = np.full((1, 2), 0xFFFFFFFF, np.uint32)
    tree = DraftTree.root_only(token)
    best = int(sequence.logits(tree)[0].argmax())
    allowed[0, best // 32] &= ~np.uint32(1 << best % 32)
    (chosen,) = backend.verifier.run(
        [Verify(sequence.state, tree, SamplingParams(allowed=allowed))]
    )
    assert chosen.tokens[0] == np.argsort(sequence.logits(tree)[0])[-2]


def test_logits_that_are_not_finite_raise(backend):
    sequence = SequenceSession(backend)
    token = step(sequence, sequence.extend([3, 4, 5]))
    norm = backend.target.model.model.norm
    norm.weight = norm.weight * mx.nan
    with pytest.raises(NumericalError):
        step(sequence, token)
