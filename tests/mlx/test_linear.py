"""Linear layers whose input is a concatenation of two parts."""

import numpy as np
import pytest

from treeflash.testing import require

require("mlx.core")

import mlx.core as mx
from mlx import nn
from treeflash_mlx.drafter_operations import PairLinear, split_pairs

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
