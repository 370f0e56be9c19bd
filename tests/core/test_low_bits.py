"""Weights of few bits: types of GGUF, formats of other libraries, and the order of packed ones."""

import re
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from low_bit_checkpoints import KINDS, compressed_settings, configuration, gptq_settings

from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.low_bit_formats import LowBitTensors, find_format
from treeflash.low_bits import (
    GROUP,
    METHOD,
    TYPES,
    LowBitFormat,
    LowBitWeight,
    StoredWeight,
    join,
    low_bits,
    round_weight,
)

ROWS = 3


def finite(data: np.ndarray, kind) -> np.ndarray:
    """Whether the scales of each row are finite."""
    with np.errstate(invalid="ignore"):
        return np.isfinite(dequantize(data, kind)).all(1)


def stored_blocks(kind, blocks: int) -> st.SearchStrategy[np.ndarray]:
    """Any bytes of rows of a type, except scales that are not finite."""
    _, nbytes = GGML_QUANT_SIZES[kind]
    rows = arrays(np.uint8, (ROWS, blocks * nbytes))
    return rows.filter(lambda data: bool(finite(data, kind).all()))


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@given(data=st.data())
def test_numbers_have_the_values_that_gguf_dequantises(kind, data):
    stored = data.draw(stored_blocks(kind, blocks=2))
    expected = dequantize(stored, kind)
    weight = low_bits(stored, kind, expected.shape)
    assert weight.numbers.max() < 1 << weight.bits
    np.testing.assert_array_equal(weight.dequantised().view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_random_weights_of_every_type(kind):
    """Random bytes reach every bit of a number, which few examples of a strategy do."""
    _, nbytes = GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, (64, 2 * nbytes), np.uint8)
    stored = stored[finite(stored, kind)]
    assert len(stored) > 16
    expected = dequantize(stored, kind)
    actual = low_bits(stored, kind, expected.shape).dequantised()
    np.testing.assert_array_equal(actual.view("u4"), expected.view("u4"))


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("rows", [16, 21])
def test_packed_numbers_lie_by_block_group_and_line(bits, rows):
    rng, size = np.random.default_rng(rows), 3 * GROUP
    numbers = rng.integers(0, 1 << bits, (rows, size), np.uint8)
    scales, least = rng.standard_normal((2, rows, 3)).astype(np.float16)
    packed = LowBitWeight(numbers, scales, least, bits).pack()
    assert packed["numbers"].shape == (-(-rows // 16), 3, bits, 64)
    for row in range(rows):
        block, column = divmod(row, 16)
        for place in range(size):
            group, rest = divmod(place, GROUP)
            line, byte = divmod(rest, 4)
            lines = packed["numbers"][block, group, :, 4 * column + byte]
            stored = lines[line] if bits == 8 else lines[line // 2] >> line % 2 * 4 & 15
            if bits == 5:
                stored |= (lines[4] >> line & 1) << 4
            if bits == 6:
                stored |= (lines[4 + line // 4] >> line % 4 * 2 & 3) << 4
            assert stored == numbers[row, place]
        np.testing.assert_array_equal(packed["scales"][block, :, column], scales[row])
        np.testing.assert_array_equal(packed["least"][block, :, column], least[row])
    assert not packed["scales"][-1, :, (rows - 1) % 16 + 1 :].any()


BITS = {
    **{Kind.Q4_0: 4.5, Kind.Q4_1: 5, Kind.Q4_K: 4.625, Kind.Q5_0: 5.5, Kind.Q5_1: 6},
    **{Kind.Q5_K: 5.625, Kind.Q6_K: 6.5625, Kind.Q8_0: 8.5, Kind.IQ4_NL: 8.5},
    **{Kind.IQ4_XS: 8.3125},
}
"""Bits of a weight in memory."""


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_packed_weights_take_few_bits(kind):
    """Of whole blocks and the factors that they share; `StoredWeight` says so without a weight."""
    data = np.zeros((32, 2 * GGML_QUANT_SIZES[kind][1]), np.uint8)
    shape = len(data), 2 * GGML_QUANT_SIZES[kind][0]
    weight = low_bits(data, kind, shape)
    packed = weight.pack()
    assert sum(x.nbytes for x in packed.values()) * 8 == BITS[kind] * shape[0] * shape[1]
    tensors = StoredWeight(name="", format=weight.format, shape=shape).tensors
    assert tensors == {name: (x.dtype.name, x.shape) for name, x in packed.items()}


def test_weights_of_one_format_are_joined():
    rng = np.random.default_rng(0)
    first, second = (
        round_weight(rng.standard_normal((n, 64), dtype=np.float32), 4) for n in (4, 2)
    )
    other = round_weight(rng.standard_normal((4, 64), dtype=np.float32), 8)
    both = join([first, second])
    np.testing.assert_array_equal(
        both.dequantised(), np.concatenate([first.dequantised(), second.dequantised()])
    )
    assert join([first, other]) is None


@pytest.mark.parametrize(("bits", "steps"), [(4, 15), (8, 254)])
def test_rounding_errs_by_half_a_step_at_most(bits, steps):
    weight = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    error = np.abs(round_weight(weight, bits).dequantised() - weight).reshape(8, -1, GROUP)
    groups = weight.reshape(8, -1, GROUP)
    span = np.ptp(groups, axis=2) if bits == 4 else 2 * np.abs(groups).max(2)
    assert (error.max(2) <= span / steps * 0.55).all()


def test_weights_that_another_version_packed_are_refused_in_one_line():
    kind = LowBitFormat(4, 1, False, "float16")
    module = StoredWeight(name="Q4_0", format=kind, shape=(16, 32)).document()
    module["format"]["wide"] = True
    settings = {"quant_method": METHOD, "modules": {"lm_head": module}}
    with pytest.raises(CheckpointError, match="packed by another version of treeflash"):
        StoredWeight.of(settings)


HEIGHT, SIZE = 24, 128


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
    layer = kind.store(np.random.default_rng(1), HEIGHT, SIZE)
    weight = read(configuration(kind), layer.tensors)
    np.testing.assert_array_equal(weight.dequantised().view("u4"), layer.weight.view("u4"))
    assert weight.numbers.max() < 1 << weight.bits
    # The zeros of whole rows are one number; all others were drawn.
    assert len(np.unique(layer.weight)) > SIZE


def test_scales_take_two_bytes_where_that_changes_none():
    def is_wide(name: str) -> bool:
        kind = KINDS[name]
        layer = kind.store(np.random.default_rng(1), HEIGHT, SIZE)
        return read(configuration(kind), layer.tensors).format.scale_dtype == "float32"

    assert not is_wide("GPTQ")
    assert is_wide("GPTQ, zeros")  # scale times zero
    assert not is_wide("MLX, 4 bits")
    assert is_wide("W4A16")  # a row of tiny scales


def test_layers_with_other_orders_of_inputs_are_not_joined():
    kind, rng = KINDS["GPTQ, act-order"], np.random.default_rng(1)
    layers = [kind.store(rng, HEIGHT, SIZE) for _ in range(2)]
    first, second = (read(configuration(kind), layer.tensors) for layer in layers)
    assert join([first, second]) is None
    both = join([first, first])
    np.testing.assert_array_equal(both.dequantised(), np.concatenate([layers[0].weight] * 2))
    assert first.order is not None


def test_groups_of_different_sizes_are_refused():
    kind = KINDS["GPTQ, act-order"]
    layer = kind.store(np.random.default_rng(1), HEIGHT, SIZE)
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


@pytest.mark.parametrize(
    "settings",
    [
        compressed_settings("pack-quantized", 4) | {"config_groups": None},
        compressed_settings("pack-quantized", 4) | {"config_groups": {"group_0": {}}},
        scheme(weights=["int"]),
        scheme(weights={"num_bits": 0}),
        scheme(input_activations=8),
        ["gptq"],
    ],
)
def test_settings_that_are_malformed_are_left_to_the_library(settings):
    """It refuses them in its own words."""
    parts = ("weight_packed", "weight_scale", "weight_shape")
    shapes = dict.fromkeys([f"layer.{part}" for part in parts], (8, 4))
    found = LowBitTensors.find({"quantization_config": settings}, shapes)
    assert isinstance(found, str)
    assert re.search("(of its quantised weights is|of its tensors are) not valid$", found)


def test_mlx_may_give_layers_settings_of_their_own():
    wide, narrow = (KINDS[f"MLX, {bits} bits"] for bits in (8, 4))
    rng = np.random.default_rng(2)
    layers = {"a": narrow.store(rng, HEIGHT, SIZE), "b": wide.store(rng, HEIGHT, SIZE)}
    stored = {f"{x}.{part}": y for x in layers for part, y in layers[x].tensors.items()}
    config = {"quantization": narrow.settings | {"b": wide.settings, "c": False}}
    found = LowBitTensors.find(config, {name: x.shape for name, x in stored.items()})
    assert isinstance(found, LowBitTensors)
    assert [found.label(x) for x in ("a", "b")] == ["MLX, 4 bits", "MLX, 8 bits"]
    for name, layer in layers.items():
        weight = found.read(name, stored, stored.__getitem__)
        np.testing.assert_array_equal(weight.dequantised(), layer.weight)
