"""Layers of several kinds in one forward pass: each has its own mask, in batches too."""

from __future__ import annotations

import json

import numpy as np
import pytest
from parts import load_with_parts

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.reference import backend as reference
from treeflash.testing import require
from treeflash.testing.comparisons import random_tokens, random_tree
from treeflash.testing.models import write_target
from treeflash.testing.pairs import pairwise

require("torch")

from treeflash_cuda.backend import load

VOCAB, WINDOW = 40, 4
CPU = LoadConfig(device="cpu", dtype="float32")
KINDS = {"s": "sliding_attention", "f": "full_attention"}


def each_backend(**lengths):
    """Any two of a target's layers, a backend and a length meet."""
    ((name, values),) = lengths.items()
    cases = pairwise(("sfsf", "fsfs", "ffss"), ("masks", "parts", "static"), values)
    return pytest.mark.parametrize(
        ("folder", "backend", name), cases, indirect=["folder", "backend"]
    )


@pytest.fixture
def folder(request, tmp_path):
    """A target whose layers slide (s) or attend to everything (f)."""
    write_target(tmp_path, "qwen3", seed=1, vocab_size=VOCAB)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = [KINDS[kind] for kind in request.param][: config["num_hidden_layers"]]
    assert len(set(layers)) == 2
    sliding = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": layers}
    (tmp_path / "config.json").write_text(json.dumps(config | sliding))
    return tmp_path


@pytest.fixture
def backend(request, folder, monkeypatch):
    """With masks over all keys, in parts as on a GPU, and with the shapes of CUDA graphs."""
    if request.param == "masks":
        return load(folder, None, CPU)
    return load_with_parts(monkeypatch, folder, cuda_graphs=request.param == "static")


def logits(backend, prompts, trees):
    """(n, vocab) logits of the trees of several sequences from one forward pass."""
    texts = [SequenceSession(backend, capacity=700) for _ in prompts]
    for text, prompt in zip(texts, prompts, strict=True):
        text.extend(prompt)
    return backend.verifier.logits([(x.state, tree) for x, tree in zip(texts, trees, strict=True)])


@each_backend(long=(20, 300))
def test_each_layer_of_a_batch_has_its_own_mask(backend, folder, long):
    """The logits of trees in a batch equal the reference's, which runs them alone."""
    rng = np.random.default_rng(long)
    prompts = [random_tokens(rng, VOCAB, n) for n in (9, long, 13)]
    trees = [random_tree(rng, 7, n, VOCAB) for n in (12, 3, 1)]
    expected = logits(reference.load(folder, None, LoadConfig()), prompts, trees)
    together = logits(backend, prompts, trees)
    for mine, theirs, prompt, tree in zip(together, expected, prompts, trees, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-3)
        (alone,) = logits(backend, [prompt], [tree])
        np.testing.assert_allclose(alone, theirs, atol=2e-3)


@each_backend(n=(30, 300))
def test_each_layer_of_prompts_beside_trees_has_its_own_mask(backend, folder, n):
    """A tree and a long prompt in one pass, and a chunk after an earlier one."""
    rng = np.random.default_rng(n)
    first, later, new = (random_tokens(rng, VOCAB, k) for k in (11, 6, n))
    tree = random_tree(rng, 7, 9, VOCAB)
    params = SamplingParams(log_probs=VOCAB)
    found = []
    for tested in (backend, reference.load(folder, None, LoadConfig())):
        texts = [SequenceSession(tested, capacity=700) for _ in range(3)]
        texts[0].extend(first)
        texts[1].extend(later)
        work = [
            Verify(texts[0].state, tree, params),
            Prefill(texts[1].state, new, params),
            Prefill(texts[2].state, new, params),
        ]
        sampled = tested.verifier.run(work)
        rows = [np.argsort(x.log_probs.tokens, -1) for x in sampled]
        values = [
            np.take_along_axis(x.log_probs.values, row, -1)
            for x, row in zip(sampled, rows, strict=True)
        ]
        found.append([*values, *(text.state.read_kv_cache() for text in texts)])
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-3)
