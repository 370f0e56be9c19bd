"""A replayed graph gives what its function would give now: for its settings, inputs and shapes."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from parts import load_with_parts
from replayed_graphs import Replay, enable, replay_graphs

from treeflash.decoding.interfaces import Prefill
from treeflash.testing import require
from treeflash.testing.comparisons import random_tokens, random_tree
from treeflash.testing.models import write_pair

require("torch")

import torch
from treeflash_cuda.gpu import graphs
from treeflash_cuda.gpu.graphs import Graphs

VOCAB = 40


@pytest.fixture
def captured(monkeypatch):
    """The names of all captures."""
    return replay_graphs(monkeypatch)


@pytest.fixture
def replayed(captured):
    """Graphs that are captured and replayed on a CPU."""
    return enable(Graphs(torch.device("cpu")))


def times(factor):
    return lambda x: (x * factor, factor)


def test_what_a_function_depends_on_tells_graphs_apart(replayed, captured):
    """Its name, its settings, and the shapes and dtypes of its inputs."""
    x = torch.tensor([1, 2])
    for _ in range(2):
        for name, factor in (("one", 2), ("one", 3), ("two", 2)):
            scale = factor if name == "one" else -factor
            result, other = replayed.run(name, factor, times(scale), x)
            assert (result.tolist(), other) == ([scale, 2 * scale], scale)
        for y in (x.double(), x[:1], x[None], x.to(torch.int32)):
            result, _ = replayed.run("one", 2, times(2), y)
            assert result.dtype == y.dtype
            torch.testing.assert_close(result, 2 * y)
    assert len(captured) == 7, "each is captured once"


def test_outputs_belong_to_the_caller(replayed):
    """Another replay, and a change of the inputs, leave them alone."""
    inputs = [torch.full((3,), float(i)) for i in range(5)]
    outputs = [replayed.run("f", None, times(2), x)[0] for x in inputs]
    for i, output in enumerate(outputs):
        assert output.tolist() == [2.0 * i] * 3
    inputs[-1].fill_(9)
    assert outputs[-1].tolist() == [8.0] * 3
    outputs[0].fill_(7)
    assert replayed.run("f", None, times(2), inputs[1])[0].tolist() == [2.0] * 3


def test_a_store_has_a_limit(replayed, captured):
    """The oldest graph is dropped, and captured again if it is needed."""
    x = torch.ones(1)
    for i in range(graphs.MAX_GRAPHS + 3):
        replayed.run("f", i, times(i), x)
    assert len(replayed.store) == graphs.MAX_GRAPHS
    count = len(captured)
    assert replayed.run("f", 0, times(0), x)[0].tolist() == [0.0]
    assert len(captured) == count + 1
    replayed.run("f", graphs.MAX_GRAPHS + 2, times(-1), x)
    assert len(captured) == count + 1


def test_graphs_of_other_functions_drop_none(replayed, captured):
    """So ranks of `torchrun` keep the same graphs of the target, whatever else rank 0 captures."""
    x = torch.ones(1)
    replayed.run("shared", None, times(2), x)
    for i in range(graphs.MAX_GRAPHS + 3):
        replayed.run("own", i, times(i), x)
    assert replayed.run("shared", None, times(3), x)[0].tolist() == [2.0]
    assert captured.count("shared") == 1


@pytest.mark.filterwarnings("error")
def test_what_another_rank_cannot_capture_is_called(monkeypatch):
    """It counts as a failure of this rank, so that both try equally often."""
    own, x, tries = enable(Graphs(torch.device("cpu"))), torch.ones(1), []

    def record(self, function, places, **_):
        tries.append(function)
        outputs = function(*places)
        return graphs.Graph(Replay(function, places, outputs), places, outputs)

    monkeypatch.setattr(Graphs, "_record", record)
    own.agreements["shared"] = lambda succeeded: not succeeded
    reason = "^shared runs without CUDA graphs: another rank cannot capture it$"
    for i in range(graphs.MAX_FAILURES + 2):
        last = i == graphs.MAX_FAILURES - 1
        with pytest.warns(UserWarning, match=reason) if last else nullcontext():
            assert own.run("shared", None, times(i), x)[0].tolist() == [i]
    assert (len(tries), own.captures, len(own.store)) == (graphs.MAX_FAILURES, 0, 0)
    own.run("own", None, times(1), x)
    assert (own.captures, len(own.store)) == (1, 1)


@pytest.mark.filterwarnings("error")
def test_a_failure_of_a_kernels_compiler_counts_too(monkeypatch):
    """Triton's errors are no RuntimeErrors."""
    own, x = enable(Graphs(torch.device("cpu"))), torch.ones(1)

    def record(self, function, places, **_):
        raise TypeError("out of resource: shared memory")

    monkeypatch.setattr(Graphs, "_record", record)
    for i in range(graphs.MAX_FAILURES + 1):
        last = i == graphs.MAX_FAILURES - 1
        reason = "^own runs without CUDA graphs: out of resource: shared memory$"
        with pytest.warns(UserWarning, match=reason) if last else nullcontext():
            assert own.run("own", None, times(i), x)[0].tolist() == [i]


@pytest.mark.parametrize("slabs", ["one", "several"])
def test_replays_of_models_are_for_the_present_sequences(tmp_path, monkeypatch, captured, slabs):
    """With other sequences, other numbers of them, and other slabs of the KV cache."""
    folders = write_pair(tmp_path, "qwen3", vocab_size=VOCAB)
    replaying = load_with_parts(monkeypatch, *folders)
    plain = load_with_parts(monkeypatch, *folders, cuda_graphs=False)
    replaying.target.graphs = enable(Graphs(torch.device("cpu")))
    found = []
    for backend in (replaying, plain):
        if slabs == "several":
            backend.target.arena.slab_nbytes = 1
        rng = np.random.default_rng(3)
        states = [backend.open(100, drafts=True) for _ in range(4)]
        prompts = [random_tokens(rng, VOCAB, n) for n in (12, 3, 5, 7)]
        for state, prompt in zip(states, prompts, strict=True):
            backend.verifier.run([Prefill(state, prompt, None)])
        results = []
        groups = [[0], [1], [0, 1], [2, 3], [1], [2, 0, 3], [0]]
        groups = [group for group in groups if slabs == "one" or len(group) == 1]
        for group in groups:
            trees = [(states[i], random_tree(rng, 7, 5, VOCAB)) for i in group]
            verified = backend.verifier.logits(trees)
            results += verified.logits
            path = np.arange(1, dtype=np.int32)
            backend.verifier.commit(verified, [(states[i], path) for i in group])
            blocks = backend.drafter.draft([(states[i], 3) for i in group])
            results += [backend.drafter.log_probs(block) for block in blocks]
        found.append(results)
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    assert captured.count("the target") > 0
    assert captured.count("the target") <= len(groups)
