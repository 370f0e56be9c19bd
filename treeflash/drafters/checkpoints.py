"""DFlash and TreeFlash checkpoints: Hugging Face folders, read unchanged and checked by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from treeflash.config import DrafterConfig
from treeflash.drafters.rope import inverse_frequencies, rope_parameters
from treeflash.errors import CheckpointError

HEADS = ("swiglu", "linear")


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder.

    Raises:
        CheckpointError: it is missing or is no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json; it is not a model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return config


def drafter_config(folder: Path) -> DrafterConfig:
    """What the `config.json` of a DFlash or TreeFlash checkpoint says.

    Raises:
        CheckpointError: a key is missing, has a wrong type, or asks for what is not supported.
    """
    config = read_config(folder)
    try:
        return parse_drafter_config(config)
    except KeyError as error:
        raise CheckpointError(
            f"{folder / 'config.json'} lacks {error}; is it a DFlash or TreeFlash drafter?"
        ) from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {error}") from error


def parse_drafter_config(config: Mapping[str, Any]) -> DrafterConfig:
    """What a configuration says; raises the errors of Python where it is not valid."""
    dflash = dict(config.get("dflash_config") or {})
    treeflash = dict(config.get("treeflash_config") or {})

    def setting(key: str, default: Any = None) -> Any:
        return dflash.get(key, treeflash.get(key, config.get(key, default)))

    for key, neutral in (("output_multiplier", 1.0), ("final_logit_softcapping", None)):
        if setting(key, neutral) != neutral:
            raise ValueError(f"{key} is not supported")
    layers = int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    hidden_size = int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden_size // heads)
    target_layers = config.get("num_target_layers")
    layer_ids = setting("target_layer_ids")
    if layer_ids is None:
        layer_ids = default_target_layer_ids(int(config["num_target_layers"]), layers)
    head = setting("ar_approximation")
    if head not in (None, *HEADS):
        raise ValueError(f"the AR head {head!r} is not known; known are {', '.join(HEADS)}")
    block_size = int(setting("block_size", 16))
    if block_size < 2:
        raise ValueError(f"block_size must be 2 or more, got {block_size}")
    mask_token_id = setting("mask_token_id")
    if mask_token_id is None:
        raise KeyError("mask_token_id")
    inv_freq, rope_scale = inverse_frequencies(rope_parameters(config), head_dim)
    sliding = tuple(
        kind == "sliding_attention"
        for kind in config.get("layer_types") or ["full_attention"] * layers
    )
    if len(sliding) != layers:
        raise ValueError(f"layer_types names {len(sliding)} layers of {layers}")
    window = int(config["sliding_window"]) if any(sliding) else None
    # The published code makes sliding layers causal unless the checkpoint says otherwise.
    causal = config.get("is_causal")
    return DrafterConfig(
        hidden_size=hidden_size,
        intermediate_size=int(config["intermediate_size"]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        rms_norm_eps=float(config["rms_norm_eps"]),
        attention_bias=bool(config.get("attention_bias", False)),
        block_size=block_size,
        mask_token_id=int(mask_token_id),
        target_layer_ids=tuple(int(i) for i in layer_ids),
        num_target_layers=None if target_layers is None else int(target_layers),
        vocab_size=None if config.get("vocab_size") is None else int(config["vocab_size"]),
        head=head,
        inv_freq=tuple(inv_freq.tolist()),
        rope_scale=rope_scale,
        sliding_windows=tuple(window if slides else None for slides in sliding),
        causal=tuple(slides if causal is None else bool(causal) for slides in sliding),
        input_scale=float(setting("input_embedding_scale", 1.0)),
    )


def default_target_layer_ids(num_target_layers: int, num_hidden_layers: int) -> tuple[int, ...]:
    """The layers that DFlash takes features from where a checkpoint names none."""
    if num_hidden_layers == 1:
        return (num_target_layers // 2,)
    step = (num_target_layers - 4) / (num_hidden_layers - 1)
    return tuple(round(1 + i * step) for i in range(num_hidden_layers))


def check_pair(
    config: DrafterConfig, *, hidden_size: int, vocab_size: int, num_hidden_layers: int
) -> None:
    """Raise a CheckpointError where a drafter cannot belong to a target of this shape."""
    problem = None
    if config.hidden_size != hidden_size:
        problem = f"its hidden size is {config.hidden_size}, the target's is {hidden_size}"
    elif config.vocab_size is not None and config.vocab_size != vocab_size:
        problem = f"its vocabulary has {config.vocab_size} tokens, the target's has {vocab_size}"
    elif not 0 <= config.mask_token_id < vocab_size:
        problem = f"its mask token {config.mask_token_id} is outside the vocabulary of {vocab_size}"
    elif config.num_target_layers not in (None, num_hidden_layers):
        problem = (
            f"it was trained for a target of {config.num_target_layers} layers, "
            f"this one has {num_hidden_layers}"
        )
    elif not all(0 <= i < num_hidden_layers for i in config.target_layer_ids):
        problem = (
            f"it reads target layers {list(config.target_layer_ids)}, "
            f"the target has {num_hidden_layers}"
        )
    if problem:
        raise CheckpointError(f"drafter and target do not fit: {problem}")


def tensor_shapes(config: DrafterConfig, head_size: int = 0) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint, by canonical name (without `model.`), and their shapes.

    Args:
        config: of the drafter.
        head_size: I, the inner width of the AR head; ignored where there is none.
    """
    h, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (h, len(config.target_layer_ids) * h),
        "hidden_norm.weight": (h,),
        "norm.weight": (h,),
    }
    for n in range(config.num_hidden_layers):
        layer = f"layers.{n}."
        for name, (rows, columns) in {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, columns)
            if config.attention_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes |= {
            f"{layer}self_attn.q_norm.weight": (d,),
            f"{layer}self_attn.k_norm.weight": (d,),
            f"{layer}mlp.gate_proj.weight": (i, h),
            f"{layer}mlp.up_proj.weight": (i, h),
            f"{layer}mlp.down_proj.weight": (h, i),
            f"{layer}input_layernorm.weight": (h,),
            f"{layer}post_attention_layernorm.weight": (h,),
        }
    if config.head == "swiglu":
        shapes |= {
            "ar_approximation.ug.weight": (2 * head_size, 2 * h),
            "ar_approximation.ug.bias": (2 * head_size,),
            "ar_approximation.d.weight": (h, head_size),
            "ar_approximation.norm.weight": (h,),
        }
    elif config.head == "linear":
        shapes |= {
            "ar_approximation.d.weight": (h, 2 * h),
            "ar_approximation.norm.weight": (h,),
        }
    return shapes


