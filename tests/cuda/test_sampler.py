"""The backend's samplers against the definition in the core."""

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import SamplingParams, position_keys, vocabulary_noise
from treeflash.decoding.sampling import sample_tokens as reference
from treeflash.errors import NumericalError
from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda import numerics
from treeflash_cuda.operations import sample_rows
from treeflash_cuda.sampling import Logits, sample, sample_tokens

SAMPLINGS = [
    SamplingConfig(),
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.5, top_k=7),
    SamplingConfig(temperature=1.0, top_p=0.6),
    SamplingConfig(temperature=2.0, top_p=0.999),
    SamplingConfig(temperature=1.0, min_p=0.2),
    SamplingConfig(temperature=1.3, top_k=50, top_p=0.9, min_p=0.02),
]


def keys(count: int) -> np.ndarray:
    return position_keys(3, np.arange(count, dtype=np.int32))


def sample_on_gpu(logits, sampling, noise_keys):
    """What a GPU does without a kernel, on the CPU."""
    noise_keys = None if sampling.greedy else noise_keys
    params = SamplingParams(sampling, noise_keys)
    (sampled,) = sample(Logits.split(logits, [len(logits)]), [params], sample_rows)
    return sampled.tokens


def rows(vocab: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(64, vocab) logits, flat where the scale is small, and the keys of their noise."""
    rng = np.random.default_rng(vocab)
    logits = (scale * rng.normal(size=(64, vocab))).astype(np.float32)
    return logits, keys(64)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: repr(s)[15:-1])
@pytest.mark.parametrize("vocab", [5, 300, 4000])
@pytest.mark.parametrize("scale", [0.1, 3.0])  # 0.1 is flat: the nucleus has many tokens
def test_the_sampler_chooses_as_defined(sampling, vocab, scale):
    logits, noise_keys = rows(vocab, scale)
    chosen = sample_tokens(torch.from_numpy(logits), sampling, noise_keys)
    assert chosen.dtype == np.int32
    assert chosen.tolist() == reference(logits, sampling, noise_keys).tolist()


def test_equal_probabilities_are_kept_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    sampling = SamplingConfig(temperature=1.0, top_k=2)
    drawn = sample_tokens(logits.expand(200, -1), sampling, keys(200))
    assert set(drawn.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: repr(s)[15:-1])
@pytest.mark.parametrize("vocab", [5, 300, 4000])
@pytest.mark.parametrize("scale", [0.1, 3.0])  # 0.1 is flat: the nucleus has many tokens
def test_the_sampler_of_a_gpu_chooses_as_defined(sampling, vocab, scale):
    logits, noise_keys = rows(vocab, scale)
    chosen = sample_on_gpu(torch.from_numpy(logits), sampling, noise_keys)
    assert chosen.tolist() == reference(logits, sampling, noise_keys).tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS[1:], ids=lambda s: repr(s)[15:-1])
def test_a_row_alone_is_chosen_as_among_others(sampling):
    rng = np.random.default_rng(8)
    logits = torch.from_numpy(rng.normal(size=(11, 5000)).astype(np.float32)).bfloat16()
    alone = [
        int(sample_tokens(logits[n : n + 1], sampling, keys(11)[n : n + 1])[0]) for n in range(11)
    ]
    assert sample_tokens(logits, sampling, keys(11)).tolist() == alone


@pytest.mark.parametrize("vocab", [5, 7, 49, 4000])
def test_equal_probabilities_are_all_in_the_smallest_nucleus(vocab):
    sampling = SamplingConfig(temperature=1.0, top_p=1e-9)
    drawn = sample_tokens(torch.zeros(64, vocab), sampling, keys(64))
    assert drawn.tolist() == vocabulary_noise(keys(64), vocab).argmax(-1).tolist()


@pytest.mark.parametrize("choose", [sample_tokens, sample_on_gpu], ids=["cpu", "gpu"])
def test_the_first_of_equal_logits_is_the_best(choose):
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    assert choose(logits, SamplingConfig(), None).tolist() == [1, 0]


@pytest.mark.parametrize("choose", [sample_tokens, sample_on_gpu], ids=["cpu", "gpu"])
@pytest.mark.parametrize("top_p", [1e-300, 5e-324])
def test_the_smallest_top_p_keeps_the_best_token(choose, top_p):
    logits, noise_keys = rows(300, 1.0)
    sampling = SamplingConfig(temperature=1.0, top_p=top_p)
    chosen = choose(torch.from_numpy(logits), sampling, noise_keys)
    assert chosen.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("choose", [sample_tokens, sample_on_gpu], ids=["cpu", "gpu"])
def test_top_k_may_be_more_than_the_tokens_that_are_allowed(choose):
    """Without a warning about the others, whose probability is 0."""
    logits, noise_keys = rows(300, 1.0)
    logits[:, 7:] = -np.inf
    sampling = SamplingConfig(temperature=1.0, top_k=40)
    chosen = choose(torch.from_numpy(logits), sampling, noise_keys)
    assert chosen.tolist() == reference(logits, sampling, noise_keys).tolist()


@pytest.mark.parametrize("vocab", [1, 5, 151_936])
def test_the_noise_of_a_gpu_is_as_defined(vocab):
    found = numerics.gumbel_on_device(torch.from_numpy(keys(9).view(np.int32)), vocab)
    np.testing.assert_allclose(found, vocabulary_noise(keys(9), vocab), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6])
def test_extreme_temperatures(temperature):
    logits, noise_keys = rows(300, 1.0)
    sampling = SamplingConfig(temperature=temperature)
    for sampler in (sample_tokens, sample_on_gpu):
        chosen = sampler(torch.from_numpy(logits), sampling, noise_keys)
        assert chosen.tolist() == reference(logits, sampling, noise_keys).tolist()


@pytest.mark.parametrize("choose", [sample_tokens, sample_on_gpu], ids=["cpu", "gpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_raise(choose, bad, sampling):
    logits = torch.zeros(2, 10)
    logits[1, 3] = bad
    with pytest.raises(NumericalError, match="not finite"):
        choose(logits, sampling, keys(2))


@pytest.mark.sample(8)
@pytest.mark.parametrize("sampler", [sample_tokens, sample_on_gpu], ids=["cpu", "gpu"])
@pytest.mark.parametrize("top_k", [0, 11])
@pytest.mark.parametrize("min_p", [0.0, 0.6])
@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0])
def test_the_edge_of_a_nucleus(sampler, top_k, min_p, scale):
    """In flat distributions tokens of about an equal share of the mass decide the edge."""
    rng = np.random.default_rng(top_k)
    different = 0
    for vocab, top_p in ((7, 0.05), (7, 0.5), (40, 0.3), (40, 0.8), (400, 0.5), (400, 0.99)):
        logits = (scale * rng.normal(size=(150, vocab))).astype(np.float32)
        keys = position_keys(vocab, np.arange(150, dtype=np.int32))
        config = SamplingConfig(temperature=1.0, top_p=top_p, top_k=top_k, min_p=min_p)
        found = sampler(torch.from_numpy(logits), config, keys).tolist()
        assert found == reference(logits, config, keys).tolist(), (vocab, top_p)
        plain = SamplingConfig(temperature=1.0, top_k=top_k, min_p=min_p)
        different += sum(np.array(found) != reference(logits, plain, keys))
    assert different > 10, "the nucleus matters"
