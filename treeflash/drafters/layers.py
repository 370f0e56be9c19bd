"""The layers of drafters and the model of block drafters, written once for PyTorch and MLX.

`treeflash.drafters.heads.operations` tells how a framework's module is made of a class. A layer
gets what depends on a backend's KV cache as a function: `Attend` writes keys and values, and
attends to what the cache has. Rows are (n, hidden_size), or (batch, n, hidden_size).

The rows of a block drafter (DFlash, arXiv 2602.06036) are the root and masks. Keys and values come
from them and, before them, from the context: rows of projected features of positions that the
target has committed. Names of attributes are the canonical names of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from treeflash.drafters.config import DrafterConfig, DrafterShape, LayerKind
from treeflash.drafters.heads.operations import Array, Module, Operations

Attend: TypeAlias = Callable[[Array, Array, Array], Array]
"""From (batch, heads, n, head_dim) queries, and the keys and values of new rows, to the
(..., n, heads, head_dim) attention."""
Rotation: TypeAlias = Any
"""What the rotary embedding of a backend needs of n positions."""
NormBuilder: TypeAlias = Callable[[int, float], Module]
"""`Builders.rms_norm` or `Builders.float32_norm`."""
WithContext: TypeAlias = Callable[[Array], Array]
"""Puts the rows of the context beside the rows of blocks."""
Rotations: TypeAlias = tuple[Rotation | None, Rotation | None]
"""Rotations of the rows of blocks, and of what `WithContext` returns; None each if `Attend` norms
and turns queries and keys."""
Convolve: TypeAlias = Callable[[Array], Array]


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


class BlockAttention(Attention):
    """Queries from the blocks; keys and values from the context and the blocks."""

    def __init__(self, config: DrafterConfig) -> None:
        ops, q = self.ops, config.num_attention_heads * config.head_dim
        h, bias = config.hidden_size, config.attention_bias
        super().__init__(config, ops.rms_norm, inputs=h, queries=q, output_bias=bias)
        self.gate_proj = ops.linear(h, q, bias=bias) if config.gated else None
        # (heads,) scores of a key whose value is zero.
        self.attention_sink_bias = None
        if config.attention_sinks:
            self.attention_sink_bias = ops.parameter(config.num_attention_heads)

    def forward(
        self, y: Array, with_context: WithContext, rotations: Rotations, attend: Attend
    ) -> Array:
        """Map the (..., n, hidden_size) rows of blocks to their attention's output."""
        q, gate = self.queries(y, rotations[0])
        return self.output(attend(q, *self.keys_and_values(with_context(y), rotations[1])), gate)

    def _queries_and_gates(self, y: Array) -> tuple[Array, Array | None]:
        gate = None if self.gate_proj is None else self._heads(self.gate_proj(y))
        return self._heads(self.q_proj(y)), gate


class Convolution:
    """DFlash2's convolutions along a block, before and after a sublayer.

    Tap t reads the slot t slots back, never beyond the block. Its coefficients are the sum of a
    constant and of a linear function of the sublayer's normed input that groups of channels share.
    """

    ops: Operations

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        h, taps, ops = config.hidden_size, config.conv_kernel_size, self.ops
        self.block_size, self.group_size = config.block_size, config.conv_group_size
        self.base_kernel = ops.parameter(2, taps, h)
        self.kernel_projection = ops.linear(h, 2 * taps * h // self.group_size, bias=False)

    def forward(self, y: Array) -> tuple[Convolve, Convolve]:
        """Compute both convolutions from a sublayer's (..., n, hidden_size) normed input."""
        sides, taps, h = self.base_kernel.shape
        grouped = self.base_kernel.reshape(sides, taps, -1, self.group_size)
        added = self.kernel_projection(y).reshape(*y.shape[:-1], *grouped.shape[:-1], 1)
        kernels = (grouped + added).reshape(*y.shape[:-1], sides, taps, h)

        def convolution(side: int) -> Convolve:
            def convolve(x: Array) -> Array:
                blocks, out = x.reshape(-1, self.block_size, h), kernels[..., side, 0, :] * x
                for tap in range(1, taps):
                    shifted = self.ops.shift(blocks, tap).reshape(x.shape)
                    out = out + kernels[..., side, tap, :] * shifted
                return out

            return convolve

        return convolution(0), convolution(1)


class ConvolvedLayer(Layer):
    """A layer with convolutions before and after its attention and its feed-forward network."""

    def __init__(self, config: DrafterConfig, *parts: Module, norm: NormBuilder) -> None:
        super().__init__(config, *parts, norm=norm)
        self.attention_conv = self.ops.module(Convolution)(config)
        self.mlp_conv = self.ops.module(Convolution)(config)

    def forward(self, x: Array, *attention: Any) -> Array:
        y = self.input_layernorm(x)
        before, after = self.attention_conv(y)
        x = x + after(self.self_attn(before(y), *attention))
        y = self.post_attention_layernorm(x)
        before, after = self.mlp_conv(y)
        return x + after(self.mlp(before(y)))


def visible_positions(
    ops: Operations, config: DrafterConfig, start: int, kind: LayerKind, like: Array
) -> Array | None:
    """Return the (S, start + S) bool mask of a block at position `start`, on the device of `like`.

    None stands for a layer whose slots see all positions.
    """
    (window, causal), end = kind, start + config.block_size
    if window is not None and window >= end:
        window = None
    if window is None and not causal:
        return None
    keys = ops.arange(end, like)
    distance = keys[start:, None] - keys
    if window is None:
        return distance >= 0
    near = keys >= start - window if config.window_from_root else abs(distance) < window
    return near & (distance >= 0) if causal else ops.broadcast_to(near, distance.shape)


class BlockModel:
    """The weights of a block drafter; the embeddings and the output head are a backend's part.

    Each of `layers` maps the (..., n, hidden_size) rows of blocks, and takes what
    `BlockAttention.forward` does.
    """

    ops: Operations

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config, ops = config, self.ops
        h, eps = config.hidden_size, config.rms_norm_eps
        self.fc = ops.linear(len(config.target_layer_ids) * h, h, bias=False)
        self.hidden_norm = ops.rms_norm(h, eps)
        self.layers = ops.children([self._layer() for _ in range(config.num_hidden_layers)])
        self.norm = ops.rms_norm(h, eps)

    def project(self, features: Array) -> Array:
        """Project (..., layers * hidden_size) target outputs to (..., hidden_size) context."""
        return self.hidden_norm(self.fc(features))

    def _layer(self) -> Module:
        config, ops = self.config, self.ops
        kind: type[Layer] = ConvolvedLayer if config.conv_kernel_size else Layer
        if config.gemma4:
            kind = Gemma4Layer
        attention = ops.module(BlockAttention)(config)
        return ops.module(kind)(config, attention, ops.mlp(config), norm=ops.rms_norm)
