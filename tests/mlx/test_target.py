"""Targets on MLX: families, hooks, features and quantised caches."""

import numpy as np
import pytest
from recordings import recording

from treeflash.config import LoadConfig
from treeflash.decoding.probe import check_trees
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ChunkedKVCache, KVCache
from mlx_lm.utils import load_model
from treeflash_mlx.backend import MlxBackend, load
from treeflash_mlx.state import project_contexts
from treeflash_mlx.target import CacheLayout, Target, shortlist_logits

VERIFIED = (
    "llama",
    "qwen2_moe",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "cohere2",
    "olmo3",
    "glm4",
    "phi3",
    "smollm3",
    "deepseek_v3",
    "afm7",
)


def a_tree(*parents: int) -> DraftTree:
    """A tree of tokens 1, 2, ..."""
    tokens = np.arange(1, len(parents) + 1, dtype=np.int32)
    return DraftTree.from_parents(tokens, np.array(parents, np.int32))


def features_of(sequence: SequenceSession) -> np.ndarray:
    """The projected features that the drafter has not read yet."""
    project_contexts([sequence.state], sequence.backend.drafter_model.project)
    return np.array(mx.concatenate(sequence.state.context))


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", VERIFIED)
def test_family_branches_and_commits(families, tmp_path, rng, family):
    """Trees after every sliding window; commits of any path equal a fresh prefill."""
    assert families.attempt(family)[0] == "verified"
    families.write(tmp_path, family)
    backend = MlxBackend(Target(tmp_path, mx.float32, None), None, None)
    sequence = SequenceSession(backend)
    tokens = rng.integers(0, 96, 20).tolist()
    sequence.extend(tokens)
    for path in ([0, 4, 5], [0, 1, 2, 3], [0], [0, 1, 6]):
        tree = a_tree(-1, 0, 1, 2, 0, 4, 1)
        sequence.verify(tree)
        sequence.commit(np.array(path, np.int32))
        tokens += tree.tokens[path].tolist()
    fresh = SequenceSession(backend)
    fresh.extend(tokens)
    assert sequence.length == fresh.length == len(tokens)
    probe = a_tree(-1, 0, 0)
    np.testing.assert_allclose(sequence.logits(probe), fresh.logits(probe), atol=2e-4)


@pytest.mark.parametrize("family", ["mamba", "rwkv7", "baichuan_m1", "gpt2", "deepseek_v32"])
def test_family_that_cannot_branch_is_refused(families, tmp_path, family):
    families.write(tmp_path, family)

    def check():
        target = Target(tmp_path, mx.float32, None)
        target.check_drafting()
        target.check_trees()
        check_trees(MlxBackend(target, None, None))

    with pytest.raises(UnsupportedModelError) as caught:
        check()
    message = str(caught.value)
    assert "\n" not in message
    assert family in message or "method ar still works" in message


def test_a_cache_of_another_kind_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"^llama4 models keep a ChunkedKVCache, which"):
        CacheLayout("llama4", [KVCache(), ChunkedKVCache(8)])


def test_attention_that_cannot_read_quantised_keys_is_refused(families, tmp_path, monkeypatch):
    monkeypatch.setitem(families.OVERRIDES, "plamo2", {"hidden_size_per_head": 32})
    families.write(tmp_path, "plamo2")
    with pytest.raises(ConfigError, match=r"^kv_bits is not supported for plamo2 models"):
        load(tmp_path, None, LoadConfig(kv_bits=8))


def test_hooks_leave_the_parameters_alone(pair):
    plain, _ = load_model(pair[0])
    hooked = load(*pair, LoadConfig()).target.model
    names = [[name for name, _ in tree_flatten(m.parameters())] for m in (plain, hooked)]
    assert names[0] == names[1]
    assert [name for name, _ in plain.named_modules()] == [n for n, _ in hooked.named_modules()]
    tokens = mx.array([[1, 2, 3, 4]])
    assert mx.array_equal(plain(tokens), hooked(tokens))


def test_two_models_at_once(pair):
    """Hooks belong to instances: another model of the same classes computes as before."""
    untouched, _ = load_model(pair[0])
    before = untouched(mx.array([[1, 2, 3]]))
    a, b = load(*pair, LoadConfig()), load(*pair, LoadConfig())
    sequences = [SequenceSession(backend, drafts=True) for backend in (a, b, a)]
    for sequence in sequences:
        sequence.extend([5, 6, 7])
    tree = a_tree(-1, 0, 0, 1)
    logits = [sequence.logits(tree) for sequence in sequences]
    for sequence in sequences:
        sequence.commit(np.array([0, 1, 3], np.int32))
    features = [features_of(sequence) for sequence in sequences]
    for other in (1, 2):
        np.testing.assert_array_equal(logits[0], logits[other])
        np.testing.assert_array_equal(features[0], features[other])
    assert mx.array_equal(untouched(mx.array([[1, 2, 3]])), before)
    assert "rotate" not in str(type(untouched.layers[0].self_attn.rope).__call__)


def test_features_are_the_projected_outputs_of_the_layers(pair):
    """In the order that the drafter asks for; without a drafter none are kept."""
    backend = load(*pair, LoadConfig())
    model = backend.target.model
    x = model.model.embed_tokens(mx.array([[3, 1, 4, 1]]))
    expected = []
    for i, layer in enumerate(load_model(pair[0])[0].layers):
        x = layer(x, "causal", None)
        if i in backend.drafter_config.target_layer_ids:
            expected.append(x[0])
    sequence = SequenceSession(backend, drafts=True)
    sequence.extend([3, 1, 4, 1])
    expected = backend.drafter_model.project(mx.concatenate(expected, axis=-1))
    np.testing.assert_allclose(features_of(sequence), np.array(expected), atol=1e-4)
    silent = SequenceSession(backend)
    silent.extend([3, 1, 4, 1])
    silent.verify(DraftTree.root_only(1))
    silent.commit(np.zeros(1, np.int32))
    assert silent.state.context == []


# Thousands of positions; `test_long_contexts_match_reference` has hundreds.
@pytest.mark.nightly
def test_features_of_a_long_prompt_are_projected_by_chunks(pair, rng):
    """Outputs of the target layers are never held for the whole prompt."""
    backend = load(*pair, LoadConfig())
    backend.verifier.chunk = 512
    sequence = SequenceSession(backend, drafts=True, capacity=2048)
    with recording(nn.Linear, "__call__") as calls:

        def projected():
            return [len(x) for layer, x in calls if layer is backend.drafter_model.fc]

        root = sequence.extend(rng.integers(0, 64, 1500).tolist())
        assert sum(projected()) == 1499  # the last position had its own pass
        assert max(projected()) <= 512
        assert features_of(sequence).shape == (1500, 128)
        assert sum(projected()) == 1500
        sequence.draft(root)
        assert sum(projected()) == 1500


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
