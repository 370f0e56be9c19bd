"""The layers of a model: whether they can run a draft tree, and hooks for their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from treeflash.decoding.recurrence import UNSUPPORTED, refusal
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.attention import capture_output

TREE_LAYERS = {"full_attention", "sliding_attention"}
RECURRENT_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
STATELESS_LAYERS = {"mlp", "moe"}
"""Of models in which feed-forward networks are layers of their own."""


def refuse_stateful(config: PreTrainedConfig) -> None:
    """Raise for layers whose state is of another kind, or that attend in chunks."""
    text = config.get_text_config()
    for name in (config.model_type, text.model_type):
        if name in UNSUPPORTED:
            raise UnsupportedModelError(refusal(name))
    known = TREE_LAYERS | RECURRENT_LAYERS | STATELESS_LAYERS
    if kinds := set(getattr(text, "layer_types", None) or ()) - known:
        raise UnsupportedModelError(
            refusal(config.model_type, f"they have {', '.join(sorted(kinds))} layers")
        )


def refuse_unknown_layers(model: Any, hooked: Mapping[int, set[str]]) -> None:
    """Raise for a model whose attention or recurrence cannot be led over a tree."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if hooked:  # `Target.prepare` checks their attention
        return
    if getattr(model, "_is_stateful", False) or kinds & RECURRENT_LAYERS:
        raise UnsupportedModelError(refusal(model.config.model_type))
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            refusal(
                model.config.model_type, "their layers do not support other attention functions"
            )
        )


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The layers of a decoder-only model, first to last; raise for other models."""
    layers: Sequence[nn.Module] | None = getattr(model.get_decoder(), "layers", None)
    if not layers:
        raise UnsupportedModelError(
            f"{model.config.model_type} models cannot run a draft tree: they have no decoder layers"
        )
    return layers


def capture_layers(layers: Sequence[nn.Module], layer_ids: Sequence[int]) -> None:
    """Give `capture_output` these layers' outputs in every forward pass; -1: the embeddings'."""

    def keep(layer_id: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            capture_output(layer_id, output[0] if isinstance(output, tuple) else output)

        return hook

    def keep_input(_: nn.Module, args: Any, kwargs: Any) -> None:
        capture_output(-1, args[0] if args else kwargs["hidden_states"])

    for layer_id in layer_ids:
        if layer_id == -1:
            layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
        else:
            layers[layer_id].register_forward_hook(keep(layer_id))
