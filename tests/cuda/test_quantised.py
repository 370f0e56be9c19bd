"""Keys and values in 8 bits."""

from dataclasses import replace

import numpy as np
import pytest
from parts import load_with_parts

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError
from treeflash.testing import require
from treeflash.testing.comparisons import generate, random_tokens
from treeflash.testing.models import write_pair, write_target

require("torch")

import torch
from treeflash_cuda.backend import load
from treeflash_cuda.cache import dequantise, quantise

VOCAB = 40
EXACT, ROUNDED = (LoadConfig(device="cpu", dtype="float32", kv_bits=bits) for bits in (None, 8))
TREE = DraftTree.from_parents(np.array([3, 4, 5, 6, 7], np.int32), np.array([-1, 0, 0, 1, 2]))


@pytest.fixture(scope="module", params=["qwen3", "mistral", "qwen3_5"])
def pair(request, tmp_path_factory):
    """One of them has windows, one recurrent layers."""
    folder = tmp_path_factory.mktemp("pair")
    return write_pair(folder, request.param, vocab_size=VOCAB)


@pytest.fixture(scope="module", params=[True, False], ids=["parts", "masks"])
def backend(request, pair):
    if not request.param:
        return load(*pair, ROUNDED)
    with pytest.MonkeyPatch.context() as patch:
        return load_with_parts(patch, *pair, kv_bits=8)


@pytest.fixture(scope="module")
def exact(pair):
    """The same pair with keys and values as they are."""
    return load(*pair, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_by_half_a_step(dtype):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0], x[0, 1] = 0, 1000 * x[0, 1]
    stored = quantise(x)
    assert (stored.dtype, stored.shape) == (torch.int8, (3, 5, 20))
    y = dequantise(stored, dtype)
    assert y.dtype == dtype
    step = x.abs().amax(-1, keepdim=True).float() / 127
    # The scale and the product are rounded to the dtype.
    bound = step / 2 + 2 * torch.finfo(dtype).eps * x.abs().amax(-1, keepdim=True).float()
    assert ((x.float() - y.float()).abs() <= bound).all()
    assert (y[0, 0] == 0).all()


def test_what_is_not_a_number_stays_so():
    x = torch.ones(2, 8)
    x[0, 3] = torch.nan
    y = dequantise(quantise(x), torch.float32)
    assert y[0].isnan().all()
    assert (y[1] == 1).all()


def test_logits_and_state_are_near_those_of_floats(exact, backend):
    tokens = random_tokens(np.random.default_rng(0), VOCAB, 40)
    caches, logits = [], []
    for each in (exact, backend):
        text = SequenceSession(each)
        text.extend(tokens)
        logits.append(text.logits(TREE))
        text.verify(TREE)
        text.commit(np.array([0, 2, 4], np.int32))
        caches.append(text.state.read_kv_cache())
    assert caches[0].shape == caches[1].shape
    largest = np.abs(caches[0]).max()
    assert 0 < np.abs(caches[0] - caches[1]).max() < largest / 50
    difference = np.sqrt(np.mean((logits[0] - logits[1]) ** 2)) / logits[0].std()
    assert 0 < difference < 0.03


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=0.8, seed=3)])
def test_trees_give_the_tokens_of_plain_decoding(backend, sampling):
    """Alone, and several texts in one forward pass."""
    rng = np.random.default_rng(1)
    scheduler, expected = Scheduler(backend), {}
    for n, method in enumerate(("treeflash", "ddtree", "dflash")):
        prompt = random_tokens(rng, VOCAB, 2 + 9 * n)
        config = DecodeConfig(method=method, budget=5 + 7 * n, max_tokens=12, sampling=sampling)
        tokens = generate(backend, prompt, replace(config, method="ar"))
        assert tokens == generate(backend, prompt, config)
        expected[scheduler.submit(Request(prompt_ids=prompt, config=config))] = tokens
    found = {request_id: [] for request_id in expected}
    for request_id, step in scheduler.run():
        found[request_id] += step.tokens
    assert found == expected


def test_commits_and_forks_equal_a_prefill(backend):
    tokens = random_tokens(np.random.default_rng(2), VOCAB, 9)
    text, fresh = SequenceSession(backend), SequenceSession(backend)
    text.extend(tokens)
    text.verify(TREE)
    text.commit(np.array([0, 2, 4], np.int32))
    fresh.extend([*tokens, *TREE.tokens[[0, 2, 4]]])
    # Rounding may fall to either side where two computations differ in their last bits.
    step = np.abs(fresh.state.read_kv_cache()).max() / 127
    np.testing.assert_allclose(
        text.state.read_kv_cache(), fresh.state.read_kv_cache(), atol=1.01 * step
    )
    fork = text.state.fork(text.length, 50)
    np.testing.assert_array_equal(fork.read_kv_cache(), text.state.read_kv_cache())


def test_a_text_takes_a_byte_a_number_and_its_scales(exact, backend):
    with SequenceSession(exact) as text, SequenceSession(backend) as rounded:
        for each in (text, rounded):
            each.extend([3, 4, 5])
        width = text.state.read_kv_cache().shape[-1]
        sizes = [each.state.kv_cache.nbytes for each in (text, rounded)]
    assert sizes[0] * (width + 4) == sizes[1] * 4 * width
    assert backend.state_nbytes(100, drafts=False) < exact.state_nbytes(100, drafts=False)


def test_other_bits_and_widths_are_refused(tmp_path):
    write_target(tmp_path, "llama", seed=1)
    with pytest.raises(ConfigError, match="kv_bits must be 8 on the cuda backend, got 4"):
        load(tmp_path, None, replace(EXACT, kv_bits=4))
    write_target(tmp_path / "narrow", "llama", seed=1, hidden_size=24)
    with pytest.raises(ConfigError, match="multiple of 4, but llama has heads of width 6"):
        load(tmp_path / "narrow", None, ROUNDED)
