"""Convert a GGUF file to a Hugging Face folder, without any framework.

A GGUF file names tensors, settings and tokens in the way of llama.cpp. `ARCHITECTURES` has what
differs between models: their settings and names, and what llama.cpp's converter does to weights.

A file of the architecture `dflash` is a drafter: DFlash, DFlash2 or DSpark, with a copy of the
target's tokens. It becomes a folder in a published format, whose arithmetic llama.cpp's runtime
(`src/models/dflash.cpp`) has too. Layer ids count one more than in that format, since they name the
layer that reads a feature, and `d2t` has tokens instead of differences.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from treeflash.errors import CheckpointError
from treeflash.hub.gguf_names import part_files
from treeflash.hub.gguf_size import refuse_short
from treeflash.hub.gguf_weights import (
    Architecture,
    Fields,
    Model,
    Progress,
    Tensors,
    pack_model,
    write_weights,
)

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
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP = ("ffn_gate", "ffn_up", "ffn_down")
"""The matrices of a Llama's layer that may have biases: all of a line, or none."""
ROPE_FACTORS = "rope_freqs.weight"
"""Factors on the wavelengths of Llama 3's rotary embeddings, instead of the settings."""
NORMAL_TOKEN, CONTROL_TOKEN, USER_DEFINED_TOKEN = 1, 3, 4
END_TOKENS = {
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|im_end|>",
}
"""Tokens that end a text or a turn also in files that do not say so, as Gemma 3's do not."""
YARN_FACTORS = {
    "yarn_attn_factor": 1.0,
    "yarn_ext_factor": 1.0,
    "yarn_log_multiplier": 0.0,
}
"""Settings under `rope.scaling.` that transformers lacks, and the values that change nothing."""
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": (GPT2_SPLIT,),
    "mellum": (GPT2_SPLIT,),
    "a.x-4.0": (GPT2_SPLIT,),
    "default": (r"[\p{P}$+<=>^~|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"),
    "smollm": (r"\p{N}", GPT2_SPLIT),
    "seed-coder": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "deepseek-coder": (
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ),
}
"""How texts are split before merges, by `tokenizer.ggml.pre`; transformers knows other ones."""
WHOLE_WORDS = {
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
}
"""Tokenizers that look words up before they merge, and by default put the first token first."""


def convert_gguf(
    path: Path,
    folder: Path,
    progress: Progress = lambda done, total: None,
    *,
    packed: bool = False,
) -> None:
    """Write configuration, weights and tokenizer of a GGUF model into a folder.

    The folder exists. Weights become bfloat16; `packed` keeps the bits of a target's matrices,
    where `treeflash.low_bits` knows their types. A model in parts is read from all of them, and
    `path` is any. Raises a CheckpointError if the file is damaged, or holds another kind of model
    or tokenizer, and an OSError if the folder cannot be written.
    """
    files = part_files(path)
    try:
        for file in files:
            refuse_short(file)
        readers = [GGUFReader(file) for file in files]
        fields = {name: field.contents() for name, field in readers[0].fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path.name} is not a readable GGUF file: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if any(reader.byte_order != "I" for reader in readers):
        raise CheckpointError(
            f"{path.name} has its bytes in the order of another kind of machine; convert it with "
            "gguf-convert-endian, or take the usual file"
        )
    if (content := fields.get("general.type", "model")) != "model":
        raise CheckpointError(
            f"{path.name} has general.type = {content!r}, not 'model'; pass the file of a whole "
            "language model"
        )
    if (parts := max(int(fields.get("split.count", 1)), 1)) != len(files):
        raise CheckpointError(
            f"{path.name} is one of {parts} parts of a model, and its name does not say so; merge "
            "them with llama-gguf-split --merge"
        )
    kind = fields.get("general.architecture")
    if kind not in (*ARCHITECTURES, DRAFTER):
        raise CheckpointError(
            f"{path.name} has general.architecture = {kind!r}; supported are "
            f"{', '.join(ARCHITECTURES)}, and {DRAFTER} for drafters"
        )
    fields |= {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    stored = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    try:
        convert = _drafter if kind == DRAFTER else _target
        model = convert(str(kind), fields, stored)
        if packed and kind != DRAFTER:
            model = pack_model(model)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{path.name}: missing or unsupported GGUF entry: {error}") from error
    for name, document in model.documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save(str(folder / "tokenizer.json"))
    try:
        write_weights(model, folder / "model.safetensors", progress)
    except (NotImplementedError, ValueError, ArithmeticError) as error:  # types, sizes
        raise CheckpointError(f"{path.name} cannot be converted: {error}") from error


def _target(kind: str, fields: Fields, stored: Tensors) -> Model:
    architecture = ARCHITECTURES[kind]
    config, ends = _config(architecture, fields, stored), _end_tokens(fields)
    return Model(
        architecture=architecture,
        documents={
            "config.json": config,
            "generation_config.json": {
                "bos_token_id": config["bos_token_id"],
                "eos_token_id": ends if len(ends) > 1 else ends[0],
            },
            "tokenizer_config.json": _tokenizer_config(fields),
        },
        tensors={
            _hugging_face_name(architecture, name): tensor
            for name, tensor in stored.items()
            if name != ROPE_FACTORS
        },
        tokenizer=_tokenizer(kind, fields),
    )


def _config(architecture: Architecture, fields: Fields, tensors: Tensors) -> dict[str, Any]:
    if int(fields.get("expert_count") or 0):
        raise ValueError("a mixture of experts")
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **_layers(fields, tensors),
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        **architecture.settings(fields, tensors),
    }


