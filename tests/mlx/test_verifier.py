"""Several sequences in one pass: each gives the same results as alone."""

from dataclasses import replace

import numpy as np
import pytest
from recordings import recording

from treeflash.config import METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.probe import relative_difference
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError
from treeflash.testing import require
from treeflash.testing.comparisons import generate, path_to, random_tokens, random_tree

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from treeflash_mlx import verifier
from treeflash_mlx.backend import MlxBackend, load, runs_batches
from treeflash_mlx.target import Target

CHUNK = 512
BITS = pytest.mark.parametrize("kv_bits", [None, 8])
# In groups of quantised values a rounding difference becomes a step.
TOLERANCE = {None: 2e-4, 8: 0.05}


class GrowingSequence(SequenceSession):
    """A sequence that grows by random tokens."""

    def __init__(self, backend, rng, length, capacity=600):
        super().__init__(backend, drafts=True, capacity=capacity)
        self.rng = rng
        self.tokens = random_tokens(rng, backend.vocab_size, length)
        self.extend(self.tokens)

    def tree(self, nodes):
        (root,) = random_tokens(self.rng, self.backend.vocab_size, 1)
        return random_tree(self.rng, root, nodes, self.backend.vocab_size)

    def assert_as_prefilled(self, tolerance):
        fresh = SequenceSession(self.backend, drafts=True)
        fresh.extend(self.tokens)
        assert self.length == len(self.tokens)
        mine, theirs = self.state.read_kv_cache(), fresh.state.read_kv_cache()
        np.testing.assert_allclose(mine, theirs, atol=tolerance)
        blocks = [sequence.draft(1) for sequence in (self, fresh)]
        mine, theirs = (self.backend.drafter.log_probs(block) for block in blocks)
        np.testing.assert_allclose(mine, theirs, atol=tolerance)


def commit_together(backend, rng, sequences):
    """Verify a tree of random size for each sequence, and commit a random path of it."""
    trees = [sequence.tree(int(rng.integers(1, 40))) for sequence in sequences]
    paths = [path_to(tree, int(rng.integers(len(tree)))) for tree in trees]
    states = [sequence.state for sequence in sequences]
    backend.verifier.run(
        [Verify(s, tree, SamplingParams()) for s, tree in zip(states, trees, strict=True)]
    )
    backend.verifier.commit(list(zip(states, paths, strict=True)))
    for sequence, tree, path in zip(sequences, trees, paths, strict=True):
        sequence.tokens += tree.tokens[path].tolist()


@BITS
@pytest.mark.parametrize("count", [2, 3, 5])
def test_sequences_together_give_the_tokens_of_each_alone(pair, rng, count, kv_bits):
    """Of any length, method and tree size."""
    backend = load(*pair, LoadConfig(kv_bits=kv_bits))
    scheduler, expected = Scheduler(backend), {}
    for i in range(count):
        prompt = random_tokens(rng, backend.vocab_size, int(rng.integers(1, 40)))
        sampling = SamplingConfig(temperature=0.8 * (i % 2), top_p=0.9, seed=i)
        config = DecodeConfig(
            method=METHODS[-1 - i], budget=3 + 9 * i, max_tokens=12, sampling=sampling
        )
        request_id = scheduler.submit(Request(prompt_ids=prompt, config=config))
        expected[request_id] = generate(backend, prompt, replace(config, method="ar"))
    found = {request_id: [] for request_id in expected}
    for request_id, step in scheduler.run():
        found[request_id] += step.tokens
    assert found == expected


@BITS
def test_logits_of_a_batch_equal_those_alone(pair, rng, kv_bits):
    backend = load(*pair, LoadConfig(kv_bits=kv_bits))
    assert backend.target.batches
    sequences = [GrowingSequence(backend, rng, length) for length in (3, 41, 1, 260)]
    trees = [
        sequence.tree(nodes) for sequence, nodes in zip(sequences, (30, 1, 7, 40), strict=True)
    ]
    states = [sequence.state for sequence in sequences]
    together = backend.verifier.logits(list(zip(states, trees, strict=True)))
    reverse = backend.verifier.logits(list(zip(states, trees, strict=True))[::-1])
    assert len({id(state.kv_cache.storage) for state in states}) == 1
    for sequence, tree, logits, again in zip(
        sequences, trees, together, reverse[::-1], strict=True
    ):
        np.testing.assert_array_equal(logits, again)
        np.testing.assert_allclose(logits, sequence.logits(tree), atol=2e-4)


