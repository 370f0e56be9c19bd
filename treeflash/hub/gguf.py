"""Convert a GGUF file of a Llama model to a Hugging Face folder, without any framework."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from treeflash.drafters.folder import write_stored
from treeflash.errors import CheckpointError

Progress = Callable[[int, int], None]
"""Called with two numbers of bytes: the weights written so far, and all weights."""

TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4


def convert_gguf(path: Path, folder: Path, progress: Progress = lambda done, total: None) -> None:
    """Write configuration, bfloat16 weights and tokenizer of a GGUF Llama model into a folder.

    The tokenizer must be a `smollm` byte-level BPE. The folder exists. Raises a CheckpointError if
    the file is damaged, or holds another kind of model or tokenizer, and an OSError if the folder
    cannot be written.
    """
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path.name} is not a readable GGUF file: {error}") from error
    for key, expected in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if fields.get(key) != expected:
            raise CheckpointError(
                f"{path.name} has {key} = {fields.get(key)!r}; only {expected!r} can be converted"
            )
    try:
        config = _config(fields, tied=all(t.name != "output.weight" for t in reader.tensors))
        tensors = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
        documents = {
            "config.json": config,
            "generation_config.json": {k: config[k] for k in ("bos_token_id", "eos_token_id")},
            "tokenizer_config.json": _tokenizer_config(fields),
        }
        tokenizer = _tokenizer(fields)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path.name}: missing or unsupported GGUF entry: {error}") from error
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    entries = {
        name: ("BF16", tensor.shape[::-1].tolist(), 2 * int(tensor.n_elements))
        for name, tensor in tensors.items()
    }
    write_stored(folder / "model.safetensors", entries, _weights(tensors, heads, progress))


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the bits of bfloat16, to nearest and ties to even; NaN stays NaN."""
    bits: NDArray[np.uint16] = quantize(values, GGMLQuantizationType.BF16).view(np.uint16)
    return bits


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    hidden_size = int(fields["llama.embedding_length"])
    heads = int(fields["llama.attention.head_count"])
    rope_theta = float(fields["llama.rope.freq_base"])
    epsilon = np.float32(fields["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "head_dim": hidden_size // heads,
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rms_norm_eps": float(str(epsilon)),  # 1e-05, not 9.999999747378752e-06
        # Readers look for the rotary base in either place.
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{role}_token": tokens[int(fields[f"tokenizer.ggml.{name}_token_id"])]
        for role, name in roles.items()
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields["llama.context_length"]),
        "chat_template": fields["tokenizer.chat_template"],
        **special,
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
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


def _hugging_face_name(name: str) -> str:
    if name in TOP_LEVEL_NAMES:
        return TOP_LEVEL_NAMES[name]
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer is None:
        raise KeyError(name)
    return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight"


def _weights(
    tensors: dict[str, ReaderTensor], heads: dict[str, int], progress: Progress
) -> Iterator[bytes]:
    """Yield the tensors in bfloat16, one at a time."""
    done, total = 0, 2 * sum(int(tensor.n_elements) for tensor in tensors.values())
    for name, tensor in tensors.items():
        weight = dequantize(tensor.data, tensor.tensor_type)
        projection = name.split(".")[-2]
        if projection in heads:
            weight = _half_rotation_order(weight, heads[projection])
        yield bfloat16_bits(weight).astype("<u2").tobytes()
        done += 2 * int(tensor.n_elements)
        progress(done, total)


def _half_rotation_order(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of a query or key matrix, (heads * head_dim, hidden_size).

    GGUF rotates the rows (2i, 2i + 1) of a head as a pair, transformers row i of the first half
    with row i of the second half.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