def canonical_name(name: str) -> str:
    """A tensor's name without the `model.` that TreeFlash checkpoints put before it."""
    return name.removeprefix("model.")


def check_tensors(
    folder: Path, config: DrafterConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare what a checkpoint holds with what its configuration asks for.

    Args:
        folder: named in the error.
        config: of the drafter.
        shapes: by canonical name, as found.

    Raises:
        CheckpointError: names the first missing, misshapen or unexpected tensor.
    """
    # Either tensor tells the head's inner width, so that the other can be missing by name.
    down, bias = (shapes.get(f"ar_approximation.{name}", ()) for name in ("d.weight", "ug.bias"))
    head_size = down[-1] if down else bias[0] // 2 if bias else 0
    expected = tensor_shapes(config, head_size)
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(f"{folder} lacks the tensor {name} of shape {shape}")
        if tuple(shapes[name]) != shape:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {tuple(shapes[name])}, "
                f"config.json asks for {shape}"
            )
    if extra := sorted(set(shapes) - set(expected)):
        raise CheckpointError(
            f"{folder} holds a tensor that no DFlash or TreeFlash drafter of its configuration "
            f"has: {extra[0]}"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted.

    Raises:
        CheckpointError: there is none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors file; other formats are not read")
    return files


def read_tensors(folder: Path) -> dict[str, NDArray[np.float32]]:
    """All tensors of a folder as float32, under their own names.

    Raises:
        CheckpointError: a file is damaged, or holds a type that is not floating point.
    """
    tensors: dict[str, NDArray[np.float32]] = {}
    for path in weight_files(folder):
        try:
            parts = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        for name, part in parts:
            tensors[name] = _float32(path, part).reshape(part["shape"])
    return tensors


def _float32(path: Path, part: Mapping[str, Any]) -> NDArray[np.float32]:
    data, dtype = part["data"], part["dtype"]
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in ("F16", "F32", "F64"):
        return np.frombuffer(data, f"<f{int(dtype[1:]) // 8}").astype(np.float32)
    raise CheckpointError(f"{path} holds tensors of type {dtype}; floating point is needed")