@BITS
def test_states_after_random_commits_equal_prefills(pair, rng, kv_bits):
    """Texts join and leave the batch, are forked and truncated."""
    backend = load(*pair, LoadConfig(kv_bits=kv_bits))
    sequences = [GrowingSequence(backend, rng, length) for length in (2, 30, 9, 17)]
    commit_together(backend, rng, sequences)
    commit_together(backend, rng, sequences[::-1])
    backend.drafter.draft([(sequence.state, 1) for sequence in sequences])
    commit_together(backend, rng, sequences[1:])
    sequences[2].state.truncate(5)
    del sequences[2].tokens[5:]
    copy = GrowingSequence.__new__(GrowingSequence)
    copy.backend, copy.rng, copy.tokens = backend, rng, sequences[1].tokens[:20]
    copy.state = sequences[1].state.fork(20, 300)
    sequences.append(copy)
    commit_together(backend, rng, sequences)
    sequences.pop(0).close()
    commit_together(backend, rng, sequences)
    for sequence in sequences:
        sequence.assert_as_prefilled(TOLERANCE[kv_bits])


@pytest.fixture
def _short_chunks(monkeypatch):
    monkeypatch.setattr("treeflash_mlx.verifier.PREFILL_CHUNK", CHUNK)


@pytest.mark.usefixtures("_short_chunks")
def test_short_and_long_new_tokens_run_beside_trees(pair, rng):
    """Tokens no more than the largest tree share its pass; more of them have their own."""
    backend = load(*pair, LoadConfig())
    sequences = [GrowingSequence(backend, rng, 4, capacity=2000) for _ in range(4)]
    tree = sequences[0].tree(20)
    new = [random_tokens(rng, 64, n) for n in (7, 20, CHUNK + 100)]
    all_params = [SamplingParams(log_probs=3), None, SamplingParams(log_probs=3)]
    work = [
        Prefill(t.state, ids, c) for t, ids, c in zip(sequences[1:], new, all_params, strict=True)
    ]
    verification = Verify(sequences[0].state, tree, SamplingParams(log_probs=3))
    with recording(backend.target, "forward") as passes:
        sampled = backend.verifier.run([work[0], verification, *work[1:]])
    shapes = [token_ids.shape for token_ids, *_ in passes]
    assert shapes == [(1, CHUNK), (1, 99), (1, 1), (3, 20)]
    assert sampled[2] is None
    assert sequences[0].length == 4
    for sequence, ids, found in zip(sequences[1:], new, (sampled[0], *sampled[2:]), strict=True):
        alone = SequenceSession(backend, capacity=2000)
        alone.extend(sequence.tokens + ids[:-1])
        (logits,) = alone.logits(DraftTree.root_only(ids[-1]))
        sequence.tokens += ids
        sequence.assert_as_prefilled(2e-4)
        if found is not None:
            assert found.tokens.tolist() == [logits.argmax()]
            best = np.sort(logits - np.logaddexp.reduce(logits))[::-1]
            np.testing.assert_allclose(found.log_probs.values[0], best[:3], atol=1e-4)
    assert sampled[1].tokens.tolist() == sequences[0].logits(tree).argmax(-1).tolist()


