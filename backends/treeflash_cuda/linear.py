"""Linear layers: of two vectors, fused, and with weights packed for the CPU's kernels.

For the few rows of a draft tree a matrix product takes as long as reading the weights. In a
checkpoint's row-major layout they are rearranged at every call, which takes at least as long again.
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

RowIndex: TypeAlias = Tensor | None
"""(n,) row of a tensor that belongs to each of n others; None pairs them in order."""


def take(x: Tensor, rows: RowIndex) -> Tensor:
    """Those rows of x; on a CPU in half the time of `x[rows]`."""
    return x if rows is None else x.index_select(0, rows)


class PairLinear(nn.Linear):
    """A linear layer of a concatenation: a vector of its own, and one that many rows share."""

    def __init__(self, size: int, out: int, bias: bool) -> None:
        """Make the layer; both vectors have `size` elements."""
        super().__init__(2 * size, out, bias)

    def forward(self, own: Tensor, shared: Tensor, rows: RowIndex) -> Tensor:
        """(n, out) from both.

        Args:
            own: (n, size).
            shared: (d, size).
            rows: (n,) the row of `shared` that belongs to each row of `own`.
        """
        # The product with a concatenation is a sum of two products.
        of_own, of_shared = self.weight.chunk(2, 1)
        return F.linear(own, of_own) + take(F.linear(shared, of_shared, self.bias), rows)


class PackedLinear(nn.Module):
    """A linear layer for inference: no gradient flows through it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack (out, in) weights."""
        super().__init__()
        self.weight = placeholder(weight)
        self.packed = ONEDNN._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y: Tensor = ONEDNN._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class PackedPairLinear(nn.Module):
    """`PairLinear` with packed weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack (out, 2 * size) weights."""
        super().__init__()
        of_own, of_shared = weight.chunk(2, 1)
        self.of_own, self.of_shared = PackedLinear(of_own, None), PackedLinear(of_shared, bias)

    def forward(self, own: Tensor, shared: Tensor, rows: RowIndex) -> Tensor:
        """See `PairLinear.forward`."""
        return self.of_own(own) + take(self.of_shared(shared), rows)


class FusedLinear(PackedLinear):
    """Packed layers that read the same input, computed as one product."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        """Fuse layers with the same input size."""
        super().__init__(*concatenated(linears))
        self.sizes = [len(x.weight) for x in linears]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., in) to the (..., out) of each layer."""
        return super().forward(x).split(self.sizes, -1)


class JoinedLinear(nn.Module):
    """The same with weights as they are, for a GPU."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        """Join layers with the same input size."""
        super().__init__()
        self.joined, self.bias = concatenated(linears)
        self.sizes = [len(x.weight) for x in linears]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., in) to the (..., out) of each layer."""
        return F.linear(x, self.joined, self.bias).split(self.sizes, -1)


def concatenated(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights and biases of several layers, one below the other."""
    biases = [x.weight.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in linears]
    bias = None if all(x.bias is None for x in linears) else torch.cat(biases).detach()
    return torch.cat([x.weight for x in linears]).detach(), bias


class FusedPart(nn.Module):
    """One of several fused layers, in its place in a model that calls them one by one.

    The first part that is called computes the outputs of all and leaves them with the input. They
    belong to that call and are freed with it; the module itself holds nothing, so threads can share
    it.
    """

    def __init__(
        self, compute: Callable[[Tensor], tuple[Tensor, ...]], part: int, linear: nn.Linear
    ) -> None:
        """Replace a layer, the part-th of those whose outputs `compute` returns."""
        super().__init__()
        self.compute = compute
        self.part = part
        self.weight = placeholder(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        compute = self.compute
        by, outputs = getattr(x, "fused_outputs", (None, ()))
        if by is not compute:
            outputs = compute(x)
            x.fused_outputs = compute, outputs
        output: Tensor = outputs[self.part]
        return output


IN_TARGET = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Layers that read the same input, under the names that most models give them."""
IN_DRAFTER = ("k_proj", "v_proj"), ("gate_proj", "up_proj")
"""The same in a drafter, whose queries come from the block alone."""
PACKED: dict[type[nn.Module], Callable[[Tensor, Tensor | None], nn.Module]] = {
    nn.Linear: PackedLinear,
    PairLinear: PackedPairLinear,
}


def pack_linears(module: nn.Module) -> None:
    """Pack the linear layers inside a module, which is then for inference only."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in PACKED and can_pack(child.weight):
                setattr(parent, name, PACKED[type(child)](child.weight, child.bias))


def fuse_linears(module: nn.Module, sets: Sequence[Sequence[str]]) -> None:
    """Fuse the layers of every module inside that has children with all the names of a set."""
    for parent in list(module.modules()):
        for names in sets:
            linears = [getattr(parent, name, None) for name in names]
            if not all(is_plain(x) for x in linears):
                continue
            if all(can_pack(x.weight) for x in linears):
                # A bound method is a plain attribute: nn.Module looks its own children up slowly.
                compute: Callable[[Tensor], tuple[Tensor, ...]] = FusedLinear(linears).forward
            elif all(x.weight.device.type == "cuda" for x in linears):
                compute = JoinedLinear(linears).forward
            else:
                continue
            for part, name in enumerate(names):
                setattr(parent, name, FusedPart(compute, part, linears[part]))


def is_plain(layer: Any) -> bool:
    """Whether it is a linear layer whose weights nothing quantises, shards or moves."""
    return type(layer) is nn.Linear and "forward" not in vars(layer)


def placeholder(weight: Tensor) -> nn.Parameter:
    """A weight's dtype, device and shape, which models ask for, in the memory of one element."""
    return nn.Parameter(weight.new_full((), torch.nan).expand(weight.shape), requires_grad=False)


def can_pack(weight: Tensor) -> bool:
    """Whether this machine has a kernel for packed weights of this dtype and device."""
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and weight.dtype in SUPPORTED
        and SUPPORTED[weight.dtype]()
    )
