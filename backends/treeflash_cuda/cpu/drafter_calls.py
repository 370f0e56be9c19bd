"""The layers of a block drafter as one call, and the norms outside of it, compiled.

`LayerCalls` runs the layers. The rows of a pass are the blocks of its sequences, and then the
context: projected features of the positions that are new since their last draft. Results are the
modules' but for rounding, because rotations and attention add in another order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from treeflash.drafters.config import DrafterConfig, LayerKind
from treeflash_cuda.cache import KVCache
from treeflash_cuda.cpu import layer_code
from treeflash_cuda.cpu.decoder_target import CpuTarget
from treeflash_cuda.cpu.layer_calls import CalledLayer, LayerCalls, LayerStack, products_of
from treeflash_cuda.cpu.layer_kernels import LayerKernels, SequencesTable, layer_kernels
from treeflash_cuda.drafter_model import DrafterModel, RMSNorm
from treeflash_cuda.target import Target

ROPE = 0
"""The index of the only rotation of a pass."""


class BlockCalls:
    """The calls of a drafter's layers, for its blocks and their context."""

    def __init__(self, model: DrafterModel, calls: LayerCalls) -> None:
        self.model, self.calls = model, calls

    @classmethod
    def of(cls, model: DrafterModel, dtype: torch.dtype) -> BlockCalls | None:
        """Return the calls of a drafter with rows of a dtype; None if its modules have to run."""
        config = model.config
        if dtype != torch.float32 or _differs(config):
            return None
        layers = []
        for module, kind in zip(model.layers, config.layer_kinds, strict=True):
            layer = _called(config, module, kind)
            if layer is None:
                return None
            layers.append(layer)
        sizes = config.hidden_size, config.intermediate_size
        kernels = layer_kernels(dtype, dtype, layer_code.LayerKind(config.head_dim), sizes)
        if kernels is None:
            return None
        stack = LayerStack(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            activation="silu",
            eps=config.rms_norm_eps,
            score_scale=config.attention_scale,
            score_cap=None,
            dtype=dtype,
            layers=layers,
        )
        return cls(model, LayerCalls(stack, kernels))

    def run(
        self,
        x: Tensor,  # (t * S, hidden_size) embeddings of the blocks' tokens
        context: Tensor,  # (c, hidden_size)
        positions: Tensor,  # (c + t * S,) of the context, and then of the blocks
        sequences: Sequence[tuple[KVCache, int]],  # each with the position of its root
    ) -> Tensor:
        """Return the (t * S, hidden_size) outputs of the blocks; keys and values are written."""
        cos, sin = self.model.rotary(positions.roll(-len(context)), x.dtype)
        sin[:, : sin.shape[1] // 2].neg_()  # as `LayerKernels.turn` reads them
        attention = BlockAttention(self.model.config, sequences)
        y, residual, _ = self.calls.run(x, [(cos, sin)], attention, context=context)
        return y + residual


class BlockAttention:
    """Where the rows of drafts are in the sequences' KV caches, and which columns they see."""

    def __init__(self, config: DrafterConfig, sequences: Sequence[tuple[KVCache, int]]) -> None:
        self.size, heads = config.block_size, config.num_attention_heads
        self.from_root = config.window_from_root
        self.starts = np.array([start for _, start in sequences])
        blocks = [(cache, start, self.size) for cache, start in sequences]
        contexts = [(cache, cache.length, start - cache.length) for cache, start in sequences]
        self.places = SequencesTable.of([*blocks, *contexts], heads)
        self._seen = self.places.first(len(blocks))
        self._bounds: dict[LayerKind, Tensor] = {}

    def layout(self, seen: LayerKind) -> tuple[Tensor, SequencesTable]:
        """Return the first and last column of each slot in a kind of layer, and the table."""
        if seen not in self._bounds:
            self._bounds[seen] = self._make_bounds(*seen)
        return self._bounds[seen], self._seen

    def _make_bounds(self, window: int | None, is_causal: bool) -> Tensor:
        """Make the bounds of `LayerKernels.attend`; see `visible_positions`."""
        roots = np.repeat(self.starts, self.size)
        slots = (self.starts[:, None] + np.arange(self.size)).ravel()
        firsts, lasts = np.zeros_like(slots), roots + self.size - 1
        if window is not None and self.from_root:
            firsts = roots - window
        elif window is not None:
            firsts, lasts = slots - window + 1, np.minimum(slots + window - 1, lasts)
        lasts = slots if is_causal else lasts
        return torch.from_numpy(np.column_stack([firsts.clip(0), lasts]).astype(np.int32))


def _differs(config: DrafterConfig) -> bool:
    """Return whether layers have what the calls do not compute."""
    others = config.conv_kernel_size, config.gemma4, config.gated, config.attention_sinks
    return any(others) or config.keys_are_values


def _called(config: DrafterConfig, layer: Any, kind: LayerKind) -> CalledLayer | None:
    """Return a layer; None if it has a product that is no call."""
    attention, network = layer.self_attn, layer.mlp
    products = products_of(
        (
            ((attention.q_proj, attention.k_proj, attention.v_proj), "normed", "heads"),
            ((attention.o_proj,), "mixed", "y"),
            ((network.gate_proj, network.up_proj), "normed", "gate_up"),
            ((network.down_proj,), "active", "y"),
        )
    )
    if products is None:
        return None
    of_context = attention.k_proj, attention.v_proj
    counts = config.num_attention_heads, config.num_key_value_heads
    norms = attention.q_norm.weight, attention.k_norm.weight
    head_norms = [x.detach().expand(n, -1) for x, n in zip(norms, counts, strict=True)]
    return CalledLayer(
        input_norm=layer.input_layernorm.weight.detach(),
        network_norm=layer.post_attention_layernorm.weight.detach(),
        head_norms=torch.cat(head_norms),
        products=[x._replace(of_context=x.layer in of_context) for x in products],
        rope=ROPE,
        seen=kind,
    )


def compile_drafter(
    modules: Collection[nn.Module],  # the model, whose linear layers are packed, and its head
    target: Target,
) -> None:
    """Let compiled functions run a drafter's norms, and the layers of a block drafter."""
    for module in modules:
        if isinstance(target, CpuTarget) and target.kernels is not None:
            compile_norms(module, target.kernels, target.dtype)
        if isinstance(module, DrafterModel):
            module.calls = BlockCalls.of(module, target.dtype)


def compile_norms(module: nn.Module, kernels: LayerKernels, dtype: torch.dtype) -> None:
    """Let the norms inside a module that have rows of a dtype call compiled functions.

    A draft has few rows and many norms: PyTorch takes longer to begin them than to compute them.
    """
    for norm in module.modules():
        if isinstance(norm, RMSNorm):
            weight = norm.weight.detach()
            if weight.dtype == dtype and len(weight) % layer_code.LANES == 0:
                norm.compiled = partial(_rms_norm, kernels, weight.float(), norm.eps)


def _rms_norm(kernels: LayerKernels, weight: Tensor, eps: float, x: Tensor) -> Tensor:
    """Norm (..., size) numbers."""
    rows = x.reshape(-1, len(weight)).contiguous()
    return kernels.rms_norm(rows, weight, eps)[0].view(x.shape)
