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
where targets with few bits have it, too (`treeflash.low_bits`). `cpu.low_bit_code` has its rule, in
which rows are independent of each other.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from treeflash.low_bits import (
    BLOCK,
    LINE,
    LowBitWeight,
    PackedWeight,
    StoredWeight,
    lines_of_byte,
    round_weight,
)
from treeflash.low_bits import GROUP as LOW_BIT_GROUP
from treeflash_cuda.numerics import concatenate
from treeflash_cuda.quantised_weights import GROUP, QuantisedWeight, quantise_weight

if TYPE_CHECKING:
    from treeflash_cuda.cpu.low_bit_kernels import Operands

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


class LowBitLinear(nn.Module):
    """A linear layer for inference, with the tensors of a `PackedWeight` as parameters.

    They may be mapped from a file, and are empty when the layer is made.
    """

    numbers: Tensor
    scales: Tensor
    least: Tensor | None
    factors: Tensor | None
    order: Tensor | None  # see `LowBitWeight`
    bias: Tensor | None

    def __init__(self, stored: StoredWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.dtype = stored, dtype
        self.shape = stored.shape  # (out, in)
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, kind))
            for name, (kind, shape) in stored.tensors.items()
        }
        for name in PackedWeight._fields:
            self._keep(name, tensors.get(name))
        self._keep("bias", torch.empty(self.shape[0], dtype=dtype) if stored.bias else None)
        # Multiplies float32 and bfloat16 rows, when the first product has asked for it.
        self._product: Callable[[Tensor], Tensor] | None = None

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        self.register_parameter(name, parameter)

    @classmethod
    def from_packed(
        cls, stored: StoredWeight, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> Self:
        """Make a layer of arrays, whose memory it shares."""
        with torch.device("meta"):
            layer = cls(stored, dtype)
        for name, array in weight._asdict().items():
            if array is not None:
                layer._keep(name, torch.from_numpy(array))
        layer._keep("bias", None if bias is None else bias.detach().to(dtype))
        return layer

    @classmethod
    def of(cls, weight: LowBitWeight, name: str, bias: Tensor | None, dtype: torch.dtype) -> Self:
        """Make a layer of a weight in a format with this name."""
        rows, size = weight.numbers.shape
        stored = StoredWeight(
            name=name, format=weight.format, shape=(rows, size), bias=bias is not None
        )
        return cls.from_packed(stored, weight.pack(), bias, dtype)

    @property
    def name(self) -> str:
        """The format's name, for reports."""
        return self.stored.name

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self._product is None:
            # Weights can be dequantised where llvmlite is missing.
            from treeflash_cuda.cpu.low_bit_kernels import kernel

            self._product = self.product(kernel(self.stored.format))
        if x.dtype in (torch.float32, torch.bfloat16):
            return self._product(x)
        return self._product(x.float()).to(x.dtype)

    def product(self, kernel: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the function of a kernel that maps float32 or bfloat16 rows."""
        product = partial(kernel, operands=self.operands)
        order, rows = self.order, self.shape[0]
        if order is None and rows % BLOCK == 0:
            return product
        return lambda x: product(x if order is None else x.index_select(-1, order))[..., :rows]

    @property
    def operands(self) -> Operands:
        """What a kernel reads."""
        from treeflash_cuda.cpu.low_bit_kernels import Operands

        read = self.numbers, self.scales, self.least, self.factors, self._filled_bias
        addresses = (0 if x is None else x.data_ptr() for x in read)
        return Operands._make([*addresses, self.numbers.shape[0]])

    @cached_property
    def _filled_bias(self) -> Tensor | None:
        """The bias of whole blocks, in float32."""
        missing = -self.shape[0] % BLOCK
        return None if self.bias is None else F.pad(self.bias.detach().float(), (0, missing))

    @torch.no_grad()
    def rows(self, ids: Tensor) -> Tensor:
        """Dequantise the (..., in) rows of the weight with these indices."""
        kind, flat = self.stored.format, ids.flatten()
        block, row = flat // BLOCK, flat % BLOCK
        lines = self.numbers.view(torch.int32)  # the numbers of a row in a line are one of them
        numbers = lines[block, :, :, row].view(torch.uint8).unflatten(-1, (-1, LINE))
        if kind.bits < 8:
            lower = numbers[:, :, : LOW_BIT_GROUP // LINE // 2]
            upper = numbers[:, :, LOW_BIT_GROUP // LINE // 2 :]
            numbers = torch.stack([lower & 15, lower >> 4], 3).flatten(2, 3)
            if kind.bits > 4:
                shared = lines_of_byte(kind.bits)
                places = torch.arange(0, 8, 8 // shared, dtype=torch.uint8)[:, None]
                fields = upper[:, :, :, None] >> places & (1 << (8 // shared)) - 1
                numbers = numbers | fields.flatten(2, 3) << 4
        scales = self._scales_of(self.scales, 0, block, row)
        values = numbers.reshape(*scales.shape, LOW_BIT_GROUP // kind.scales).float()
        values = (values - kind.half if kind.half else values).mul_(scales[..., None])
        if self.least is not None:
            values += self._scales_of(self.least, 1, block, row)[..., None]
        values = values.view(len(flat), self.shape[1])
        if self.order is not None:
            values = values[:, self.order.argsort()]
        return values.view(*ids.shape, self.shape[1]).to(self.dtype)

    def _scales_of(self, stored: Tensor, factor: int, block: Tensor, row: Tensor) -> Tensor:
        """Return the scales, or least numbers, of rows of blocks, times one of their factors."""
        values = stored[block, :, row].float()
        if self.factors is None:
            return values
        shared = self.factors[block, factor :: self.stored.format.factors, row].float()
        return values * shared.repeat_interleave(values.shape[1] // shared.shape[1], 1)

    @torch.no_grad()
    def select(self, ids: Tensor) -> LowBitLinear:
        """Return a layer with the rows of the weight with these (n,) indices."""
        flat = F.pad(ids, (0, -len(ids) % BLOCK))  # the last block is filled up with any row
        block, row = flat // BLOCK, flat % BLOCK
        chosen = {}
        for name in self.stored.tensors:
            tensor: Tensor = getattr(self, name)
            # A row's numbers in a line are one of 32 bits.
            units = tensor.view(torch.int32) if name == "numbers" else tensor
            rows = units[block, ..., row].unflatten(0, (-1, BLOCK)).movedim(1, -1).contiguous()
            chosen[name] = rows.view(tensor.dtype)
        return self._with_rows(ids, len(ids), chosen)

    @torch.no_grad()
    def split(self) -> dict[str, LowBitLinear]:
        """Return the layers that are one module here; they share its memory in whole blocks."""
        found, first = {}, 0
        for name, count in self.stored.parts.items():
            end = first + count
            if first % BLOCK:
                found[name] = self.select(torch.arange(first, end))
            else:
                blocks = slice(first // BLOCK, -(-end // BLOCK))
                own = {tensor: getattr(self, tensor)[blocks] for tensor in self.stored.tensors}
                found[name] = self._with_rows(slice(first, end), count, own)
            first = end
        return found

    def _with_rows(
        self, rows: Tensor | slice, count: int, tensors: Mapping[str, Tensor]
    ) -> LowBitLinear:
        """Return a layer with some of the rows, whose packed tensors are given."""
        stored = replace(self.stored, shape=(count, self.shape[1]), parts={})
        with torch.device("meta"):
            layer = LowBitLinear(stored, self.dtype)
        bias = None if self.bias is None else self.bias[rows]
        for name, tensor in {**tensors, "order": self.order, "bias": bias}.items():
            layer._keep(name, tensor)
        return layer


class LowBitEmbedding(LowBitLinear):
    """An input table, whose rows are dequantised where they are read."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the (..., hidden_size) rows of (...) tokens."""
        return self.rows(x)

    def output_head(self) -> LowBitLinear:
        """Return a linear layer with this table as its weight."""
        with torch.device("meta"):
            head = LowBitLinear(self.stored, self.dtype)
        for name in self.stored.tensors:
            head.register_parameter(name, getattr(self, name))
        return head


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
