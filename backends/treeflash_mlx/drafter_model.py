"""Drafters as modules of MLX: what their layers and heads need of it, and block drafters.

A block drafter is DFlash's (arXiv 2602.06036) or of a format that followed it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models import gemma3_text, qwen3
from mlx_lm.models.switch_layers import SwitchGLU
from numpy.typing import NDArray

from treeflash.drafters.config import DrafterConfig, DrafterShape
from treeflash.drafters.heads.operations import Operations
from treeflash.drafters.layers import BlockModel
from treeflash_mlx.numerics import log_softmax, logsumexp, top_indices, top_log_probs
from treeflash_mlx.target import Target


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


def mlp(config: DrafterShape) -> nn.Module:
    """Make the feed-forward network of a layer: SwiGLU, or Gemma's gated GELU."""
    kind = gemma3_text.MLP if config.gemma4 else qwen3.MLP
    made: nn.Module = kind(config.hidden_size, config.intermediate_size)
    return made


class PairLinear(nn.Module):
    """A linear layer of two concatenated vectors of equal size; many rows share the second one."""

    def __init__(self, size: int, out: int, bias: bool) -> None:
        super().__init__()
        # A product with a concatenation is the sum of two products.
        self.first = nn.Linear(size, out, bias=False)
        self.second = nn.Linear(size, out, bias=bias)

    def __call__(self, first: mx.array, second: mx.array, rows: mx.array) -> mx.array:
        """Return (n, out) from (n, size) first vectors and (n,) rows of (d, size) second ones."""
        return self.first(first) + self.second(second)[rows]


