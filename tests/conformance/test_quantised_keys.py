"""Keys and values in 8 bits: near floats, and the laws of states within steps of rounding."""

from dataclasses import replace

import numpy as np
import pytest
from parts import load_with_parts

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.interfaces import Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.registry import loader
from treeflash.testing import require
from treeflash.testing.comparisons import generate, path_to, prompted, random_tokens, random_tree
from treeflash.testing.models import write_pair
from treeflash.testing.pairs import each_value, two_samplings

PACKAGES = {"cuda": "torch", "cuda on a GPU": "torch", "mlx": "mlx_lm"}
"""The package that each backend needs. On a GPU attention is in parts: see `load_with_parts`."""
FAMILIES = "qwen3", "mistral", "qwen3_5"
"""Whole attention, windows, and recurrent layers."""
VOCAB = 40


@pytest.fixture(scope="module", params=each_value(PACKAGES, FAMILIES), ids="-".join)
def backends(request, tmp_path_factory):
    """A pair with floats, and with 8 bits; MLX quantises heads whose width is a multiple of 32."""
    name, family = request.param
    require(PACKAGES[name])
    folder = tmp_path_factory.mktemp("pair")
    folders = write_pair(folder, family, vocab_size=VOCAB, hidden_size=128)

    def load(bits):
        if name == "cuda on a GPU":
            with pytest.MonkeyPatch.context() as patch:
                return load_with_parts(patch, *folders, kv_bits=bits)
        return loader(name)(*folders, LoadConfig(device="cpu", dtype="float32", kv_bits=bits))

    return load(None), load(8)


@pytest.fixture
def backend(backends):
    return backends[1]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.sample(2)
def test_logits_and_keys_are_near_those_of_floats(backends, rng):
    tokens, tree = random_tokens(rng, VOCAB, 40), random_tree(rng, 3, 9, VOCAB)
    caches, logits = [], []
    for sequence in prompted(backends, tokens):
        logits.append(sequence.logits(tree))
        sequence.verify(tree)
        sequence.commit(path_to(tree, 8))
        caches.append(sequence.state.read_kv_cache())
    assert caches[0].shape == caches[1].shape
    assert 0 < np.abs(caches[0] - caches[1]).max() < np.abs(caches[0]).max() / 50
    difference = np.sqrt(np.mean((logits[0] - logits[1]) ** 2)) / logits[0].std()
    assert 0 < difference < 0.03


@pytest.mark.sample(1)
@two_samplings
def test_trees_give_the_tokens_of_plain_decoding(backend, rng, sampling):
    """Alone, and several sequences together."""
    scheduler, expected = Scheduler(backend), {}
    for n, method in enumerate(("treeflash", "ddtree", "dflash")):
        prompt = random_tokens(rng, VOCAB, 2 + 9 * n)
        config = DecodeConfig(method=method, budget=5 + 7 * n, max_tokens=12, sampling=sampling)
        tokens = generate(backend, prompt, replace(config, method="ar"))
        assert tokens == generate(backend, prompt, config)
        expected[scheduler.submit(Request(prompt_ids=prompt, config=config))] = tokens
    found = {request: [] for request in expected}
    for request, step in scheduler.run():
        found[request] += step.tokens
    assert found == expected


@pytest.mark.sample(2)
def test_logits_of_a_batch_equal_those_alone(backend, rng):
    sequences = [prompted([backend], random_tokens(rng, VOCAB, n))[0] for n in (3, 41, 1, 260)]
    trees = [random_tree(rng, 3, nodes, VOCAB) for nodes in (30, 1, 7, 40)]
    work = [(x.state, tree) for x, tree in zip(sequences, trees, strict=True)]
    for each, logits in zip(work, backend.verifier.logits(work).logits, strict=True):
        (alone,) = backend.verifier.logits([each]).logits
        differences = np.abs(alone - logits).max(1)
        # A key of a node may be rounded to either side: such steps were seen to cost 0.003.
        assert (differences > 2e-4).sum() <= 2
        assert differences.max() < 0.01


def test_states_equal_prefills_after_commits_forks_and_truncations(backend, rng):
    texts = [random_tokens(rng, VOCAB, n) for n in (2, 30, 9)]
    sequences = [prompted([backend], text)[0] for text in texts]
    for _ in range(3):
        trees = [random_tree(rng, 3, int(rng.integers(1, 30)), VOCAB) for _ in sequences]
        paths = [path_to(tree, int(rng.integers(len(tree)))) for tree in trees]
        states = [x.state for x in sequences]
        work = zip(states, trees, strict=True)
        verified = backend.verifier.run([Verify(*each, SamplingParams()) for each in work])
        backend.verifier.commit(verified, list(zip(states, paths, strict=True)))
        for text, tree, path in zip(texts, trees, paths, strict=True):
            text += tree.tokens[path].tolist()
        if len(sequences) == 3:
            sequences[2].state.snapshot()
            sequences.append(sequences[2].fork(sequences[2].length, 300))
            texts.append([*texts[2]])
            sequences[1].state.truncate(length := sequences[1].state.restorable(20))
            del texts[1][length:]
    for sequence, text in zip(sequences, texts, strict=True):
        assert sequence.length == len(text)
        if text:
            (fresh,) = prompted([backend], text)
            keys = [x.state.read_kv_cache() for x in (sequence, fresh)]
            # Rounding may fall to either side where two computations differ in their last bits.
            np.testing.assert_allclose(*keys, atol=2 * np.abs(keys[1]).max() / 127)


def test_a_state_takes_little_more_than_a_byte_a_number(backends):
    sizes = []
    for backend in backends:
        with SequenceSession(backend, capacity=500) as sequence:
            sequence.extend([3, 4, 5])
            sizes.append(sequence.state.nbytes)
            assert sequence.state.nbytes <= backend.state_nbytes(500, drafts=False)
    assert sizes[1] < sizes[0] * (1 if sequence.state.needs_snapshots else 1 / 3)
