"""Drafters as modules of PyTorch: what their layers and heads need of it, and block drafters.

A block drafter is DFlash's (arXiv 2602.06036) or of a format that followed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.drafters.config import DrafterConfig, DrafterShape
from treeflash.drafters.heads.operations import Operations as ArrayOperations
from treeflash.drafters.layers import BlockModel, by_head
from treeflash.drafters.loading import DrafterTensors
from treeflash_cuda.experts import routed
from treeflash_cuda.linear import PairLinear, take
from treeflash_cuda.low_bit_linear import LowBitLinear
from treeflash_cuda.numerics import largest, top_log_probs
from treeflash_cuda.operations import PYTORCH, Operations
from treeflash_cuda.target import Target

if TYPE_CHECKING:
    from treeflash_cuda.cpu.drafter_calls import BlockCalls

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines, (..., n, head_dim) each, or of the channels that are rotated."""
M = TypeVar("M", bound=nn.Module)


class OnDevice(nn.Module):
    """A part of a drafter's model that a GPU's operations compute, for inference."""

    operations: Operations | None = None  # None computes in PyTorch


class RMSNorm(OnDevice, nn.RMSNorm):
    """RMSNorm in the dtype of its weight, which stays float32 in mixed-precision training."""

    eps: float
    compiled: Callable[[Tensor], Tensor] | None = None  # a CPU's function, for inference

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled is not None:
            return self.compiled(x)
        x = x.to(self.weight.dtype)
        if self.operations is not None:
            return self.operations.rms_norm(x, self.weight, self.eps)[0]
        return super().forward(x)


class MLP(OnDevice):
    """SwiGLU."""

    activation = "silu"

    def __init__(self, config: DrafterShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., hidden_size) to (..., hidden_size)."""
        gated = (self.operations or PYTORCH).gated
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.activation))


class Gemma4MLP(MLP):
    """A gated network with GELU, by its approximation with a hyperbolic tangent."""

    activation = "gelu_pytorch_tanh"


class GRU(nn.Module):
    """A GRU without biases, with PyTorch's names for its tensors."""

    def __init__(self, size: int, state_size: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * state_size, size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * state_size, state_size))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Return the (n, state_size) states from (n, size) inputs and (n, state_size) states."""
        return torch.gru_cell(x, state, self.weight_ih_l0, self.weight_hh_l0)


class Float32Module(nn.Module):
    """Has buffers that follow the model to its device, but not to its dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        for name, x in self.named_buffers():
            setattr(self, name, x.to(fn(x).device))
        return self


class Float32Norm(Float32Module, OnDevice):
    """RMS norm in float32, with weights that stay float32."""

    weight: Tensor

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.operations is not None:
            return self.operations.rms_norm(x, self.weight, self.eps)[0]
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class Float32Bias(Float32Module):
    """Adds a bias that stays float32."""

    bias: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Experts(OnDevice):
    """The feed-forward networks of all experts, (experts, out, in) each.

    A GPU's grouped product needs no read of the experts' numbers of rows.
    """

    def __init__(self, size: int, width: int, count: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(count, width, size))
        self.up_proj = nn.Parameter(torch.empty(count, width, size))
        self.down_proj = nn.Parameter(torch.empty(count, size, width))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the (n, size) float32 sum of the outputs of (n, k) experts with these weights."""
        if self.operations is not None:
            return routed(x, chosen, weights, len(self.gate_proj), self._network)
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            y = x[rows]
            gate, up = F.linear(y, self.gate_proj[expert]), F.linear(y, self.up_proj[expert])
            y = F.linear(F.silu(gate) * up, self.down_proj[expert])
            out.index_add_(0, rows, y.float() * weights[rows, places, None])
        return out

    def _network(self, x: Tensor, ends: Tensor) -> Tensor:
        assert self.operations is not None
        multiply = self.operations.grouped_linear
        gate, up = multiply(x, self.gate_proj, ends), multiply(x, self.up_proj, ends)
        return multiply(self.operations.gated(gate, up), self.down_proj, ends)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate (..., n, head_dim); element i is paired with i + head_dim / 2."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def rotate_first(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first channels: (batch, heads, n, head_dim) from (..., n, heads, head_dim)."""
    x, width = by_head(x), rotation[0].shape[-1]
    if width == x.shape[-1]:
        return rotate(x, rotation)
    first, rest = x.tensor_split([width], -1)
    return torch.cat([rotate(first, rotation), rest], -1)


Layout: TypeAlias = tuple[tuple[int, bool], ...]
"""The size of each array's rows, and whether its numbers are float32."""


def join(arrays: list[Tensor]) -> tuple[Tensor, Layout]:
    """Join (n, size) arrays of integers and float32 numbers to one of (n, sizes) int32 bits."""
    bits = [x.view(torch.int32) if x.is_floating_point() else x.int() for x in arrays]
    return torch.cat(bits, 1), tuple((x.shape[1], x.is_floating_point()) for x in arrays)


def split(numbers: NDArray[np.int32], layout: Layout) -> list[NDArray[Any]]:
    """Return the arrays that `join` joined."""
    parts = np.split(numbers, np.cumsum([size for size, _ in layout])[:-1], 1)
    return [x.view(np.float32) if y else x for x, (_, y) in zip(parts, layout, strict=True)]


def read(arrays: list[Tensor]) -> list[NDArray[Any]]:
    """Read (n, size) arrays of integers and float32 numbers, with one copy."""
    numbers, layout = join(arrays)
    return split(numbers.cpu().numpy(), layout)


def as_module(kind: Any) -> Any:
    """Make a module of PyTorch, which registers its children, of a class that is written once."""
    members = {"ops": OPERATIONS, "__module__": __name__}
    return type(kind.__name__, (kind, nn.Module), members)


