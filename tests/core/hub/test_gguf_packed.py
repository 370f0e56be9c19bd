"""GGUF files whose weights keep their bits: no value changes, and the folder says what it has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, ReaderTensor
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from gguf_files import HEADS, HIDDEN, KV_HEADS, write_gguf

from treeflash.hub import gguf_weights
from treeflash.hub.gguf import convert_gguf
from treeflash.hub.gguf_weights import _half_rotation_order
from treeflash.low_bits import BLOCK, GROUP, LowBitWeight, StoredWeight


def convert(path: Path, folder: Path, **options: bool) -> tuple[dict, dict[str, np.ndarray]]:
    """Convert a file; returns the configuration and the tensors, of packed folders."""
    folder.mkdir()
    convert_gguf(path, folder, **options)
    config = json.loads((folder / "config.json").read_text())
    if not options:
        return config, {}
    data = (folder / "model.safetensors").read_bytes()
    assert b'"BF16"' in data  # the norms, which NumPy cannot read
    return config, read_packed(folder / "model.safetensors")


def read_packed(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors that are not bfloat16."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = [x for x in file.keys() if file.get_slice(x).get_dtype() != "BF16"]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def unpack(module: str, stored: StoredWeight, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the weight of a module in float32, from the layout that `low_bits` describes."""
    (rows, size), kind = stored.shape, stored.format
    lines = tensors[f"{module}.numbers"].reshape(-1, size // GROUP, kind.lines, BLOCK, 4)
    if kind.bits < 8:
        lower, upper = lines[:, :, :4], lines[:, :, 4:]
        lines = np.stack([lower & 15, lower >> 4], 3)
        if width := kind.bits - 4:
            places = np.arange(0, 8, width, dtype=np.uint8)[:, None, None]
            fields = upper[:, :, :, None] >> places & (1 << width) - 1
            lines |= fields.reshape(lines.shape) << 4
    else:
        lines = lines[:, :, :, None]
    numbers = lines.transpose(0, 4, 1, 2, 3, 5).reshape(-1, size)[:rows]
    scales, least, factors = (
        None if x is None else x.transpose(0, 2, 1).reshape(-1, x.shape[1])[:rows]
        for x in (tensors.get(f"{module}.{part}") for part in ("scales", "least", "factors"))
    )
    return LowBitWeight(numbers, scales, least, kind.bits, factors).dequantised()


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_every_weight_is_the_one_of_the_file(kind, tmp_path):
    weights = write_gguf(tmp_path / "tiny.gguf", kind=lambda name: kind)
    config, tensors = convert(tmp_path / "tiny.gguf", tmp_path / "packed", packed=True)
    modules = StoredWeight.of(config["quantization_config"])
    assert {module.name for module in modules.values()} == {kind.name}
    assert len(modules) == 1 + 4 * 2  # the table, and four of each layer

    def expected(name: str, heads: int = 0) -> np.ndarray:
        return _half_rotation_order(weights[name], heads) if heads else weights[name]

    found = {name: unpack(name, stored, tensors) for name, stored in modules.items()}
    np.testing.assert_array_equal(found["model.embed_tokens"], weights["token_embd"])
    for layer in range(2):
        old, new = f"blk.{layer}", f"model.layers.{layer}"
        parts = expected(f"{old}.attn_q", HEADS), expected(f"{old}.attn_k", KV_HEADS)
        joined = np.concatenate([*parts, weights[f"{old}.attn_v"]])
        np.testing.assert_array_equal(found[f"{new}.self_attn.qkv_proj"], joined)
        joined = np.concatenate([weights[f"{old}.ffn_{x}"] for x in ("gate", "up")])
        np.testing.assert_array_equal(found[f"{new}.mlp.gate_up_proj"], joined)
        for a, b in (("attn_output", "self_attn.o_proj"), ("ffn_down", "mlp.down_proj")):
            np.testing.assert_array_equal(found[f"{new}.{b}"], weights[f"{old}.{a}"])


@pytest.mark.parametrize(
    "kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS], ids=lambda x: x.name
)
def test_every_weight_of_large_blocks_is_the_one_of_the_file(kind, tmp_path):
    """Their rows are longer than the ones of the tiny model."""
    rng, names = np.random.default_rng(0), ("gate_proj", "up_proj")
    shape, nbytes = (24, 2 * GGML_QUANT_SIZES[kind][0]), 2 * GGML_QUANT_SIZES[kind][1]
    tensors, expected = {}, []
    for name in names:
        data = rng.integers(0, 256, (64, nbytes), np.uint8)
        with np.errstate(invalid="ignore"):
            values = dequantize(data, kind)
        finite = np.isfinite(values).all(1).nonzero()[0][: shape[0]]
        expected.append(values[finite])
        field = np.array(shape[::-1])
        tensors[f"layers.0.mlp.{name}.weight"] = ReaderTensor(
            name, kind, field, int(field.prod()), data[finite].size, 0, data[finite], None
        )
    architecture = gguf_weights.Architecture(model_type="", name="")
    model = gguf_weights.Model(
        architecture=architecture, documents={"config.json": {}}, tensors=tensors, tokenizer=None
    )
    packed = gguf_weights.pack_model(model)
    gguf_weights.write_weights(packed, tmp_path / "file", lambda *_: None)
    ((module, stored),) = packed.modules.items()
    found = unpack(module, stored, read_packed(tmp_path / "file"))
    np.testing.assert_array_equal(found, np.concatenate(expected))


@pytest.mark.parametrize("numbers", [1, 48 * HIDDEN])
def test_parts_of_weights_are_the_same_file(tmp_path, monkeypatch, numbers):
    """A part may begin in one layer of a module and end in the next."""
    write_gguf(tmp_path / "tiny.gguf", kind=lambda name: Kind.Q4_1)
    convert(tmp_path / "tiny.gguf", tmp_path / "whole", packed=True)
    monkeypatch.setattr(gguf_weights, "SLICE_NUMBERS", numbers)
    convert(tmp_path / "tiny.gguf", tmp_path / "parts", packed=True)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


def test_layers_of_other_types_are_not_joined(tmp_path):
    kind = {"attn_v": Kind.Q5_1, "ffn_up": Kind.BF16}
    write_gguf(tmp_path / "tiny.gguf", kind=lambda x: kind.get(x.rpartition(".")[2], Kind.Q4_1))
    config, _ = convert(tmp_path / "tiny.gguf", tmp_path / "packed", packed=True)
    modules = StoredWeight.of(config["quantization_config"])
    own = {name.removeprefix("model.layers.0."): x.name for name, x in modules.items()}
    assert {x: own[x] for x in own if not x.startswith("model")} == {
        "self_attn.q_proj": "Q4_1",
        "self_attn.k_proj": "Q4_1",
        "self_attn.v_proj": "Q5_1",
        "self_attn.o_proj": "Q4_1",
        "mlp.gate_proj": "Q4_1",
        "mlp.down_proj": "Q4_1",
    }


def test_a_file_without_few_bits_is_converted_as_without_packing(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", kind=lambda name: Kind.BF16)
    for name, options in (("plain", {}), ("packed", {"packed": True})):
        (tmp_path / name).mkdir()
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / name, **options)
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "packed" / file.name).read_bytes()


def test_progress_ends_with_the_size_of_all_tensors(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    calls: list[tuple[int, int]] = []
    (tmp_path / "packed").mkdir()
    convert_gguf(
        tmp_path / "tiny.gguf", tmp_path / "packed", lambda *x: calls.append(x), packed=True
    )
    assert calls == sorted(calls)
    done, total = calls[-1]
    header = (tmp_path / "packed" / "model.safetensors").read_bytes()[:8]
    size = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert done == total == size - 8 - int.from_bytes(header, "little")