def _layers(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    """Return the settings that the layers of targets and drafters have."""
    count = int(fields["block_count"])
    if not 0 < count <= len(tensors):  # a damaged number would fill the memory with settings
        raise ValueError(f"block_count = {count}, with {len(tensors)} tensors")
    hidden_size, heads = int(fields["embedding_length"]), int(fields["attention.head_count"])
    head_dim = int(fields.get("attention.key_length") or hidden_size // heads)
    if fields.get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"rope.dimension_count = {fields['rope.dimension_count']}")
    rope = _rope(fields)
    return {
        "hidden_size": hidden_size,
        "intermediate_size": int(fields["feed_forward_length"]),
        "num_hidden_layers": count,
        "num_attention_heads": heads,
        "num_key_value_heads": int(np.max(fields.get("attention.head_count_kv", heads))),
        "head_dim": head_dim,
        "max_position_embeddings": int(fields["context_length"]),
        "rms_norm_eps": _number(fields["attention.layer_norm_rms_epsilon"]),
        # Readers look for the rotary settings in either place.
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        **({"rope_scaling": rope} if "factor" in rope else {}),
        "hidden_act": "silu",
        "attention_bias": False,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _rope(fields: Fields) -> dict[str, Any]:
    """Return the settings of plain rotary embeddings, or of ones that are stretched.

    What a file leaves out is as in llama.cpp: the base is 10000, and a factor without a type is
    linear.
    """
    theta = float(fields.get("rope.freq_base", 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if (value := fields.get("rope.scaling.attn_factor", 1.0)) != 1.0:
        raise ValueError(f"rope.scaling.attn_factor = {value}")
    kind = fields.get("rope.scaling.type", "linear")
    factor = _number(fields.get("rope.scaling.factor") or fields.get("rope.scale_linear") or 1.0)
    if kind == "none" or factor == 1.0:
        return rope
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type = {kind!r}")
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        length = "original_max_position_embeddings"
        longest = fields["context_length"]
        rope[length] = int(fields.get("rope.scaling.original_context_length", longest))
        for name in ("beta_fast", "beta_slow"):
            if (value := fields.get(f"rope.scaling.yarn_{name}")) is not None:
                rope[name] = _number(value)
        for name, neutral in YARN_FACTORS.items():
            if (value := fields.get(f"rope.scaling.{name}", neutral)) != neutral:
                raise ValueError(f"rope.scaling.{name} = {value}")
    return rope


def _number(value: float) -> float:
    """Return the shortest decimal number that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _llama_settings(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    """Find which layers have biases, and Llama 3's rotary settings from the factors they give."""
    biases = {
        setting: _have_biases(int(fields["block_count"]), names, tensors)
        for setting, names in (("attention_bias", ATTENTION), ("mlp_bias", MLP))
    }
    return biases | _llama3_rope(fields, tensors)


def _have_biases(layers: int, names: Sequence[str], tensors: Tensors) -> bool:
    """Return whether these matrices have biases in all layers; a ValueError if only some do."""
    found = {f"blk.{n}.{name}.bias" in tensors for n in range(layers) for name in names}
    if len(found) > 1:
        raise ValueError(f"biases of some of the matrices {', '.join(names)} only")
    return found.pop()


def _llama3_rope(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    """Find Llama 3's rotary settings from the factors that follow from them."""
    if ROPE_FACTORS not in tensors:
        return {}
    if "factor" in _rope(fields):
        raise ValueError(f"{ROPE_FACTORS} beside a factor for all frequencies")
    factors = np.asarray(tensors[ROPE_FACTORS].data, np.float64).ravel()
    rope: dict[str, Any] = {
        "rope_type": "llama3",
        "rope_theta": _rope(fields)["rope_theta"],
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
    """Find which layers have a window: five are followed by one without, whose rotary base differs.

    Without a window in the file, no layer has one.
    """
    full = _rope(fields)
    local = {"rope_type": "default", "rope_theta": float(fields.get("rope.freq_base_swa", 10000.0))}
    layers, heads = int(fields["block_count"]), int(fields["attention.head_count"])
    # The largest model alone scales its scores by a width that is not its heads' width.
    scaled = int(fields["embedding_length"]) // heads if layers == 62 else None
    window, pattern = fields.get("attention.sliding_window"), 1
    if window is not None:
        pattern = int(fields.get("attention.sliding_window_pattern", 6))
    cap = fields.get("final_logit_softcapping")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scaled or int(fields["attention.key_length"]),
        **({} if cap is None else {"final_logit_softcapping": _number(cap)}),
        "sliding_window": int(window or fields["context_length"]),
        "sliding_window_pattern": pattern,
        "layer_types": [
            "full_attention" if n % pattern == pattern - 1 else "sliding_attention"
            for n in range(layers)
        ],
        "rope_local_base_freq": local["rope_theta"],
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
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
        model_type="llama",
        name="LlamaForCausalLM",
        settings=_llama_settings,
        biases=True,
        pairs_rows=True,
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
        scales_embeddings=True,
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
DRAFTER = "dflash"
"""The architecture of drafters."""
DRAFTER_NAMES = {
    **{f"{name}.weight": f"{module}.weight" for name, module in LAYER_NAMES.items()},
    "attn_sinks.weight": "self_attn.attention_sink_bias",
    "attn_conv_base": "attention_conv.base_kernel",
    "attn_conv_proj.weight": "attention_conv.kernel_projection.weight",
    "ffn_conv_base": "mlp_conv.base_kernel",
    "ffn_conv_proj.weight": "mlp_conv.kernel_projection.weight",
    "token_embd.weight": "embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "norm.weight",
    "enc.output_norm.weight": "hidden_norm.weight",
    "fc.weight": "fc.weight",
    "selector_predecessor.weight": "candidate_selector.predecessor_codebook",
    "selector_successor.weight": "candidate_selector.successor_codebook",
    "selector_hidden.weight": "candidate_selector.hidden_projection.weight",
    "markov_w1.weight": "markov_head.markov_w1.weight",
    "markov_w2.weight": "markov_head.markov_w2.weight",
    "conf_proj.weight": "confidence_head.proj.weight",
    "conf_proj.bias": "confidence_head.proj.bias",
    "d2t": "d2t",
}
"""The names of a drafter's tensors; in a layer its number stands before them."""
FACTORS = {
    "output_multiplier": "logit_scale",
    "final_logit_softcapping": "final_logit_softcapping",
    "input_embedding_scale": "embedding_scale",
}
"""Settings of DFlash and their names in a file."""
SELECTOR = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
"""The settings of DFlash2, whose names are equal."""


def _drafter(kind: str, fields: Fields, stored: Tensors) -> Model:
    """Name a drafter's tensors, and find its format."""
    names = {}
    for name in stored:
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if (known := DRAFTER_NAMES.get(layer[2] if layer else name)) is None:
            raise KeyError(name)
        names[name] = f"layers.{layer[1]}.{known}" if layer else known
    return Model(
        architecture=Architecture(model_type="qwen3", name="DFlashDraftModel"),
        documents={"config.json": _drafter_config(fields, stored)},
        tensors={names[name]: tensor for name, tensor in stored.items()},
        tokenizer=None,
    )


def _drafter_config(fields: Fields, stored: Tensors) -> dict[str, Any]:
    """Return the configuration of DFlash2, of speculators with fewer tokens, or of DeepSpec.

    As in llama.cpp, the root's slot predicts a token with a Markov head, and no slot is causal,
    unless the file says otherwise.
    """
    layers = _layers(fields, stored)
    if window := int(fields.get("attention.sliding_window") or 0):
        kinds = fields["attention.sliding_window_pattern"]
        names = {True: "sliding_attention", False: "full_attention"}
        layers |= {"sliding_window": window, "layer_types": [names[bool(kind)] for kind in kinds]}
    has_head = "markov_w1.weight" in stored
    causal = bool(fields.get("attention.causal", False))
    own: dict[str, Any] = {
        "block_size": int(fields.get("block_size", 16)),
        "mask_token_id": int(fields["tokenizer.ggml.mask_token_id"]),
    }
    if has_head:
        confidence = stored.get("conf_proj.weight")
        own |= {
            "markov_rank": int(stored["markov_w1.weight"].shape[0]),
            "enable_confidence_head": confidence is not None,
        }
        if confidence is not None:  # it reads a hidden state, and the vector of a token or not
            own["confidence_head_with_markov"] = int(confidence.shape[0]) > layers["hidden_size"]
    factors = {x: _number(fields[name]) for x, name in FACTORS.items() if name in fields}
    if "selector_hidden.weight" in stored:
        own |= {"architectures": ["DFlash2DraftModel"]}
        own |= {key: int(fields[key]) for key in SELECTOR}
    else:
        own |= {"sample_from_anchor": bool(fields.get("sample_from_anchor", has_head))}
    if "d2t" in stored:
        if factors:
            raise ValueError(f"d2t with {', '.join(factors)}")
        return {
            "speculators_model_type": "dspark" if has_head else "dflash",
            "transformer_layer_config": layers,
            "aux_hidden_state_layer_ids": [int(layer) for layer in fields["target_layers"]],
            "draft_vocab_size": int(stored["d2t"].n_elements),
            "sliding_window_non_causal": not causal,
            **own,
        }
    return {
        **layers,
        "architectures": ["Qwen3DSparkModel"],
        "target_layer_ids": [int(layer) - 1 for layer in fields["target_layers"]],
        "is_causal": causal,
        "attention_sink_bias": any(name.endswith("attn_sinks.weight") for name in stored),
        **own,
        **factors,
    }


def _hugging_face_name(architecture: Architecture, name: str) -> str:
    part, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.([\w.]+)", part)
    known = (LAYER_NAMES if layer else TOP_LEVEL_NAMES) | dict(architecture.names)
    kinds = ("weight", "bias") if architecture.biases else ("weight",)
    if kind not in kinds or (module := known.get(layer[2] if layer else part)) is None:
        raise KeyError(name)
    return f"model.layers.{layer[1]}.{module}.{kind}" if layer else f"{module}.{kind}"


def _end_tokens(fields: Fields) -> list[int]:
    """Return the ids of the tokens that end a text or a turn.

    SmolLM's unknown token has the name of an end token, and is none.
    """
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    named = {int(fields[key]) for key in keys if fields.get(key) is not None}
    tokens = enumerate(fields["tokenizer.ggml.tokens"])
    known = {number for number, token in tokens if token in END_TOKENS}
    return sorted(named | known - {fields.get("tokenizer.ggml.unknown_token_id")})


def _tokenizer_config(fields: Fields) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    template = fields.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = {x.removeprefix(prefix): fields[x] for x in fields if x.startswith(prefix)}
    if template and named:  # one for tools, say
        every = {"default": template} | named
        template = [{"name": name, "template": text} for name, text in every.items()]
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
    if fields["tokenizer.ggml.model"] == "gpt2":
        tokenizer = _byte_level_tokenizer(fields)
        default = fields.get("tokenizer.ggml.pre") in WHOLE_WORDS
    else:
        tokenizer = _sentencepiece_tokenizer(kind, fields)
        default = fields["tokenizer.ggml.model"] == "llama"
    added = fields.get("tokenizer.ggml.add_bos_token", default)
    if added and (first := fields.get("tokenizer.ggml.bos_token_id")) is not None:
        token = fields["tokenizer.ggml.tokens"][int(first)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A",
            pair=f"{token} $A {token} $B",
            special_tokens=[(token, int(first))],
        )
    return tokenizer


def _byte_level_tokenizer(fields: Fields) -> Tokenizer:
    """Build a byte-level BPE tokenizer, in which added tokens are whole whatever their letters."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    if (pre := fields.get("tokenizer.ggml.pre")) is None:
        raise ValueError("no pre-tokenizer; llama.cpp would guess tokenizer.ggml.pre = 'default'")
    if (splits := SPLITS.get(pre)) is None:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

        if (split := mapping.GGUF_PRE_TOKENIZER_SPLITS.get(pre)) is None:
            raise ValueError(f"tokenizer.ggml.pre = {pre!r}")
        splits = (split,)
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [(left, right) for left, right in map(str.split, fields["tokenizer.ggml.merges"])]
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_WORDS)
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(f"tokenizer.ggml.merges: {error}") from error
    tokenizer = Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
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


def _sentencepiece_tokenizer(kind: str, fields: Fields) -> Tokenizer:
    """Build a SentencePiece tokenizer, which marks words by a space before them.

    In Llama's and Mistral's the first word has one too, and the first after a special token, unless
    the file says otherwise.
    """
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    own = {
        name: fields[f"tokenizer.{key}"]
        for key, name in mapping.GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in fields
    }
    types = fields["tokenizer.ggml.token_type"]
    scores = zip(own["scores"], types, strict=True)
    if len({score for score, token_type in scores if token_type == NORMAL_TOKEN}) == 1:
        # A tokenizer.json has no scores for the converter; its tokens are in the merges' order.
        own["scores"] = [-float(number) for number in range(len(types))]
    tokenizer, _ = mapping.convert_gguf_tokenizer(kind, own)
    if kind != "gemma3":
        marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", "\u2581")]
        decoding = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        if fields.get("tokenizer.ggml.add_space_prefix", True):
            marks.insert(0, normalizers.Prepend("\u2581"))
            decoding.append(decoders.Strip(" ", left=1))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence(marks), None
        tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer  # type: ignore[no-any-return]
