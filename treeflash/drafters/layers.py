"""The transformer layers of drafters, written once for PyTorch and MLX.

`treeflash.drafters.heads.operations` tells how a framework's module is made of a class. A layer
gets what depends on a backend's KV cache as a function: `Attend` writes keys and values, and
attends to what the cache has. Rows are (n, hidden_size), or (batch, n, hidden_size).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from treeflash.drafters.config import DrafterShape
from treeflash.drafters.heads.operations import Array, Module, Operations

Attend: TypeAlias = Callable[[Array, Array, Array], Array]
"""From (batch, heads, n, head_dim) queries, and the keys and values of new rows, to the
(..., n, heads, head_dim) attention."""
Rotation: TypeAlias = Any
"""What the rotary embedding of a backend needs of n positions."""
NormBuilder: TypeAlias = Callable[[int, float], Module]
"""`Builders.rms_norm` or `Builders.float32_norm`."""


def by_head(x: Array) -> Array:
    """Return (batch, heads, n, head_dim) from (..., n, heads, head_dim)."""
    return x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2)


class Attention:
    """Queries, keys and values of rows, by head.

    Args:
        config: the drafter's.
        norm: builds the norms of queries and keys; None if they are not normed.
        inputs: width of a row that is read.
        queries: numbers of all heads that `q_proj` gives for a row.
        output_bias: whether `o_proj` has a bias.
    """

    ops: Operations

    def __init__(
        self,
        config: DrafterShape,
        norm: NormBuilder | None,
        *,
        inputs: int,
        queries: int,
        output_bias: bool,
    ) -> None:
        super().__init__()
        self.config, ops = config, self.ops
        d, bias, kv_heads = config.head_dim, config.attention_bias, config.num_key_value_heads
        self.q_proj = ops.linear(inputs, queries, bias=bias)
        self.k_proj = ops.linear(inputs, kv_heads * d, bias=bias)
        self.v_proj = None
        if not config.keys_are_values:
            self.v_proj = ops.linear(inputs, kv_heads * d, bias=bias)
        self.o_proj = ops.linear(config.num_attention_heads * d, config.hidden_size, output_bias)
        self.q_norm, self.k_norm = (
            None if norm is None else norm(d, config.rms_norm_eps) for _ in range(2)
        )
        self.rotate = ops.rotary(config)

    def queries(self, y: Array, rotation: Rotation | None) -> tuple[Array, Array | None]:
        """Return (batch, heads, n, head_dim) queries, and (..., n, heads, head_dim) gates if any.

        Without a rotation they are not normed either, and `keys_and_values` returns such keys.
        """
        q, gate = self._queries_and_gates(y)
        return self._turned(q, self.q_norm, rotation), gate

    def keys_and_values(self, y: Array, rotation: Rotation | None) -> tuple[Array, Array]:
        """Return the (batch, kv_heads, n, head_dim) each, of n rows."""
        k = self._heads(self.k_proj(y))
        v = k if self.v_proj is None else self._heads(self.v_proj(y))
        if self.config.gemma4:
            v = self.ops.normed(v, self.config.rms_norm_eps)
        return self._turned(k, self.k_norm, rotation), by_head(v)

    def output(self, attended: Array, gate: Array | None) -> Array:
        """Return (..., n, hidden_size) from the (..., n, heads, head_dim) attention of rows."""
        if gate is not None:
            attended = attended * self.ops.sigmoid(gate)
        return self.o_proj(attended.reshape(*attended.shape[:-2], -1))

    def _queries_and_gates(self, y: Array) -> tuple[Array, Array | None]:
        """Return the (..., n, heads, head_dim) each; no gates if there are none."""
        raise NotImplementedError

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.config.head_dim)

    def _turned(self, x: Array, norm: Module | None, rotation: Rotation | None) -> Array:
        if rotation is None:
            return by_head(x)
        return self.rotate(x if norm is None else norm(x), rotation)


class Layer:
    """A pre-norm transformer layer.

    Args:
        config: the drafter's.
        attention: has the weights of the attention.
        network: the feed-forward network.
        norm: builds the norms.
        norms_input: whether the layer norms its input; EAGLE-3's only layer reads a normed one.
    """

    ops: Operations

    def __init__(
        self,
        config: DrafterShape,
        attention: Module,
        network: Module,
        *,
        norm: NormBuilder,
        norms_input: bool = True,
    ) -> None:
        super().__init__()
        h, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn, self.mlp = attention, network
        self.input_layernorm: Module = norm(h, eps) if norms_input else None
        self.post_attention_layernorm = norm(h, eps)

    def forward(self, x: Array, *attention: Any) -> Array:
        """Map (..., n, hidden_size) rows; `attention` is what the attention takes beside them."""
        return self.add(self.self_attn(self.input_layernorm(x), *attention), x)

    def finish(self, attended: Array, gate: Array | None, residual: Array) -> Array:
        """Return (..., n, hidden_size) outputs of rows, from what `Attention.output` takes."""
        return self.add(self.self_attn.output(attended, gate), residual)

    def add(self, y: Array, residual: Array) -> Array:
        """Return (..., n, hidden_size) outputs of rows, from the output of their attention."""
        x = residual + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Gemma4Layer(Layer):
    """Gemma 4's layer with full attention: the outputs of sublayers are normed too."""

    def __init__(
        self, config: DrafterShape, *parts: Module, norm: NormBuilder, **options: bool
    ) -> None:
        super().__init__(config, *parts, norm=norm, **options)
        size = config.hidden_size, config.rms_norm_eps
        self.pre_feedforward_layernorm = norm(*size)
        self.post_feedforward_layernorm = norm(*size)
        self.layer_scalar = self.ops.parameter(1)

    def add(self, y: Array, residual: Array) -> Array:
        x = residual + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return (x + self.post_feedforward_layernorm(y)) * self.layer_scalar
