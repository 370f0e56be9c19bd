"""Linear layers: of two vectors, joined, and with weights packed for the CPU's kernels.

For the few rows of a draft tree a matrix product takes as long as reading the weights. A CPU's
kernel that gets them in a checkpoint's row-major layout rearranges them at every call, which takes
at least as long again. oneDNN's kernels have their own layout, and FBGEMM's on processors without
products of float16: PyTorch's kernel for them computes one row after the other.

Quantised layers of a target stay as the library of their format made them, one product each. What
its kernels read is a layout that each version of it arranges after loading, such as Marlin's tiles
for GPTQ and AWQ, so that joining or multiplying these weights here would mean to know all of them.
Joining saves launches, which a CUDA graph makes cheap, and not one byte of weights. Those kernels
read the packed weights once for the rows of a tree, as a kernel of ours would. Two formats become
half precision first: bitsandbytes writes them out in each pass with more rows than its kernel is
good for on a GPU, by thresholds that it measured, and compressed-tensors once, in the first pass.

A drafter has no such library: `QuantisedLinear` is for it on a GPU, and `LowBitLinear` on a CPU,
where targets with few bits have it, too.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from treeflash.low_bits import GROUP as LOW_BIT_GROUP
from treeflash.low_bits import round_weight
from treeflash_cuda.low_bit_linear import LowBitEmbedding, LowBitLinear
from treeflash_cuda.numerics import concatenate
from treeflash_cuda.quantised_weights import GROUP, QuantisedWeight, quantise_weight

ONEDNN: Any = torch.ops.mkldnn  # the kernels that torch.compile uses for frozen weights
FBGEMM: Any = torch.ops.quantized  # multiplies float16 weights by float32 numbers
IN_ONEDNN: dict[torch.dtype, Callable[[], bool]] = {
    torch.float32: lambda: True,
    torch.bfloat16: ONEDNN._is_mkldnn_bf16_supported,
    torch.float16: ONEDNN._is_mkldnn_fp16_supported,
}

PLAIN = torch.float32, torch.bfloat16, torch.float16
"""Dtypes of weights that nothing quantises."""

ROUNDED = {4: "Q4_1", 8: "Q8_0"}
"""Names of the formats that a CPU rounds weights to."""

RowIndex: TypeAlias = Tensor | None
"""(n,) indices of the rows of a tensor that belong to n others; None pairs them in order."""


def take(x: Tensor, rows: RowIndex) -> Tensor:
    """Return the rows of x with these indices; on a CPU in half the time of `x[rows]`."""
    return x if rows is None else x.index_select(0, rows)


def token_products(
    x: Tensor,
    table: Tensor | LowBitLinear,
    tokens: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply (n, size) rows with some tokens' rows of a (vocab, size) table: (n, v).

    The table may be a layer with weights of few bits. The tokens are (v,), or (b, v) for each of b
    equal parts of x; None for all. The (vocab,) bias is added.
    """
    if tokens is None:
        return table(x) if isinstance(table, LowBitLinear) else F.linear(x, table, bias)
    if tokens.ndim == 1:
        if isinstance(table, LowBitLinear):
            return table.select(tokens).forward(x)
        return F.linear(x, take(table, tokens), None if bias is None else bias[tokens])
    parts = x.unflatten(0, (len(tokens), -1))
    if x.device.type == "cpu":  # each selection stays in the caches
        pairs = zip(parts, tokens, strict=True)
        return torch.cat([token_products(part, table, own, bias) for part, own in pairs])
    assert isinstance(table, Tensor)  # weights of few bits are on a CPU
    weights = take(table, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)
    products = (
        parts @ weights if bias is None else torch.baddbmm(bias[tokens][:, None], parts, weights)
    )
    return products.flatten(0, 1)


def can_pack(weight: Tensor) -> bool:
    """Return whether this machine has a kernel for packed weights of this dtype and device."""
    is_plain_tensor = weight.device.type == "cpu" and not is_subclass(weight)
    return is_plain_tensor and (uses_onednn(weight.dtype) or uses_fbgemm(weight.dtype))


