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
from treeflash_cuda.attention import additive, folded, grouped_attention
from treeflash_cuda.cache import KeyValues
from treeflash_cuda.target import Target
from treeflash_cuda.topk import topk

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Block:
    """A drafted block: the root's token id, and (S, hidden_size) outputs of the last layer."""

    root: int
    hidden: Tensor


class Rotary:
    """Cosines and sines of positions. No module: frequencies stay float32 in a half model."""

    def __init__(self, config: DrafterConfig) -> None:
        """Take the frequencies from the configuration."""
        self.scale = config.rope_scale
        self.inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(..., n, head_dim) each, from (..., n) positions."""
        angles = positions[..., None].float() * self.inv_freq.to(positions.device)
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of (..., n, head_dim), the two halves of a head paired."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class RMSNorm(nn.RMSNorm):
    """In the precision of its weight: the same when decoding, float32 in mixed training."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to the same."""
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
        """(..., hidden_size) to the same."""
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
        """(batch, n, hidden_size) to the same.

        Args:
            x: the block.
            context: (batch, c, hidden_size) projected features of positions before it.
            rotation: of the context's positions and then the block's.
            attend: from queries of the block, and keys and values of both, to (batch, n, heads,
                head_dim).
        """
        y = self.input_layernorm(x)
        attention, n = self.self_attn, x.shape[1]
        of_block = rotation[0][..., -n:, :], rotation[1][..., -n:, :]
        keys_values = attention.keys_values(torch.cat([context, y], 1), rotation)
        seen = attend(attention.queries(y, of_block), *keys_values)
        x = x + attention.o_proj(seen.flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


class DrafterModel(nn.Module):
    """A drafter's weights, under the names that checkpoints give them."""

    def __init__(self, config: DrafterConfig) -> None:
        """Make the layers; the weights are to be loaded."""
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * h, h, bias=False)
        self.hidden_norm = RMSNorm(h, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(h, config.rms_norm_eps)
        self.rotary = Rotary(config)


class Drafter:
    """`treeflash.decoding.interfaces.Drafter` in PyTorch."""

    def __init__(self, model: DrafterModel, target: Target) -> None:
        """Start a text."""
        self.model = model
        self.target = target
        self.cache = KeyValues(model.config.num_hidden_layers)
        self.waiting: list[Tensor] = []

    def extend(self, features: Tensor) -> None:
        """See `Drafter.extend`; the next draft projects them, all at once."""
        self.waiting.append(features)

    @torch.inference_mode()
    def draft(self, features: Tensor, root: int) -> Block:
        """See `Drafter.draft`."""
        features = torch.cat([*self.waiting, features])
        self.waiting.clear()
        context = self.model.hidden_norm(self.model.fc(features))[None]
        config, first = self.model.config, self.cache.length
        device, size = self.target.device, config.block_size
        tokens = torch.full((size,), config.mask_token_id, device=device)
        tokens[0] = root
        x = F.embedding(tokens, self.target.embeddings)[None]
        if config.input_scale != 1:
            x = x * config.input_scale
        start = first + len(features)
        rotation = self.model.rotary(torch.arange(first, start + size, device=device), x.dtype)
        kinds = list(zip(config.sliding_windows, config.causal, strict=True))
        groups = config.num_attention_heads // config.num_key_value_heads
        biases = {
            kind: folded(block_bias(start, size, *kind, x.dtype, device), groups)
            for kind in set(kinds)
        }
        for n, (layer, kind) in enumerate(zip(self.model.layers, kinds, strict=True)):
            x = layer(x, context, rotation, functools.partial(self._attend, n, biases[kind]))
        # The block's own keys and values are scratch: the next context is written over them.
        self.cache.commit(np.arange(len(features), dtype=np.int32))
        return Block(root, x[0])

    @torch.inference_mode()
    def marginals(self, block: Block, k: int, temperature: float) -> TransitionTable:
        """See `Drafter.marginals`."""
        logits = self.target.output(self.model.norm(block.hidden[1:]))
        tokens, log_probs = top(logits, k, temperature)
        read = torch.cat([tokens, log_probs.view(torch.int32)], 1).cpu().numpy()
        k = tokens.shape[1]
        return TransitionTable.from_marginals(read[:, :k], read[:, k:].view(np.float32))

    @torch.inference_mode()
    def log_probs(self, block: Block) -> NDArray[np.float32]:
        """See `Drafter.log_probs`."""
        logits = self.target.output(self.model.norm(block.hidden[1:]))
        return logits.float().log_softmax(-1).cpu().numpy()

    def keys_values(self) -> NDArray[np.float32]:
        """See `Drafter.keys_values`."""
        return self.cache.read()

    def _attend(self, layer: int, bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a block to all before it and itself."""
        k, v = self.cache.attend(layer, k, v)
        return grouped_attention(q, k, v, bias, self.model.config.head_dim**-0.5)


def block_bias(
    start: int,
    size: int,
    window: int | None,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """(size, start + size) additive mask of a block from `start` on; None where all is seen."""
    if window is None and not causal:
        return None
    keys = torch.arange(start + size, device=device)
    distance = keys[start:, None] - keys
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        seen = seen & (distance.abs() < window)
    return additive(seen, dtype)


def divided(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32, divided by the temperature: a pass over them is saved where it is 1."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def top(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The best tokens of each row, best first, and their log probabilities.

    Args:
        logits: (n, vocab).
        k: the whole vocabulary where that is smaller.
        temperature: divides the logits.

    Returns:
        (n, k) int32, and (n, k) float32 nats.
    """
    scaled = divided(logits, temperature)
    best, tokens = topk(scaled, k)
    return tokens.int(), best - scaled.logsumexp(-1, keepdim=True)
