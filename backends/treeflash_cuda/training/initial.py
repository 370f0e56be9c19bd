"""The drafter that a training run starts from: its configuration and its weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treeflash.drafters.backbone import ROPE_TYPES, default_target_layer_ids
from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.folder import read_config, stored_shapes
from treeflash.drafters.formats import (
    DFLASH,
    SELECTOR_DEFAULTS,
    TREEFLASH,
    TREEFLASH_HEADS,
    detect_format,
    parse_drafter_config,
)
from treeflash.drafters.heads.markov import Markov
from treeflash.drafters.heads.selector import Selector
from treeflash.drafters.heads.treeflash import Linear, SwiGLU
from treeflash.drafters.layers import Convolution
from treeflash.drafters.loading import VOCABULARY, drafter_config
from treeflash.errors import ConfigError
from treeflash.training.config import DEFAULT_LAYERS, NEW_DRAFTERS, TrainConfig, trained_head_name
from treeflash_cuda.drafter_loading import read_drafter
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.heads import HEAD_CLASSES
from treeflash_cuda.hf.attention_contexts import MaskedContext
from treeflash_cuda.hf.model_target import ModelTarget
from treeflash_cuda.linear import is_subclass

RANK = 256
"""Rank of the heads `markov` and `selector`, as published."""
ROPE_THETA = 10_000.0
"""The base of rotary embeddings for a target that has none."""
RANDOM_STD = 0.02
"""Standard deviation of random weights."""
COPIED_LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
FOLDED_NORMS = "input_layernorm", "post_attention_layernorm"
"""The parts of a target's layer that a drafter gets, under the names that most models give them."""


def refuse_options(config: TrainConfig, layers: int, vocab_size: int) -> None:
    """Raise a ConfigError for the shape of a new drafter that does not fit the target's."""
    if config.init not in NEW_DRAFTERS:
        return
    if (count := config.layers or DEFAULT_LAYERS) >= layers:
        given = f"and its default is {count}" if config.layers is None else f"got {count}"
        raise ConfigError(
            f"layers must be below the target's {layers}, {given}; pass a smaller --layers"
        )
    if max(config.target_layer_ids or (0,)) >= layers:
        raise ConfigError(
            f"target-layer-ids must be from 0 to {layers - 1}, got {config.target_layer_ids}"
        )
    if not 0 <= (config.mask_token_id or 0) < vocab_size:
        raise ConfigError(
            f"mask-token-id must be from 0 to {vocab_size - 1}, got {config.mask_token_id}"
        )


def drafter_settings(config: TrainConfig, target: ModelTarget) -> dict[str, Any]:
    """Build the `config.json` of the drafter to train, in the published TreeFlash format.

    Raises a ConfigError if the configuration does not fit the target, and a CheckpointError if
    `init` names a folder without a drafter.
    """
    if config.on_policy and target.is_hybrid:  # recurrent layers would read drafts one by one
        raise ConfigError("on-policy needs a target without recurrent layers; leave it out")
    if config.init in NEW_DRAFTERS:
        return with_head(_new_settings(config, target), config)
    folder = Path(config.init)
    drafter = drafter_config(folder)
    _refuse_untrainable_parts(folder, drafter)
    settings = _settings_with_layers(read_config(folder), drafter.num_hidden_layers, config)
    head = trained_head_name(drafter.head)
    if head == config.head:
        return settings
    # With a head it is read as a TreeFlash drafter, whose slots predict and see as in DFlash.
    is_dflash = detect_format(settings) in (DFLASH, TREEFLASH)
    if not is_dflash or config.head not in ("none", *TREEFLASH_HEADS):
        raise ConfigError(
            f"the drafter in {folder} has the head {head}, and its layers cannot serve the head "
            f"{config.head}; use --head {head}, or another --init"
        )
    return with_head(settings, config)


def _settings_with_layers(
    settings: dict[str, Any], layers: int, config: TrainConfig
) -> dict[str, Any]:
    """Build the configuration of a drafter of `layers` layers, appended layers included."""
    if config.layers is None or config.layers <= layers:
        return settings
    if "num_hidden_layers" not in settings:
        raise ConfigError(f"layers cannot be added to the format of {config.init}; remove --layers")
    settings = {**settings, "num_hidden_layers": config.layers}
    if kinds := settings.get("layer_types"):
        settings["layer_types"] = [*kinds, *kinds[-1:] * (config.layers - layers)]
    return settings


