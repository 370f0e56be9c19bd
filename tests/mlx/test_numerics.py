"""How numbers are computed on MLX: pairs of layers, sorting, sampling, rotations and attention."""

import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
from recordings import recording

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import position_keys
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
import mlx_lm.models
from mlx import nn
from treeflash_mlx.attention import TreePass, attend, is_rope
from treeflash_mlx.drafter_model import PairLinear, split_pairs
from treeflash_mlx.group_attention import attend_by_group
from treeflash_mlx.numerics import top_indices, top_log_probs
from treeflash_mlx.sampling import sample_tokens

SIZE, OUT = 64, 40


class Layers(nn.Module):
    """A pair among other layers."""

    def __init__(self, bias):
        super().__init__()
        self.pair = PairLinear(SIZE, OUT, bias)
        self.norm = nn.RMSNorm(SIZE)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pair_equals_a_linear_layer_of_the_concatenation(rng, bias, bits):
    """Quantised too: a group of weights never spans both halves."""
    layer, layers = nn.Linear(2 * SIZE, OUT, bias), Layers(bias)
    tensors = {f"pair.{name}": tensor for name, tensor in layer.parameters().items()}
    tensors["norm.weight"] = mx.ones(SIZE)
    layers.load_weights(list(split_pairs(layers, tensors).items()))
    if bits is not None:
        nn.quantize(layers, SIZE, bits)
        layer = layer.to_quantized(SIZE, bits)
        assert isinstance(layers.pair.first, nn.QuantizedLinear)
        assert isinstance(layers.pair.second, nn.QuantizedLinear)
    own = mx.array(rng.normal(size=(7, SIZE)), mx.float32)
    shared = mx.array(rng.normal(size=(3, SIZE)), mx.float32)
    rows = mx.array([0, 1, 1, 1, 2, 2, 2])
    expected = layer(mx.concatenate([own, shared[rows]], -1))
    np.testing.assert_allclose(layers.pair(own, shared, rows), expected, atol=1e-5)


def test_splitting_leaves_other_tensors_alone():
    tensors = {"pair.weight": mx.zeros((OUT, 2 * SIZE)), "norm.weight": mx.ones(SIZE)}
    parts = split_pairs(Layers(bias=False), tensors)
    assert sorted(parts) == ["norm.weight", "pair.first.weight", "pair.second.weight"]
    assert parts["norm.weight"] is tensors["norm.weight"]
    assert len(tensors) == 2


def keys(count):
    return position_keys(3, np.arange(count, dtype=np.int32))


@pytest.mark.parametrize("vocab", [5, 129, 2048, 5000])
@pytest.mark.parametrize("k", [1, 5])
def test_top_indices_equal_sorting(rng, vocab, k):
    logits = rng.normal(size=(30, vocab)).astype(np.float32)
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(np.array(top_indices(mx.array(logits), k)), expected)
    tokens, log_probs = top_log_probs(mx.array(logits), k, 0.7)
    scaled = logits / 0.7
    normalised = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    np.testing.assert_array_equal(np.array(tokens), expected)
    expected_log_probs = np.take_along_axis(normalised, expected, -1)
    np.testing.assert_allclose(np.array(log_probs), expected_log_probs, atol=1e-5)


def test_equal_entries_are_in_order_of_their_columns():
    logits = np.zeros((2, 3000), np.float32)
    logits[:, [2900, 7, 1500]] = 1
    np.testing.assert_array_equal(np.array(top_indices(mx.array(logits), 3)), [[7, 1500, 2900]] * 2)


def test_a_row_is_drawn_again_without_its_neighbours(rng):
    """Other rows are certain; sums over the whole vocabulary may round differently."""
    logits = mx.array(rng.normal(size=(3, 700)) * [[3.0], [0.01], [3.0]], mx.float32)
    config = SamplingConfig(temperature=1.0, top_p=0.9)
    together = sample_tokens(logits, config, keys(3))
    alone = [sample_tokens(logits[i : i + 1], config, keys(3)[i : i + 1])[0] for i in range(3)]
    assert together.tolist() == alone


def modules_of_mlx_lm():
    """Every class of module that mlx-lm defines, except one that needs another package."""
    for path in sorted(Path(mlx_lm.models.__path__[0]).glob("*.py")):
        if path.stem != "olmo":
            module = importlib.import_module(f"mlx_lm.models.{path.stem}")
            for kind in vars(module).values():
                if inspect.isclass(kind) and issubclass(kind, nn.Module):
                    yield kind


def test_rotary_modules_are_found_by_what_they_take():
    found = {kind.__name__ for kind in modules_of_mlx_lm() if is_rope(kind.__new__(kind))}
    assert not {"RoPEAttention", "VisionRoPE2D"} & found
    assert {"Llama3RoPE", "YarnRoPE", "SuScaledRoPE", "DeepseekV2YarnRotaryEmbedding"} <= found
    assert all("rope" in name.lower() or "rotary" in name.lower() for name in found - {"NoPE"})
    assert is_rope(nn.RoPE(8))
    assert not is_rope(nn.ALiBi())


@pytest.mark.parametrize("batch", [1, 2])
def test_the_heads_of_a_group_are_rows_where_mlx_has_no_fused_kernel(rng, see_device, batch):
    """Wide heads and many rows; the keys of a group are then read once."""
    tree = DraftTree.from_parents(np.zeros(9, np.int32), (np.arange(9, dtype=np.int32) - 1) // 2)
    tree_pass = TreePass.build([tree] * batch, [6] * batch, 99)
    mask = tree_pass.mask(None)
    q = mx.array(rng.normal(size=(batch, 6, 9, 160)), mx.float32)
    k, v = (mx.array(rng.normal(size=(batch, 2, 15, 160)), mx.float32) for _ in "kv")
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=mask)
    assert mx.allclose(attend_by_group(q, k, v, 0.1, mask), expected, atol=1e-5)
    with recording(mx.fast, "scaled_dot_product_attention") as calls:
        assert attend(tree_pass, q, k, v, None, 0.1, mask) is NotImplemented  # on a CPU
        see_device(mx.gpu)
        assert mx.allclose(attend(tree_pass, q, k, v, None, 0.1, mask), expected, atol=1e-5)
    assert [queries.shape for queries, *_ in calls] == [(batch, 2, 27, 160)]
    for part in (q[:, :, :8], q[:, :2], q[..., :128]):  # few rows, no groups, narrow heads
        width = part.shape[-1]
        others = part, k[..., :width], v[..., :width], None, 0.1, mask[..., : part.shape[2], :]
        assert attend(tree_pass, *others) is NotImplemented


@pytest.mark.parametrize(("rows", "heads"), [(5, 14), (8, 10), (4, 18)])
def test_few_rows_of_large_groups_are_rows_of_one_head(rng, see_device, rows, heads):
    """MLX's kernel for few rows takes 32 rows of a group."""
    tree = DraftTree.from_parents(np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32) - 1)
    tree_pass = TreePass.build([tree] * 2, [6] * 2, 99)
    mask = tree_pass.mask(None)
    q = mx.array(rng.normal(size=(2, heads, rows, 64)), mx.float32)
    k, v = (mx.array(rng.normal(size=(2, 2, 6 + rows, 64)), mx.float32) for _ in "kv")
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=mask)
    see_device(mx.gpu)
    assert mx.allclose(attend(tree_pass, q, k, v, None, 0.1, mask), expected, atol=1e-5)
    few = q[:, :, : 32 // (heads // 2)]
    part = mask[..., : few.shape[2], :]
    assert attend(tree_pass, few, k, v, None, 0.1, part) is NotImplemented
