"""Layers of few bits in the formats of other libraries: no weight changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from low_bit_checkpoints import KINDS, compressed_settings, configuration, gptq_settings

from treeflash.errors import UnsupportedModelError
from treeflash.low_bit_formats import LowBitTensors, find_format
from treeflash.low_bits import LowBitWeight, join

ROWS, SIZE = 24, 128


def read(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> LowBitWeight:
    stored = {f"layer.{name}": x for name, x in tensors.items()}
    found = LowBitTensors.find(config, {name: x.shape for name, x in stored.items()})
    assert isinstance(found, LowBitTensors)
    assert list(found.layers) == ["layer"]
    assert all(found.owns(name) for name in stored)
    assert not found.owns("layer.bias")
    return found.read("layer", stored, stored.__getitem__)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_weights_are_bit_for_bit_the_ones_of_the_format(kind):
    layer = kind.store(np.random.default_rng(1), ROWS, SIZE)
    weight = read(configuration(kind), layer.tensors)
    np.testing.assert_array_equal(weight.dequantised().view("u4"), layer.weight.view("u4"))
    assert weight.numbers.max() < 1 << weight.bits
    # The zeros of whole rows are one number; all others were drawn.
    assert len(np.unique(layer.weight)) > SIZE


def test_scales_take_two_bytes_where_that_changes_none():
    def is_wide(name: str) -> bool:
        kind = KINDS[name]
        layer = kind.store(np.random.default_rng(1), ROWS, SIZE)
        return read(configuration(kind), layer.tensors).format.scale_dtype == "float32"

    assert not is_wide("GPTQ")
    assert is_wide("GPTQ, zeros")  # scale times zero
    assert not is_wide("MLX, 4 bits")
    assert is_wide("W4A16")  # a row of tiny scales


def test_layers_with_other_orders_of_inputs_are_not_joined():
    kind, rng = KINDS["GPTQ, act-order"], np.random.default_rng(1)
    layers = [kind.store(rng, ROWS, SIZE) for _ in range(2)]
    first, second = (read(configuration(kind), layer.tensors) for layer in layers)
    assert join([first, second]) is None
    both = join([first, first])
    assert both is not None
    np.testing.assert_array_equal(both.dequantised(), np.concatenate([layers[0].weight] * 2))
    assert first.order is not None


def test_groups_of_different_sizes_are_refused():
    kind = KINDS["GPTQ, act-order"]
    layer = kind.store(np.random.default_rng(1), ROWS, SIZE)
    layer.tensors["g_idx"][0] = (layer.tensors["g_idx"][0] + 1) % 4
    with pytest.raises(UnsupportedModelError, match="groups of different sizes"):
        read(configuration(kind), layer.tensors)


def scheme(**changes: Any) -> dict[str, Any]:
    settings = compressed_settings("pack-quantized", 4)
    settings["config_groups"]["group_0"] |= changes
    return settings


STATIC = {"num_bits": 8, "dynamic": False}
REFUSED = {
    "another method": ({"quant_method": "fp8"}, "its weights are quantised"),
    "Marlin's order": (gptq_settings(checkpoint_format="marlin"), "as GPTQ's marlin"),
    "AWQ's gemv": ({"quant_method": "awq", "version": "gemv"}, "as AWQ's gemv"),
    "AWQ's 8 bits": ({"quant_method": "awq", "bits": 8}, "as AWQ's 8 bits"),
    "floats": (scheme(weights={"num_bits": 4, "type": "float"}), "numbers that are no integers"),
    "static inputs": (scheme(input_activations=STATIC), "inputs of stored scales"),
    "nvfp4": (compressed_settings("nvfp4-pack-quantized", 4), "its weights are quantised"),
    "rotations": (
        compressed_settings("pack-quantized", 4) | {"transform_config": {"config_groups": {}}},
        "a rotation of its layers",
    ),
}


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED)
def test_other_formats_are_not_read(settings, reason):
    found = find_format({"quantization_config": settings})
    assert isinstance(found, str)
    assert reason in found


def test_other_bits_and_groups_are_not_read():
    three = {"layer.weight": (8, 12), "layer.scales": (8, 4), "layer.biases": (8, 4)}
    config = {"quantization": {"group_size": 32, "bits": 3}}
    assert "numbers of 3 bits" in str(LowBitTensors.find(config, three))
    config = {"quantization": {"group_size": 16, "bits": 4}}
    short = {"layer.weight": (8, 16), "layer.scales": (8, 8), "layer.biases": (8, 8)}
    assert "groups of 16 numbers" in str(LowBitTensors.find(config, short))
    assert "MLX's mxfp4" in str(find_format({"quantization": {"bits": 4, "mode": "mxfp4"}}))
    assert find_format({"hidden_size": 8}) is None


def test_mlx_may_give_layers_settings_of_their_own():
    wide, narrow = (KINDS[f"MLX, {bits} bits"] for bits in (8, 4))
    rng = np.random.default_rng(2)
    layers = {"a": narrow.store(rng, ROWS, SIZE), "b": wide.store(rng, ROWS, SIZE)}
    stored = {f"{x}.{part}": y for x in layers for part, y in layers[x].tensors.items()}
    config = {"quantization": narrow.settings | {"b": wide.settings, "c": False}}
    found = LowBitTensors.find(config, {name: x.shape for name, x in stored.items()})
    assert isinstance(found, LowBitTensors)
    assert [found.label(x) for x in ("a", "b")] == ["MLX, 4 bits", "MLX, 8 bits"]
    for name, layer in layers.items():
        weight = found.read(name, stored, stored.__getitem__)
        np.testing.assert_array_equal(weight.dequantised(), layer.weight)
