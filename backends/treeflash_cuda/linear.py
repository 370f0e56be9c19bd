"""Linear layers: of two vectors, and with weights that lie as the CPU's kernels read them.

For the few rows of a draft tree a product takes as long as reading the weights. Given row by row,
as checkpoints have them, they are rearranged in every call, which takes as long again and more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN: Any = torch.ops.mkldnn  # what torch.compile uses for frozen weights
SUPPORTED: dict[torch.dtype, Callable[[], bool]] = {
    torch.float32: lambda: True,
    torch.bfloat16: ONEDNN._is_mkldnn_bf16_supported,
    torch.float16: ONEDNN._is_mkldnn_fp16_supported,
}


Rows: TypeAlias = Tensor | None
"""(n,) which rows of a tensor go with n others; None where the first goes with the first, ..."""


def take(x: Tensor, rows: Rows) -> Tensor:
    """Those rows of x; on a CPU in half the time that `x[rows]` takes."""
    return x if rows is None else x.index_select(0, rows)


class PairLinear(nn.Linear):
    """A linear layer of a vector and another that is shared by many of the first kind."""

    def __init__(self, size: int, out: int, bias: bool) -> None:
        """Make it; both vectors have `size` elements."""
        super().__init__(2 * size, out, bias)

    def forward(self, own: Tensor, shared: Tensor, rows: Rows) -> Tensor:
        """(n, out) from both.

        Args:
            own: (n, size).
            shared: (d, size).
            rows: (n,) the row of `shared` that goes with each of `own`.
        """
        # The product with a concatenation is a sum.
        of_own, of_shared = self.weight.chunk(2, 1)
        return F.linear(own, of_own) + take(F.linear(shared, of_shared, self.bias), rows)


class PackedLinear(nn.Module):
    """A linear layer for inference: no gradient flows through it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Rearrange (out, in) weights."""
        super().__init__()
        self.weight = stand_in(weight)
        self.packed = ONEDNN._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y: Tensor = ONEDNN._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class PackedPairLinear(nn.Module):
    """The same as `PairLinear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Rearrange (out, 2 * size) weights."""
        super().__init__()
        of_own, of_shared = weight.chunk(2, 1)
        self.of_own, self.of_shared = PackedLinear(of_own, None), PackedLinear(of_shared, bias)

    def forward(self, own: Tensor, shared: Tensor, rows: Rows) -> Tensor:
        """See `PairLinear.forward`."""
        return self.of_own(own) + take(self.of_shared(shared), rows)


class Joined:
    """Packed layers that read the same input, computed in one product when the first is asked."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        """Join layers of the same input size."""
        biases = [x.weight.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in linears]
        bias = None if all(x.bias is None for x in linears) else torch.cat(biases)
        self.sizes = [len(x.weight) for x in linears]
        self.product = PackedLinear(torch.cat([x.weight for x in linears]), bias)
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def output(self, part: int, x: Tensor) -> Tensor:
        """What one of the layers makes of x."""
        if x is not self.input or part not in self.outputs:
            self.input = x
            self.outputs = dict(enumerate(self.product(x).split(self.sizes, -1)))
        y = self.outputs.pop(part)
        if not self.outputs:
            self.input = None
        return y


class JoinedLinear(nn.Module):
    """One of several joined layers, in its place."""

    def __init__(self, joined: Joined, part: int, linear: nn.Linear) -> None:
        """Stand for a layer."""
        super().__init__()
        self.joined = joined
        self.part = part
        self.weight = stand_in(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.joined.output(self.part, x)


IN_TARGET = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Layers that read the same vector, by the names that most models give them."""
IN_DRAFTER = ("k_proj", "v_proj"), ("gate_proj", "up_proj")
"""The same in a drafter, of which the context asks no queries."""
PACKED: dict[type[nn.Module], Callable[[Tensor, Tensor | None], nn.Module]] = {
    nn.Linear: PackedLinear,
    PairLinear: PackedPairLinear,
}


def pack_linears(module: nn.Module) -> None:
    """Pack the linear layers inside, where there is a kernel; the module is for inference then."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in PACKED and can_pack(child.weight):
                setattr(parent, name, PACKED[type(child)](child.weight, child.bias))


def join_linears(module: nn.Module, sets: Sequence[Sequence[str]]) -> None:
    """Join the layers inside of which all names of a set are children, likewise."""
    for parent in list(module.modules()):
        for names in sets:
            linears = [getattr(parent, name, None) for name in names]
            if all(type(x) is nn.Linear and can_pack(x.weight) for x in linears):
                joined = Joined(linears)
                for part, name in enumerate(names):
                    setattr(parent, name, JoinedLinear(joined, part, linears[part]))


def stand_in(weight: Tensor) -> nn.Parameter:
    """One number for all: models ask weights for their type, device and shape."""
    return nn.Parameter(weight.new_full((), torch.nan).expand(weight.shape), requires_grad=False)


def can_pack(weight: Tensor) -> bool:
    """Whether this machine has a kernel for packed weights of the kind."""
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and weight.dtype in SUPPORTED
        and SUPPORTED[weight.dtype]()
    )