@pytest.mark.parametrize("wide", [False, True])
def test_chunks_of_wide_heads_keep_their_scores_small(pair, rng, monkeypatch, wide):
    """MLX has the scores of such heads in memory; a long context would make them gigabytes."""
    backend, chunk = load(pair[0], None, LoadConfig()), 128
    monkeypatch.setattr(verifier, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr(verifier, "WIDE_COLUMNS", 2 * chunk)
    if wide:
        monkeypatch.setattr(verifier, "WIDE_HEAD", backend.target.head_dim)
    tokens = random_tokens(rng, 64, 6 * chunk)
    sequence = SequenceSession(backend, capacity=7 * chunk)
    with recording(backend.target, "forward") as passes:
        sequence.extend(tokens)
    sizes = [token_ids.shape[1] for token_ids, *_ in passes]
    assert sizes[:2] == [chunk] * 2
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == len(tokens)
    columns = np.cumsum(sizes)
    assert (max(sizes * columns) <= 2 * chunk * chunk) == wide


@pytest.mark.usefixtures("_short_chunks")
def test_a_call_that_fails_changes_no_sequence(pair, rng):
    backend = load(*pair, LoadConfig())
    sequences = [GrowingSequence(backend, rng, length, capacity=2000) for length in (3, 8, 5)]
    before = [(sequence.length, sequence.state.read_kv_cache()) for sequence in sequences]
    tree = sequences[0].tree(9)
    nothing = SamplingParams(allowed=np.zeros((len(tree), 2), np.uint32))
    work = [
        Prefill(sequences[1].state, random_tokens(rng, 64, 2 * CHUNK), SamplingParams()),
        Prefill(sequences[2].state, [1, 2, 3], SamplingParams()),
        Verify(sequences[0].state, tree, nothing),
    ]
    with pytest.raises(NumericalError, match="not finite"):
        backend.verifier.run(work)
    for sequence, (length, kv_cache) in zip(sequences, before, strict=True):
        assert sequence.length == length
        np.testing.assert_array_equal(sequence.state.read_kv_cache(), kv_cache)
        sequence.assert_as_prefilled(2e-4)


def test_states_are_written_in_place(pair, rng):
    """While the same sequences run together, no array moves, whatever is committed."""
    backend = load(*pair, LoadConfig(device="cpu"))
    for count in (1, 3):
        sequences = [GrowingSequence(backend, rng, 5) for _ in range(count)]
        commit_together(backend, rng, sequences)
        storage = sequences[0].state.kv_cache.storage
        before = addresses(storage)
        for _ in range(3):
            commit_together(backend, rng, sequences)
            assert addresses(storage) == before
        assert sequences[0].state.kv_cache.storage is storage


def addresses(storage):
    """Where the data of all arrays is."""
    mx.eval(storage.layers)
    mx.synchronize()
    arrays = [array for layer in storage.layers for array in layer]
    return [np.array(array, copy=False).__array_interface__["data"][0] for array in arrays]


def test_the_bytes_of_a_state_are_those_announced(pair):
    backend = load(*pair, LoadConfig())
    for drafts in (False, True):
        sequence = SequenceSession(backend, drafts=drafts, capacity=700)
        sequence.extend([1, 2, 3])
        if drafts:
            sequence.draft(4)
        assert sequence.state.nbytes == backend.state_nbytes(700, drafts=drafts)
        sequence.close()
        assert sequence.state.nbytes == 0


@pytest.mark.parametrize(
    ("family", "batches"),
    [
        *(("gemma3_text", True), ("deepseek_v3", True), ("gemma3n", True)),
        *(("gemma2", False), ("gpt2", False), ("ministral3", False)),
    ],
)
def test_sequences_run_one_by_one_if_the_family_needs_it(families, tmp_path, rng, family, batches):
    """Gemma 2 adds the mask to five axes, GPT-2 and Ministral 3 have one offset for all rows."""
    families.write(tmp_path, family)
    backend = load(tmp_path, None, LoadConfig())
    assert backend.target.batches == batches
    sequences = [SequenceSession(backend) for _ in range(3)]
    # Ministral 3 scales its queries from position 64 on.
    for sequence, length in zip(sequences, (3, 70, 11), strict=True):
        sequence.extend(rng.integers(0, 96, length).tolist())
    nodes = (1, 1, 1) if family == "gpt2" else (5, 30, 1)
    trees = [random_tree(rng, 1, n, 96) for n in nodes]
    states = [sequence.state for sequence in sequences]
    together = backend.verifier.logits(list(zip(states, trees, strict=True)))
    for sequence, tree, logits in zip(sequences, trees, together, strict=True):
        np.testing.assert_allclose(logits, sequence.logits(tree), atol=2e-4)


def test_layers_with_quantised_keys_may_attend_twice_with_the_same_queries(
    families, tmp_path, rng, monkeypatch
):
    """mlx-lm scales these queries in place."""
    monkeypatch.setitem(families.FIELDS, "head_dim", 32)
    families.write(tmp_path, "iquestloopcoder")
    exact, quantised = (load(tmp_path, None, LoadConfig(kv_bits=bits)) for bits in (None, 8))
    for nodes in (1, 5):
        tree, found = random_tree(rng, 7, nodes, 96), []
        for backend in (exact, quantised):
            with SequenceSession(backend) as sequence:
                sequence.extend(list(range(20)))
                found.append(sequence.logits(tree)[-1])
        assert relative_difference(*found) < 0.05


def test_an_error_of_the_model_means_one_sequence_at_a_time(families, tmp_path):
    families.write(tmp_path, "gemma2")
    backend = MlxBackend(Target(tmp_path, mx.float32, None), None, None)
    assert not runs_batches(backend)


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
def test_one_offset_for_all_rows_is_noticed_in_half_precision(families, tmp_path, family):
    """Beside rounding, a wrong position is a small difference."""
    families.write(tmp_path, family)
    assert not load(tmp_path, None, LoadConfig(dtype="bfloat16")).target.batches
