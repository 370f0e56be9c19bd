"""Plain decoding of one text: the next pass is submitted before the token of this one is read."""

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.choices import Choice
from treeflash.decoding.interfaces import Verification
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError
from treeflash.testing import require
from treeflash.testing.models import write_drafter, write_target
from treeflash.testing.texts import random_tokens

require("mlx")

import mlx.core as mx  # noqa: E402
from treeflash_mlx.backend import load  # noqa: E402

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


def step(text, token):
    """Plain decoding by a token; returns the next one."""
    (chosen,) = text.verify(DraftTree.root_only(token))
    text.commit(ROOT)
    return int(chosen)


def expected(backend, tokens):
    """The token after these."""
    (logits,) = prefilled(backend, tokens[:-1]).logits(DraftTree.root_only(tokens[-1]))
    return int(logits.argmax())


def prefilled(backend, tokens):
    text = TextSession(backend)
    text.extend(tokens)
    return text


def test_a_pass_is_ahead_from_the_second_token_on(backend, passes):
    text = TextSession(backend, drafts=True)
    token, prompt = text.extend([3, 4, 5]), [3, 4, 5]
    del passes[:]
    counts = []
    for _ in range(4):
        prompt.append(token)
        token = step(text, token)
        counts.append(len(passes))
    assert counts == [1, 3, 4, 5]
    assert token == expected(backend, prompt)
    fresh = TextSession(backend, drafts=True)
    fresh.extend(prompt)
    np.testing.assert_allclose(text.state.keys_values(), fresh.state.keys_values(), atol=1e-5)
    features = [mx.concatenate(each.state.context) for each in (text, fresh)]
    np.testing.assert_allclose(*map(np.array, features), atol=1e-5)


@pytest.mark.parametrize("between", ["tree", "truncate", "extend", "batch", "other token"])
def test_what_comes_between_drops_it(backend, between):
    text = TextSession(backend, drafts=True)
    tokens = [3, 4, 5]
    token = text.extend(tokens)
    for _ in range(3):
        tokens.append(token)
        token = step(text, token)
    if between == "tree":
        text.verify(DraftTree.from_parents(np.array([token, 7, 8], np.int32), np.array([-1, 0, 0])))
    elif between == "truncate":
        del tokens[4:]
        text.state.truncate(4)
    elif between == "extend":
        tokens += [token, 9]
        text.extend([token, 9])
    elif between == "batch":
        other = prefilled(backend, [6, 7])
        backend.verifier.logits([(x.state, DraftTree.root_only(token)) for x in (text, other)])
    token = (token + 1) % 40 if between == "other token" else token
    for _ in range(3):
        tokens.append(token)
        token = step(text, token)
        assert token == expected(backend, tokens)


def test_a_text_fills_its_capacity(backend):
    text = TextSession(backend, capacity=255)
    token = text.extend(random_tokens(np.random.default_rng(0), 40, 240))
    for _ in range(14):
        token = step(text, token)
    assert text.length == 254


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
    text = TextSession(backend)
    token = text.extend([3, 4, 5])
    for _ in range(3):
        token = step(text, token)
    allowed = np.full((1, 2), 0xFFFFFFFF, np.uint32)
    tree = DraftTree.root_only(token)
    best = int(text.logits(tree)[0].argmax())
    allowed[0, best // 32] &= ~np.uint32(1 << best % 32)
    (chosen,) = backend.verifier.run([Verification(text.state, tree, Choice(allowed=allowed))])
    assert chosen.tokens[0] == np.argsort(text.logits(tree)[0])[-2]


def test_logits_that_are_not_finite_raise(backend):
    text = TextSession(backend)
    token = step(text, text.extend([3, 4, 5]))
    norm = backend.target.model.model.norm
    norm.weight = norm.weight * mx.nan
    with pytest.raises(NumericalError):
        step(text, token)
