"""A forward pass that fails, at whatever call, leaves every sequence as it was."""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.registry import loader
from treeflash.testing import HYBRID_FAMILIES, require
from treeflash.testing.comparisons import assert_equal_states, random_tokens, random_tree
from treeflash.testing.models import write_drafter, write_target

require("torch")
require("mlx_lm")

import treeflash_cuda.verifier
import treeflash_mlx.verifier

VOCAB = 40
PARTS = ["forward", "sample", "project"]
# Prompts of a few tokens run in several chunks, of which the first are committed.
SMALL_CHUNKS = {
    "cuda": (treeflash_cuda.verifier, {"FIRST_CHUNK": 4, "NEXT_CHUNK": 3}),
    "mlx": (treeflash_mlx.verifier, {"PREFILL_CHUNK": 4}),
}


@pytest.fixture(scope="module", params=SMALL_CHUNKS)
def name(request):
    return request.param


@pytest.fixture(scope="module", params=["qwen3", *HYBRID_FAMILIES])
def backend(request, name, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_target(folder / "target", request.param, seed=1, vocab_size=VOCAB)
    write_drafter(folder / "drafter", folder / "target", seed=2)
    return loader(name)(folder / "target", folder / "drafter", LoadConfig(device="cpu"))


@pytest.fixture(autouse=True)
def verifier(name, monkeypatch):
    """The module of the backend's verifier, with small chunks."""
    module, chunks = SMALL_CHUNKS[name]
    for constant, size in chunks.items():
        monkeypatch.setattr(module, constant, size)
    return module


def started(backend):
    """Sequences with and without committed tokens, and work for all of them in one call."""
    rng = np.random.default_rng(5)
    sequences = [SequenceSession(backend, drafts=True) for _ in range(3)]
    for sequence, n in zip(sequences[:2], (6, 3), strict=True):
        sequence.extend(random_tokens(rng, VOCAB, n))
    for sequence in sequences[:2]:
        sequence.state.snapshot()
    tree = random_tree(rng, 7, 5, VOCAB)
    long, new = random_tokens(rng, VOCAB, 11), random_tokens(rng, VOCAB, 14)
    params = SamplingParams()
    work = [
        Prefill(sequences[1].state, long, params),
        Verify(sequences[0].state, tree, params),
        Prefill(sequences[2].state, new, params),
    ]
    return sequences, work


def fail_at(monkeypatch, backend, verifier, part, number):
    """Let the numbered call of a part fail; returns the calls so far."""
    holder, name = {
        "forward": (backend.target, "forward"),
        "sample": (verifier, "sample"),
        "project": (backend.drafter_model, "project"),
    }[part]
    function, calls = getattr(holder, name), []

    def failing(*args, **kwargs):
        calls.append(part)
        if len(calls) - 1 == number:
            raise RuntimeError("a planted failure")
        return function(*args, **kwargs)

    monkeypatch.setattr(holder, name, failing)
    return calls


@pytest.mark.parametrize("part", PARTS)
def test_a_call_that_fails_anywhere_can_be_repeated(backend, verifier, monkeypatch, part):
    sequences, work = started(backend)
    backend.verifier.run(work)
    with monkeypatch.context() as patch:
        fresh, again = started(backend)
        calls = fail_at(patch, backend, verifier, part, -1)
        expected = backend.verifier.run(again)
    total = len(calls)
    assert total >= (1 if part == "sample" else 3), "chunks are run one by one"
    for number in range(total):
        sequences, work = started(backend)
        untouched, _ = started(backend)
        with monkeypatch.context() as patch:
            fail_at(patch, backend, verifier, part, number)
            with pytest.raises(RuntimeError, match="planted"):
                backend.verifier.run(work)
        for mine, before in zip(sequences, untouched, strict=True):
            assert mine.length == before.length
            if before.length:
                assert_equal_states(mine.state, before.state)
            lengths = range(mine.length + 5)
            assert [mine.state.restorable(n) for n in lengths] == [
                before.state.restorable(n) for n in lengths
            ]
        found = backend.verifier.run(work)
        for one, other in zip(found, expected, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
        for mine, theirs in zip(sequences, fresh, strict=True):
            assert_equal_states(mine.state, theirs.state)
            mine.draft(3)
            drafts = [backend.drafter.log_probs(x.draft(3)) for x in (mine, theirs)]
            np.testing.assert_allclose(*drafts, atol=1e-4)
