"""A call that fails, at whatever point, leaves every sequence as it was."""

from functools import partial

import numpy as np
import pytest

from tests.helpers.mtp_pairs import write_mtp_pair, write_peagle_pair
from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.registry import loader
from treeflash.testing import HYBRID_FAMILIES, require
from treeflash.testing.comparisons import assert_equal_states, path_to, random_tokens, random_tree
from treeflash.testing.models import write_pair
from treeflash.testing.pairs import each_value

require("torch")
require("mlx_lm")

import mlx.core
import treeflash_cuda.verifier
import treeflash_mlx.verifier
from treeflash_cuda.recurrent_states import SequenceWrites

MODULES = {"cuda": treeflash_cuda.verifier, "mlx": treeflash_mlx.verifier}
SUBMIT = {"cuda": (treeflash_cuda.verifier, "upload_all"), "mlx": (mlx.core, "async_eval")}
"""What brings the work of a commit to the device."""
VOCAB = 40
PARTS = ["forward", "sample", "project"]


@pytest.fixture(
    scope="module", params=each_value(MODULES, ["qwen3", *HYBRID_FAMILIES]), ids="-".join
)
def backend(request, tmp_path_factory):
    """A pair that runs prompts in chunks of a few tokens, the first of which are committed."""
    name, family = request.param
    folders = write_pair(tmp_path_factory.mktemp(family), family, vocab_size=VOCAB)
    backend = loader(name)(*folders, LoadConfig(device="cpu"))
    if name == "cuda":
        backend.verifier.first_chunk, backend.verifier.next_chunk = 4, 3
    else:
        backend.verifier.chunk = 4
    return backend


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


def fail_at(monkeypatch, backend, part, number):
    """Let the numbered call of a part fail; returns the calls so far."""
    framework = "mlx" if backend.name == "mlx" else "cuda"
    holder, name = {
        "forward": (backend.target, "run_rows" if framework == "cuda" else "forward"),
        "sample": (MODULES[framework], "sample"),
        "project": (backend.drafter_model, "project"),
        "embed": (backend.drafter and backend.drafter.output, "embed"),
        "submit": SUBMIT[framework],
        "states": (SequenceWrites, "states_after"),
    }[part]
    function, calls = getattr(holder, name), []

    def failing(*args, **kwargs):
        calls.append(part)
        if len(calls) - 1 == number:
            raise RuntimeError("a planted failure")
        return function(*args, **kwargs)

    monkeypatch.setattr(holder, name, failing)
    return calls


@pytest.mark.sample(3)
@pytest.mark.parametrize("part", PARTS)
def test_a_call_that_fails_anywhere_can_be_repeated(backend, monkeypatch, part):
    sequences, work = started(backend)
    backend.verifier.run(work)
    with monkeypatch.context() as patch:
        fresh, again = started(backend)
        calls = fail_at(patch, backend, part, -1)
        expected = backend.verifier.run(again).sampled
    total = len(calls)
    assert total >= (1 if part == "sample" else 3), "chunks are run one by one"
    for number in range(total):
        sequences, work = started(backend)
        untouched, _ = started(backend)
        with monkeypatch.context() as patch:
            fail_at(patch, backend, part, number)
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
        found = backend.verifier.run(work).sampled
        for one, other in zip(found, expected, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
        for mine, theirs in zip(sequences, fresh, strict=True):
            assert_equal_states(mine.state, theirs.state)
            mine.draft(3)
            drafts = [backend.drafter.log_probs(x.draft(3)) for x in (mine, theirs)]
            np.testing.assert_allclose(*drafts, atol=1e-4)


@pytest.mark.parametrize("part", ["project", "submit", "states"])
def test_a_commit_that_fails_can_be_repeated(backend, monkeypatch, part):
    """Recurrent states of the second sequence fail after the first one's have been computed."""
    if part == "states" and (backend.name == "mlx" or not backend.target.is_hybrid):
        pytest.skip("the states are computed together, or there are none")

    def verified():
        sequences, _ = started(backend)
        tree = random_tree(np.random.default_rng(6), 7, 5, VOCAB)
        path = path_to(tree, len(tree) - 1)
        work = [Verify(x.state, tree, SamplingParams()) for x in sequences[:2]]
        return backend.verifier.run(work), [(x.state, path) for x in sequences[:2]]

    (again, paths), (_, untouched), (once, expected) = verified(), verified(), verified()
    backend.verifier.commit(once, expected)
    with monkeypatch.context() as patch:
        fail_at(patch, backend, part, int(part == "states"))
        with pytest.raises(RuntimeError, match="planted"):
            backend.verifier.commit(again, paths)
    for (mine, _), (before, _) in zip(paths, untouched, strict=True):
        assert_equal_states(mine, before)
    for path in paths:  # a call that fails is repeated for each sequence alone
        backend.verifier.commit(again, [path])
    for (mine, _), (theirs, _) in zip(paths, expected, strict=True):
        assert_equal_states(mine, theirs)


WRITERS = {
    "block": partial(write_pair, family="qwen3"),
    "eagle3": partial(write_mtp_pair, kind="eagle3"),
    "peagle": write_peagle_pair,
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", MODULES)
def test_a_draft_that_fails_can_be_repeated(monkeypatch, tmp_path, name, kind):
    """Long prompts are read in several chunks, and the second may fail after the first."""
    backend = loader(name)(*WRITERS[kind](tmp_path), LoadConfig(device="cpu", dtype="float32"))
    if kind != "block":
        backend.drafter.chunk = 4
    texts = [random_tokens(np.random.default_rng(8), backend.vocab_size, n) for n in (7, 11)]

    def prompted():
        sequences = [SequenceSession(backend, drafts=True) for _ in texts]
        for sequence, tokens in zip(sequences, texts, strict=True):
            sequence.extend(tokens)
        return [(sequence.state, 3) for sequence in sequences]

    def log_probs(block):
        if kind != "eagle3":
            return backend.drafter.log_probs(block)
        return backend.head.log_probs(block, np.array([3, 5, 2], np.int32))

    with monkeypatch.context() as patch:
        calls = fail_at(patch, backend, "embed", -1)
        blocks = backend.drafter.draft(prompted())
    assert len(calls) >= (1 if kind == "block" else 3)
    expected = [log_probs(block) for block in blocks]
    for number in range(len(calls)):
        roots = prompted()
        with monkeypatch.context() as patch:
            fail_at(patch, backend, "embed", number)
            with pytest.raises(RuntimeError, match="planted"):
                backend.drafter.draft(roots)
        assert [state.read_length for state, _ in roots] == [0, 0]
        for root, log_probs_before in zip(roots, expected, strict=True):
            (block,) = backend.drafter.draft([root])
            np.testing.assert_allclose(log_probs(block), log_probs_before, atol=1e-4)
