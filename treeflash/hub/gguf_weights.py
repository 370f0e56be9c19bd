"""Write the weights of a GGUF file into a Hugging Face folder, one module after the other.

They become bfloat16, or keep their bits: `pack_model` says which modules do, and configuration and
file then have them as `treeflash.low_bits` packs them. Layers that read the same input become one
module if their formats agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from gguf import GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from tokenizers import Tokenizer

from treeflash.drafters.folder import write_stored
from treeflash.low_bits import BLOCK_ROWS, METHOD, LowBitWeight, StoredWeight, join, low_bits

Progress = Callable[[int, int], None]
"""Called with two numbers of bytes: the weights written so far, and all weights."""
Fields: TypeAlias = Mapping[str, Any]
"""A file's settings; the ones of its architecture without the architecture's name before them."""
Tensors: TypeAlias = Mapping[str, ReaderTensor]
"""A file's tensors by name."""
Entry: TypeAlias = tuple[str, list[int], int]
"""A tensor's type in safetensors, shape and number of bytes."""

JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Modules of a layer that several layers with the same input become."""
SLICE_NUMBERS = 1 << 24
"""Numbers of a weight that are converted at once: conversion takes seven bytes for each."""
INPUT_TABLE = "model.embed_tokens"
SAFETENSORS = {"uint8": ("U8", 1), "int8": ("I8", 1), "float16": ("F16", 2), "float32": ("F32", 4)}
"""Types, and bytes of a number, by NumPy's names."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How the files of a kind of model differ from others."""

    model_type: str  # the name of the kind in `config.json`
    name: str  # the class of transformers
    # This makes the settings of `config.json` that other kinds lack.
    settings: Callable[[Fields, Tensors], dict[str, Any]] = lambda fields, tensors: {}
    # Tensors have these names instead of the ones in `LAYER_NAMES` and `TOP_LEVEL_NAMES`.
    names: Mapping[str, str] = field(default_factory=dict)
    biases: bool = False  # whether matrices may have biases
    pairs_rows: bool = False  # whether neighbouring rows of queries and keys are rotary pairs
    norm_offset: float = 0.0  # what is added to the norms' weights in the file
    # Whether the model multiplies rows of its input table by a factor.
    scales_embeddings: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a file holds, under the names of Hugging Face folders."""

    architecture: Architecture  # what llama.cpp's converter does to the weights
    documents: Mapping[str, Mapping[str, Any]]  # in JSON, by the names of their files
    tensors: Tensors  # tensors by name in the folder
    tokenizer: Tokenizer | None  # None for a drafter, which has its target's
    # The modules that keep the bits of their weights, by name in the folder.
    modules: Mapping[str, StoredWeight] = field(default_factory=dict)


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the bits of bfloat16, to nearest and ties to even; NaN stays NaN."""
    bits: NDArray[np.uint16] = quantize(values, GGMLQuantizationType.BF16).view(np.uint16)
    return bits


def pack_model(model: Model) -> Model:
    """Return a model whose matrices keep their bits, where their types are known."""
    found = {}
    for name, tensor in model.tensors.items():
        layer = name.removesuffix(".weight")
        is_scaled = layer == INPUT_TABLE and model.architecture.scales_embeddings
        if layer != name and len(tensor.shape) == 2 and not is_scaled:
            shape = int(tensor.shape[1]), int(tensor.shape[0])
            sample = tensor.data[:1], tensor.tensor_type, (1, shape[1])
            if (weight := low_bits(*sample)) is not None:
                found[layer] = StoredWeight(
                    name=tensor.tensor_type.name,
                    format=weight.format,
                    shape=shape,
                    bias=f"{layer}.bias" in model.tensors,
                )
    modules = {}
    for layer, stored in found.items():
        name, parts = _joined(layer, found)
        if not parts:
            modules[layer] = stored
        elif name not in modules:
            rows = {part.rpartition(".")[2]: found[part].shape[0] for part in parts}
            shape = sum(rows.values()), stored.shape[1]
            modules[name] = replace(stored, shape=shape, parts=rows)
    if not modules:
        return model
    settings = {"quant_method": METHOD, "modules": {x: y.document() for x, y in modules.items()}}
    config = {**model.documents["config.json"], "quantization_config": settings}
    documents = {**model.documents, "config.json": config}
    return replace(model, modules=modules, documents=documents)


def _joined(layer: str, found: Mapping[str, StoredWeight]) -> tuple[str, list[str]]:
    """Return the module that a layer is part of, and all its parts; no parts if it is alone."""
    for name, parts in JOINED.items():
        for part in parts:
            if layer.endswith(f".{part}"):
                start = layer.removesuffix(part)
                layers = [f"{start}{x}" for x in parts]
                known = {(x.name, x.format, x.bias) for x in map(found.get, layers) if x}
                if all(x in found for x in layers) and len(known) == 1:
                    return f"{start}{name}", layers
    return layer, []


