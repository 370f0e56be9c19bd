"""The weights of a one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash.drafters.config import DrafterConfig, DrafterShape
from treeflash_cuda.operations import Operations
from treeflash_cuda.target import Target

M = TypeVar("M", bound=nn.Module)
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Convolve: TypeAlias = Callable[[Tensor], Tensor]
Rotation: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines, (..., n, head_dim) each."""


class Rotary(nn.Module):
    """Cosines and sines of positions, from frequencies in float32 whatever the model's dtype."""

    inv_freq: Tensor

    def __init__(self, config: DrafterShape) -> None:
        super().__init__()
        self.scale = config.rope_scale
        inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32, device="cpu")
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Follow the model to its device, but not to its dtype."""
        self.inv_freq = self.inv_freq.to(fn(self.inv_freq).device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the (..., n, head_dim) each, from (..., n) positions."""
        return self.turn(positions[..., None], dtype)

    def turn(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the same from the position of each frequency: (..., n, head_dim / 2)."""
        angles = positions.float() * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate (..., n, head_dim); element i is paired with i + head_dim / 2."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its weight, which stays float32 in mixed-precision training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Queries from the block; keys and values from the context and the block."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5  # factor on the scores
        h, bias = config.hidden_size, config.attention_bias
        heads = config.num_attention_heads, config.num_key_value_heads
        q, kv = (n * self.head_dim for n in heads)
        self.q_proj = nn.Linear(h, q, bias)
        self.gate_proj = nn.Linear(h, q, bias) if config.gated else None
        self.k_proj = nn.Linear(h, kv, bias)
        self.v_proj: nn.Linear | None = nn.Linear(h, kv, bias)
        self.o_proj = nn.Linear(q, h, bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        # (heads,) scores of a key whose value is zero.
        sinks = nn.Parameter(torch.empty(heads[0])) if config.attention_sinks else None
        self.attention_sink_bias: nn.Parameter | None = sinks

    def forward(
        self, y: Tensor, context: Tensor, rotation: Rotation | None, attend: Attend
    ) -> Tensor:
        """Map the (batch, n, hidden_size) input of a layer's attention; see `Layer.forward`."""
        n = y.shape[1]
        block_rotation = rotation and (rotation[0][..., -n:, :], rotation[1][..., -n:, :])
        keys_and_values = self.keys_and_values(torch.cat([context, y], 1), rotation)
        out = attend(self.queries(y, block_rotation), *keys_and_values).flatten(2)
        if self.gate_proj is not None:
            out = out * self.gate_proj(y).sigmoid()
        return self.o_proj(out)

    def queries(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """Return the (batch, heads, n, head_dim) from (batch, n, hidden_size).

        Without a rotation they are neither normed nor rotated, and `kv_cache` returns such keys.
        """
        heads = self._heads(self.q_proj(x))
        if rotation is None:
            return heads.transpose(1, 2)
        return rotate(self.q_norm(heads).transpose(1, 2), rotation)

    def keys_and_values(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Return the (batch, kv_heads, n, head_dim) each, of context and block."""
        keys = self._heads(self.k_proj(x))
        values = self._values(x, keys).transpose(1, 2)
        if rotation is None:
            return keys.transpose(1, 2), values
        return rotate(self.k_norm(keys).transpose(1, 2), rotation), values

    def _values(self, x: Tensor, keys: Tensor) -> Tensor:
        assert self.v_proj is not None
        return self._heads(self.v_proj(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class Gemma4Attention(Attention):
    """Gemma 4's attention: normed values, which may be the projected keys, and plain scores."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.scale = 1.0
        self.eps = config.rms_norm_eps
        if config.keys_are_values:
            self.v_proj = None

    def _values(self, x: Tensor, keys: Tensor) -> Tensor:
        values = keys if self.v_proj is None else super()._values(x, keys)
        return F.rms_norm(values, values.shape[-1:], None, self.eps)


class MLP(nn.Module):
    """SwiGLU."""

    act_fn = staticmethod(F.silu)

    def __init__(self, config: DrafterShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., hidden_size) to (..., hidden_size)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Convolution(nn.Module):
    """DFlash2's convolutions along a block, before and after a sublayer.

    Tap t reads the slot t slots back, never beyond the block. Its coefficients are the sum of a
    constant and of a linear function of the sublayer's normed input that groups of channels share.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        h, taps = config.hidden_size, config.conv_kernel_size
        self.block_size, self.group_size = config.block_size, config.conv_group_size
        self.base_kernel = nn.Parameter(torch.empty(2, taps, h))
        self.kernel_projection = nn.Linear(h, 2 * taps * h // self.group_size, bias=False)

    def forward(self, y: Tensor) -> tuple[Convolve, Convolve]:
        """Compute both convolutions from a sublayer's (batch, n, hidden_size) normed input."""
        sides, taps, h = self.base_kernel.shape
        groups = self.kernel_projection(y).unflatten(-1, (sides, taps, h // self.group_size))
        kernels = self.base_kernel + groups.repeat_interleave(self.group_size, -1)

        def convolution(side: int) -> Convolve:
            def convolve(x: Tensor) -> Tensor:
                blocks = x.unflatten(1, (-1, self.block_size))
                shifted = [F.pad(blocks, (0, 0, tap, -tap)).flatten(1, 2) for tap in range(taps)]
                return sum(kernels[..., side, tap, :] * shifted[tap] for tap in range(taps))

            return convolve

        return convolution(0), convolution(1)


def unchanged(x: Tensor) -> Tensor:
    """Return the convolution of a drafter without convolutions."""
    return x


class Layer(nn.Module):
    """A pre-norm transformer layer, Qwen3's."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        convolves = config.conv_kernel_size > 0
        self.attention_conv = Convolution(config) if convolves else None
        self.mlp_conv = Convolution(config) if convolves else None

    def forward(
        self, x: Tensor, context: Tensor, rotation: Rotation | None, attend: Attend
    ) -> Tensor:
        """Map (batch, n, hidden_size) to (batch, n, hidden_size), for a block.

        The (batch, c, hidden_size) context are projected features of the positions before it. The
        rotation covers the context's positions and then the block's; without one `attend` norms and
        rotates. It maps queries of the block, and keys and values, to (batch, n, heads, head_dim).
        """
        y = self.input_layernorm(x)
        before, after = self.attention_conv(y) if self.attention_conv else (unchanged, unchanged)
        x = x + after(self.self_attn(before(y), context, rotation, attend))
        y = self.post_attention_layernorm(x)
        before, after = self.mlp_conv(y) if self.mlp_conv else (unchanged, unchanged)
        return x + after(self.mlp(before(y)))


class Gemma4MLP(MLP):
    """A gated network with GELU, by its approximation with a hyperbolic tangent."""

    act_fn = staticmethod(functools.partial(F.gelu, approximate="tanh"))


class Gemma4Layer(nn.Module):
    """Gemma 4's layer with full attention: the outputs of sublayers are normed too."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = Gemma4Attention(config)
        self.mlp = Gemma4MLP(config)
        size = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(*size)
        self.post_attention_layernorm = RMSNorm(*size)
        self.pre_feedforward_layernorm = RMSNorm(*size)
        self.post_feedforward_layernorm = RMSNorm(*size)
        self.layer_scalar = nn.Parameter(torch.empty(1))

    def forward(
        self, x: Tensor, context: Tensor, rotation: Rotation | None, attend: Attend
    ) -> Tensor:
        """Map (batch, n, hidden_size) to (batch, n, hidden_size) as `Layer.forward` does."""
        y = self.self_attn(self.input_layernorm(x), context, rotation, attend)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return (x + self.post_feedforward_layernorm(y)) * self.layer_scalar


class OwnVocabulary(nn.Module):
    """The tensors that a drafter has instead of the target's; None for each that it shares."""

    embeddings: Tensor | None  # (vocab, hidden_size)
    lm_head: Tensor | None  # (Vd, hidden_size)
    token_ids: Tensor | None  # (Vd,) the target's ids of the tokens that the drafter can propose

    def __init__(
        self,
        embeddings: Tensor | None = None,
        lm_head: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.register_buffer("lm_head", lm_head, persistent=False)
        self.register_buffer("token_ids", token_ids, persistent=False)
        # A quantised copy of the output head, for logits of all tokens.
        self.quantised_lm_head: nn.Module | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], target: Target) -> OwnVocabulary:
        """Take `embed_tokens.weight`, `lm_head.weight` and `d2t` that are not the target's."""

        def weight(name: str, shared: Tensor | None) -> Tensor | None:
            if name not in tensors:
                return None
            tensor = tensors[name].to(target.device, target.dtype)
            return None if shared is not None and torch.equal(tensor, shared) else tensor

        token_ids = None
        if (offsets := tensors.get("d2t")) is not None:
            token_ids = (offsets + torch.arange(len(offsets))).to(target.device, offsets.dtype)
        return cls(
            weight("embed_tokens.weight", target.embeddings),
            weight("lm_head.weight", target.lm_head_weight),
            token_ids,
        )


class DrafterModel(nn.Module):
    """A drafter's weights, under their names in checkpoints; they are loaded afterwards."""

    operations: Operations | None = None  # for rows; None attends with masks

    def __init__(self, config: DrafterConfig, own: OwnVocabulary | None = None) -> None:
        super().__init__()
        self.config = config
        self.own = own or OwnVocabulary()
        h = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * h, h, bias=False)
        self.hidden_norm = RMSNorm(h, config.rms_norm_eps)
        layer = Gemma4Layer if config.gemma4 else Layer
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(h, config.rms_norm_eps)
        self.rotary = Rotary(config)

    def attention(self, layer: int) -> Attention:
        """Return the attention of a layer."""
        module: Any = self.layers[layer]
        attention: Attention = module.self_attn
        return attention

    def project(self, features: Tensor) -> Tensor:
        """Project (..., layers * hidden_size) target outputs to (..., hidden_size) context."""
        return self.hidden_norm(self.fc(features))


def load_weights(
    make: Callable[[Any, OwnVocabulary], M],  # the class of the model
    config: DrafterShape,
    weights: Mapping[str, Tensor],
    vocabulary: Mapping[str, Tensor],  # see `OwnVocabulary.from_tensors`
    target: Target,
) -> M:
    """Load the model of a drafter for inference, on the target's device and in its dtype."""
    own = OwnVocabulary.from_tensors(vocabulary, target)
    with torch.device("meta"):  # no memory for weights that are replaced
        model = make(config, own)
    tensors = {
        # Adding the offset in float32 rounds nothing.
        name: x.float() + config.norm_offset if "norm." in name else x
        for name, x in weights.items()
    }
    model.load_state_dict(tensors, assign=True)
    return model.to(target.device, target.dtype).eval()
