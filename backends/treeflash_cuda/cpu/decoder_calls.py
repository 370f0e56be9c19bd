"""A decoder by compiled functions: its layers for `LayerCalls`, and the attention of its passes.

The attention of all sequences is one call in each layer. A row has equal bits whatever else is in
the pass, so this is the attention of exact mode as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from treeflash_cuda.cpu.decoder_attention import CacheBlock, sees
from treeflash_cuda.cpu.layer_calls import CalledLayer, LayerStack, products_of
from treeflash_cuda.cpu.layer_kernels import LayerKernels, SequencesTable
from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.model import AttentionMixer, Decoder, DecoderLayer, Network
from treeflash_cuda.decoder.operations import Rotation
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


class KernelAttention:
    """`Attention` over the columns of the sequences."""

    def __init__(
        self, facts: DecoderFacts, blocks: Sequence[CacheBlock], *, kernels: LayerKernels
    ) -> None:
        self.kernels, self.facts, self.blocks = kernels, facts, blocks
        self.heads = facts.heads
        segments = [(block.cache, block.committed, len(block)) for block in blocks]
        self.places = SequencesTable.of(segments, facts.heads)
        # By window: the columns that each row sees, and the table with what it masks.
        self._layouts: dict[int | None, tuple[Tensor, SequencesTable]] = {}

    def turn(
        self,
        layer: int,
        heads: Tensor,
        rotation: Rotation | None,
        norms: Tensor | None,
        eps: float,
    ) -> Tensor:
        self.kernels.turn(heads, rotation, norms, eps, self.places, layer)
        return heads[:, : self.heads]

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        bounds, table = self.layout(window)
        factors = self.facts.score_scale, self.facts.factors.score_cap
        return self.kernels.attend(queries, bounds, table, layer, *factors)

    def layout(self, window: int | None) -> tuple[Tensor, SequencesTable]:
        """Return the bounds of what each row sees in a window, and the table with masks."""
        if window not in self._layouts:
            self._layouts[window] = self._make_layout(window)
        return self._layouts[window]

    def _make_layout(self, window: int | None) -> tuple[Tensor, SequencesTable]:
        masks = [self._mask(block, window) for block in self.blocks]
        has_masks = any(mask is not None for mask in masks)
        table = self.places.with_masks(masks) if has_masks else self.places
        bounds = []
        for block in self.blocks:
            lasts = block.committed + torch.arange(len(block))
            firsts = torch.zeros_like(lasts)
            if window is not None:
                firsts = (block.positions - window + 1).clamp(min=0)
            bounds.append(torch.stack([firsts, lasts], 1))
        return torch.cat(bounds).int(), table

    def _mask(self, block: CacheBlock, window: int | None) -> Tensor | None:
        """Return the (n, n) bytes that say which new columns rows see; None up to their own."""
        if block.ancestors is None:
            return None
        visible = block.ancestors & sees(window, block.positions[:, None], block.positions)
        return visible.to(torch.uint8).contiguous()