def write_weights(model: Model, path: Path, progress: Progress) -> None:
    """Write a model's tensors to a safetensors file."""
    layers = [x for module in model.modules.items() for x in _layers(*module)]
    packed = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    rest = [name for name in model.tensors if name not in packed]
    entries = {name: _entry(name, model.tensors[name]) for name in rest}
    for name, module in model.modules.items():
        entries |= _packed_entries(name, module)
    total = sum(nbytes for _, _, nbytes in entries.values())

    def data() -> Iterator[bytes]:
        for name in rest:
            yield _plain(model, name)
        for name, module in model.modules.items():
            yield from _packed(model, name, module)

    def counted(done: int = 0) -> Iterator[bytes]:
        for part in data():
            yield part
            done += len(part)
            progress(done, total)

    write_stored(path, entries, counted())


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape[::-1])


def _layers(name: str, module: StoredWeight) -> list[str]:
    """Return the names of the layers that are a module."""
    parent = name.rpartition(".")[0]
    return [f"{parent}.{part}" for part in module.parts] or [name]


def _packed_entries(name: str, module: StoredWeight) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for part, (dtype, shape) in module.tensors.items():
        kind, width = SAFETENSORS[dtype]
        found[f"{name}.{part}"] = kind, list(shape), width * int(np.prod(shape, dtype=np.int64))
    if module.bias:
        found[f"{name}.bias"] = "BF16", [module.shape[0]], 2 * module.shape[0]
    return found


def _packed(model: Model, name: str, module: StoredWeight) -> Iterator[bytes]:
    """Yield the tensors of a module in the order of its entries, numbers part by part."""
    layers = _layers(name, module)
    others: list[list[bytes]] = []
    for weight in _slices(model, layers, module.shape):
        numbers, *rest = (x.tobytes() for x in weight.pack().values())
        yield numbers
        others.append(rest)
    yield from (b"".join(parts) for parts in zip(*others, strict=True))
    if module.bias:
        yield b"".join(_plain(model, f"{layer}.bias") for layer in layers)


def _slices(model: Model, layers: list[str], shape: tuple[int, int]) -> Iterator[LowBitWeight]:
    """Yield the weight of a module, a few rows after the other, which are whole blocks."""
    rows, size = shape
    step = max(1, SLICE_NUMBERS // (size * BLOCK_ROWS)) * BLOCK_ROWS
    for first in range(0, rows, step):
        parts, start = [], 0
        for layer in layers:
            count = _shape(model.tensors[f"{layer}.weight"])[0]
            own = slice(max(0, first - start), max(0, first + step - start))
            if own.start < count and own.stop:
                parts.append(_low_bits(model, f"{layer}.weight", own))
            start += count
        weight = join(parts)
        assert weight is not None
        yield weight


def _low_bits(model: Model, name: str, rows: slice) -> LowBitWeight:
    """Read some rows of a tensor, in the order of transformers."""
    tensor = model.tensors[name]
    count, size = _shape(tensor)
    places = _model_order(model, name, np.arange(count))[rows]
    weight = low_bits(tensor.data[places], tensor.tensor_type, (len(places), size))
    assert weight is not None
    return weight


def _model_order(model: Model, name: str, rows: NDArray[Any]) -> NDArray[Any]:
    """Return a tensor's rows in the order of transformers."""
    module, config = name.split(".")[-2], model.documents["config.json"]
    if not model.architecture.pairs_rows or module not in ("q_proj", "k_proj"):
        return rows
    heads = "num_attention_heads" if module == "q_proj" else "num_key_value_heads"
    return _half_rotation_order(rows, config[heads])


def _entry(name: str, tensor: ReaderTensor) -> Entry:
    """Return a tensor's type, shape and number of bytes in the folder.

    A short convolution has a group per channel there.
    """
    shape = list(_shape(tensor))
    if name.endswith(".conv.conv.weight"):
        shape = [shape[0], 1, shape[1]]
    dtype, width = ("I64", 8) if name == "d2t" else ("BF16", 2)
    return dtype, shape, width * int(tensor.n_elements)


def _plain(model: Model, name: str) -> bytes:
    """Return the data of a tensor in bfloat16; `d2t` has integers."""
    tensor = model.tensors[name]
    if name == "d2t":  # in the folder they are differences
        ids = np.asarray(tensor.data, np.int64).ravel()
        return (ids - np.arange(len(ids))).astype("<i8").tobytes()
    weight = _model_order(model, name, dequantize(tensor.data, tensor.tensor_type))
    if name.split(".")[-2].endswith("norm"):
        weight = weight - np.float32(model.architecture.norm_offset)
    return bfloat16_bits(weight).astype("<u2").tobytes()


def _half_rotation_order(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder the rows of a query or key matrix, (heads * head_dim, hidden_size), or its bias.

    In the file the rows (2i, 2i + 1) of a head are rotated as a pair, in transformers row i of the
    first half and row i of the second half.
    """
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
