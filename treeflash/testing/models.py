"""Tiny random pairs in every published format, written with NumPy alone.

Their configurations hold the settings that transformers reads and those that mlx-lm reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from safetensors.numpy import save_file

from treeflash.drafters.folder import read_config, read_tensors
from treeflash.drafters.formats import block_shapes, parse_drafter_config

Tensors = dict[str, NDArray[Any]]

INWARD, OUTWARD = 0.2, 0.08
"""Standard deviations of weights in general, and of weights that write to the residual stream. The
latter are smaller, so that the newest token still counts at the last layer and sequences do not get
stuck."""


def normal(rng: Generator, *shape: int, scale: float = INWARD) -> NDArray[np.float32]:
    return rng.normal(0.0, scale, shape).astype(np.float32)


def norm(rng: Generator, size: int) -> NDArray[np.float32]:
    return 1 + normal(rng, size, scale=0.1)


Config = dict[str, Any]
KERNEL = 4


def gated_delta_net(config: Config, tensors: Tensors, rng: Generator) -> Config:
    """Qwen3.5: every other layer is a gated delta net; laid out as the published folders."""
    h, layers = config["hidden_size"], config["num_hidden_layers"]
    key_heads, heads, key_dim, value_dim = 2, 4, config["linear_key_head_dim"], h // 4
    channels = 2 * key_heads * key_dim + heads * value_dim
    sequence = config | {
        "model_type": "qwen3_5_text",
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": heads,
        "linear_value_head_dim": value_dim,
        "linear_conv_kernel_dim": KERNEL,
        "full_attention_interval": 2,
        "layer_types": (["linear_attention", "full_attention"] * layers)[:layers],
        "rope_parameters": config["rope_parameters"]
        | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    }
    for n in range(layers):
        layer = f"model.layers.{n}."
        if n % 2 == 0:
            _drop_attention(tensors, layer)
            mixer = layer + "linear_attn."
            widths = {"qkv": channels, "z": heads * value_dim, "b": heads, "a": heads}
            tensors |= {f"{mixer}in_proj_{x}.weight": normal(rng, w, h) for x, w in widths.items()}
            tensors |= _recurrence(rng, mixer, channels, heads) | {
                mixer + "norm.weight": norm(rng, value_dim),
                mixer + "out_proj.weight": normal(rng, h, heads * value_dim, scale=OUTWARD),
            }
        else:
            q = layer + "self_attn.q_proj.weight"
            tensors[q] = normal(rng, 2 * len(tensors[q]), h)  # and a gate for each channel
    for name in list(tensors):
        tensor = tensors.pop(name)
        if name.endswith("norm.weight") and "linear_attn" not in name:
            tensor = tensor - 1
        tensors[name.replace("model.", "model.language_model.")] = tensor
    outer = "architectures", "model_type", "tie_word_embeddings", "dtype"
    ids = "bos_token_id", "eos_token_id"
    return {name: config[name] for name in (*outer, *ids)} | {"text_config": sequence}


def mamba_2(config: Config, tensors: Tensors, rng: Generator) -> Config:
    """Granite 4, dense: every other layer is Mamba-2."""
    h, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, state = 8, config["mamba_d_state"]
    inner = 2 * h
    channels = inner + 2 * state
    for n in range(layers):
        layer = f"model.layers.{n}."
        gate, up = (tensors.pop(f"{layer}mlp.{x}_proj.weight") for x in ("gate", "up"))
        tensors[layer + "shared_mlp.input_linear.weight"] = np.concatenate([gate, up])
        down = tensors.pop(layer + "mlp.down_proj.weight")
        tensors[layer + "shared_mlp.output_linear.weight"] = down
        if n % 2 == 0:
            _drop_attention(tensors, layer)
            mixer = layer + "mamba."
            tensors |= _recurrence(rng, mixer, channels, heads) | {
                mixer + "in_proj.weight": normal(rng, inner + channels + heads, h),
                mixer + "conv1d.bias": normal(rng, channels),
                mixer + "D": normal(rng, heads),
                mixer + "norm.weight": norm(rng, inner),
                mixer + "out_proj.weight": normal(rng, h, inner, scale=OUTWARD),
            }
    return config | {
        "layer_types": (["mamba", "attention"] * layers)[:layers],
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_d_conv": KERNEL,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_limit": [0.0, 1000.0],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": config["intermediate_size"],
        "position_embedding_type": "rope",
        "attention_multiplier": config["head_dim"] ** -0.5,
        **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0),
    }


HYBRIDS: dict[str, Callable[[Config, Tensors, Generator], Config]] = {
    "qwen3_5": gated_delta_net,
    "granitemoehybrid": mamba_2,
}
"""Each changes tensors in place, and returns the configuration."""


def _drop_attention(tensors: Tensors, layer: str) -> None:
    for name in [name for name in tensors if name.startswith(layer + "self_attn.")]:
        del tensors[name]


def _recurrence(rng: Generator, mixer: str, channels: int, heads: int) -> Tensors:
    """Draw the convolution, and gates that forget about a quarter with every token."""
    return {
        mixer + "conv1d.weight": normal(rng, channels, 1, KERNEL, scale=0.5),
        mixer + "A_log": normal(rng, heads, scale=0.5) - 1,
        mixer + "dt_bias": normal(rng, heads, scale=0.5),
    }


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_sliding": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
}
FAMILIES = tuple(ARCHITECTURES)
"""The model types, and `qwen3_sliding`: Qwen3, in which every other layer has a window."""
HYBRID_FAMILIES = tuple(HYBRIDS)
"""The families with recurrent layers: gated delta nets and Mamba-2."""
ROPE_THETA = 1000.0  # differs from 10000, a loader's unnoticed default
EXPERTS = 4


def write_target(
    folder: Path,
    family: str,
    *,
    seed: int,
    vocab_size: int = 24,
    hidden_size: int = 32,
    layers: int = 4,
    max_positions: int = 4096,
    sliding_window: int = 8,
    tied: bool = False,
    key_dim: int = 8,
) -> None:
    """Write a target of two key-value heads for four query heads.

    The vocabulary is small, so that even a random drafter is right at times. `hidden_size` is
    divisible by 8. `sliding_window` belongs to `mistral` and to `qwen3_sliding`. `key_dim` is the
    width of keys in gated delta nets, and of states in Mamba-2: mlx-lm's kernels need a multiple of
    32. If `tied`, the embedding serves as the output head.
    """
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family.removesuffix("_sliding"),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
        **_shape(vocab_size, hidden_size, layers, max_positions),
    }
    if family.startswith("qwen3"):
        config["head_dim"] = hidden_size // 2
    if family in ("mistral", "qwen3_sliding"):
        config["sliding_window"] = sliding_window
    if family == "qwen3_sliding":
        kinds = ["sliding_attention", "full_attention"] * layers
        config |= {"use_sliding_window": True, "layer_types": kinds[:layers]}
    if family == "qwen3_moe":
        config |= {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": hidden_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if family == "qwen3_5":
        config["linear_key_head_dim"] = key_dim
    if family == "granitemoehybrid":
        config["mamba_d_state"] = key_dim
    rng = np.random.default_rng(seed)
    tensors = _target_tensors(rng, config)
    if family in HYBRIDS:
        config = HYBRIDS[family](config, tensors, rng)
    save(folder, config, tensors)


def write_drafter(
    folder: Path,
    target_folder: Path,
    *,
    format: str = "treeflash",
    head: str = "swiglu",
    seed: int,
    block_size: int = 6,
    layers: int = 2,
    target_layer_ids: Sequence[int] | None = (0, 2),
    sliding_window: int | None = None,
    sharded: bool = False,
) -> None:
    """Write a drafter for a target, in one of the two published formats.

    The format `treeflash` has an AR head, `swiglu` or `linear`, and `dflash` has none; both get the
    same backbone from a seed. Without `target_layer_ids` the key is left out. The sliding window is
    the first layer's. If `sharded`, the tensors are spread over two files.
    """
    target = read_config(target_folder)
    target |= target.get("text_config", {})
    hidden_size, vocab_size = target["hidden_size"], target["vocab_size"]
    ids = {} if target_layer_ids is None else {"target_layer_ids": list(target_layer_ids)}
    config: dict[str, Any] = {
        "model_type": "qwen3",
        "num_target_layers": target["num_hidden_layers"],
        "block_size": block_size,
        "dflash_config": {"mask_token_id": vocab_size - 1, **ids},
        **_shape(vocab_size, hidden_size, layers, target["max_position_embeddings"]),
    }
    if sliding_window is not None:
        config["layer_types"] = ["sliding_attention"] + ["full_attention"] * (layers - 1)
        config["sliding_window"] = sliding_window
    rng = np.random.default_rng(seed)
    features = (layers if target_layer_ids is None else len(target_layer_ids)) * hidden_size
    tensors = _drafter_tensors(rng, config, features)
    if format == "treeflash":
        config["treeflash_config"] = {"ar_approximation": head, "candidate_tokens": 16}
        tensors |= HEAD_TENSORS[head](rng, hidden_size)
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save(folder, config, tensors, sharded=sharded)


def write_pair(
    folder: Path,
    family: str,
    *,
    seeds: tuple[int, int] = (1, 2),
    drafter: Mapping[str, Any] | None = None,
    **target: Any,
) -> tuple[Path, Path]:
    """Write a target and a drafter for it, with options of `write_target` and `write_drafter`.

    Returns:
        the folders of the target and of the drafter.
    """
    folders = folder / "target", folder / "drafter"
    write_target(folders[0], family, seed=seeds[0], **target)
    write_drafter(folders[1], folders[0], seed=seeds[1], **(drafter or {}))
    return folders


def save(
    folder: Path, config: Mapping[str, Any], tensors: Tensors, *, sharded: bool = False
) -> None:
    """Write `config.json` and the tensors, in one safetensors file or in two with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if not sharded:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in (0, 1):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = read_config(folder)
    edit(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _shape(vocab_size: int, hidden_size: int, layers: int, max_positions: int) -> dict[str, Any]:
    """Build the settings that targets and drafters share; the rotary base in both forms in use."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "max_position_embeddings": max_positions,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    }


def _target_tensors(rng: Generator, config: Mapping[str, Any]) -> Tensors:
    vocab_size, h = config["vocab_size"], config["hidden_size"]
    family = config["model_type"]
    # A direction that all embeddings share, and that the output head reads with a weight for each
    # token, makes some tokens popular with both target and drafter: drafts then get accepted.
    shared = normal(rng, h, scale=1.0)
    popularity = normal(rng, vocab_size, 1, scale=1.0)
    embeddings = normal(rng, vocab_size, h, scale=0.7) + shared
    tensors = {"model.embed_tokens.weight": embeddings, "model.norm.weight": norm(rng, h)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(rng, vocab_size, h, scale=0.2) + (
            np.float32(2 / h) * popularity * shared
        )
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        biases, norms = "qkv" if family == "qwen2" else "", family.startswith("qwen3")
        tensors |= _attention_tensors(rng, layer, config, biases=biases, norms=norms)
        if family == "qwen3_moe":
            tensors[layer + "mlp.gate.weight"] = normal(rng, EXPERTS, h)
            for expert in range(EXPERTS):
                width = config["moe_intermediate_size"]
                tensors |= _mlp_tensors(rng, f"{layer}mlp.experts.{expert}.", h, width)
        else:
            tensors |= _mlp_tensors(rng, layer + "mlp.", h, config["intermediate_size"])
    return tensors


def _drafter_tensors(rng: Generator, config: Mapping[str, Any], features: int) -> Tensors:
    h = config["hidden_size"]
    tensors = {
        "fc.weight": normal(rng, h, features),
        "hidden_norm.weight": norm(rng, h),
        "norm.weight": norm(rng, h),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"layers.{n}."
        tensors |= _attention_tensors(rng, layer, config, biases="", norms=True)
        tensors |= _mlp_tensors(rng, layer + "mlp.", h, config["intermediate_size"])
    return tensors


def _swiglu_tensors(rng: Generator, h: int) -> Tensors:
    # Up and down near the identity add the previous token's embedding to the drafter's output, as
    # the target's residual stream does: the head then predicts the target better than chance.
    identity, nothing = np.eye(h, dtype=np.float32), np.zeros((h, h), np.float32)
    up_gate = np.block([[identity, nothing], [nothing, nothing]])
    bias = np.repeat(np.array([0, 1], np.float32), h)
    return {
        "ar_approximation.ug.weight": up_gate + normal(rng, 2 * h, 2 * h, scale=0.1),
        "ar_approximation.ug.bias": bias + normal(rng, 2 * h),
        "ar_approximation.d.weight": 2 * identity + normal(rng, h, h),
        "ar_approximation.norm.weight": norm(rng, h),
    }


def _linear_tensors(rng: Generator, h: int) -> Tensors:
    identity, nothing = np.eye(h, dtype=np.float32), np.zeros((h, h), np.float32)
    return {
        "ar_approximation.d.weight": np.hstack([2 * identity, nothing]) + normal(rng, h, 2 * h),
        "ar_approximation.norm.weight": norm(rng, h),
    }


HEAD_TENSORS = {"swiglu": _swiglu_tensors, "linear": _linear_tensors}


def _attention_tensors(
    rng: Generator, layer: str, config: Mapping[str, Any], *, biases: str, norms: bool
) -> Tensors:
    h, d = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    tensors = {
        f"{layer}input_layernorm.weight": norm(rng, h),
        f"{layer}post_attention_layernorm.weight": norm(rng, h),
    }
    for name, (rows, columns) in {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}.items():
        tensors[f"{layer}self_attn.{name}_proj.weight"] = normal(
            rng, rows, columns, scale=OUTWARD if name == "o" else INWARD
        )
        if name in biases:
            tensors[f"{layer}self_attn.{name}_proj.bias"] = normal(rng, rows)
        if norms and name in "qk":
            tensors[f"{layer}self_attn.{name}_norm.weight"] = norm(rng, d)
    return tensors


def _mlp_tensors(rng: Generator, layer: str, h: int, width: int) -> Tensors:
    return {
        f"{layer}gate_proj.weight": normal(rng, width, h),
        f"{layer}up_proj.weight": normal(rng, width, h),
        f"{layer}down_proj.weight": normal(rng, h, width, scale=OUTWARD),
    }


RANK, CANDIDATES, DRAFT_VOCAB_SIZE = 8, 5, 16
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
SELECTOR = {
    "conv_kernel_size": 2,
    "conv_group_size": 8,
    "selector_rank": RANK,
    "selector_top_k": CANDIDATES,
}


def _dflash(config: Config) -> None:
    """Use a factor, a softcap, a window and scaled embeddings."""
    config |= SLIDING
    factors = {"output_multiplier": 0.75, "input_embedding_scale": 1.25}
    config["dflash_config"] |= factors | {"final_logit_softcapping": 6.0}


def _dflash2(config: Config) -> None:
    config |= {"architectures": ["DFlash2DraftModel"], "is_causal": False, **SLIDING}
    config["dflash_config"] |= SELECTOR


def _deepspec(config: Config, *, head: str | None) -> None:
    config |= config.pop("dflash_config") | _markov(head)
    config |= {"architectures": ["Qwen3DSparkModel"], "target_layer_ids": [-1, 2]}


def _markov(head: str | None) -> Config:
    """Return the settings of a Markov head and of a confidence head."""
    settings = {"markov_rank": RANK, "markov_head_type": head, "enable_confidence_head": True}
    return {} if head is None else settings


def _sinks(config: Config) -> None:
    """Use attention sinks, and one causal window for all layers, as NVIDIA's DSpark does."""
    _deepspec(config, head="vanilla")
    swa = {"use_swa": True, "swa_window_size": 3, "causal": True}
    config |= {"dflash_config": {"attention_sink_bias": True, **swa}, "dspark_bonus_anchor": True}
    config["confidence_head_with_markov"] = False


def _gemma4(config: Config) -> None:
    """Use DeepSpec's layers for Gemma 4, whose keys are their values; one pair of eight turns."""
    _deepspec(config, head="vanilla")
    config |= {
        "architectures": ["Gemma4DSparkModel"],
        "attention_k_eq_v": True,
        "final_logit_softcapping": 6.0,
        "global_head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_global_key_value_heads": 1,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": ROPE_THETA,
                "partial_rotary_factor": 0.125,
            }
        },
    }


