"""The weights of a one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash.config import DrafterConfig

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


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