def split_pairs(module: nn.Module, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Split the weights of the `PairLinear`s of a module among a checkpoint's tensors, by name.

    A pair has an (out, 2 * size) weight in the checkpoint, and perhaps an (out,) bias.
    """
    tensors = dict(tensors)
    for name, child in module.named_modules():
        if isinstance(child, PairLinear):
            first, second = mx.split(tensors.pop(f"{name}.weight"), 2, -1)
            # A strided half of a matrix would be copied in every product.
            tensors[f"{name}.first.weight"] = mx.contiguous(first)
            tensors[f"{name}.second.weight"] = mx.contiguous(second)
            if f"{name}.bias" in tensors:
                tensors[f"{name}.second.bias"] = tensors.pop(f"{name}.bias")
    return tensors


class GRU(nn.Module):
    """A GRU without biases, with PyTorch's names for its tensors."""

    def __init__(self, size: int, state_size: int) -> None:
        super().__init__()
        self.weight_ih_l0 = mx.zeros((3 * state_size, size))
        self.weight_hh_l0 = mx.zeros((3 * state_size, state_size))

    def __call__(self, x: mx.array, state: mx.array) -> mx.array:
        """Return the (n, state_size) states from (n, size) inputs and (n, state_size) states."""
        inputs = mx.split(x @ self.weight_ih_l0.T, 3, -1)
        states = mx.split(state @ self.weight_hh_l0.T, 3, -1)
        reset, update = (mx.sigmoid(inputs[i] + states[i]) for i in (0, 1))
        new = mx.tanh(inputs[2] + reset * states[2])
        return (1 - update) * new + update * state


class Float32Norm(nn.Module):
    """RMS norm in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = mx.ones(size)

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x.astype(mx.float32), weight, self.eps).astype(x.dtype)


class Float32Bias(nn.Module):
    """Adds a bias in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = mx.zeros(size)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.bias


class Experts(SwitchGLU):
    """The feed-forward networks of all experts."""

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """Return the (n, size) float32 sum of the outputs of (n, k) experts with these weights."""
        outputs: mx.array = super().__call__(x, chosen)
        return (outputs.astype(mx.float32) * weights[..., None]).sum(-2)


def read(arrays: list[mx.array]) -> list[NDArray[Any]]:
    """Read (n, size) arrays of integers and float32 numbers, with one copy.

    Token ids are exact in float32.
    """
    kinds = [np.float32 if x.dtype == mx.float32 else np.int32 for x in arrays]
    ends = np.cumsum([array.shape[1] for array in arrays])[:-1]
    numbers = np.array(mx.concatenate([x.astype(mx.float32) for x in arrays], 1))
    parts = zip(np.split(numbers, ends, 1), kinds, strict=True)
    return [part.astype(kind) for part, kind in parts]


def as_module(kind: Any) -> Any:
    """Make a module of MLX, whose parameters include its children's, of a class written once."""
    members: dict[str, Any] = {"ops": OPERATIONS, "__module__": __name__}
    if hasattr(kind, "forward"):
        members["__call__"] = kind.forward
    return type(kind.__name__, (kind, nn.Module), members)


OPERATIONS = Operations(
    linear=nn.Linear,
    pair_linear=PairLinear,
    embedding=nn.Embedding,
    rms_norm=nn.RMSNorm,
    float32_norm=Float32Norm,
    float32_bias=Float32Bias,
    activation=nn.SiLU,
    gru=GRU,
    mlp=mlp,
    experts=Experts,
    rotary=Rope,
    children=list,
    named_children=dict,
    parameter=lambda *shape: mx.zeros(shape),
    module=as_module,
    concatenate=mx.concatenate,
    stack=mx.stack,
    broadcast_to=mx.broadcast_to,
    einsum=mx.einsum,
    sigmoid=mx.sigmoid,
    silu=nn.silu,
    softmax=lambda x: mx.softmax(x, -1),
    tanh=mx.tanh,
    float32=lambda x: x.astype(mx.float32),
    split=lambda x, parts: mx.split(x, parts, -1),
    take=lambda x, rows: x[rows],
    gather=lambda x, indices: mx.take_along_axis(x, indices, -1),
    top=lambda x, k: mx.argsort(-x, axis=-1)[:, :k],
    amax=mx.max,
    largest=lambda x, k: mx.sort(top_indices(x, k)),
    repeat=lambda x, n: mx.repeat(x, n, 0),
    top_log_probs=top_log_probs,
    log_softmax=log_softmax,
    logsumexp=logsumexp,
    as_linear=lambda table, queries: table.as_linear(queries),
    read=read,
    zeros=lambda shape, like: mx.zeros(shape, like.dtype),
    full=lambda shape, value, like: mx.full(shape, value, like.dtype),
    arange=lambda n, like: mx.arange(n),
    ids=lambda tokens, like: mx.array(tokens),
    cast=lambda x, like: x.astype(like.dtype),
    shift=lambda x, n: mx.pad(x, [(0, 0), (n, 0), (0, 0)])[:, : x.shape[1]],
    normed=lambda x, eps: mx.fast.rms_norm(x, None, eps),
)
"""The operations of layers and heads in MLX."""


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
        if embeddings is not None and differs(embeddings, target.embedding):
            self.embed_tokens = nn.Embedding(*embeddings.shape)
            self.embed_tokens.weight = embeddings.astype(target.dtype)
        if head is not None and differs(head, target.output_module):
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


TABLE_ROWS = 4096
"""Rows of a quantised table that are compared at once."""


def differs(weight: mx.array, module: Any) -> bool:
    """Return whether a weight differs from a module's weight by more than rounding.

    That is rounding to the dtype of the module's weight, or to its bits if it is quantised.
    """
    if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return not mx.array_equal(weight.astype(module.weight.dtype), module.weight).item()
    if len(weight) != len(module.weight):
        return True
    # Normal weights in groups of 64 have an error of 1.5 / 2**bits, other weights of more than 1.
    most = 3 / 2**module.bits
    parts = range(0, len(weight), TABLE_ROWS)
    return not all(_is_near(weight, module, first, most) for first in parts)


def _is_near(weight: mx.array, module: Any, first: int, most: float) -> bool:
    """Return whether quantised rows from `first` on have at most this relative error."""
    rows = slice(first, first + TABLE_ROWS)
    expected = weight[rows].astype(mx.float32)
    biases = None if module.biases is None else module.biases[rows]
    options = module.group_size, module.bits, module.mode
    found = mx.dequantize(module.weight[rows], module.scales[rows], biases, *options)
    if found.shape != expected.shape:
        return False
    error = mx.linalg.norm(found.astype(mx.float32) - expected)
    return bool(error <= most * mx.linalg.norm(expected))  # rows of padding may be 0


class VocabularyOwner(nn.Module):
    """A drafter's model that has the parts of the vocabulary that are not the target's."""

    _own: OwnVocabulary  # loaded already, so not among the parameters

    @property
    def own(self) -> OwnVocabulary:
        return self._own


class DrafterModel(BlockModel, VocabularyOwner):
    """The model as a module of MLX, with its own vocabulary."""

    ops = OPERATIONS

    def __init__(self, config: DrafterConfig, own: OwnVocabulary) -> None:
        super().__init__(config)
        self._own = own