def _refuse_untrainable_parts(folder: Path, config: DrafterConfig) -> None:
    """Raise a ConfigError for parts of a drafter that training does not support."""
    vocabulary = set(VOCABULARY) & stored_shapes(folder).keys()
    parts: dict[str, object] = {
        "a confidence head": config.confidence_head,
        "embeddings or an output head of its own": vocabulary,
        "windows measured from the root": config.window_from_root and any(config.sliding_windows),
        "features of the embeddings": -1 in config.target_layer_ids,
        **dict(config.extensions.values()),
    }
    for name, present in parts.items():
        if present:
            raise ConfigError(f"training does not support the drafter in {folder}: it has {name}")


def with_head(settings: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Build a DFlash or TreeFlash configuration with the head to train, in that head's format."""
    drafter, head = dict(settings), config.head
    candidates = dict(drafter.pop("treeflash_config", None) or {}).get("candidate_tokens", 16)
    rank = config.head_size or RANK
    if head == "selector":
        drafter["architectures"] = ["DFlash2DraftModel"]
        drafter["dflash_config"] = {
            **drafter["dflash_config"],
            "selector_rank": rank,
            "selector_top_k": candidates,
            "conv_kernel_size": SELECTOR_DEFAULTS["conv_kernel_size"],
            "conv_group_size": math.gcd(
                drafter["hidden_size"], SELECTOR_DEFAULTS["conv_group_size"]
            ),
        }
    elif head == "markov":
        drafter["architectures"] = ["Qwen3DSparkModel"]
        drafter |= {"markov_rank": rank, "markov_head_type": "vanilla"}
    else:
        name = None if head == "none" else head
        drafter["architectures"] = ["TreeFlashDraftModel" if name else "DFlashDraftModel"]
        drafter["treeflash_config"] = {"ar_approximation": name, "candidate_tokens": candidates}
    return drafter


def _new_settings(config: TrainConfig, target: ModelTarget) -> dict[str, Any]:
    target_config, depth = target.config, len(target.layers)
    count = config.layers or DEFAULT_LAYERS
    layer_ids = config.target_layer_ids
    if layer_ids is None:
        spread = default_target_layer_ids(depth, count) if depth > 4 else (0,)
        # The last one is the input of the first copied layer in the target.
        layer_ids = (*spread[:-1], depth - count - 1)
        layer_ids = tuple(sorted({i for i in layer_ids if i < depth - count}))
    heads = int(target_config.num_attention_heads)
    head_dim = getattr(target_config, "head_dim", None) or target_config.hidden_size // heads
    attention = getattr(target.layers[0], "self_attn", None)
    bias = getattr(getattr(attention, "q_proj", None), "bias", None) is not None
    given = config.mask_token_id
    mask_token_id = _mask_token(target_config, target.vocab_size) if given is None else given
    return {
        "model_type": "qwen3",
        "attention_bias": bias,
        "block_size": config.block_size,
        "dflash_config": {"mask_token_id": mask_token_id, "target_layer_ids": list(layer_ids)},
        "dtype": "bfloat16",
        "head_dim": int(head_dim),
        "hidden_act": "silu",
        "hidden_size": int(target_config.hidden_size),
        "intermediate_size": int(target_config.intermediate_size),
        "layer_types": ["full_attention"] * count,
        "max_position_embeddings": int(target_config.max_position_embeddings),
        "num_attention_heads": heads,
        "num_hidden_layers": count,
        "num_key_value_heads": int(getattr(target_config, "num_key_value_heads", None) or heads),
        "num_target_layers": depth,
        "rms_norm_eps": float(getattr(target_config, "rms_norm_eps", None) or 1e-6),
        "rope_parameters": _rope_settings(target_config),
        "tie_word_embeddings": False,
        "vocab_size": target.vocab_size,
    }


def _rope_settings(config: Any) -> dict[str, Any]:
    """Return the target's rotary settings, of one kind of layers if they differ.

    A kind may have none. Of embeddings that no drafter has, such as longrope, the base is kept.
    """
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_kind = rope.get("full_attention"), *rope.values()
    found = next((part for part in by_kind if isinstance(part, Mapping)), rope)
    settings = {"rope_type": "default", "rope_theta": ROPE_THETA, **found}
    if settings["rope_type"] in ROPE_TYPES:
        return settings
    return {"rope_type": "default", "rope_theta": settings["rope_theta"]}


def _mask_token(config: Any, vocab_size: int) -> int:
    """Return the first token with a role that is in the vocabulary: some files have -1, or []."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        token_ids = value if isinstance(value, list) else [value]
        for token_id in token_ids:
            if token_id is not None and 0 <= token_id < vocab_size:
                return int(token_id)
    return 0


def initial_drafter(
    config: TrainConfig,  # the configuration of the training
    settings: dict[str, Any],  # result of `drafter_settings`
    target: ModelTarget,  # the model to draft for
    # The scale of queries and keys is measured on these tokens of a few sequences.
    sequences: Sequence[Sequence[int]],
) -> tuple[DrafterModel, nn.Module | None]:
    """Create a drafter and its head, float32, on the target's device.

    Raises a ConfigError if the target's layers cannot be copied, or the head has a different size.
    """
    parsed = parse_drafter_config(settings)
    torch.manual_seed(config.seed)
    head: Any = None
    if config.init in NEW_DRAFTERS:
        model = DrafterModel(parsed)
        model.apply(_randomise)
        model.apply(_neutralise)
        if config.init == "target":
            _copy_layers(model, target, sequences)
    else:
        loaded: Any = read_drafter(Path(config.init), target)  # a block drafter
        model, loaded_head = loaded
        if loaded_head is not None and model.config.head == parsed.head:
            head = loaded_head.module.float()
            size = _head_size(head)
            if size is not None and config.head_size not in (None, size):
                raise ConfigError(
                    f"the head in {config.init} has head-size {size}, not {config.head_size}; "
                    "leave it out"
                )
        if parsed.num_hidden_layers > len(model.layers):
            model = _with_layers(model, parsed)
    if parsed.head is not None and head is None:
        size = config.head_size or parsed.intermediate_size
        head = HEAD_CLASSES[parsed.head](parsed, size, target.vocab_size)
        head.apply(_randomise)
        head.apply(_neutralise)
    if head is not None:
        head = head.to(target.device)
    return model.float().to(target.device), head


def _with_layers(model: DrafterModel, config: DrafterConfig) -> DrafterModel:
    """Append copies of the last layer that add nothing to its output at first."""
    deeper = DrafterModel(config)
    deeper.own = model.own
    weights = model.state_dict()
    for n in range(len(model.layers), config.num_hidden_layers):
        for name, weight in model.layers[-1].state_dict().items():
            is_output = name.startswith(("self_attn.o_proj", "mlp.down_proj"))
            weights[f"layers.{n}.{name}"] = torch.zeros_like(weight) if is_output else weight
    deeper.load_state_dict(weights)
    return deeper


def _head_size(head: Any) -> int | None:
    """Return the inner size of a head, or None if it has none."""
    if isinstance(head, Markov):
        return int(head.markov_w1.embedding_dim)
    if isinstance(head, Selector):
        return int(head.predecessor_codebook.shape[1])
    return int(head.d.in_features) if isinstance(head, SwiGLU) else None


def _randomise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=RANDOM_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def _neutralise(module: nn.Module) -> None:
    """Let a head or a convolution change nothing at first: training starts at plain DFlash."""
    if isinstance(module, SwiGLU | Linear):
        nn.init.ones_(module.norm.weight)
        nn.init.zeros_(module.d.weight)
    elif isinstance(module, Markov):
        nn.init.zeros_(module.markov_w2.weight)
    elif isinstance(module, Selector):
        nn.init.normal_(module.predecessor_codebook)
        nn.init.zeros_(module.successor_codebook)
    elif isinstance(module, Convolution):
        nn.init.zeros_(module.base_kernel)
        nn.init.ones_(module.base_kernel[:, 0])
        nn.init.zeros_(module.kernel_projection.weight)


@torch.no_grad()
def _copy_layers(
    model: DrafterModel, target: ModelTarget, sequences: Sequence[Sequence[int]]
) -> None:
    """Copy the target's last layers into the drafter.

    Context and block reach a layer through different norms, so the target's norm is folded into
    the projections. If the target has no norms of queries and keys, the drafter's norms get the
    scale of the target's queries and keys on `sequences`. `fc` passes on the features of the
    deepest layer.
    """
    count = len(model.layers)
    layers: Sequence[Any] = list(model.layers)
    sources: Sequence[Any] = list(target.layers)[-count:]
    if not all(map(_can_copy, layers, sources)):
        raise ConfigError(
            f"the layers of {target.model.config.model_type} cannot be copied into a drafter; "
            "use --init random"
        )
    scales = _query_key_scales(target, sources, sequences)
    for layer, source, (scale_q, scale_k) in zip(layers, sources, scales, strict=True):
        scale = _norm_scale(source.input_layernorm)
        for name in ("q_proj", "k_proj", "v_proj"):
            _copy_linear(getattr(layer.self_attn, name), getattr(source.self_attn, name), scale)
        _copy_linear(layer.self_attn.o_proj, source.self_attn.o_proj, None)
        layer.self_attn.q_norm.weight.copy_(scale_q)
        layer.self_attn.k_norm.weight.copy_(scale_k)
        scale = _norm_scale(source.post_attention_layernorm)
        _copy_linear(layer.mlp.gate_proj, source.mlp.gate_proj, scale)
        _copy_linear(layer.mlp.up_proj, source.mlp.up_proj, scale)
        _copy_linear(layer.mlp.down_proj, source.mlp.down_proj, None)
    model.norm.weight.copy_(_norm_scale(target.model.get_decoder().norm))
    h = model.config.hidden_size
    model.fc.weight.zero_()
    deepest = int(torch.tensor(model.config.target_layer_ids).argmax())
    model.fc.weight[:, deepest * h : (deepest + 1) * h] = torch.eye(h)


def _can_copy(layer: nn.Module, source: nn.Module) -> bool:
    """Return whether a target's layer has the parts of a drafter's, and nothing quantises them.

    Gemma 2 and 3 give the names of these norms to others, among more norms.
    """
    parts, own = (dict(x.named_modules()) for x in (source, layer))
    if {name for name, _ in source.named_children() if "norm" in name} != set(FOLDED_NORMS):
        return False
    if any(getattr(parts[name], "weight", None) is None for name in FOLDED_NORMS):
        return False
    pairs: Sequence[tuple[Any, Any]] = [(parts.get(name), own[name]) for name in COPIED_LINEARS]
    return all(
        type(x) is nn.Linear and not is_subclass(x.weight) and x.weight.shape == mine.weight.shape
        for x, mine in pairs
    )


def _copy_linear(linear: nn.Linear, source: Any, scale: Tensor | None) -> None:
    weight = source.weight.float().cpu()
    linear.weight.copy_(weight if scale is None else weight * scale)
    if linear.bias is not None:
        linear.bias.zero_() if source.bias is None else linear.bias.copy_(source.bias)


def _norm_scale(norm: Any) -> Tensor:
    """Return the (hidden_size,) factors of a norm; some families store them less 1."""
    ones = torch.ones_like(norm.weight)
    return norm(ones[None])[0].float().cpu()


def _query_key_scales(
    target: ModelTarget, layers: Sequence[Any], sequences: Sequence[Sequence[int]]
) -> list[tuple[Tensor, Tensor]]:
    """Return the weights of the drafter's query and key norms, layer by layer."""
    squares: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    def measure(key: tuple[int, str], _: nn.Module, __: Any, output: Tensor) -> None:
        squares[key].append(output.float().cpu().pow(2).flatten())

    hooks = []
    for n, layer in enumerate(layers):
        for name in ("q", "k"):
            linear = getattr(layer.self_attn, f"{name}_proj")
            hooks.append(linear.register_forward_hook(partial(measure, (n, name))))
    for sequence in sequences:
        tokens = torch.tensor(sequence, device=target.device)
        context = MaskedContext.whole_sequence(len(sequence), target.device)
        target.run_decoder(tokens[None], context)
    for hook in hooks:
        hook.remove()

    def scale(n: int, name: str) -> Tensor:
        attention = layers[n].self_attn
        norm = getattr(attention, f"{name}_norm", None)
        if norm is not None:
            return _norm_scale(norm)
        return torch.cat(squares[n, name]).mean().sqrt().expand(attention.head_dim)

    return [(scale(n, "q"), scale(n, "k")) for n in range(len(layers))]
