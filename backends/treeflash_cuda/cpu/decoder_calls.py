"""The layers of a decoder, as `LayerCalls` runs them."""

from __future__ import annotations

from torch import nn

from treeflash_cuda.cpu.layer_calls import CalledLayer, LayerStack, products_of
from treeflash_cuda.decoder.model import AttentionMixer, Decoder, DecoderLayer, Network
from treeflash_cuda.decoder.weights import Joined


def decoder_stack(decoder: Decoder) -> LayerStack | None:
    """Return a decoder's layers; None if their modules have to run."""
    facts = decoder.facts
    names = facts.norms
    if facts.experts is not None or facts.factors.sublayers != 1:
        return None
    if facts.delta_nets is not None or facts.gates_attention:
        return None
    if names.attention_output or names.network_output:
        return None
    layers = []
    for module, rope, window in zip(decoder.layers, facts.rotated, facts.windows, strict=True):
        layer = _called(module, rope, window)
        if layer is None:
            return None
        layers.append(layer)
    return LayerStack(
        hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        activation=facts.activation,
        eps=facts.eps,
        score_scale=facts.score_scale,
        score_cap=facts.factors.score_cap,
        dtype=decoder.scale.dtype,
        layers=layers,
    )


def _called(layer: nn.Module, rope: int | None, window: int | None) -> CalledLayer | None:
    """Return a layer; None if it has no norm before a sublayer, or a product that is no call."""
    assert isinstance(layer, DecoderLayer)
    assert isinstance(layer.mixer, AttentionMixer)
    assert isinstance(layer.network, Network)
    if layer.input_norm is None or layer.network_norm is None:
        return None
    products = products_of(
        (
            (_parts(layer.mixer.qkv), "normed", "heads"),
            (_parts(layer.mixer.o_proj), "mixed", "y"),
            (_parts(layer.network.gate_up), "normed", "gate_up"),
            (_parts(layer.network.down), "active", "y"),
        )
    )
    if products is None:
        return None
    norms = layer.input_norm, layer.network_norm, layer.mixer.head_norms
    return CalledLayer(*norms, products, rope, window)


def _parts(module: nn.Module) -> list[nn.Module]:
    return list(module.parts) if isinstance(module, Joined) else [module]
