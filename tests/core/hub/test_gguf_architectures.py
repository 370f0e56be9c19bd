"""GGUF files of every architecture, written from random models as llama.cpp's converter does."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from failures import failing
from gguf_files import finish, scaling, write_gguf
from tokenizers.pre_tokenizers import ByteLevel

from treeflash.commands import models as models_command
from treeflash.errors import CheckpointError
from treeflash.hub import cached, models
from treeflash.hub import gguf as converter
from treeflash.hub.gguf import ARCHITECTURES, convert_gguf
from treeflash.registry import loader
from treeflash.testing.comparisons import generate
from treeflash.testing.models import INWARD
from treeflash.text.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
import transformers

LAYERS, PROMPT = 7, [3, 9, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<｜User｜>", "<end_of_turn>"]
CASES = json.loads((Path(__file__).parent / "gguf_models.json").read_text("utf-8"))
"""The architecture of each file, and the configuration of the model in it."""
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SHAPE |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False}


def random_model(name: str, vocab_size: int) -> Any:
    """A random model of transformers whose weights are exact in bfloat16."""
    settings = SHAPE | CASES[name] | {"vocab_size": vocab_size}
    del settings["architecture"]
    config = transformers.AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        noise = INWARD * torch.randn_like(parameter)
        parameter.data = (parameter.data + noise).bfloat16().float()
    return model.eval()


def write(
    path: Path,
    name: str,
    kind: gguf.GGMLQuantizationType | None = None,
    *,
    pre: str | None = None,
    space: bool = True,
    part: int = 0,
) -> Any:
    """Write a random model as llama.cpp's converter does; returns the model.

    Matrices are quantised if a kind is given, and the model then has the rounded weights. A Llama's
    would be in the file's order. `pre` names another pre-tokenizer, `space` is whether a space
    comes before the first word, and `part` is the number of tensors in each part of a model in
    parts.
    """
    architecture = CASES[name]["architecture"]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=part)
    vocab_size = write_tokenizer(writer, name, pre, space=space)
    model = random_model(name, vocab_size)
    config = model.config
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "qwen2":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    if name == "mistral":  # as in old files
        writer.add_float32("llama.rope.scale_linear", full["factor"])
    else:
        writer.add_rope_freq_base(full["rope_theta"])
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", getattr(config, "norm_eps", 0)))
    kv_heads: Any = config.num_key_value_heads
    if architecture == "lfm2":
        kv_heads = [kv_heads if x == "full_attention" else 0 for x in config.layer_types]
        writer.add_shortconv_l_cache(config.conv_L_cache)
    writer.add_head_count_kv(kv_heads)
    if (head_dim := getattr(config, "head_dim", None)) is not None:
        writer.add_key_length(head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if full["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    if full["rope_type"] == "llama3":
        plain = full["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
        factors = plain / model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    names = gguf.get_tensor_name_map(ARCHS[architecture], LAYERS)
    state = model.state_dict()
    for stored, tensor in state.items():
        if stored == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, suffix = stored.rpartition(".")
        values = tensor.numpy().copy()
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_proj" in module else kv_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2)
            values = np.ascontiguousarray(values).reshape(tensor.shape)
        if architecture == "gemma3" and module.endswith("norm"):
            values += 1
        if values.ndim == 3:
            values = values[:, 0]
        raw = None
        if kind is not None and values.ndim == 2 and "conv" not in module:
            packed = gguf.quants.quantize(values, kind)
            raw, rounded = kind, gguf.quants.dequantize(packed, kind)
            values = packed
            tensor.copy_(torch.from_numpy(rounded).bfloat16())
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", values, raw_dtype=raw)
    finish(writer)
    return model


ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
PRE_TOKENIZERS = {"llama": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2", "lfm2": "lfm2"}


def write_tokenizer(writer: gguf.GGUFWriter, name: str, pre: str | None, *, space: bool) -> int:
    """Write a small tokenizer of the family; returns the number of tokens."""
    kinds = [3] * len(SPECIAL)
    if name in ("gemma3", "mistral"):
        pieces = [chr(c) for c in range(97, 123)] + ["\u2581", "th", "\u2581th", "  "]
        pieces += ["bc", "abc", "bcd"]
        tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
        kinds += [6] * 256 + [1] * len(pieces)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        if name == "gemma3":
            writer.add_token_scores([-float(n) for n in range(len(tokens))])
            writer.add_add_space_prefix(False)
        else:  # as from a tokenizer.json
            writer.add_token_scores([-1000.0] * len(tokens))
            if not space:  # the default is to have one
                writer.add_add_space_prefix(False)
    else:
        merges = ["Ġ t", "h e", "Ġt he", "1 2", "12 3", "Ã ©"]
        alphabet = sorted(ByteLevel.alphabet())
        tokens = [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in merges), "Ġwhole"]
        kinds += [1] * (len(tokens) - len(kinds))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or PRE_TOKENIZERS[CASES[name]["architecture"]])
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    if name in ("qwen2", "qwen3"):  # in the others it is the default
        writer.add_add_bos_token(name == "qwen2")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    writer.add_chat_template(
        [{"name": "default", "template": template}, {"name": "tool_use", "template": "{{ tools }}"}]
        if name == "mistral"
        else template
    )
    return len(tokens)


def weights_of(folder):
    """The weights that transformers reads from a folder, and the model with them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.state_dict(), model


