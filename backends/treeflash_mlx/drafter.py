"""The one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from treeflash.config import DrafterConfig
from treeflash.decoding.transitions import TransitionTable
from treeflash_mlx.cache import KeyValues
from treeflash_mlx.target import Target
from treeflash_mlx.topk import log_softmax, top_log_probs


@dataclass(frozen=True, eq=False)
class Block:
    """A drafted block: the root's token id, and (S, hidden_size) outputs of the last layer."""

    root: int
    hidden: mx.array


class Attention(nn.Module):
    """Queries from the block; keys and values from the context and the block."""

    def __init__(self, config: DrafterConfig) -> None:
        """Make the projections."""
        super().__init__()
        self.head_dim, self.rope_scale = config.head_dim, config.rope_scale
        h, bias = config.hidden_size, config.attention_bias
        q, kv = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(h, q, bias=bias)
        self.k_proj = nn.Linear(h, kv, bias=bias)
        self.v_proj = nn.Linear(h, kv, bias=bias)
        self.o_proj = nn.Linear(q, h, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        # Not a parameter: it stays float32 if the model is cast to half precision.
        self._wavelengths = 1 / mx.array(config.inv_freq, mx.float32)
        mx.eval(self._wavelengths)  # only the thread that makes a lazy array can evaluate it

    def __call__(
        self, x: mx.array, context: mx.array, cache: KeyValues, start: int, mask: mx.array | None
    ) -> mx.array:
        """Attend from a block to the cached context, the new context and the block.

        Args:
            x: (S, hidden_size) the block, normalised.
            context: (n, hidden_size) projected features of the n positions before it, whose
                keys and values enter the cache.
            cache: keys and values of the positions before those.
            start: the block's first position.
            mask: (S, start + S) bool, or None if the block attends to everything.
        """
        rows = mx.concatenate([context, x])
        first = start - context.shape[0]
        q = self._rotate(self.q_norm(self._heads(self.q_proj(x))), start)
        k = self._rotate(self.k_norm(self._heads(self.k_proj(rows))), first)
        # The block's keys and values are scratch: the next context overwrites them.
        cache.put(first, [k, self._heads(self.v_proj(rows))])
        keys, values = cache.until(start + x.shape[0])
        out = mx.fast.scaled_dot_product_attention(
            q, keys, values, scale=self.head_dim**-0.5, mask=mask
        )
        y: mx.array = self.o_proj(out[0].swapaxes(0, 1).reshape(x.shape[0], -1))
        return y

    def _heads(self, x: mx.array) -> mx.array:
        """(1, heads, n, head_dim)."""
        return x.reshape(1, x.shape[0], -1, self.head_dim).swapaxes(1, 2)

    def _rotate(self, x: mx.array, first: int) -> mx.array:
        rotated = mx.fast.rope(
            x,
            self.head_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=first,
            freqs=self._wavelengths,
        )
        return rotated if self.rope_scale == 1 else rotated * self.rope_scale


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterConfig) -> None:
        """Make the projections."""
        super().__init__()
        h, i = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(h, i, bias=False)
        self.up_proj = nn.Linear(h, i, bias=False)
        self.down_proj = nn.Linear(i, h, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., hidden_size) to (..., hidden_size)."""
        y: mx.array = self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: DrafterConfig) -> None:
        """Make its parts."""
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self, x: mx.array, context: mx.array, cache: KeyValues, start: int, mask: mx.array | None
    ) -> mx.array:
        """See `Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), context, cache, start, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class DrafterModel(nn.Module):
    """The parameters of a drafter without its AR head, named as in a checkpoint."""

    def __init__(self, config: DrafterConfig) -> None:
        """Make its parts."""
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * h, h, bias=False)
        self.hidden_norm = nn.RMSNorm(h, config.rms_norm_eps)
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(h, config.rms_norm_eps)

    def project(self, features: mx.array) -> mx.array:
        """(n, hidden_size) context from (n, layers * hidden_size) outputs of the target layers."""
        context: mx.array = self.hidden_norm(self.fc(features))
        return context

    def __call__(
        self, x: mx.array, context: mx.array, caches: list[KeyValues], start: int
    ) -> mx.array:
        """(S, hidden_size) outputs of the last layer, not normalised.

        Args:
            x: (S, hidden_size) embeddings of the root and the masks.
            context: (n, hidden_size) projected features of the n positions before the block.
            caches: per layer.
            start: the root's position.
        """
        for layer, cache, mask in zip(
            self.layers, caches, self._masks(start, x.shape[0]), strict=True
        ):
            x = layer(x, context, cache, start, mask)
        return x

    def _masks(self, start: int, n: int) -> list[mx.array | None]:
        """Per layer, (n, start + n) bool or None."""
        kinds = list(zip(self.config.sliding_windows, self.config.causal, strict=True))
        masks = {kind: _mask(start, n, *kind) for kind in set(kinds)}
        return [masks[kind] for kind in kinds]


def _mask(start: int, n: int, window: int | None, causal: bool) -> mx.array | None:
    """A block's attention mask; a window reaches fewer than `window` positions to each side."""
    if window is not None and window >= start + n:
        window = None
    if window is None and not causal:
        return None
    distance = mx.arange(start, start + n)[:, None] - mx.arange(start + n)
    mask = distance >= 0 if causal else mx.ones(distance.shape, mx.bool_)
    return mask if window is None else mask & (mx.abs(distance) < window)


class Drafter:
    """`treeflash.decoding.interfaces.Drafter` in MLX; its features are projected context."""

    def __init__(self, model: DrafterModel, target: Target) -> None:
        """Start a text."""
        self.model = model
        self.target = target
        self.caches = [KeyValues() for _ in model.layers]
        self.length = 0
        self.waiting: list[mx.array] = []

    def extend(self, features: mx.array) -> None:
        """See `Drafter.extend`; the next draft computes their keys and values."""
        self.waiting.append(features)

    def draft(self, features: mx.array, root: int) -> Block:
        """See `Drafter.draft`."""
        config = self.model.config
        context = mx.concatenate([*self.waiting, features])
        self.waiting.clear()
        self.length += context.shape[0]
        tokens = mx.array([root] + [config.mask_token_id] * (config.block_size - 1))
        x = self.target.embed(tokens)
        if config.input_scale != 1:
            x = x * config.input_scale
        return Block(root, self.model(x, context, self.caches, self.length))

    def marginals(self, block: Block, k: int, temperature: float) -> TransitionTable:
        """See `Drafter.marginals`."""
        k = min(k, self.target.vocab_size)
        logits = self.target.output_head(self.model.norm(block.hidden[1:]))
        tokens, log_probs = top_log_probs(logits, k, temperature)
        # Token ids are exact in float32, and one array needs one read from the device.
        read = np.array(mx.stack([tokens.astype(mx.float32), log_probs]))
        return TransitionTable.from_marginals(read[0].astype(np.int32), read[1])

    def log_probs(self, block: Block) -> NDArray[np.float32]:
        """See `Drafter.log_probs`."""
        return np.array(log_softmax(self.target.output_head(self.model.norm(block.hidden[1:]))))

    def keys_values(self) -> NDArray[np.float32]:
        """See `Drafter.keys_values`."""
        return np.array(
            mx.stack([mx.stack(c.until(self.length))[:, 0].astype(mx.float32) for c in self.caches])
        )
