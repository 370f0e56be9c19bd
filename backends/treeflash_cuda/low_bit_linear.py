"""Linear layers and input tables with weights of few bits, for a CPU; see `treeflash.low_bits`.

`cpu.low_bit_code` has the rule of their products, in which rows are independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.low_bits import (
    BLOCK_ROWS,
    GROUP,
    LINE,
    LowBitWeight,
    StoredWeight,
    lines_of_byte,
)

if TYPE_CHECKING:
    from treeflash_cuda.cpu.low_bit_kernels import Operands


class LowBitLinear(nn.Module):
    """A linear layer for inference, with the arrays of `LowBitWeight.pack` as parameters.

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
        for name in ("numbers", "scales", "least", "factors", "order"):
            self._keep(name, tensors.get(name))
        self._keep("bias", torch.empty(self.shape[0], dtype=dtype) if stored.bias else None)
        # Multiplies float32 and bfloat16 rows, when the first product has asked for it.
        self._product: Callable[[Tensor], Tensor] | None = None

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        self.register_parameter(name, parameter)

    @classmethod
    def from_packed(
        cls,
        stored: StoredWeight,
        arrays: Mapping[str, NDArray[Any]],  # see `LowBitWeight.pack`
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Self:
        """Make a layer of arrays, whose memory it shares."""
        with torch.device("meta"):
            layer = cls(stored, dtype)
        for name, array in arrays.items():
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
        if order is None and rows % BLOCK_ROWS == 0:
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
        missing = -self.shape[0] % BLOCK_ROWS
        return None if self.bias is None else F.pad(self.bias.detach().float(), (0, missing))

    @torch.no_grad()
    def rows(self, ids: Tensor) -> Tensor:
        """Dequantise the (..., in) rows of the weight with these indices."""
        kind, flat = self.stored.format, ids.flatten()
        block, row = flat // BLOCK_ROWS, flat % BLOCK_ROWS
        lines = self.numbers.view(torch.int32)  # the numbers of a row in a line are one of them
        numbers = lines[block, :, :, row].view(torch.uint8).unflatten(-1, (-1, LINE))
        if kind.bits < 8:
            lower = numbers[:, :, : GROUP // LINE // 2]
            upper = numbers[:, :, GROUP // LINE // 2 :]
            numbers = torch.stack([lower & 15, lower >> 4], 3).flatten(2, 3)
            if kind.bits > 4:
                shared = lines_of_byte(kind.bits)
                places = torch.arange(0, 8, 8 // shared, dtype=torch.uint8)[:, None]
                fields = upper[:, :, :, None] >> places & (1 << (8 // shared)) - 1
                numbers = numbers | fields.flatten(2, 3) << 4
        scales = self._scales_of(self.scales, 0, block, row)
        values = numbers.reshape(*scales.shape, GROUP // kind.scales).float()
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
        flat = F.pad(ids, (0, -len(ids) % BLOCK_ROWS))  # the last block is filled up with any row
        block, row = flat // BLOCK_ROWS, flat % BLOCK_ROWS
        chosen = {}
        for name in self.stored.tensors:
            tensor: Tensor = getattr(self, name)
            # A row's numbers in a line are one of 32 bits.
            units = tensor.view(torch.int32) if name == "numbers" else tensor
            rows = units[block, ..., row].unflatten(0, (-1, BLOCK_ROWS)).movedim(1, -1).contiguous()
            chosen[name] = rows.view(tensor.dtype)
        return self._with_rows(ids, len(ids), chosen)

    @torch.no_grad()
    def split(self) -> dict[str, LowBitLinear]:
        """Return the layers that are one module here; they share its memory in whole blocks."""
        found, first = {}, 0
        for name, count in self.stored.parts.items():
            end = first + count
            if first % BLOCK_ROWS:
                found[name] = self.select(torch.arange(first, end))
            else:
                blocks = slice(first // BLOCK_ROWS, -(-end // BLOCK_ROWS))
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