@pytest.mark.parametrize("name", CASES)
def test_a_converted_model_is_the_written_one(name, tmp_path):
    model = write(tmp_path / "tiny.gguf", name)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    found, loaded = weights_of(tmp_path)
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for tensor, values in found.items():
        tolerance = 0.01 if "norm" in tensor else 0  # the file's norms are rounded with their 1
        torch.testing.assert_close(values, expected[tensor], atol=tolerance, rtol=0)
    loaded.load_state_dict(expected)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("more", "kinds"),
    [
        ({}, "fffffffffffff"),
        ({"attention.sliding_window": 8}, "sssssfsssssfs"),
        ({"attention.sliding_window": 8, "attention.sliding_window_pattern": 3}, "ssfssfssfssfs"),
    ],
    ids=["none", "as in most files", "pattern"],
)
def test_windows_of_gemma3(more, kinds):
    sizes = {"attention.head_count": 2, "attention.key_length": 32, "embedding_length": 64}
    fields = {**sizes, "block_count": 13, "context_length": 99, "final_logit_softcapping": 30.0}
    settings = ARCHITECTURES["gemma3"].settings(fields | more, {})
    assert "".join(kind[0] for kind in settings["layer_types"]) == kinds
    assert settings["sliding_window"] == (8 if more else 99)
    assert settings["final_logit_softcapping"] == 30
    transformers.Gemma3TextConfig(**settings, num_hidden_layers=13)


def test_a_factor_of_no_scaling_stretches_nothing(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", add=scaling("none"))
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}


def test_a_model_in_parts_is_one_model(tmp_path):
    model = write(tmp_path / "tiny-BF16.gguf", "qwen3", part=30)
    files = sorted(tmp_path.glob("*.gguf"))
    assert [file.name for file in files] == [f"tiny-BF16-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    folder = models.resolve_target(str(tmp_path))
    assert folder.name == "tiny-BF16"
    assert {models.resolve_target(str(file)) for file in files} == {folder}
    for tensor, values in weights_of(folder)[0].items():
        torch.testing.assert_close(values, model.state_dict()[tensor], atol=0.01, rtol=0)
    files[1].rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"is one of 3 parts of a model.*llama-gguf-split"):
        models.resolve_target(str(tmp_path / "other.gguf"))
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf is missing, which is a part"):
        models.resolve_target(str(files[0]))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_read(kind, tmp_path):
    model = write(tmp_path / "tiny.gguf", "qwen3", gguf.GGMLQuantizationType[kind])
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    for tensor, values in weights_of(tmp_path)[0].items():
        torch.testing.assert_close(values, model.state_dict()[tensor], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "text", "tokens"),
    [
        ("llama", " the 123\n4", ["<bos>", "Ġthe", "Ġ", "123", "Ċ", "4"]),
        ("llama", " whole<｜User｜> the", ["<bos>", "Ġwhole", "<｜User｜>", "Ġthe"]),
        ("qwen2", " the 123<eos>", ["<bos>", "Ġthe", "Ġ", "1", "2", "3", "<eos>"]),
        ("qwen3", " the 12", ["Ġthe", "Ġ", "1", "2"]),
        ("qwen3", "e\u0301", ["Ã©"]),
        ("gemma3", "a th\u00e9", ["<bos>", "a", "\u2581th", "<0xC3>", "<0xA9>"]),
        ("lfm2", " the 123", ["<bos>", "Ġthe", "Ġ", "123"]),
        ("mistral", "th<eos>th", ["<bos>", "\u2581th", "<eos>", "\u2581th"]),
        ("mistral", "abcd", ["<bos>", "\u2581", "abc", "d"]),
    ],
)
def test_tokenizers(name, text, tokens, tmp_path):
    write(tmp_path / "tiny.gguf", name)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    plain = tokenizer.transformers
    assert plain.convert_ids_to_tokens(tokenizer.encode(text)) == tokens
    assert plain.decode(plain(" the 12").input_ids, skip_special_tokens=True) == " the 12"
    assert plain.eos_token == "<eos>"
    assert tokenizer.stop_token_ids == {SPECIAL.index("<eos>"), SPECIAL.index("<end_of_turn>")}
    assert tokenizer.knows_tools == (name == "mistral")
    assert tokenizer.render([{"role": "user", "content": "Hi"}]) == "Hi"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("default", "it's 12345, a+b  c", ["it", "'", "s", "Ġ", "123", "45", ",", "Ġa", "+"]),
        ("seed-coder", "I'LL see 12!\n\n x", ["I", "'LL", "Ġsee", "Ġ", "1", "2", "!", "ĊĊ", "Ġx"]),
    ],
)
def test_texts_are_split_as_the_file_says(pre, text, pieces, tmp_path):
    write(tmp_path / "tiny.gguf", "llama", pre=pre)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    found = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert found[: len(pieces)] == pieces


