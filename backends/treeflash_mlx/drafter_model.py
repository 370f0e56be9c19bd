"""The model of a one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models import gemma3_text, qwen3

from treeflash.drafters.config import DrafterConfig, DrafterShape
from treeflash_mlx.target import Target

Attend: TypeAlias = Callable[[mx.array, mx.array, mx.array], mx.array]
Convolve: TypeAlias = Callable[[mx.array], mx.array]


class Rope(nn.Module):
    """Rotates the first channels of heads, each row by its own position."""

    def __init__(self, config: DrafterShape) -> None:
        super().__init__()
        # Wavelengths are no parameters, and so stay float32 if the model is cast to half precision.
        self._wavelengths = 1 / mx.array(config.inv_freq, mx.float32)
        mx.eval(self._wavelengths)  # only the thread that makes a lazy array can evaluate it
        self._axes = None  # (head_dim,) the axis that turns each channel; None if there is one
        if config.rotary_axes is not None:
            rest = config.head_dim - 2 * len(config.rotary_axes)
            self._axes = mx.array([*config.rotary_axes * 2, *[0] * rest])
            mx.eval(self._axes)
        self._scales = None
        if config.rope_scale != 1:
            width = 2 * len(config.inv_freq)
            scales = [config.rope_scale] * width + [1.0] * (config.head_dim - width)
            self._scales = mx.array(scales)

    def __call__(self, x: mx.array, positions: mx.array) -> mx.array:
        """Return the (1, heads, n, head_dim) from (n, heads, head_dim).

        The positions are (n,), or (3, n) of time, height and width.
        """
        time, *others = positions if positions.ndim == 2 else [positions]
        rotated = self._turn(x, time)
        if self._axes is not None:
            for axis, other in enumerate(others, 1):
                rotated = mx.where(self._axes == axis, self._turn(x, other), rotated)
        return rotated if self._scales is None else rotated * self._scales.astype(x.dtype)

    def _turn(self, x: mx.array, positions: mx.array) -> mx.array:
        return mx.fast.rope(
            x[:, :, None],  # a rope has one offset per batch entry, which is a row here
            2 * len(self._wavelengths),
            traditional=False,
            base=None,
            scale=1.0,
            offset=positions,
            freqs=self._wavelengths,
        ).swapaxes(0, 2)


class Attention(nn.Module):
    """Queries from the blocks; keys and values from the context and the blocks."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5  # factor on the scores
        h, bias = config.hidden_size, config.attention_bias
        q, kv = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(h, q, bias=bias)
        self.gate_proj = nn.Linear(h, q, bias=bias) if config.gated else None
        self.k_proj = nn.Linear(h, kv, bias=bias)
        self.v_proj = nn.Linear(h, kv, bias=bias)
        self.o_proj = nn.Linear(q, h, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.rope = Rope(config)
        # (heads,) scores of a key whose value is zero.
        sinks = mx.zeros(config.num_attention_heads) if config.attention_sinks else None
        self.attention_sink_bias: mx.array | None = sinks

    def __call__(
        self,
        y: mx.array,
        contexts: Sequence[mx.array],
        block_positions: mx.array,
        row_positions: mx.array,
        attend: Attend,
    ) -> mx.array:
        """Map the (batch * S, hidden_size) input of a layer's attention; see `Layer.__call__`."""
        pairs = zip(contexts, mx.split(y, len(contexts)), strict=True)
        rows = mx.concatenate([part for pair in pairs for part in pair])
        queries = self.queries(y, block_positions)
        out = attend(queries, *self.keys_and_values(rows, row_positions))
        if self.gate_proj is not None:
            out = out * mx.sigmoid(self.gate_proj(y))
        return self.o_proj(out)

    def queries(self, x: mx.array, positions: mx.array) -> mx.array:
        """Return the (1, heads, n, head_dim) of n rows."""
        queries = self.q_proj(x).reshape(len(x), -1, self.head_dim)
        return self.rope(self.q_norm(queries), positions)

    def keys_and_values(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Return the (1, kv_heads, n, head_dim) each, of n rows of context and blocks."""
        keys = self.k_proj(x).reshape(len(x), -1, self.head_dim)
        values = self._values(x, keys).swapaxes(0, 1)[None]
        return self.rope(self.k_norm(keys), positions), values

    def _values(self, x: mx.array, keys: mx.array) -> mx.array:
        values: mx.array = self.v_proj(x).reshape(keys.shape)
        return values


class Gemma4Attention(Attention):
    """Gemma 4's attention: normed values, which may be the projected keys, and plain scores."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.scale = 1.0
        self.eps = config.rms_norm_eps
        if config.keys_are_values:
            self.v_proj = None

    def _values(self, x: mx.array, keys: mx.array) -> mx.array:
        values = keys if self.v_proj is None else super()._values(x, keys)
        return mx.fast.rms_norm(values, None, self.eps)


def mlp(config: DrafterShape) -> nn.Module:
    """Make the feed-forward network of a layer: SwiGLU, or Gemma's gated GELU."""
    kind = gemma3_text.MLP if config.gemma4 else qwen3.MLP
    made: nn.Module = kind(config.hidden_size, config.intermediate_size)
    return made


class Convolution(nn.Module):
    """DFlash2's convolutions along a block, before and after a sublayer.

    Tap i looks i slots back, never beyond the block. Its coefficients are the sum of a constant and
    of a linear function of the sublayer's normed input, which groups of channels share.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        h, taps = config.hidden_size, config.conv_kernel_size
        self.block_size, self.group_size = config.block_size, config.conv_group_size
        self.base_kernel = mx.zeros((2, taps, h))
        outputs = 2 * taps * h // self.group_size
        self.kernel_projection = nn.Linear(h, outputs, bias=False)

    def __call__(self, y: mx.array) -> tuple[Convolve, Convolve]:
        """Compute both convolutions from a sublayer's (batch * S, hidden_size) normed input."""
        sides, taps, h = self.base_kernel.shape
        groups = self.kernel_projection(y).reshape(-1, sides, taps, h // self.group_size)
        kernels = self.base_kernel + mx.repeat(groups, self.group_size, -1)

        def convolution(side: int) -> Convolve:
            def convolve(x: mx.array) -> mx.array:
                blocks, size = x.reshape(-1, self.block_size, h), self.block_size
                out = kernels[:, side, 0] * x
                for tap in range(1, taps):
                    shifted = mx.pad(blocks, [(0, 0), (tap, 0), (0, 0)])[:, :size]
                    out = out + kernels[:, side, tap] * shifted.reshape(-1, h)
                return out

            return convolve

        return convolution(0), convolution(1)


def _identity(x: mx.array) -> mx.array:
    return x


class Layer(nn.Module):
    """A pre-norm transformer layer like Qwen3's."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = mlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        convolves = config.conv_kernel_size > 0
        self.attention_conv = Convolution(config) if convolves else None
        self.mlp_conv = Convolution(config) if convolves else None

    def __call__(
        self,
        x: mx.array,
        contexts: Sequence[mx.array],
        block_positions: mx.array,
        row_positions: mx.array,
        attend: Attend,
    ) -> mx.array:
        """Map (batch * S, hidden_size) to (batch * S, hidden_size), of the blocks.

        The rows of a sequence are its new context, (n, hidden_size) projected features of positions
        before its block that the drafter has not read yet, followed by its block. `attend` returns
        (batch * S, heads * head_dim), from queries of the blocks and keys and values of the rows.
        """
        y = self.input_layernorm(x)
        before, after = self.attention_conv(y) if self.attention_conv else (_identity, _identity)
        x = x + after(self.self_attn(before(y), contexts, block_positions, row_positions, attend))
        y = self.post_attention_layernorm(x)
        before, after = self.mlp_conv(y) if self.mlp_conv else (_identity, _identity)
        return x + after(self.mlp(before(y)))


class Gemma4Layer(nn.Module):
    """Gemma 4's layer with full attention: the outputs of sublayers are normed too."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = Gemma4Attention(config)
        self.mlp = mlp(config)
        size = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(*size)
        self.post_attention_layernorm = nn.RMSNorm(*size)
        self.pre_feedforward_layernorm = nn.RMSNorm(*size)
        self.post_feedforward_layernorm = nn.RMSNorm(*size)
        self.layer_scalar = mx.ones(1)

    def __call__(self, x: mx.array, *rows: Any) -> mx.array:
        """Map (batch * S, hidden_size) to (batch * S, hidden_size) as `Layer.__call__` does."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), *rows))
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return (x + self.post_feedforward_layernorm(y)) * self.layer_scalar


class OwnVocabulary(nn.Module):
    """The embeddings, output head and token map of a drafter that does not use the target's.

    A part that is the target's is None.
    """

    embed_tokens: nn.Embedding | None  # (vocab, hidden_size)
    lm_head: nn.Linear | None  # (Vd, hidden_size)

    def __init__(self, tensors: Mapping[str, mx.array], target: Target) -> None:
        super().__init__()
        self.embed_tokens = self.lm_head = None
        embeddings, head = tensors.get("embed_tokens.weight"), tensors.get("lm_head.weight")
        if embeddings is not None and _differs(embeddings, target.embedding):
            self.embed_tokens = nn.Embedding(*embeddings.shape)
            self.embed_tokens.weight = embeddings.astype(target.dtype)
        if head is not None and _differs(head, target.output_module):
            self.lm_head = nn.Linear(*head.shape[::-1], bias=False)
            self.lm_head.weight = head.astype(target.dtype)
        offsets = tensors.get("d2t")
        ids = None if offsets is None else offsets + mx.arange(len(offsets), dtype=offsets.dtype)
        self._token_ids = None if ids is None else ids.astype(mx.int32)
        mx.eval(self._token_ids)  # only the thread that makes a lazy array can evaluate it

    @property
    def token_ids(self) -> mx.array | None:
        """(Vd,) int32 target ids of the tokens that the drafter can propose; None for all."""
        return self._token_ids


CHUNK = 4096
"""Rows of a quantised table that are compared at once."""


def _differs(weight: mx.array, module: Any) -> bool:
    """Return whether a weight differs from a module's weight by more than rounding.

    That is rounding to the dtype of the module's weight, or to its bits if it is quantised.
    """
    if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return not mx.array_equal(weight.astype(module.weight.dtype), module.weight).item()
    if len(weight) != len(module.weight):
        return True
    # Normal weights in groups of 64 have an error of 1.5 / 2**bits, other weights of more than 1.
    most = 3 / 2**module.bits
    return not all(
        _quantisation_error(weight, module, first) <= most for first in range(0, len(weight), CHUNK)
    )


def _quantisation_error(weight: mx.array, module: Any, first: int) -> float:
    """Measure the error of a module's quantised rows from `first` on, relative to a weight's."""
    rows = slice(first, first + CHUNK)
    expected = weight[rows].astype(mx.float32)
    biases = None if module.biases is None else module.biases[rows]
    options = module.group_size, module.bits, module.mode
    found = mx.dequantize(module.weight[rows], module.scales[rows], biases, *options)
    if found.shape != expected.shape:
        return math.inf
    error = mx.linalg.norm(found.astype(mx.float32) - expected) / mx.linalg.norm(expected)
    return float(np.array(error))


class VocabularyOwner(nn.Module):
    """A drafter's model that has the parts of the vocabulary that are not the target's."""

    _own: OwnVocabulary  # loaded already, so not among the parameters

    @property
    def own(self) -> OwnVocabulary:
        return self._own


class DrafterModel(VocabularyOwner):
    """A drafter's weights, under their names in checkpoints."""

    def __init__(self, config: DrafterConfig, own: OwnVocabulary) -> None:
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * h, h, bias=False)
        self.hidden_norm = nn.RMSNorm(h, config.rms_norm_eps)
        layer = Gemma4Layer if config.gemma4 else Layer
        self.layers = [layer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(h, config.rms_norm_eps)
        self._own = own

    def project(self, features: mx.array) -> mx.array:
        """Project (n, layers * hidden_size) target outputs to (n, hidden_size) context."""
        return self.hidden_norm(self.fc(features))