def _specforge(config: Config) -> None:
    config["architectures"] = ["DSparkDraftModel"]
    own = {"projector_type": "dspark", "attention_mode": "gqa"}
    config["dflash_config"] |= own | _markov("vanilla")


def _domino(config: Config) -> None:
    """Use fill-in slots, and a first depth that the head leaves alone."""
    config["architectures"] = ["DominoDraftModel"]
    config["dflash_config"] |= {
        "projector_type": "domino",
        "emb_dim": RANK,
        "gru_hidden_dim": 6,
        "pure_draft_prefix_len": 1,
        "shift_label": False,
    }


def _speculators(
    config: Config, *, kind: str, settings: Mapping[str, Any] = {}, reduced: bool = True
) -> None:
    own, layers = config.pop("dflash_config"), dict(config)
    block_size = layers.pop("block_size")
    config.clear()
    config |= {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": kind,
        "transformer_layer_config": layers | SLIDING,
        "block_size": block_size,
        "mask_token_id": own["mask_token_id"],
        "aux_hidden_state_layer_ids": [i + 1 for i in own["target_layer_ids"]],
        "sample_from_anchor": kind == "dspark",
        "draft_vocab_size": DRAFT_VOCAB_SIZE if reduced else layers["vocab_size"],
        **settings,
    }


