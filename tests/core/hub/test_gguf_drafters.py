"""GGUF files of drafters, written from random drafters as llama.cpp's converter writes them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import finish

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import CheckpointError
from treeflash.hub import cached, models
from treeflash.hub.gguf import convert_gguf
from treeflash.hub.gguf_weights import bfloat16_bits
from treeflash.language_model import locate
from treeflash.reference.backend import load
from treeflash.testing.comparisons import steps_of
from treeflash.testing.models import edit_config, save, write_dialect, write_target

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NAMES = json.loads((Path(__file__).parent / "gguf_drafter_names.json").read_text("utf-8"))
"""Names in GGUF files of the drafter's tensors and of each layer's, by their own names."""
DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DFlash": ("dflash", {"layer_types": None}),
    "DFlash with a window and YaRN": (
        "dflash",
        {
            "use_sliding_window": True,
            "is_causal": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 0.5,
                "beta_slow": 0.125,
            },
        },
    ),
    "DFlash2": ("dflash2", {"use_sliding_window": True}),
    "DSpark": ("deepspec", {}),
    "DSpark with sinks": ("deepspec-sinks", {}),
    "DSpark with fewer tokens": (
        "speculators-dspark",
        {
            "use_sliding_window": True,
            "sliding_window_non_causal": True,
            "markov_head_type": "vanilla",
        },
    ),
}
"""By name, a dialect and settings that it has besides."""


def write_drafter(root: Path, name: str) -> tuple[Path, Path]:
    """Write a target and a drafter whose weights are exact in bfloat16; returns their folders."""
    dialect, settings = DRAFTERS[name]
    target, folder = root / "target", root / "drafter"
    write_target(target, "qwen3", seed=0)
    write_dialect(folder, target, dialect, seed=1)
    edit_config(folder, lambda config: config.update(settings))
    tensors = read_tensors(folder)
    for stored, tensor in tensors.items():
        if tensor.dtype == np.float32:
            bits = bfloat16_bits(tensor).astype(np.uint32) << 16
            tensors[stored] = bits.view(np.float32)
    if settings.get("markov_head_type"):
        tensors = {x: y for x, y in tensors.items() if not x.startswith("markov_head.gate_proj")}
    save(folder, read_config(folder), tensors)
    return target, folder


def write_gguf(path: Path, folder: Path) -> None:
    """Write a drafter's folder as llama.cpp's converter does, with zeros in place of tokens."""
    config, tensors = read_config(folder), read_tensors(folder)
    config |= config.get("dflash_config") or {}
    config |= config.get("transformer_layer_config") or {}
    writer = gguf.GGUFWriter(path, "dflash")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config.get("max_position_embeddings", 256))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    ids = config.get("aux_hidden_state_layer_ids") or [i + 1 for i in config["target_layer_ids"]]
    writer.add_array("dflash.target_layers", ids)
    writer.add_uint32("dflash.block_size", config["block_size"])
    for key in ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"):
        if key in config:
            writer.add_uint32(f"dflash.{key}", config[key])
    factors = {"output_multiplier": "logit_scale", "input_embedding_scale": "embedding_scale"}
    for key, name in (factors | {"final_logit_softcapping": "final_logit_softcapping"}).items():
        if config.get(key):
            writer.add_float32(f"dflash.{name}", config[key])
    if config.get("use_sliding_window") or config.get("use_swa"):
        kinds = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
        writer.add_sliding_window(config.get("swa_window_size") or config["sliding_window"])
        slides = [kind == "sliding_attention" for kind in kinds]
        writer.add_array("dflash.attention.sliding_window_pattern", slides)
    if config.get("causal"):  # a file that does not say is not causal
        writer.add_causal_attention(True)
    if "markov_rank" in config:
        samples = config.get("sample_from_anchor", not config.get("dspark_bonus_anchor"))
        writer.add_bool("dflash.sample_from_anchor", samples)
    writer.add_token_list([f"token {n}" for n in range(config["vocab_size"])])
    writer.add_uint32("tokenizer.ggml.mask_token_id", config["mask_token_id"])
    for stored, tensor in tensors.items():
        if stored == "t2d":
            continue
        if stored == "d2t":
            writer.add_tensor("d2t", tensor + np.arange(len(tensor)))
            continue
        _, _, layer = stored.partition("layers.")
        number, _, tail = layer.partition(".")
        name = f"blk.{number}.{NAMES['layer'][tail]}" if layer else NAMES["drafter"][stored]
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    finish(writer)


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_file_drafts_as_its_folder(name, tmp_path):
    target, folder = write_drafter(tmp_path, name)
    write_gguf(tmp_path / "tiny-Q8_0.gguf", folder)
    resolved = models.resolve_drafter(str(tmp_path / "tiny-Q8_0.gguf"), str(target))
    assert resolved == models.resolve_drafter(str(tmp_path / "tiny-Q8_0.gguf"), str(target))
    assert "tiny-Q8_0" in [model.name for model in cached.cached_models()]
    for name in (tmp_path / "tiny-Q8_0.gguf", folder):
        with pytest.raises(CheckpointError, match=f"^{name} is a drafter, not a target; name it"):
            locate(name, backend="reference")
    options = LoadConfig(device="cpu", dtype="float32")
    found, texts = [], []
    for drafter in (folder, resolved):
        pair = load(target, drafter, options)
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(PROMPT)
            block = sequence.draft(7)
            rows = [pair.drafter.log_probs(block)]
            if pair.head is not None:
                previous = np.resize(np.array([7, *PROMPT], np.int32), pair.drafter_config.depths)
                rows.append(pair.head.log_probs(block, previous))
        found.append(rows)
        method = "ddtree" if pair.head is None else "treeflash"
        config = DecodeConfig(method=method, budget=8, max_tokens=12)
        steps = steps_of(pair, PROMPT, config)
        texts.append([step.tokens for step in steps])
    for actual, expected in zip(*found[::-1], strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dflash.target_layers", "dflash.tarxet_layers", "GGUF entry: 'target_layers'"),
        ("mask_token_id", "mask_token_ix", "GGUF entry: 'tokenizer.ggml.mask_token_id'"),
        ("enc.output_norm", "enc.output_nerm", "GGUF entry: 'enc.output_nerm.weight'"),
    ],
)
def test_bad_files_are_one_line(old, new, message, tmp_path):
    _, folder = write_drafter(tmp_path, "DFlash")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, folder)
    data = path.read_bytes()
    assert old.encode() in data
    path.write_bytes(data.replace(old.encode(), new.encode(), 1))
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_gguf(path, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_factor_that_its_format_lacks_is_refused(tmp_path):
    _, folder = write_drafter(tmp_path, "DSpark with fewer tokens")
    edit_config(folder, lambda config: config.update(output_multiplier=2.0))
    write_gguf(tmp_path / "tiny.gguf", folder)
    with pytest.raises(CheckpointError, match="GGUF entry: d2t with output_multiplier"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)