OPERATIONS = ArrayOperations(
    linear=nn.Linear,
    pair_linear=PairLinear,
    embedding=nn.Embedding,
    rms_norm=RMSNorm,
    float32_norm=Float32Norm,
    float32_bias=Float32Bias,
    activation=nn.SiLU,
    gru=GRU,
    mlp=lambda config: (Gemma4MLP if config.gemma4 else MLP)(config),
    experts=Experts,
    rotary=lambda config: rotate_first,
    children=nn.ModuleList,
    named_children=nn.ModuleDict,
    parameter=lambda *shape: nn.Parameter(torch.empty(shape)),
    module=as_module,
    concatenate=torch.cat,
    stack=torch.stack,
    broadcast_to=torch.broadcast_to,
    einsum=torch.einsum,
    sigmoid=torch.sigmoid,
    silu=F.silu,
    softmax=lambda x: x.softmax(-1),
    tanh=torch.tanh,
    float32=lambda x: x.float(),
    split=lambda x, parts: x.chunk(parts, -1),
    take=take,
    gather=lambda x, indices: x.gather(-1, indices.long()),
    top=lambda x, k: x.topk(k, dim=-1).indices,
    amax=lambda x, axis: x.amax(axis),
    largest=largest,
    repeat=lambda x, n: x.repeat_interleave(n, 0),
    top_log_probs=top_log_probs,
    log_softmax=lambda x: x.float().log_softmax(-1),
    logsumexp=lambda x: x.logsumexp(-1, keepdim=True),
    as_linear=lambda table, queries: queries @ table.weight.T,
    read=read,
    zeros=lambda shape, like: like.new_zeros(shape),
    full=lambda shape, value, like: like.new_full(shape, value),
    arange=lambda n, like: torch.arange(n, device=like.device),
    ids=lambda tokens, like: torch.from_numpy(np.array(tokens)).to(like.device),
    cast=lambda x, like: x.to(like.dtype),
    shift=lambda x, n: F.pad(x, (0, 0, n, -n)),
    normed=lambda x, eps: F.rms_norm(x, x.shape[-1:], None, eps),
)
"""The operations of layers and heads in PyTorch."""


class Rotary(Float32Module):
    """Cosines and sines of positions, from frequencies in float32 whatever the model's dtype."""

    inv_freq: Tensor

    def __init__(self, config: DrafterShape) -> None:
        super().__init__()
        self.scale = config.rope_scale
        inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32, device="cpu")
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Return (..., n, head_dim) cosines and sines of (..., n) positions."""
        return self.turn(positions[..., None], dtype)

    def turn(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Return cosines and sines where each frequency has a position, (..., n, head_dim / 2)."""
        angles = positions.float() * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


class OwnVocabulary(nn.Module):
    """The tensors that a drafter has instead of the target's; None for each that it shares."""

    embed_tokens: Tensor | None  # (vocab, hidden_size)
    lm_head: Tensor | None  # (Vd, hidden_size)
    token_ids: Tensor | None  # (Vd,) the target's ids of the tokens that the drafter can propose

    def __init__(self, **tensors: Tensor | None) -> None:
        super().__init__()
        for name in ("embed_tokens", "lm_head", "token_ids"):
            self.register_buffer(name, tensors.get(name), persistent=False)
        # A quantised copy of the output head, for logits of all tokens.
        self.quantised_lm_head: nn.Module | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], target: Target) -> OwnVocabulary:
        """Take `embed_tokens.weight`, `lm_head.weight` and `d2t` that are not the target's."""

        def weight(name: str, shared: Tensor | LowBitLinear | None) -> Tensor | None:
            if name not in tensors:
                return None
            tensor = tensors[name].to(target.device, target.dtype)
            return None if isinstance(shared, Tensor) and torch.equal(tensor, shared) else tensor

        token_ids = None
        if (offsets := tensors.get("d2t")) is not None:
            token_ids = (offsets + torch.arange(len(offsets))).to(target.device, offsets.dtype)
        return cls(
            embed_tokens=weight("embed_tokens.weight", target.embeddings),
            lm_head=weight("lm_head.weight", target.lm_head_weight),
            token_ids=token_ids,
        )


class DrafterModel(BlockModel, nn.Module):
    """The model as a module of PyTorch, with the rotations of its rows and its own vocabulary."""

    ops = OPERATIONS
    operations: Operations | None = None  # for rows; None attends with masks
    calls: BlockCalls | None = None  # the layers on a CPU; None runs their modules

    def __init__(self, config: DrafterConfig, own: OwnVocabulary | None = None) -> None:
        super().__init__(config)
        self.own = own or OwnVocabulary()
        self.rotary = Rotary(config)


def load_model(
    kind: Callable[[Any, OwnVocabulary], M],  # the class of the model
    tensors: DrafterTensors[Tensor],
    target: Target,
) -> M:
    """Make the model of a drafter's tensors for inference; see `filled`."""
    own = OwnVocabulary.from_tensors(tensors.vocabulary, target)
    weights = {
        # Adding the offset in float32 rounds nothing.
        name: x.float() + tensors.config.norm_offset if "norm." in name else x
        for name, x in tensors.backbone.items()
    }
    return filled(lambda: kind(tensors.config, own), weights, target)


def filled(make: Callable[[], M], weights: Mapping[str, Tensor], target: Target) -> M:
    """Make a module for inference, on the target's device and in its dtype."""
    with torch.device("meta"):  # no memory for weights that are replaced
        module = make()
    module.load_state_dict(weights, assign=True)
    return module.to(target.device, target.dtype).eval()
