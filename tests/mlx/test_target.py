"""Targets on MLX: families, hooks, features and quantised caches."""

import pytest

from treeflash.config import LoadConfig
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash.testing import require

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
