"""What the heads of `treeflash.drafters.heads` need of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash.drafters.heads.operations import Operations
from treeflash_cuda.drafter_model import RMSNorm
from treeflash_cuda.linear import PairLinear, take


class GRU(nn.Module):
    """A GRU without biases, with PyTorch's names for its tensors."""

    def __init__(self, size: int, state_size: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * state_size, size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * state_size, state_size))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Return the (n, state_size) states from (n, size) inputs and (n, state_size) states."""
        return torch.gru_cell(x, state, self.weight_ih_l0, self.weight_hh_l0)


def as_module(kind: Any) -> Any:
    """Make a module of PyTorch, which registers its children, of a class that is written once."""
    members = {"ops": OPERATIONS, "__module__": __name__}
    return type(kind.__name__, (kind, nn.Module), members)


OPERATIONS = Operations(
    linear=nn.Linear,
    pair_linear=PairLinear,
    embedding=nn.Embedding,
    rms_norm=RMSNorm,
    layer_norm=nn.LayerNorm,
    activation=nn.SiLU,
    gru=GRU,
    children=nn.ModuleList,
    named_children=nn.ModuleDict,
    parameter=lambda *shape: nn.Parameter(torch.empty(shape)),
    module=as_module,
    concatenate=torch.cat,
    stack=torch.stack,
    broadcast_to=torch.broadcast_to,
    einsum=torch.einsum,
    exp=torch.exp,
    sigmoid=torch.sigmoid,
    silu=F.silu,
    tanh=torch.tanh,
    copy=torch.clone,
    float32=lambda x: x.float(),
    split=lambda x, parts: x.chunk(parts, -1),
    take=take,
    zeros=lambda shape, like: like.new_zeros(shape),
    arange=lambda n, like: torch.arange(n, device=like.device),
    ids=lambda tokens, like: torch.tensor(tokens, device=like.device),
    cast=lambda x, like: x.to(like.dtype),
    unit=lambda x, least: F.normalize(x.float(), dim=-1, eps=least),
    attention=F.scaled_dot_product_attention,
)
"""The operations of heads in PyTorch."""
