"""GGUF files of a Llama: how they are converted or keep their bits, and what is refused."""

import errno
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from failures import failing
from gguf import GGML_QUANT_SIZES, ReaderTensor
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from gguf_files import HEADS, HIDDEN, KV_HEADS, USER_DEFINED, finish, scaling, write_gguf
from tokenizers import Tokenizer

from treeflash.errors import CheckpointError
from treeflash.hub import gguf as converter
from treeflash.hub import gguf_weights, models
from treeflash.hub.gguf import convert_gguf
from treeflash.hub.gguf_weights import _half_rotation_order, bfloat16_bits
from treeflash.low_bits import BLOCK_ROWS, GROUP, LowBitWeight, StoredWeight


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


def test_bfloat16_keeps_nan():
    payloads = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32)
    assert np.isnan(as_bfloat16(payloads.view(np.float32))).all()


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
        finish(part)
        with pytest.raises(CheckpointError, match=message):
            convert_gguf(tmp_path / "part.gguf", tmp_path)
    with (
        failing(converter, "GGUFReader", PermissionError(errno.EACCES, "Permission denied")),
        pytest.raises(CheckpointError, match=r"junk\.gguf cannot be read: Permission denied"),
    ):
        convert_gguf(tmp_path / "junk.gguf", tmp_path)


def with_factors(writer):
    """Factors of frequencies, and one for all of them."""
    scaling("linear")(writer)
    writer.add_tensor("rope_freqs.weight", np.ones(4, "f"))


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("a mixture of experts", {"add": lambda writer: writer.add_expert_count(8)}),
        ("rope.scaling.type = 'longrope'", {"add": scaling("longrope")}),
        ("rope.scaling.yarn_ext_factor = 0.5", {"add": scaling("yarn", yarn_ext_factor=0.5)}),
        ("rope.scaling.attn_factor = 1.25", {"add": scaling("linear", attn_factor=1.25)}),
        ("rope.scaling.attn_factor = 1.25", {"add": scaling("none", attn_factor=1.25)}),
        ("rope_freqs.weight beside a factor for all frequencies", {"add": with_factors}),
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


def test_a_weight_without_columns_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    contents, name = path.read_bytes(), b"blk.0.attn_q.weight"
    place = contents.index(name) + len(name) + 4  # behind the number of its dimensions
    path.write_bytes(contents[:place] + bytes(8) + contents[place + 8 :])
    with pytest.raises(CheckpointError, match=r"^tiny\.gguf"):
        convert_gguf(path, tmp_path, packed=True)


def test_weights_of_an_unknown_type_are_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    unknown = NotImplementedError("Dequantization for Q1_0 is not yet implemented")
    with (
        failing(gguf_weights, "dequantize", unknown),
        pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be converted: .* Q1_0 is not"),
    ):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)


def test_a_file_of_ollamas_store_needs_no_suffix(tmp_path):
    write_gguf(tmp_path / "sha256-0123")
    folder = models.resolve_target(str(tmp_path / "sha256-0123"))
    assert folder.name == "sha256-0123"
    assert (folder / "model.safetensors").stat().st_size > 0
    (tmp_path / "sha256-4567").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="is a file; pass a folder in the Hugging Face"):
        models.resolve_target(str(tmp_path / "sha256-4567"))


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


def assert_same_files(one: Path, other: Path) -> None:
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


def read_packed(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors that are not bfloat16."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = [x for x in file.keys() if file.get_slice(x).get_dtype() != "BF16"]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def unpack(module: str, stored: StoredWeight, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the weight of a module in float32, from the layout that `low_bits` describes."""
    (rows, size), kind = stored.shape, stored.format
    lines = tensors[f"{module}.numbers"].reshape(-1, size // GROUP, kind.lines, BLOCK_ROWS, 4)
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
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


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
    for name in ("plain", "packed"):
        (tmp_path / name).mkdir()
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / name, packed=name == "packed")
    assert_same_files(tmp_path / "plain", tmp_path / "packed")


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