def test_the_space_before_the_first_word_may_be_left_out(tmp_path):
    write(tmp_path / "tiny.gguf", "mistral", space=False)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("th th")
    assert tokenizer.transformers.convert_ids_to_tokens(ids) == ["<bos>", "th", "\u2581th"]
    assert tokenizer.decode(ids) == "th th"


@pytest.mark.sample(1)
@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_a_file_is_a_target(backend, tmp_path):
    pytest.importorskip({"cuda": "torch", "mlx": "mlx_lm"}[backend])
    from treeflash.config import DecodeConfig, LoadConfig

    model = write(tmp_path / "tiny-Q8_0.gguf", "qwen3")
    folder = models.resolve_target(str(tmp_path / "tiny-Q8_0.gguf"))
    assert folder == models.resolve_target(str(tmp_path / "tiny-Q8_0.gguf"))
    assert folder.name == "tiny-Q8_0"
    assert "tiny-Q8_0" in [model.name for model in cached.cached_models()]
    pair = loader(backend)(folder, None, LoadConfig(device="cpu", dtype="float32"))
    text = generate(pair, PROMPT, DecodeConfig(method="suffix", max_tokens=12))
    greedy = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
    assert text == greedy[0, len(PROMPT) :].tolist()
    models_command.main(["rm", "tiny-Q8_0", "--yes"])
    assert not folder.exists()


def test_a_changed_file_is_converted_again(tmp_path, monkeypatch):
    write(tmp_path / "tiny.gguf", "qwen3")
    before = models.resolve_target(str(tmp_path))
    write(tmp_path / "tiny.gguf", "qwen2")
    after = models.resolve_target(str(tmp_path))
    assert before != after
    assert '"qwen2"' in (after / "config.json").read_text()
    monkeypatch.setattr(models, "CONVERSION", models.CONVERSION + 1)
    assert models.resolve_target(str(tmp_path)) != after


def replaced(key: str, value: str) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(key.encode(), value.encode(), 1)


def replaced_id(key: str) -> Callable[[bytes], bytes]:
    pattern = re.compile(re.escape(key.encode()) + b"(.{4})(.{4})", re.DOTALL)
    return lambda data: pattern.sub(lambda x: x[0][:-4] + b"\xff\xff\0\0", data, count=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replaced("qwen2.block_count", "qwen2.block_xount"), "missing or unsupported.*block_count"),
        (replaced("blk.3.attn_q.weight", "blk.3.attn_z.weight"), r"blk\.3\.attn_z\.weight"),
        (replaced("Ġt he", "Ġt hx"), "tokenizer.ggml.merges: .* `hx` out of vocabulary"),
        (replaced("tokenizer.ggml.pre", "tokenizer.ggml.prx"), "tokenizer.ggml.pre = 'default'"),
        (replaced("blk.3.attn_q.bias", "blk.3.attn_q.bios"), r"blk\.3\.attn_q\.bios"),
        (
            replaced_id("qwen2.block_count"),
            r"unsupported GGUF entry: block_count = 65535, with \d+",
        ),
        (replaced_id("qwen2.rope.dimension_count"), "rope.dimension_count = 65535"),
        (replaced_id("tokenizer.ggml.eos_token_id"), "unsupported GGUF entry: list index out of"),
    ],
)
def test_bad_files_are_one_line(damage, message, tmp_path):
    path = tmp_path / "tiny.gguf"
    write(path, "qwen2")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_gguf(path, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("end", "place"), [(2000, "in its header"), (-1000, r"at \d+ of \d+ bytes")]
)
def test_a_cut_file_is_refused_before_its_header_becomes_objects(tmp_path, end, place):
    path = tmp_path / "tiny.gguf"
    write(path, "qwen2")
    path.write_bytes(path.read_bytes()[:end])
    with (
        failing(converter, "GGUFReader", AssertionError("read")),
        pytest.raises(
            CheckpointError, match=rf"^tiny\.gguf ends too early, {place}; fetch it again$"
        ),
    ):
        convert_gguf(path, tmp_path)


def test_a_file_that_cannot_be_read_leaves_no_folder_in_the_cache(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError):
        models.resolve_target(str(tmp_path / "tiny.gguf"))
    write(tmp_path / "tiny.gguf", "qwen2")
    models.resolve_target(str(tmp_path / "tiny.gguf"))
    models_command.main(["rm", "tiny", "--yes"])
    assert [path.name for path in (tmp_path / "cache" / "gguf").iterdir()] == [".models.lock"]


def test_every_architecture_has_a_case():
    assert {case["architecture"] for case in CASES.values()} == ARCHITECTURES.keys()
