"""Plain decoding of one sequence: the next pass is submitted before the token is read."""

from dataclasses import replace

import numpy as np
import pytest
from recordings import recording

from treeflash.config import DecodeConfig, LoadConfig, Penalties, SamplingConfig
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_pair

require("mlx")

import mlx.core as mx
from treeflash_mlx.backend import load
from treeflash_mlx.sampling import SHORTLIST

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
def test_a_pass_is_ahead_however_tokens_are_sampled(backend, passes, config):
    decoded(backend, [3, 4, 5], config, 20)
    # The prompt, its last token, the first token, and each later token with the one before it.
    assert len(passes) == 22


def test_a_pass_ahead_of_another_token_is_dropped(tmp_path):
    """In a nucleus wider than the shortlist, a token is sampled again after the pass has begun."""
    backend = load(*write_pair(tmp_path, "qwen3", vocab_size=3 * SHORTLIST), LoadConfig())
    sampling = SamplingConfig(temperature=9.0, top_p=0.95, seed=5)
    plain, drafted = (DecodeConfig(method=x, sampling=sampling) for x in ("ar", "dflash"))
    with recording(backend.target, "forward") as passes:
        ahead = decoded(backend, [3, 4, 5], plain, 20)
    assert len(passes) > 22
    assert decoded(backend, [3, 4, 5], replace(drafted, budget=4), 20) == ahead


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "mamba2"])
def test_hybrids_are_ahead_too(hybrid_pair_of, family):
    backend = load(*hybrid_pair_of(family), LoadConfig())
    with recording(backend.target, "forward") as passes:
        decoded(backend, [3, 4, 5], DecodeConfig(method="ar"), 16)
    # A call without trees that is not the prompt's is the verifier's own, ahead of its turn.
    assert sum(len(args) == 3 for args in passes) >= 13


def test_logits_that_are_not_finite_raise(backend, monkeypatch):
    sequence = SequenceSession(backend)
    token = step(sequence, sequence.extend([3, 4, 5]))
    norm = backend.target.model.model.norm
    monkeypatch.setitem(norm, "weight", norm.weight * mx.nan)  # a module of MLX is a dict
    with pytest.raises(NumericalError, match="not finite"):
        step(sequence, token)
