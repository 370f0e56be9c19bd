"""Targets on MLX: hooks, quantised keys, output heads, and several sequences in one pass."""

import numpy as np
import pytest
from recordings import recording

from treeflash.config import LoadConfig
from treeflash.decoding.probe import relative_difference
from treeflash.decoding.session import SequenceSession
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.comparisons import random_tokens, random_tree

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from engines.mlx import plain_model
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ChunkedKVCache, KVCache
from treeflash_mlx.backend import load
from treeflash_mlx.target import CacheLayout, Target, shortlist_logits


def test_a_cache_of_another_kind_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"^llama4 models keep a ChunkedKVCache, which"):
        CacheLayout("llama4", [KVCache(), ChunkedKVCache(8)])


def test_attention_that_cannot_read_quantised_keys_is_refused(families, tmp_path, monkeypatch):
    monkeypatch.setitem(families.OVERRIDES, "plamo2", {"hidden_size_per_head": 32})
    families.write(tmp_path, "plamo2")
    with pytest.raises(ConfigError, match=r"^kv_bits is not supported for plamo2 models"):
        load(tmp_path, None, LoadConfig(kv_bits=8))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_hooks_belong_to_one_model(families, tmp_path, family):
    """Its parameters and modules keep their names; others of its classes compute as before."""
    families.write(tmp_path, family)
    plain, tokens = plain_model(tmp_path), mx.array([[1, 2, 3, 4]])
    before = plain(tokens)
    hooked = load(tmp_path, None, LoadConfig()).target.model
    names = [[name for name, _ in tree_flatten(m.parameters())] for m in (plain, hooked)]
    assert names[0] == names[1]
    assert [name for name, _ in plain.named_modules()] == [n for n, _ in hooked.named_modules()]
    for model in (plain, hooked, plain_model(tmp_path)):
        assert mx.array_equal(model(tokens), before)
    hooks = zip(plain.modules(), hooked.modules(), strict=True)
    assert any(type(own) is not type(other) for own, other in hooks)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_shortlist_logits_are_those_of_the_whole_vocabulary(families, tmp_path, rng, family):
    """With the bias that some output heads have."""
    families.write(tmp_path, family)
    target = Target(tmp_path, mx.float32, None)
    assert ("bias" in target.lm_head) == (family == "phi")
    hidden = mx.array(rng.normal(size=(3, 64)), mx.float32)
    tokens = mx.array([5, 0, 90])
    expected = target.output_head(hidden)[:, tokens]
    assert mx.allclose(shortlist_logits(target.output_module, hidden, tokens), expected, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_shortlist_logits_of_a_quantised_head_are_products_of_its_rows_alone(
    rng, monkeypatch, bits, batch
):
    """The rows are not dequantised, which would take more memory traffic than the product."""
    head = nn.Linear(64, 96, bias=True).to_quantized(32, bits)
    hidden = mx.array(rng.normal(size=(*batch, 3, 64)), mx.float32)
    tokens = mx.array(rng.integers(0, 96, (*batch, 5)))
    monkeypatch.setattr(mx, "dequantize", None)
    found = shortlist_logits(head, hidden, tokens)
    assert found.shape == (*batch, 3, 5)
    columns = mx.broadcast_to(tokens[..., None, :], found.shape)
    assert mx.allclose(found, mx.take_along_axis(head(hidden), columns, -1), atol=1e-4)


@pytest.mark.sample(1)
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


@pytest.mark.sample(2)
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


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
def test_one_offset_for_all_rows_is_noticed_in_half_precision(families, tmp_path, family):
    """Beside rounding, a wrong position is a small difference."""
    families.write(tmp_path, family)
    assert not load(tmp_path, None, LoadConfig(dtype="bfloat16")).target.batches
