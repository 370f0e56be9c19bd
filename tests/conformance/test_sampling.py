"""The samplers of all engines against the definition in the core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding import sampling as definition
from treeflash.decoding.sampling import LogitEdits, SamplingParams, position_keys, vocabulary_noise
from treeflash.errors import NumericalError
from treeflash.testing import pairs, require

require("torch")
require("triton")
require("mlx_lm")

import mlx.core as mx
import torch
import treeflash_cuda.numerics
import treeflash_cuda.sampling
import treeflash_mlx.numerics
import treeflash_mlx.sampling
import triton_interpreter  # noqa: F401 - repairs it
from treeflash_cuda import operations
from treeflash_cuda.gpu.triton_kernels import sampling as kernels
from treeflash_cuda.sampling import Logits

DTYPES = "float32", "float16", "bfloat16"
ONE = SamplingConfig(temperature=1.0)
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "plain": ONE,
    "cold": SamplingConfig(temperature=0.3, seed=5),
    "very cold": SamplingConfig(temperature=1e-6),
    "very hot": SamplingConfig(temperature=1e6),
    "the best": SamplingConfig(temperature=1.0, top_k=1),
    "top-k": SamplingConfig(temperature=0.5, top_k=7),
    "top-k of all": SamplingConfig(temperature=1.0, top_k=300),
    "top-p": SamplingConfig(temperature=1.0, top_p=0.6),
    "flat": SamplingConfig(temperature=2.0, top_p=0.999),
    "min-p": SamplingConfig(temperature=1.0, min_p=0.2),
    "all": SamplingConfig(temperature=1.3, top_k=50, top_p=0.9, min_p=0.02),
}
each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)


@dataclass(frozen=True)
class Engine:
    """A sampler of several (n, vocab) logits, with rows and tokens that it computes quickly."""

    sample: Callable[..., list]
    rows: int = 24
    vocab: int = 4000

    def tokens(self, logits, sampling, keys, dtype="float32"):
        """The tokens of one sequence; greedy ones take no keys."""
        params = SamplingParams(sampling, None if sampling.greedy else keys)
        (found,) = self.sample([logits], [params], dtype)
        assert found.tokens.dtype == np.int32
        return found.tokens.tolist()


def on_torch(sample_rows=None):
    def sample(parts, params, dtype="float32"):
        given = torch.from_numpy(np.concatenate(parts)).to(getattr(torch, dtype))
        before = given.clone()
        logits = Logits.split(given, [len(part) for part in parts])
        found = treeflash_cuda.sampling.sample(logits, params, sample_rows)
        assert given.equal(before) or given.isnan().any(), "they are not edited in place"
        return found

    return sample


def on_mlx(parts, params, dtype="float32"):
    arrays = [mx.array(x).astype(getattr(mx, dtype)) if len(x) else None for x in parts]
    return treeflash_mlx.sampling.sample(arrays, params)


ENGINES = {
    "PyTorch": Engine(on_torch()),
    "PyTorch on a GPU": Engine(on_torch(operations.sample_rows)),
    "Triton": Engine(on_torch(kernels.sample_rows), rows=4, vocab=300),
    "MLX": Engine(on_mlx),
}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES)
def engine(request, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 128)  # several of them, and a part of one
    return request.param


def keys_of(count, seed=3):
    return position_keys(seed, np.arange(count, dtype=np.int32))


def random_logits(engine, vocab, scale=3.0):
    """Logits, flat where the scale is small, some of them equal, and the keys of their noise."""
    rng = np.random.default_rng(vocab)
    logits = (scale * rng.normal(size=(engine.rows, vocab))).astype(np.float32)
    logits[::2, ::3] = logits[::2, :1]  # at the edge of some filters
    return logits, keys_of(engine.rows)


def rounded(logits, dtype):
    return torch.from_numpy(logits).to(getattr(torch, dtype)).float().numpy()


@pytest.mark.sample(48)
@each_sampling
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_those_defined(engine, sampling, dtype):
    """In 16 bits many logits are equal."""
    for vocab in (5, 300, 4000):
        for scale in (0.1, 3.0):  # 0.1 is flat: the nucleus has many tokens
            if vocab <= engine.vocab:
                logits, keys = random_logits(engine, vocab, scale)
                logits = rounded(logits, dtype)
                expected = definition.sample_tokens(logits, sampling, keys).tolist()
                assert engine.tokens(logits, sampling, keys, dtype) == expected, (vocab, scale)


@pytest.mark.sample(16)
@each_sampling
def test_a_row_alone_is_chosen_as_among_others(engine, sampling):
    logits, keys = random_logits(engine, engine.vocab)
    logits = rounded(logits[:11], "bfloat16")
    together = engine.tokens(logits, sampling, keys[: len(logits)], "bfloat16")
    for row, token in enumerate(together):
        one = slice(row, row + 1)
        assert engine.tokens(logits[one], sampling, keys[one], "bfloat16") == [token]


@pytest.mark.parametrize("top_p", [1e-300, 5e-324])
def test_the_smallest_top_p_keeps_the_best_token(engine, top_p):
    """It is 0 in float32."""
    logits, keys = random_logits(engine, 300, 1.0)
    sampling = SamplingConfig(temperature=1.0, top_p=top_p)
    assert engine.tokens(logits[1::2], sampling, keys[1::2]) == logits[1::2].argmax(-1).tolist()


@pytest.mark.parametrize("vocab", [5, 7, 49, 300])
def test_equal_probabilities_are_all_in_the_smallest_nucleus(engine, vocab):
    keys = keys_of(engine.rows)
    sampling = SamplingConfig(temperature=1.0, top_p=1e-9)
    found = engine.tokens(np.zeros((engine.rows, vocab), np.float32), sampling, keys)
    assert found == vocabulary_noise(keys, vocab).argmax(-1).tolist()


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.3}])
def test_equal_probabilities_are_kept_together(engine, filters):
    logits = np.full((16, 300), -4.0, np.float32)
    logits[:, [5, 50, 150, 250]] = 2.0
    found = engine.tokens(logits, SamplingConfig(temperature=1.0, **filters), keys_of(16))
    assert set(found) == {5, 50, 150, 250}


def test_the_first_of_equal_logits_is_the_best(engine):
    logits = np.array([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]], np.float32)
    assert engine.tokens(logits, SamplingConfig(), None) == [1, 0]


def test_top_k_may_be_more_than_the_tokens_that_are_allowed(engine):
    """Without a warning about the others, whose probability is 0."""
    logits, keys = random_logits(engine, 300, 1.0)
    logits[:, 7:] = -np.inf
    sampling = SamplingConfig(temperature=1.0, top_k=40)
    expected = definition.sample_tokens(logits, sampling, keys).tolist()
    assert engine.tokens(logits, sampling, keys) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sampling", [SamplingConfig(), ONE], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_raise(engine, bad, sampling):
    logits = np.zeros((2, 40), np.float32)
    logits[1, 3 if bad > 0 or bad != bad else slice(None)] = bad
    params = [SamplingParams(sampling, None if sampling.greedy else keys_of(1))] * 2
    with pytest.raises(NumericalError, match="not finite"):
        engine.tokens(logits, sampling, keys_of(2))
    with pytest.raises(NumericalError, match="not finite"):
        engine.sample([logits[:1], logits[1:]], params)


def test_edits_of_half_precision_are_made_in_single_precision(engine):
    bias = np.array([1e-4], np.float32)  # in bfloat16 the sum would be a tie
    edits = LogitEdits(np.array([0]), np.array([1]), np.ones(1, np.float32), bias)
    logits = np.ones((1, 2), np.float32)
    (found,) = engine.sample([logits], [SamplingParams(edits=edits)], "bfloat16")
    assert found.tokens.tolist() == [1]


def test_a_mask_that_allows_nothing_raises(engine):
    nothing = SamplingParams(allowed=np.zeros((1, 2), np.uint32))
    with pytest.raises(NumericalError, match="not finite"):
        engine.sample([np.zeros((1, 40), np.float32)] * 2, [SamplingParams(), nothing])


@pytest.mark.sample(4)
@pytest.mark.parametrize("top_k", [0, 11])
@pytest.mark.parametrize("min_p", [0.0, 0.6])
@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0])
def test_the_edge_of_a_nucleus(engine, top_k, min_p, scale):
    """In flat distributions it lies far down, and tokens of equal shares decide it."""
    rng = np.random.default_rng(top_k)
    different, rows = 0, 2 * engine.rows
    for vocab, top_p in ((7, 0.05), (7, 0.5), (40, 0.3), (40, 0.8), (700, 0.5), (700, 0.99)):
        if vocab > engine.vocab:
            continue
        logits = (scale * rng.normal(size=(rows, vocab))).astype(np.float32)
        keys = keys_of(rows, vocab)
        config = SamplingConfig(temperature=1.0, top_p=top_p, top_k=top_k, min_p=min_p)
        found = engine.tokens(logits, config, keys)
        assert found == definition.sample_tokens(logits, config, keys).tolist(), (vocab, top_p)
        plain = SamplingConfig(temperature=1.0, top_k=top_k, min_p=min_p)
        different += sum(np.array(found) != definition.sample_tokens(logits, plain, keys))
    assert different > rows / 20, "the nucleus matters"


def random_params(rng, rows, vocab):
    """Any sampling, with or without edits, a mask and log probabilities."""
    sampling = list(pairs.SAMPLINGS.values())[rng.integers(len(pairs.SAMPLINGS))]
    edits = allowed = log_probs = None
    if rng.random() < 0.5:
        places = rng.choice(rows * vocab, rng.integers(1, rows * vocab), replace=False)
        factors = rng.uniform(0.5, 2, len(places)).astype(np.float32)
        additions = rng.normal(size=len(places)).astype(np.float32)
        edits = LogitEdits(places // vocab, places % vocab, factors, additions)
    if rng.random() < 0.5:
        bits = rng.random((rows, -(-vocab // 32) * 32)) < rng.random()
        bits[np.arange(rows), rng.integers(0, vocab, rows)] = True
        allowed = np.packbits(bits, -1, bitorder="little").view(np.uint32)
    if rng.random() < 0.5:
        log_probs = int(rng.integers(vocab + 2))
    seed = int(rng.integers(2**32))
    keys = None if sampling.greedy else position_keys(seed, np.arange(rows, dtype=np.int32))
    return SamplingParams(sampling, keys, edits, allowed, log_probs)


@pytest.mark.parametrize("vocab", [5, 32, 65, 320])
def test_choices_of_several_sequences_are_those_defined(engine, vocab):
    """With edits, masks and log probabilities, and sequences that need no token."""
    rng = np.random.default_rng(vocab)
    reported = edited = 0
    for _ in range(25 if engine.rows > 4 else 4):
        counts = [int(n) for n in rng.integers(0, 6, 1 + rng.integers(5))]
        wanted = [random_params(rng, n, vocab) if n else None for n in counts]
        parts = [(2 * rng.normal(size=(n, vocab))).astype(np.float32) for n in counts]
        for part, params, found in zip(parts, wanted, engine.sample(parts, wanted), strict=True):
            assert (found is None) == (params is None)
            if params is None:
                continue
            expected = definition.sample(part, params)
            np.testing.assert_array_equal(found.tokens, expected.tokens)
            assert (found.log_probs is None) == (params.log_probs is None)
            if found.log_probs is not None:
                reported += 1
                edited += params.edits is not None or params.allowed is not None
                mine, theirs = found.log_probs, expected.log_probs
                np.testing.assert_array_equal(mine.tokens, theirs.tokens)
                np.testing.assert_allclose(mine.sampled, theirs.sampled, atol=1e-5)
                np.testing.assert_allclose(mine.values, theirs.values, atol=1e-5)
    assert reported >= edited > 0


@pytest.mark.parametrize("vocab", [1, 5, 151_936])
def test_the_noise_of_a_gpu_is_as_defined(vocab):
    keys = keys_of(9)
    expected = vocabulary_noise(keys, vocab)
    on_torch = treeflash_cuda.numerics.gumbel_on_device(
        torch.from_numpy(keys.view(np.int32)), vocab
    )
    on_mlx = treeflash_mlx.numerics.gumbel_on_device(mx.array(keys), vocab)
    for found in (on_torch.numpy(), np.array(on_mlx)):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-6)