def uses_onednn(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies packed weights of a dtype on this machine."""
    return torch.backends.mkldnn.is_available() and IN_ONEDNN.get(dtype, bool)()


def uses_fbgemm(dtype: torch.dtype) -> bool:
    """Return whether FBGEMM multiplies packed weights of a dtype here, as oneDNN does not."""
    has_fbgemm = torch.backends.quantized.engine in ("fbgemm", "x86")
    return dtype == torch.float16 and has_fbgemm and not uses_onednn(dtype)


class PairLinear(nn.Linear):
    """A linear layer of two concatenated vectors of equal size; many rows share the second one."""

    def __init__(self, size: int, out: int, bias: bool) -> None:
        super().__init__(2 * size, out, bias)

    # The override has other arguments on purpose: nothing calls this layer as an `nn.Linear`.
    def forward(self, first: Tensor, second: Tensor, rows: RowIndex) -> Tensor:  # type: ignore[override]
        """Return (n, out) from (n, size) first vectors and (n,) rows of (d, size) second ones."""
        # The product with a concatenation is a sum of two products.
        first_weight, second_weight = self.weight.chunk(2, 1)
        return F.linear(first, first_weight) + take(
            F.linear(second, second_weight, self.bias), rows
        )


class PackedLinear(nn.Module):
    """A linear layer with packed (out, in) weights, for inference: no gradient flows through it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = placeholder(weight)
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        self.bias = bias
        self.in_fbgemm = uses_fbgemm(weight.dtype)
        if self.in_fbgemm:
            bias = None if bias is None else bias.float()
            self.packed = FBGEMM.linear_prepack_fp16(weight.float(), bias)
        else:
            self.packed = ONEDNN._reorder_linear_weight(weight.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.in_fbgemm:
            # It takes two or more dimensions.
            return FBGEMM.linear_dynamic_fp16(x[None].float(), self.packed)[0].half()
        return ONEDNN._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")


class PlainLinear(nn.Module):
    """A linear layer where this machine has no kernel for packed weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class QuantisedLinear(nn.Module):
    """A linear layer with an (out, in) weight of few bits, for inference."""

    numbers: Tensor  # numbers of the `QuantisedWeight`, as are the two fields below
    scales: Tensor
    least: Tensor

    def __init__(
        self,
        product: Callable[..., Tensor],  # `operations.quantised_linear`, or its kernel
        bits: int,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.product = product
        self.weight = placeholder(weight).data  # no parameter: nothing reads it
        for name, part in quantise_weight(weight.detach(), bits)._asdict().items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        weight = QuantisedWeight(self.numbers, self.scales, self.least)
        return self.product(x, weight, self.bias)


TABLES = nn.Embedding, LowBitEmbedding
"""Modules whose weights a pass reads only a few rows of."""


class Packing(NamedTuple):
    """A way to store the weights of linear layers for inference."""

    pack: Callable[[Tensor, Tensor | None], nn.Module]  # makes a layer of an (out, in) weight, bias
    fits: Callable[[Tensor], bool]  # tells whether it can store a weight


NATIVE = Packing(PackedLinear, can_pack)
"""Weights keep their dtype, in the order of this machine's kernels."""


def rounding(bits: int) -> Packing:
    """Return the packing on a CPU that rounds weights to numbers of 4 or 8 bits."""

    @torch.no_grad()
    def pack(weight: Tensor, bias: Tensor | None) -> LowBitLinear:
        rounded = round_weight(weight.detach().float().numpy(), bits)
        return LowBitLinear.of(rounded, ROUNDED[bits], bias, weight.dtype)

    return Packing(pack, partial(has_groups, size=LOW_BIT_GROUP))


def quantising(bits: int, product: Callable[..., Tensor]) -> Packing:
    """Return the packing on a GPU that rounds weights, for a product of `QuantisedLinear`."""
    return Packing(partial(QuantisedLinear, product, bits), partial(has_groups, size=GROUP))


class PackedPairLinear(nn.Module):
    """`PairLinear` as two packed layers."""

    def __init__(self, pair: PairLinear, packing: Packing) -> None:
        super().__init__()
        first, second = pair.weight.chunk(2, 1)
        self.first, self.second = packing.pack(first, None), packing.pack(second, pair.bias)

    def forward(self, first: Tensor, second: Tensor, rows: RowIndex) -> Tensor:
        return self.first(first) + take(self.second(second), rows)


def join(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias of one layer that takes the place of layers of one input."""
    bias = None
    if any(x is not None for x in biases):
        pairs = zip(weights, biases, strict=True)
        bias = concatenate([w.new_zeros(len(w)) if b is None else b for w, b in pairs])
    return concatenate(weights), bias


def pack_linears(module: nn.Module, packings: Sequence[Packing] = (NATIVE,)) -> None:
    """Pack the linear layers inside a module, which is then for inference only.

    Each is stored in the first of the packings that fits; without one it stays as it is.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is PairLinear:
                weight = child.weight.chunk(2, 1)[0]
            elif type(child) is nn.Linear:
                weight = child.weight
            else:
                continue
            if (packing := next((x for x in packings if x.fits(weight)), None)) is not None:
                packed = (
                    PackedPairLinear(child, packing)
                    if isinstance(child, PairLinear)
                    else packing.pack(child.weight, child.bias)
                )
                setattr(parent, name, packed)


def is_subclass(weight: Tensor) -> bool:
    """Return whether a weight holds other tensors, as torchao's quantised weights do."""
    return bool(is_traceable_wrapper_subclass(weight))


def has_groups(weight: Tensor, size: int) -> bool:
    """Return whether a weight can be rounded: its rows are whole groups of a size."""
    return not is_subclass(weight) and weight.shape[1] % size == 0


def weights_by_format(
    modules: Iterable[nn.Module], skipped: Iterable[Tensor | None] = ()
) -> Counter[str]:
    """Count the bytes of weights that a pass of some modules reads, by their format.

    A format is a dtype, or the class of a layer that stores its weights otherwise. Of input tables
    a pass reads a few rows, so embeddings are left out; and so are the `skipped` weights.
    """
    found, counted = Counter[str](), {x for x in skipped if x is not None}
    for module in itertools.chain.from_iterable(x.modules() for x in modules):
        weights = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, TABLES) or counted.issuperset(weights):
            continue
        is_plain = all(x.dtype in PLAIN and not is_subclass(x) for x in weights if x.ndim > 1)
        for weight in set(weights) - counted:
            name = str(weight.dtype).removeprefix("torch.") if is_plain else type(module).__name__
            name = module.name if isinstance(module, LowBitLinear) else name
            found[name] += stored_nbytes(weight)
        counted.update(weights)
    return found


def stored_nbytes(weight: Tensor) -> int:
    """Return the bytes of a weight, which may hold other tensors."""
    if not is_subclass(weight):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(stored_nbytes(getattr(weight, name)) for name in names)


def placeholder(weight: Tensor) -> nn.Parameter:
    """Return a parameter with a weight's dtype, device and shape, in the memory of one element.

    Models read these properties of layers whose weights are packed.
    """
    return nn.Parameter(weight.new_full((), torch.nan).expand(weight.shape), requires_grad=False)
