"""The initial drafter: a checkpoint, the target's last layers, or random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treeflash.drafters.backbone import default_target_layer_ids
from treeflash.drafters.folder import read_config
from treeflash.drafters.formats import drafter_config, parse_drafter_config
from treeflash.drafters.loading import refuse_extensions
from treeflash.errors import ConfigError
from treeflash.training.config import NEW, TrainConfig
from treeflash_cuda.attention import AttentionContext, attention_context
from treeflash_cuda.backend import load_drafter
from treeflash_cuda.corrections import CORRECTIONS, SwiGLU
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.target import Target

RANDOM_STD = 0.02
"""Standard deviation of random weights."""


def drafter_settings(config: TrainConfig, target: Target) -> dict[str, Any]:
    """The `config.json` of the drafter to train, in the published TreeFlash format.

    Raises:
        ConfigError: the configuration does not fit the target.
        CheckpointError: `init` names a folder without a drafter.
    """
    if config.init not in NEW:
        refuse_extensions(drafter_config(Path(config.init)), "training")
        settings = read_config(Path(config.init))
        head = None if config.head == "none" else config.head
    else:
        settings, head = _new_settings(config, target), config.head
    _check_head(config)
    candidates = dict(settings.get("treeflash_config") or {}).get("candidate_tokens", 16)
    settings["architectures"] = ["TreeFlashDraftModel" if head else "DFlashDraftModel"]
    settings["treeflash_config"] = {
        "ar_approximation": None if head == "none" else head,
        "candidate_tokens": candidates,
    }
    return settings


def _check_head(config: TrainConfig) -> None:
    if config.head != "none" and config.head not in CORRECTIONS:
        raise ConfigError(
            f"unknown head {config.head!r}; choose one of {', '.join(CORRECTIONS)}, none"
        )


def _new_settings(config: TrainConfig, target: Target) -> dict[str, Any]:
    target_config, depth = target.config, len(target.layers)
    if config.layers >= depth:
        raise ConfigError(f"layers must be below the target's {depth}, got {config.layers}")
    layer_ids = config.target_layer_ids
    if layer_ids is None:
        spread = default_target_layer_ids(depth, config.layers) if depth > 4 else (0,)
        # The last one is the input of the first copied layer in the target.
        layer_ids = (*spread[:-1], depth - config.layers - 1)
        layer_ids = tuple(sorted({i for i in layer_ids if i < depth - config.layers}))
    if not layer_ids or any(not 0 <= i < depth for i in layer_ids):
        raise ConfigError(f"target-layer-ids must be from 0 to {depth - 1}, got {layer_ids}")
    heads = int(target_config.num_attention_heads)
    head_dim = getattr(target_config, "head_dim", None) or target_config.hidden_size // heads
    first = target.layers[0]
    attention = getattr(first, "self_attn", None)
    bias = getattr(getattr(attention, "q_proj", None), "bias", None) is not None
    mask_token_id = config.mask_token_id
    if mask_token_id is None:
        mask_token_id = _mask_token(target_config)
    if not 0 <= mask_token_id < target.vocab_size:
        raise ConfigError(
            f"mask-token-id must be from 0 to {target.vocab_size - 1}, got {mask_token_id}"
        )
    rope = getattr(target_config, "rope_parameters", None) or {"rope_theta": 10000.0}
    if any(isinstance(value, dict) for value in rope.values()):  # by kind of layer
        rope = rope.get("full_attention") or next(iter(rope.values()))
    return {
        "model_type": "qwen3",
        "attention_bias": bias,
        "block_size": config.block_size,
        "dflash_config": {
            "mask_token_id": mask_token_id,
            "target_layer_ids": list(layer_ids),
        },
        "dtype": "bfloat16",
        "head_dim": int(head_dim),
        "hidden_act": "silu",
        "hidden_size": int(target_config.hidden_size),
        "intermediate_size": int(target_config.intermediate_size),
        "layer_types": ["full_attention"] * config.layers,
        "max_position_embeddings": int(target_config.max_position_embeddings),
        "num_attention_heads": heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": int(getattr(target_config, "num_key_value_heads", None) or heads),
        "num_target_layers": depth,
        "rms_norm_eps": float(getattr(target_config, "rms_norm_eps", 1e-6)),
        "rope_parameters": {"rope_type": "default", **rope},
        "tie_word_embeddings": False,
        "vocab_size": target.vocab_size,
    }


def _mask_token(config: Any) -> int:
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, list):
            value = value[0]
        if value is not None:
            return int(value)
    return 0


def initial_drafter(
    config: TrainConfig, settings: dict[str, Any], target: Target, texts: Sequence[Sequence[int]]
) -> tuple[DrafterModel, nn.Module | None]:
    """A drafter and its head, float32, on the target's device.

    Args:
        config: of the training.
        settings: from `drafter_settings`.
        target: the model to draft for.
        texts: a few texts to measure the scale of the target's queries and keys.

    Raises:
        ConfigError: the target's layers cannot be copied, or the head has a different size.
    """
    parsed = parse_drafter_config(settings)
    torch.manual_seed(config.seed)
    head: nn.Module | None = None
    if config.init in NEW:
        model = DrafterModel(parsed)
        model.apply(_randomise)
        if config.init == "target":
            _copy_layers(model, target, texts)
    else:
        model, old = load_drafter(Path(config.init), target)
        if old is not None and old.module.name == parsed.head:
            head = old.module.float()
            size = old.module.d.weight.shape[1]
            if parsed.head == SwiGLU.name and config.head_size not in (None, size):
                raise ConfigError(
                    f"the head in {config.init} has head-size {size}, not {config.head_size}; "
                    "leave it out"
                )
    if parsed.head is not None and head is None:
        size = config.head_size or parsed.intermediate_size
        head = CORRECTIONS[parsed.head](parsed, size)
        head.apply(_randomise)
        nn.init.ones_(head.norm.weight)
        # The correction is 0 at first, so that training starts at the one-shot drafter.
        nn.init.zeros_(head.d.weight)
    if head is not None:
        head = head.to(target.device)
    return model.float().to(target.device), head


def _randomise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=RANDOM_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def _copy_layers(model: DrafterModel, target: Target, texts: Sequence[Sequence[int]]) -> None:
    """Copy the target's last layers into the drafter.

    Context and block reach a layer through different norms, so the target's norm is folded into
    the projections. If the target has no per-head norms, the drafter's get the scale of the
    target's queries and keys on `texts`. `fc` passes on the features of the deepest layer.
    """
    count = len(model.layers)
    sources = list(target.layers)[-count:]
    scales = _scales(target, sources, texts)
    for layer, source, (scale_q, scale_k) in zip(model.layers, sources, scales, strict=True):
        theirs, own = source.self_attn, layer.self_attn
        scale = _norm_scale(source.input_layernorm)
        for name in ("q_proj", "k_proj", "v_proj"):
            _copy_linear(getattr(own, name), getattr(theirs, name), scale)
        _copy_linear(own.o_proj, theirs.o_proj, None)
        own.q_norm.weight.copy_(scale_q)
        own.k_norm.weight.copy_(scale_k)
        scale = _norm_scale(source.post_attention_layernorm)
        _copy_linear(layer.mlp.gate_proj, source.mlp.gate_proj, scale)
        _copy_linear(layer.mlp.up_proj, source.mlp.up_proj, scale)
        _copy_linear(layer.mlp.down_proj, source.mlp.down_proj, None)
    model.norm.weight.copy_(_norm_scale(target.model.get_decoder().norm))
    h = model.config.hidden_size
    model.fc.weight.zero_()
    deepest = int(torch.tensor(model.config.target_layer_ids).argmax())
    model.fc.weight[:, deepest * h : (deepest + 1) * h] = torch.eye(h)


def _copy_linear(own: nn.Linear, theirs: nn.Module, scale: Tensor | None) -> None:
    weight = theirs.weight.float().cpu()
    own.weight.copy_(weight if scale is None else weight * scale)
    if own.bias is not None:
        bias = theirs.bias
        own.bias.zero_() if bias is None else own.bias.copy_(bias)


def _norm_scale(norm: nn.Module) -> Tensor:
    """(hidden_size,) the factors of a norm, however its family stores them."""
    ones = torch.ones_like(norm.weight)
    return norm(ones[None])[0].float().cpu()


def _scales(
    target: Target, layers: Sequence[Any], texts: Sequence[Sequence[int]]
) -> list[tuple[Tensor, Tensor]]:
    """The weights of the drafter's query and key norms, layer by layer."""
    outputs: dict[tuple[int, str], list[Tensor]] = {}

    def keep(n: int, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs.setdefault((n, name), []).append(output.float().cpu().flatten(0, 1))

        return hook

    hooks = []
    for n, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        wanted = ("q_proj", "k_proj", "v_proj", "o_proj")
        if any(not isinstance(getattr(attention, name, None), nn.Linear) for name in wanted) or any(
            not isinstance(getattr(layer.mlp, name, None), nn.Linear)
            for name in ("gate_proj", "up_proj", "down_proj")
        ):
            raise ConfigError(
                f"the layers of {target.model.config.model_type} cannot be copied into a drafter; "
                "use --init random"
            )
        for name in ("q_proj", "k_proj"):
            hooks.append(getattr(attention, name).register_forward_hook(keep(n, name)))
    for text in texts:
        tokens = torch.tensor(text, device=target.device)
        context = AttentionContext.whole_text(len(text), target.device)
        with attention_context(context):
            target.model.get_decoder()(
                input_ids=tokens[None],
                position_ids=context.positions[None],
                use_cache=False,
            )
    for hook in hooks:
        hook.remove()
    scales = []
    for n, layer in enumerate(layers):
        pair = []
        for name in ("q", "k"):
            norm = getattr(layer.self_attn, f"{name}_norm", None)
            output = torch.cat(outputs[n, f"{name}_proj"])
            head_dim = layer.self_attn.head_dim
            measured = output.pow(2).mean().sqrt().expand(head_dim)
            pair.append(measured if norm is None else _norm_scale(norm))
        scales.append((pair[0], pair[1]))
    return scales
