"""The model of block drafters (DFlash, arXiv 2602.06036), written once for PyTorch and MLX.

The rows of a block are the root and masks. Keys and values come from them and, before them, from
the context: rows of projected features of positions that the target has committed. Names of
attributes are the canonical names of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from treeflash.drafters.config import DrafterConfig, LayerKind
from treeflash.drafters.heads.operations import Array, Module, Operations
from treeflash.drafters.layers import Attend, Attention, Gemma4Layer, Layer, NormBuilder, Rotation

WithContext: TypeAlias = Callable[[Array], Array]
"""Puts the rows of the context beside the rows of blocks."""
Rotations: TypeAlias = tuple[Rotation | None, Rotation | None]
"""Of the rows of blocks, and of what `WithContext` returns; None each if `Attend` norms and turns
queries and keys."""
Convolve: TypeAlias = Callable[[Array], Array]


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
