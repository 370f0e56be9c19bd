"""Linear layers as GPTQ, AWQ, compressed-tensors and MLX store them, and the weights they mean.

Numbers are put into words one by one, and weights are computed from the numbers that were drawn, so
that nothing here is shared with `treeflash.low_bit_formats`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treeflash.drafters.folder import read_config, read_tensors
from treeflash.testing.models import save

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Layer(NamedTuple):
    tensors: dict[str, NDArray[Any]]
    weight: NDArray[np.float32]  # (rows, size), as the format defines it


@dataclass(frozen=True)
class Kind:
    settings: dict[str, Any]  # of `quantization_config`
    store: Callable[[np.random.Generator, int, int], Layer]
    table: bool = False  # whether the input table is stored so, too


def to_words(numbers: NDArray[Any], bits: int, order: tuple[int, ...] = ()) -> NDArray[np.int32]:
    """Pack (n, m) numbers along rows; `order` are the columns of a word, the lowest bits first."""
    count = 32 // bits
    words = np.zeros((len(numbers), numbers.shape[1] // count), np.uint32)
    for (row, word), _ in np.ndenumerate(words):
        for place, column in enumerate(order or range(count)):
            number = int(numbers[row, word * count + column])
            words[row, word] |= np.uint32(number << bits * place)
    return words.view(np.int32)


def float16(rng: np.random.Generator, bits: int, *shape: int) -> NDArray[np.float16]:
    """Scales with which weights are of the size that a target has."""
    return (rng.uniform(0.2, 0.5, shape) / (1 << bits)).astype(np.float16)


def bfloat16(rng: np.random.Generator, bits: int, *shape: int) -> NDArray[np.float32]:
    """Scales of bfloat16 in float32; some are too small for float16."""
    scales = (rng.uniform(0.2, 0.5, shape) / (1 << bits)).astype(np.float32)
    scales[0] *= np.float32(2.0**-30)
    return (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)


def dequantised(numbers, zeros, scales, group_of) -> NDArray[np.float32]:
    """The formula of all formats but MLX, for a group of each column."""
    differences = numbers.astype(np.float32) - zeros.astype(np.float32)[:, group_of]
    return differences * scales.astype(np.float32)[:, group_of]


def gptq(rng, rows, size, *, bits, group, act_order=False, symmetric=True, version=1) -> Layer:
    groups = 1 if group == -1 else size // group
    numbers = rng.integers(0, 1 << bits, (rows, size))
    zeros = np.full((rows, groups), 1 << bits - 1)
    if not symmetric:
        zeros = rng.integers(1, 1 << bits, (rows, groups))
    scales = float16(rng, bits, rows, groups)
    group_of = np.arange(size) // (size // groups)
    if act_order:
        group_of = rng.permutation(group_of)
    tensors = {
        "qweight": np.ascontiguousarray(to_words(numbers, bits).T),
        "qzeros": to_words(zeros.T - (version == 1), bits),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": group_of.astype(np.int32),
    }
    return Layer(tensors, dequantised(numbers, zeros, scales, group_of))


def awq(rng, rows, size, *, group) -> Layer:
    numbers = rng.integers(0, 16, (rows, size))
    zeros = rng.integers(0, 16, (rows, size // group))
    scales = float16(rng, 4, rows, size // group)
    tensors = {
        "qweight": to_words(numbers.T, 4, AWQ_ORDER),
        "qzeros": to_words(zeros.T, 4, AWQ_ORDER),
        "scales": np.ascontiguousarray(scales.T),
    }
    return Layer(tensors, dequantised(numbers, zeros, scales, np.arange(size) // group))


def compressed(rng, rows, size, *, bits, group, symmetric=True, act_order=False) -> Layer:
    groups = size // group if group else 1
    half = 1 << bits - 1
    numbers = rng.integers(0, 1 << bits, (rows, size)) - half
    zeros = np.zeros((rows, groups), int)
    scales = bfloat16(rng, bits, rows, groups)
    group_of = np.arange(size) // (size // groups)
    if act_order:
        group_of = rng.permutation(group_of)
    tensors = {
        "weight_packed": to_words(numbers + half, bits),
        "weight_scale": scales,
        "weight_shape": np.array([rows, size]),
    }
    if not symmetric:
        zeros = rng.integers(-half, half, (rows, groups))
        tensors["weight_zero_point"] = np.ascontiguousarray(to_words((zeros + half).T, bits).T)
    if act_order:
        tensors["weight_g_idx"] = group_of.astype(np.int32)
    return Layer(tensors, dequantised(numbers, zeros, scales, group_of))


def w8a8(rng, rows, size) -> Layer:
    numbers = rng.integers(-128, 128, (rows, size))
    scales = bfloat16(rng, 8, rows, 1)
    tensors = {"weight": numbers.astype(np.int8), "weight_scale": scales}
    return Layer(tensors, numbers.astype(np.float32) * scales)


def mlx(rng, rows, size, *, bits, group, dtype=np.float16) -> Layer:
    numbers = rng.integers(0, 1 << bits, (rows, size))
    scales = float16(rng, bits, rows, size // group).astype(dtype)
    biases = rng.uniform(-0.2, 0, scales.shape).astype(dtype)
    tensors = {
        "weight": to_words(numbers, bits).view(np.uint32),
        "scales": scales,
        "biases": biases,
    }
    group_of = np.arange(size) // group
    weight = numbers.astype(np.float32) * scales.astype(np.float32)[:, group_of]
    return Layer(tensors, weight + biases.astype(np.float32)[:, group_of])


def gptq_settings(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", "sym": True} | settings


def compressed_settings(kind: str, bits: int, **scheme: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None} | scheme
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


AWQ_SETTINGS = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
PACKED = "pack-quantized"
DYNAMIC = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
KINDS = {
    "GPTQ": Kind(gptq_settings(), partial(gptq, bits=4, group=32)),
    "GPTQ, 8 bits": Kind(gptq_settings(bits=8), partial(gptq, bits=8, group=64)),
    "GPTQ, whole rows": Kind(gptq_settings(), partial(gptq, bits=4, group=-1)),
    "GPTQ, act-order": Kind(
        gptq_settings(desc_act=True), partial(gptq, bits=4, group=32, act_order=True)
    ),
    "GPTQ, version 2": Kind(
        gptq_settings(checkpoint_format="gptq_v2"),
        partial(gptq, bits=4, group=32, symmetric=False, version=2),
    ),
    "GPTQ, zeros": Kind(gptq_settings(sym=False), partial(gptq, bits=4, group=64, symmetric=False)),
    "AWQ": Kind(AWQ_SETTINGS, partial(awq, group=32)),
    "W4A16": Kind(compressed_settings(PACKED, 4), partial(compressed, bits=4, group=32)),
    "W4A16, zeros": Kind(
        compressed_settings(PACKED, 4), partial(compressed, bits=4, group=64, symmetric=False)
    ),
    "W4A16, act-order": Kind(
        compressed_settings(PACKED, 4), partial(compressed, bits=4, group=32, act_order=True)
    ),
    "W8A16": Kind(compressed_settings(PACKED, 8), partial(compressed, bits=8, group=0)),
    "W8A8": Kind(compressed_settings("int-quantized", 8, input_activations=DYNAMIC), w8a8),
    "MLX, 4 bits": Kind({"group_size": 32, "bits": 4}, partial(mlx, bits=4, group=32), table=True),
    "MLX, 8 bits": Kind(
        {"group_size": 64, "bits": 8, "mode": "affine"},
        partial(mlx, bits=8, group=64, dtype=np.float32),
        table=True,
    ),
}


def configuration(kind: Kind) -> dict[str, Any]:
    """What such a checkpoint's `config.json` has."""
    if "quant_method" in kind.settings:
        return {"quantization_config": kind.settings}
    return {"quantization": kind.settings, "quantization_config": kind.settings}


def write_low_bits(
    folder: Path, original: Path, kind: Kind, convert: Callable[..., Any] = save
) -> None:
    """Give a target's linear layers random weights in a format, and `original` their values."""
    rng, plain = np.random.default_rng(0), read_tensors(original)
    stored: dict[str, NDArray[Any]] = {}
    for name, weight in list(plain.items()):
        layer = name.removesuffix(".weight")
        is_linear = layer.endswith("_proj") or (kind.table and "embed" in layer)
        if layer == name or not is_linear:
            stored[name] = weight
            continue
        own = kind.store(rng, *weight.shape)
        stored |= {f"{layer}.{part}": x for part, x in own.tensors.items()}
        plain[name] = own.weight
    config = read_config(original)
    save(original, config, plain)
    convert(folder, config | configuration(kind), stored)