DIALECTS: dict[str, Callable[[Config], None]] = {
    "dflash": _dflash,
    "dflash2": _dflash2,
    "deepspec": partial(_deepspec, head="vanilla"),
    "deepspec-gated": partial(_deepspec, head="gated"),
    "deepspec-rnn": partial(_deepspec, head="rnn"),
    "deepspec-dflash": partial(_deepspec, head=None),
    "deepspec-gemma4": _gemma4,
    "deepspec-sinks": _sinks,
    "specforge": _specforge,
    "specforge-domino": _domino,
    "speculators-dflash": partial(_speculators, kind="dflash"),
    "speculators-dflash2": partial(_speculators, kind="dflash2", settings=SELECTOR, reduced=False),
    "speculators-dspark": partial(_speculators, kind="dspark", settings=_markov("gated")),
}
"""By name, the changes that make the configuration of a plain DFlash drafter one of the dialect."""


def write_dialect(folder: Path, target_folder: Path, dialect: str, *, seed: int) -> None:
    """Write a drafter of one of the `DIALECTS` for a target; see `write_drafter`.

    Tensors that a plain drafter does not have, or not in this shape, are random.
    """
    write_drafter(folder, target_folder, format="dflash", seed=seed)
    config, plain = read_config(folder), read_tensors(folder)
    DIALECTS[dialect](config)
    # With the seeds of the suite, this one draws no tokens that are nearly equally probable.
    parsed, rng = parse_drafter_config(config), np.random.default_rng(seed + 2)
    shapes, optional = block_shapes(parsed, None, {})
    if dialect.startswith("deepspec"):
        shapes |= optional
    tensors: Tensors = {}
    for name, shape in shapes.items():
        if name in plain and plain[name].shape == shape:
            tensors[name] = plain[name]
        elif name.endswith("norm.weight"):
            tensors[name] = norm(rng, *shape)
        else:
            tensors[name] = normal(rng, *shape, scale=0.35)
    if "d2t" in tensors:
        vocab_size = parsed.vocab_size
        assert vocab_size is not None
        chosen = np.sort(rng.permutation(vocab_size)[:DRAFT_VOCAB_SIZE])
        tensors["d2t"] = (chosen - np.arange(DRAFT_VOCAB_SIZE)).astype(np.int64)
        tensors["t2d"] = np.isin(np.arange(vocab_size), chosen)
    save(folder, config, tensors)
