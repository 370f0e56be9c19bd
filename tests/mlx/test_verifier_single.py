"""Plain decoding of one sequence: the next pass is submitted before the token is read."""

from dataclasses import replace

import numpy as np
import pytest
from recordings import recording

from treeflash.config import DecodeConfig, LoadConfig, Penalties, SamplingConfig
from treeflash.decoding.interfaces import Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError
from treeflash.testing import require
from treeflash.testing.comparisons import generate, random_tokens
from treeflash.testing.models import write_pair

require("mlx")

import mlx.core as mx
from treeflash_mlx import sampling
from treeflash_mlx.backend import load
from treeflash_mlx.state import Unprojected, project_contexts

ROOT = np.zeros(1, np.int32)


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return load(*write_pair(folder, "qwen3", vocab_size=40), LoadConfig())


@pytest.fixture
def passes(backend):
    """The passes over the target."""
    with recording(backend.target, "forward") as found:
        yield found


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


def decoded(backend, prompt, config, n):
    """Return n new tokens."""
    return generate(backend, prompt, replace(config, max_tokens=n))


PENALISED = Penalties(repetition=1.3, presence=0.2)


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(method="ar", sampling=SamplingConfig(temperature=1.0, seed=3)),
        DecodeConfig(method="ar", sampling=SamplingConfig(temperature=2.0, top_p=0.9, seed=5)),
        DecodeConfig(method="ar", penalties=PENALISED, log_probs=2),
    ],
    ids=["temperature", "nucleus", "penalties"],
)
@pytest.mark.parametrize("shortlist", [256, 2])
def test_a_pass_is_ahead_however_tokens_are_sampled(
    backend, passes, monkeypatch, config, shortlist
):
    """A nucleus may be wider than the shortlist; then the pass ahead may be dropped."""
    monkeypatch.setattr(sampling, "SHORTLIST", shortlist)
    ahead = decoded(backend, [3, 4, 5], config, 20)
    # The prompt, its last token, the first token, and each later token with the one before it.
    assert len(passes) == 22 or (shortlist == 2 and config.sampling.top_p < 1 < 22 < len(passes))
    monkeypatch.setattr(type(backend.verifier), "_run_single", lambda *_: None)
    assert decoded(backend, [3, 4, 5], config, 20) == ahead


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "mamba2"])
def test_hybrids_are_ahead_too(hybrid_pair_of, monkeypatch, family):
    backend = load(*hybrid_pair_of(family), LoadConfig())
    config = DecodeConfig(method="ar")
    with recording(backend.target, "forward") as passes:
        ahead = decoded(backend, [3, 4, 5], config, 16)
    # A call without trees that is not the prompt's is the verifier's own, ahead of its turn.
    assert sum(len(args) == 3 for args in passes) >= 13
    monkeypatch.setattr(type(backend.verifier), "_run_single", lambda *_: None)
    assert decoded(backend, [3, 4, 5], config, 16) == ahead


def test_a_pass_ahead_changes_no_recurrent_state(hybrid_pair_of):
    """A snapshot or a tree after it sees the states of the committed tokens."""
    backend = load(*hybrid_pair_of("qwen3_next"), LoadConfig())
    sequence, tokens = SequenceSession(backend), [3, 4, 5]
    token = sequence.extend(tokens)
    for _ in range(3):
        tokens.append(token)
        token = step(sequence, token)
    fresh = prefilled(backend, tokens)
    for found, expected_ in zip(
        sequence.state.read_recurrent_states(), fresh.state.read_recurrent_states(), strict=True
    ):
        np.testing.assert_allclose(found, expected_, atol=1e-5)
    tree = DraftTree.from_parents(np.array([token, 7, 8], np.int32), np.array([-1, 0, 0], np.int32))
    np.testing.assert_allclose(sequence.logits(tree), fresh.logits(tree), atol=1e-4)


@pytest.fixture
def projected(backend):
    """Features that were projected, with the model that did."""
    with recording(type(backend.drafter_model), "project") as found:
        yield found


def test_features_are_not_projected_while_drafting_pauses(backend, projected):
    """They are projected all at once when the drafter reads them."""
    sequences = [SequenceSession(backend, drafts=True) for _ in range(2)]
    tokens = [sequence.extend([3, 4, 5 + i]) for i, sequence in enumerate(sequences)]
    for _ in range(4):
        tokens = [step(*pair) for pair in zip(sequences, tokens, strict=True)]
    # Of the prompts, but for their last tokens.
    assert [len(outputs) for _, outputs in projected] == [2, 2]
    kept = sequences[0].state.context[1:]
    assert len(kept) == 5
    assert all(isinstance(part, Unprojected) for part in kept)
    states = [sequence.state for sequence in sequences]
    copy = sequences[0].state.fork(5, 40)
    drafted = backend.drafter.draft(list(zip(states, tokens, strict=True)))
    assert [len(outputs) for _, outputs in projected] == [2, 2, 10]
    fresh = SequenceSession(backend, drafts=True)
    fresh.extend(sequences[0].state.tokens)
    (expected_,) = backend.drafter.draft([(fresh.state, tokens[0])])
    np.testing.assert_allclose(np.array(drafted[0].hidden), np.array(expected_.hidden), atol=1e-4)
    backend.drafter.draft([(copy, 7)])


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
    project_contexts([sequence.state, fresh.state], backend.drafter_model.project)
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
    configs = [
        DecodeConfig(method=method, budget=budget, sampling=sampling)
        for method, budget in (("ar", 1), ("treeflash", 8))
    ]
    plain, drafted = (decoded(backend, [3, 4, 5], config, 30) for config in configs)
    assert drafted == plain


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


def test_logits_that_are_not_finite_raise(backend, monkeypatch):
    sequence = SequenceSession(backend)
    token = step(sequence, sequence.extend([3, 4, 5]))
    norm = backend.target.model.model.norm
    monkeypatch.setitem(norm, "weight", norm.weight * mx.nan)  # a module of MLX is a dict
    with pytest.raises(NumericalError, match="not finite"):
        step(sequence, token)
