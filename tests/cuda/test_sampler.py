"""The backend's samplers against the definition in the core."""

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import choose as reference
from treeflash.errors import NumericalError
from treeflash.testing import require

require("torch")

import torch  # noqa: E402
from treeflash_cuda import gpu_sampler  # noqa: E402
from treeflash_cuda.sampler import choose  # noqa: E402

SAMPLINGS = [
    SamplingConfig(),
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.5, top_k=7),
    SamplingConfig(temperature=1.0, top_p=0.6),
    SamplingConfig(temperature=2.0, top_p=0.999),
    SamplingConfig(temperature=1.0, min_p=0.2),
    SamplingConfig(temperature=1.3, top_k=50, top_p=0.9, min_p=0.02),
]


def rows(vocab: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(64, vocab) logits, flat where the scale is small, and the random numbers to draw with."""
    rng = np.random.default_rng(vocab)
    logits = (scale * rng.normal(size=(64, vocab))).astype(np.float32)
    return logits, rng.random(64)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: repr(s)[15:-1])
@pytest.mark.parametrize("vocab", [5, 300, 4000])
@pytest.mark.parametrize("scale", [0.1, 3.0])  # 0.1 is flat: the nucleus outgrows the shortlist
def test_the_sampler_chooses_as_defined(sampling, vocab, scale):
    logits, uniforms = rows(vocab, scale)
    chosen = choose(torch.from_numpy(logits), sampling, uniforms)
    assert chosen.dtype == np.int32
    assert chosen.tolist() == reference(logits, sampling, uniforms).tolist()


def test_equal_probabilities_are_kept_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    sampling = SamplingConfig(temperature=1.0, top_k=2)
    drawn = {int(choose(logits, sampling, np.array([u]))[0]) for u in np.linspace(0, 0.999, 50)}
    assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: repr(s)[15:-1])
@pytest.mark.parametrize("vocab", [5, 300, 4000])
@pytest.mark.parametrize("scale", [0.1, 3.0])  # 0.1 is flat: the nucleus outgrows the shortlist
def test_that_of_a_gpu_chooses_as_defined(sampling, vocab, scale):
    logits, uniforms = rows(vocab, scale)
    chosen = gpu_sampler.choose(torch.from_numpy(logits), sampling, uniforms)
    assert chosen.tolist() == reference(logits, sampling, uniforms).tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS[1:], ids=lambda s: repr(s)[15:-1])
def test_a_row_alone_is_chosen_as_among_others(sampling):
    rng = np.random.default_rng(8)
    logits = torch.from_numpy(rng.normal(size=(11, 5000)).astype(np.float32)).bfloat16()
    uniforms = rng.random(11)
    alone = [int(choose(logits[n : n + 1], sampling, uniforms[n : n + 1])[0]) for n in range(11)]
    assert choose(logits, sampling, uniforms).tolist() == alone


@pytest.mark.parametrize("vocab", [5, 7, 49, 4000])
def test_equal_probabilities_are_all_in_the_smallest_nucleus(vocab):
    sampling = SamplingConfig(temperature=1.0, top_p=1e-9)
    uniforms = (np.arange(vocab) + 0.5) / vocab
    assert choose(torch.zeros(vocab, vocab), sampling, uniforms).tolist() == list(range(vocab))


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1, 0)])
def test_the_ends_of_the_distribution(uniform):
    logits = torch.tensor([[-9.0, 2.0, 1.0, 0.0, -9.0]])
    sampling = SamplingConfig(temperature=1.0, top_p=0.9)
    assert choose(logits, sampling, np.array([uniform])).tolist() == [1 if uniform == 0 else 2]


@pytest.mark.parametrize("choose", [choose, gpu_sampler.choose], ids=["cpu", "gpu"])
def test_the_first_of_equal_logits_is_the_best(choose):
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    assert choose(logits, SamplingConfig(), None).tolist() == [1, 0]


@pytest.mark.parametrize("choose", [choose, gpu_sampler.choose], ids=["cpu", "gpu"])
@pytest.mark.parametrize("top_p", [1e-300, 5e-324])
def test_the_smallest_top_p_keeps_the_best_token(choose, top_p):
    logits, uniforms = rows(300, 1.0)
    sampling = SamplingConfig(temperature=1.0, top_p=top_p)
    chosen = choose(torch.from_numpy(logits), sampling, uniforms)
    assert chosen.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("probs", "uniform", "token"),
    [
        ([0.25, 0.25, 0.5], 0.25, 1),  # exactly between two tokens
        ([0.0, 0.0, 1.0], 0.0, 2),  # tokens that filters removed are never drawn
        ([0.0, 0.5, 0.0, 0.5], 0.5, 3),
    ],
)
def test_a_token_is_drawn_if_the_cumulative_mass_exceeds_the_share(probs, uniform, token):
    drawn = gpu_sampler.invert(torch.tensor([probs]), torch.tensor([[uniform]], dtype=torch.double))
    assert drawn.tolist() == [token]


def test_mass_is_summed_in_double_precision():
    """In float32 the tail of the first block would be lost beside its first token."""
    probs = torch.full((1, 512), 0.0)
    probs[0, :256], probs[0, 0], probs[0, 256] = 2.0**-33, 0.5, 0.5
    cumulative = probs[0].double().cumsum(0)
    uniform = (0.5 + 2.0**-26) / cumulative[-1]
    expected = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    assert 0 < expected < 256
    assert gpu_sampler.invert(probs, uniform[None, None]).tolist() == [expected]


@pytest.mark.parametrize("choose", [choose, gpu_sampler.choose], ids=["cpu", "gpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_raise(choose, bad, sampling):
    logits = torch.zeros(2, 10)
    logits[1, 3] = bad
    with pytest.raises(NumericalError, match="not finite"):
        choose(logits, sampling, np.array([0.5, 0.5]))
