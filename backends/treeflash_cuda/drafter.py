"""The one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.config import DrafterConfig
from treeflash.decoding.transitions import TransitionTable
from treeflash_cuda.attention import additive_mask, group_mask, grouped_attention
from treeflash_cuda.cache import KeyValues
from treeflash_cuda.target import Target
from treeflash_cuda.topk import top_log_probs

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Block:
    """A drafted block.

    Attributes:
        root: token id of the first position.
        hidden: (S, hidden_size) outputs of the last layer.
    """

    root: int
    hidden: Tensor


class Rotary(nn.Module):
    """Cosines and sines of positions, from frequencies in float32 whatever the model's dtype."""

    inv_freq: Tensor

    def __init__(self, config: DrafterConfig) -> None:
        """Read the frequencies from the configuration."""
        super().__init__()
        self.scale = config.rope_scale
        inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Follow the model to its device, but not to its dtype."""
        self.inv_freq = self.inv_freq.to(fn(self.inv_freq).device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(..., n, head_dim) each, from (..., n) positions."""
        angles = positions[..., None].float() * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of (..., n, head_dim); element i is paired with i + head_dim / 2."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its weight, which stays float32 in mixed-precision training."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to (..., size)."""
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Queries from the block; keys and values from the context and the block."""

    def __init__(self, config: DrafterConfig) -> None:
        """Make the projections."""
        super().__init__()
        self.head_dim = config.head_dim
        h, bias = config.hidden_size, config.attention_bias
        q, kv = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(h, q, bias)
        self.k_proj = nn.Linear(h, kv, bias)
        self.v_proj = nn.Linear(h, kv, bias)
        self.o_proj = nn.Linear(q, h, bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def queries(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """(batch, heads, n, head_dim) from (batch, n, hidden_size)."""
        return rotate(self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2), rotation)

    def keys_values(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(batch, kv_heads, n, head_dim) each, of context and block."""
        keys = rotate(self.k_norm(self._heads(self.k_proj(x))).transpose(1, 2), rotation)
        return keys, self._heads(self.v_proj(x)).transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterConfig) -> None:
        """Make the projections."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) to (..., hidden_size)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A pre-norm transformer layer, Qwen3's."""

    def __init__(self, config: DrafterConfig) -> None:
        """Make the parts."""
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, context: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        """(batch, n, hidden_size) to (batch, n, hidden_size).

        Args:
            x: (batch, n, hidden_size) the block.
            context: (batch, c, hidden_size) projected features of the positions before it.
            rotation: of the context's positions and then the block's.
            attend: queries of the block, and keys and values of context and block, to
                (batch, n, heads, head_dim).
        """
        y = self.input_layernorm(x)
        attention, n = self.self_attn, x.shape[1]
        block_rotation = rotation[0][..., -n:, :], rotation[1][..., -n:, :]
        keys_values = attention.keys_values(torch.cat([context, y], 1), rotation)
        out = attend(attention.queries(y, block_rotation), *keys_values)
        x = x + attention.o_proj(out.flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


class DrafterModel(nn.Module):
    """A drafter's weights, under their names in checkpoints."""

    def __init__(self, config: DrafterConfig) -> None:
        """Make the layers; the weights are loaded afterwards."""
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * h, h, bias=False)
        self.hidden_norm = RMSNorm(h, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(h, config.rms_norm_eps)
        self.rotary = Rotary(config)

    def project(self, features: Tensor) -> Tensor:
        """(..., hidden_size) context, from (..., layers * hidden_size) outputs of the target."""
        context: Tensor = self.hidden_norm(self.fc(features))
        return context


class Drafter:
    """`treeflash.decoding.interfaces.Drafter` in PyTorch; its features are projected context."""

    def __init__(self, model: DrafterModel, target: Target) -> None:
        """Start a text."""
        self.model = model
        self.target = target
        self.cache = KeyValues(model.config.num_hidden_layers)
        self.waiting: list[Tensor] = []

    def extend(self, features: Tensor) -> None:
        """See `Drafter.extend`; the next draft computes their keys and values."""
        self.waiting.append(features)

    @torch.inference_mode()
    def draft(self, features: Tensor, root: int) -> Block:
        """See `Drafter.draft`."""
        context = torch.cat([*self.waiting, features])[None]
        self.waiting.clear()
        config, first = self.model.config, self.cache.length
        device, size = self.target.device, config.block_size
        tokens = torch.full((size,), config.mask_token_id, device=device)
        tokens[0] = root
        x = self.target.embed(tokens)[None]
        if config.input_scale != 1:
            x = x * config.input_scale
        start = first + context.shape[1]
        rotation = self.model.rotary(torch.arange(first, start + size, device=device), x.dtype)
        kinds = list(zip(config.sliding_windows, config.causal, strict=True))
        groups = config.num_attention_heads // config.num_key_value_heads
        masks = {
            kind: group_mask(block_mask(start, size, *kind, x.dtype, device), groups)
            for kind in set(kinds)
        }
        for n, (layer, kind) in enumerate(zip(self.model.layers, kinds, strict=True)):
            x = layer(x, context, rotation, functools.partial(self._attend, n, masks[kind]))
        # The block's keys and values are scratch: the next context overwrites them.
        self.cache.commit(np.arange(context.shape[1], dtype=np.int32))
        return Block(root, x[0])

    @torch.inference_mode()
    def marginals(self, block: Block, k: int, temperature: float) -> TransitionTable:
        """See `Drafter.marginals`."""
        logits = self.target.output_head(self.model.norm(block.hidden[1:]))
        tokens, log_probs = top_log_probs(logits, k, temperature)
        # One read from the device for both.
        read = torch.cat([tokens, log_probs.view(torch.int32)], 1).cpu().numpy()
        k = tokens.shape[1]
        return TransitionTable.from_marginals(read[:, :k], read[:, k:].view(np.float32))

    @torch.inference_mode()
    def log_probs(self, block: Block) -> NDArray[np.float32]:
        """See `Drafter.log_probs`."""
        logits = self.target.output_head(self.model.norm(block.hidden[1:]))
        return logits.float().log_softmax(-1).cpu().numpy()

    def keys_values(self) -> NDArray[np.float32]:
        """See `Drafter.keys_values`."""
        return self.cache.read()

    def _attend(self, layer: int, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a block over everything before it and itself."""
        k, v = self.cache.update(layer, k, v)
        return grouped_attention(q, k, v, mask, self.model.config.head_dim**-0.5)


def block_mask(
    start: int,
    size: int,
    window: int | None,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """(size, start + size) additive mask of a block at `start`; None if everything is visible."""
    if window is None and not causal:
        return None
    keys = torch.arange(start + size, device=device)
    distance = keys[start:, None] - keys
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        visible = visible & (distance.abs() < window)
    return additive_mask(visible, dtype)
