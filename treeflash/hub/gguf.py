"""Convert a GGUF file to a Hugging Face folder, without any framework.

A GGUF file names tensors, settings and tokens in the way of llama.cpp. `ARCHITECTURES` has what
differs between models: their settings and names, and what llama.cpp's converter does to weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from treeflash.drafters.folder import write_stored
from treeflash.errors import CheckpointError

Progress = Callable[[int, int], None]
"""Called with two numbers of bytes: the weights written so far, and all weights."""
Fields: TypeAlias = Mapping[str, Any]
"""A file's settings; the ones of its architecture without the architecture's name before them."""
Tensors: TypeAlias = Mapping[str, ReaderTensor]
"""A file's tensors by name."""

TOP_LEVEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
"""Factors on the wavelengths of Llama 3's rotary embeddings, instead of the settings."""
CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How the files of a kind of model differ from others.

    Attributes:
        model_type: the name of the kind in `config.json`.
        name: the class of transformers.
        settings: makes the settings of `config.json` that other kinds lack.
        names: other names of tensors than in `LAYER_NAMES` and `TOP_LEVEL_NAMES`.
        biases: whether queries, keys and values have biases.
        pairs_rows: whether neighbouring rows of queries and keys are rotary pairs.
        norm_offset: what is added to the norms' weights in the file.
    """

    model_type: str
    name: str
    settings: Callable[[Fields, Tensors], dict[str, Any]] = lambda fields, tensors: {}
    names: Mapping[str, str] = field(default_factory=dict)
    biases: bool = False
    pairs_rows: bool = False
    norm_offset: float = 0.0


def convert_gguf(path: Path, folder: Path, progress: Progress = lambda done, total: None) -> None:
    """Write configuration, bfloat16 weights and tokenizer of a GGUF model into a folder.

    The folder exists. Raises a CheckpointError if the file is damaged, or holds another kind of
    model or tokenizer, and an OSError if the folder cannot be written.
    """
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path.name} is not a readable GGUF file: {error}") from error
    if int(fields.get("split.count", 1)) > 1:
        raise CheckpointError(
            f"{path.name} is one of {fields['split.count']} parts of a model; merge them with "
            "llama-gguf-split --merge"
        )
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{path.name} has general.architecture = {kind!r}; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[kind]
    fields |= {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config, ends = _config(architecture, fields, stored), _end_tokens(fields)
        tensors = {
            _hugging_face_name(architecture, name): tensor
            for name, tensor in stored.items()
            if name != ROPE_FACTORS
        }
        documents = {
            "config.json": config,
            "generation_config.json": {
                "bos_token_id": config["bos_token_id"],
                "eos_token_id": ends if len(ends) > 1 else ends[0],
            },
            "tokenizer_config.json": _tokenizer_config(fields),
        }
        tokenizer = _tokenizer(str(kind), fields)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path.name}: missing or unsupported GGUF entry: {error}") from error
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    shapes = {name: _shape(name, tensor) for name, tensor in tensors.items()}
    entries = {
        name: ("BF16", shapes[name], 2 * int(tensor.n_elements)) for name, tensor in tensors.items()
    }
    weights = _weights(architecture, config, tensors, progress)
    write_stored(folder / "model.safetensors", entries, weights)


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the bits of bfloat16, to nearest and ties to even; NaN stays NaN."""
    bits: NDArray[np.uint16] = quantize(values, GGMLQuantizationType.BF16).view(np.uint16)
    return bits


