"""Several sequences in one pass: each gives the same results as alone."""

import numpy as np
import pytest
from recordings import recording

from treeflash.config import LoadConfig
from treeflash.decoding.probe import relative_difference
from treeflash.decoding.session import SequenceSession
from treeflash.testing import require
from treeflash.testing.comparisons import random_tokens, random_tree

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from treeflash_mlx.backend import MlxBackend, load, runs_batches
from treeflash_mlx.target import Target

pytestmark = pytest.mark.sample(1)


@pytest.mark.parametrize("wide", [False, True])
def test_chunks_of_wide_heads_keep_their_scores_small(pair, rng, wide):
    """MLX has the scores of such heads in memory; a long context would make them gigabytes."""
    backend, chunk = load(pair[0], None, LoadConfig()), 128
    backend.verifier.chunk, backend.verifier.wide_columns = chunk, 2 * chunk
    if wide:
        backend.verifier.wide_head = backend.target.head_dim
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
    together = backend.verifier.logits(list(zip(states, trees, strict=True))).logits
    for sequence, tree, logits in zip(sequences, trees, together, strict=True):
        np.testing.assert_allclose(logits, sequence.logits(tree), atol=2e-4)


def test_layers_with_quantised_keys_may_attend_twice_with_the_same_queries(families, tmp_path, rng):
    """mlx-lm scales these queries in place."""
    families.write(tmp_path, "iquestloopcoder", head_dim=32)
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
