"""The initial drafter: a checkpoint, the target's last layers, or random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters.formats import parse_drafter_config
from treeflash.errors import ConfigError
from treeflash.training.config import NEW, TrainConfig
from treeflash_cuda.attention import AttentionContext, attention_context
from treeflash_cuda.backend import load_drafter
from treeflash_cuda.corrections import Linear, SwiGLU
from treeflash_cuda.drafter_model import Convolution, DrafterModel
from treeflash_cuda.head_weights import MarkovWeights, SelectorWeights, make_module
from treeflash_cuda.target import Target

RANDOM_STD = 0.02
"""Standard deviation of random weights."""


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
        model.apply(_neutralise)
        if config.init == "target":
            _copy_layers(model, target, texts)
    else:
        model, old = load_drafter(Path(config.init), target)
        if old is not None and model.config.head == parsed.head:
            head = old.module.float()
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
        head = make_module(parsed, size, target.vocab_size)
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
    """The inner size of a head, if it has one."""
    if isinstance(head, MarkovWeights):
        return int(head.markov_w1.embedding_dim)
    if isinstance(head, SelectorWeights):
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
    elif isinstance(module, MarkovWeights):
        nn.init.zeros_(module.markov_w2.weight)
    elif isinstance(module, SelectorWeights):
        nn.init.normal_(module.predecessor_codebook)
        nn.init.zeros_(module.successor_codebook)
    elif isinstance(module, Convolution):
        nn.init.zeros_(module.base_kernel)
        nn.init.ones_(module.base_kernel[:, 0])
        nn.init.zeros_(module.kernel_projection.weight)


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