def _config(architecture: Architecture, fields: Fields, tensors: Tensors) -> dict[str, Any]:
    if int(fields.get("expert_count") or 0):
        raise ValueError("a mixture of experts")
    hidden_size, heads = int(fields["embedding_length"]), int(fields["attention.head_count"])
    rope_theta = float(fields["rope.freq_base"])
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": int(fields["feed_forward_length"]),
        "num_hidden_layers": int(fields["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(np.max(fields.get("attention.head_count_kv", heads))),
        "head_dim": int(fields.get("attention.key_length") or hidden_size // heads),
        "max_position_embeddings": int(fields["context_length"]),
        "rms_norm_eps": _number(fields["attention.layer_norm_rms_epsilon"]),
        # Readers look for the rotary base in either place.
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        **architecture.settings(fields, tensors),
    }


def _number(value: float) -> float:
    """Return the shortest decimal number that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _llama_settings(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    """Find Llama 3's rotary settings from the factors that follow from them."""
    if fields.get("rope.scaling.type") not in (None, "none"):
        raise ValueError(f"rope.scaling.type = {fields['rope.scaling.type']!r}")
    if ROPE_FACTORS not in tensors:
        return {}
    factors = np.asarray(tensors[ROPE_FACTORS].data, np.float64).ravel()
    rope: dict[str, Any] = {
        "rope_type": "llama3",
        "rope_theta": float(fields["rope.freq_base"]),
        "factor": _number(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(len(factors)) / len(factors))
    turns = rope["original_max_position_embeddings"] / wavelengths
    share = np.clip((turns - 1) / 3, 0, 1)
    if not np.allclose(1 / (share + (1 - share) / rope["factor"]), factors, rtol=1e-3):
        raise ValueError(f"{ROPE_FACTORS} of no known rotary settings")
    return {"rope_parameters": rope, "rope_scaling": rope}


def _gemma3_settings(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    """Five layers with a window are followed by one without, whose rotary base is another."""
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": float(fields["rope.freq_base"])}
    if (scaling := fields.get("rope.scaling.type")) not in (None, "none"):
        full |= {"rope_type": str(scaling), "factor": float(fields["rope.scaling.factor"])}
    local = {"rope_type": "default", "rope_theta": 10000.0}
    layers, heads = int(fields["block_count"]), int(fields["attention.head_count"])
    # The largest model alone scales its scores by a width that is not its heads' width.
    scaled = int(fields["embedding_length"]) // heads if layers == 62 else None
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scaled or int(fields["attention.key_length"]),
        "sliding_window": int(fields["attention.sliding_window"]),
        "sliding_window_pattern": 6,
        "layer_types": [
            "full_attention" if n % 6 == 5 else "sliding_attention" for n in range(layers)
        ],
        "rope_local_base_freq": local["rope_theta"],
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "rope_scaling": {**full} if "factor" in full else None,
    }


def _lfm2_settings(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    """Layers without heads of keys are short convolutions."""
    attends = [int(heads) > 0 for heads in fields["attention.head_count_kv"]]
    epsilon = _number(fields["attention.layer_norm_rms_epsilon"])
    width = int(fields["feed_forward_length"])
    return {
        "layer_types": ["full_attention" if x else "conv" for x in attends],
        "full_attn_idxs": [n for n, x in enumerate(attends) if x],
        "conv_L_cache": int(fields["shortconv.l_cache"]),
        "conv_bias": False,
        "norm_eps": epsilon,
        "block_auto_adjust_ff_dim": False,  # the width is the final one
        "block_dim": int(fields["embedding_length"]),
        "block_ff_dim": width,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
    }


ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama", name="LlamaForCausalLM", settings=_llama_settings, pairs_rows=True
    ),
    "qwen2": Architecture(model_type="qwen2", name="Qwen2ForCausalLM", biases=True),
    "qwen3": Architecture(model_type="qwen3", name="Qwen3ForCausalLM"),
    "gemma3": Architecture(
        model_type="gemma3_text",
        name="Gemma3ForCausalLM",
        settings=_gemma3_settings,
        names={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
    ),
    "lfm2": Architecture(
        model_type="lfm2",
        name="Lfm2ForCausalLM",
        settings=_lfm2_settings,
        names={
            "token_embd_norm": "model.embedding_norm",
            "attn_norm": "operator_norm",
            "attn_output": "self_attn.out_proj",
            "attn_q_norm": "self_attn.q_layernorm",
            "attn_k_norm": "self_attn.k_layernorm",
            "ffn_norm": "ffn_norm",
            "ffn_gate": "feed_forward.w1",
            "ffn_up": "feed_forward.w3",
            "ffn_down": "feed_forward.w2",
            "shortconv.conv": "conv.conv",
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.out_proj": "conv.out_proj",
        },
    ),
}
"""By `general.architecture`."""


def _hugging_face_name(architecture: Architecture, name: str) -> str:
    part, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.([\w.]+)", part)
    known = (LAYER_NAMES if layer else TOP_LEVEL_NAMES) | dict(architecture.names)
    kinds = ("weight", "bias") if architecture.biases else ("weight",)
    if kind not in kinds or (module := known.get(layer[2] if layer else part)) is None:
        raise KeyError(name)
    return f"model.layers.{layer[1]}.{module}.{kind}" if layer else f"{module}.{kind}"


def _shape(name: str, tensor: ReaderTensor) -> list[int]:
    """Return a tensor's shape in the folder, where a short convolution has a group per channel."""
    shape = [int(size) for size in tensor.shape[::-1]]
    return [shape[0], 1, shape[1]] if name.endswith(".conv.conv.weight") else shape


def _weights(
    architecture: Architecture, config: Mapping[str, Any], tensors: Tensors, progress: Progress
) -> Iterator[bytes]:
    """Yield the tensors in bfloat16, one at a time."""
    done, total = 0, 2 * sum(int(tensor.n_elements) for tensor in tensors.values())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        weight = dequantize(tensor.data, tensor.tensor_type)
        module = name.split(".")[-2]
        if architecture.pairs_rows and module in heads:
            weight = _half_rotation_order(weight, heads[module])
        if module.endswith("norm"):
            weight = weight - np.float32(architecture.norm_offset)
        yield bfloat16_bits(weight).astype("<u2").tobytes()
        done += 2 * int(tensor.n_elements)
        progress(done, total)


def _half_rotation_order(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of a query or key matrix, (heads * head_dim, hidden_size).

    In the file the rows (2i, 2i + 1) of a head are rotated as a pair, in transformers row i of the
    first half and row i of the second half.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _end_tokens(fields: Fields) -> list[int]:
    """Return the ids of the tokens that end a text or a turn."""
    ids = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return sorted({int(x) for x in ids if x is not None})


def _tokenizer_config(fields: Fields) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    template = fields.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields["context_length"]),
        **({"chat_template": template} if template else {}),
        **{f"{role}_token": tokens[int(x)] for role, x in ids.items() if x is not None},
    }


def _tokenizer(kind: str, fields: Fields) -> Tokenizer:
    """Build the tokenizer, which puts the first token before a text if the file says so."""
    if fields.get("tokenizer.ggml.pre") == "smollm":
        tokenizer = _smollm_tokenizer(fields)
    else:
        try:
            from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping
        except ImportError as error:
            raise CheckpointError(
                "GGUF files need transformers 5.24 or later; update it, or pass a folder in the "
                "Hugging Face format"
            ) from error
        pre = fields.get("tokenizer.ggml.pre", "default")
        if (
            fields["tokenizer.ggml.model"] == "gpt2"
            and pre not in mapping.GGUF_PRE_TOKENIZER_SPLITS
        ):
            raise ValueError(f"tokenizer.ggml.pre = {pre!r}")
        own = {
            name: fields[f"tokenizer.{key}"]
            for key, name in mapping.GGUF_TOKENIZER_MAPPING["tokenizer"].items()
            if f"tokenizer.{key}" in fields
        }
        tokenizer, _ = mapping.convert_gguf_tokenizer(kind, own)
    added = fields.get("tokenizer.ggml.add_bos_token", fields["tokenizer.ggml.model"] == "llama")
    if added and (first := fields.get("tokenizer.ggml.bos_token_id")) is not None:
        token = fields["tokenizer.ggml.tokens"][int(first)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A",
            pair=f"{token} $A {token} $B",
            special_tokens=[(token, int(first))],
        )
    return tokenizer


def _smollm_tokenizer(fields: Fields) -> Tokenizer:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [(left, right) for left, right in map(str.split, fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL_TOKEN)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL_TOKEN, USER_DEFINED_TOKEN)
    ]
    tokenizer.add_tokens(added)
    return tokenizer
