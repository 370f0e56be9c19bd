"""Layers as a list of calls of compiled functions, which run as one call.

They are the layers of a decoder (`decoder_calls`), or of a drafter (`drafter_calls`). Python takes
longer to start a function of a small model than the function to compute a few rows. So the
arguments of all calls are made at load, as records in memory. A pass copies them and fills in what
it has of its own: the addresses of its rows, and its sequences. The results have the bits that a
decoder's modules give, because the functions are the same.

What layers read and write are parts of one memory of the pass. A part that begins at byte 128 of a
pass with one row begins at byte 128 * n of a pass with n rows, where its rows follow each other.

A drafter's pass has rows of context behind the rows that run through its layers. These stand beside
the normed input of each attention, and give it keys and values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.low_bits import BLOCK_ROWS, GROUP
from treeflash_cuda.cpu.ir_builder import record_type
from treeflash_cuda.cpu.layer_code import FIELDS, UNITS
from treeflash_cuda.cpu.layer_kernels import LayerKernels, SequencesTable
from treeflash_cuda.cpu.low_bit_code import ARGUMENTS
from treeflash_cuda.cpu.low_bit_kernels import SCRATCH, Operands, kernel
from treeflash_cuda.decoder.operations import Rotation
from treeflash_cuda.low_bit_linear import LowBitLinear

PRODUCT = "product"
ALIGNMENT = 64
"""Bytes that parts of the memory of a pass begin at a multiple of."""


class Product(NamedTuple):
    """A product of a layer: it writes columns of a part of a pass's memory, from another part."""

    layer: LowBitLinear
    source: str
    target: str
    column: int  # the first column
    of_context: bool = False  # whether rows of context are multiplied, too


class CalledLayer(NamedTuple):
    """A layer with a norm before each sublayer alone."""

    input_norm: Tensor  # (hidden_size,) float32 weights
    network_norm: Tensor  # (hidden_size,) float32 weights
    head_norms: Tensor | None  # (heads + kv_heads, head_dim) float32 weights; None without norms
    products: Sequence[Product]  # in order, with "heads", "mixed", "gate_up" and "active"
    rope: int | None  # index of the rotation of queries and keys; None without one
    seen: Hashable  # which keys rows see, in the words of the pass's attention


@dataclass(frozen=True, kw_only=True)
class LayerStack:
    """Layers that run as one call."""

    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str  # the name of the gate's activation, see `GATES`
    eps: float  # the norms' epsilon
    score_scale: float  # factor on the products of queries and keys
    score_cap: float | None  # bound of the scores, of layers that have one
    dtype: torch.dtype  # the dtype of rows
    layers: Sequence[CalledLayer]


class CalledAttention(Protocol):
    """Where the rows of a pass are in the caches of their sequences, and what they see."""

    places: SequencesTable  # places of all rows, also of the context's

    def layout(self, seen: Any) -> tuple[Tensor, SequencesTable]:
        """Return `LayerKernels.attend`'s bounds and table in layers that see these keys."""


class Records(NamedTuple):
    """The calls of functions whose arguments have equal names and types."""

    values: NDArray[np.void]  # arguments; addresses in a pass's memory begin with a column's bytes
    # Bytes of a row before the part of a pass's memory that an argument is in, by argument.
    places: Mapping[str, NDArray[np.int64]]
    numbers: NDArray[np.int64]  # places of the calls among all calls

    def of_pass(self, memory: int, rows: int) -> NDArray[np.void]:
        """Return the arguments of a pass over some rows, whose memory has this address."""
        values = self.values.copy()
        for name, start in self.places.items():
            values[name] += memory + rows * start
        return values


class LayerCalls:
    """The calls of layers with weights of few bits."""

    def __init__(self, stack: LayerStack, kernels: LayerKernels) -> None:
        self.stack, self.kernels, self.dtype = stack, kernels, stack.dtype
        layers = stack.layers
        products = [layer.products for layer in layers]
        groups = max(x.layer.shape[1] for x in chain(*products)) // GROUP
        self.widths = {
            **dict.fromkeys(("x", "attended", "y", "normed"), stack.hidden_size),
            "heads": (stack.heads + 2 * stack.kv_heads) * stack.head_dim,
            "mixed": stack.heads * stack.head_dim,
            "gate_up": 2 * stack.intermediate_size,
            "active": stack.intermediate_size,
        }
        parts = {name: width * self.dtype.itemsize for name, width in self.widths.items()}
        parts |= {name: groups * nbytes for name, nbytes in SCRATCH.items()}
        self.starts, self.row_nbytes = dict[str, int](), 0
        for name, nbytes in parts.items():
            self.starts[name] = self.row_nbytes
            self.row_nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT
        order = chain(*(_order(n, products, stack.activation) for n in range(len(layers))))
        self.order = np.array(list(order))  # the names of the functions that are called
        self.calls = np.zeros((len(self.order), 2), np.int64)  # addresses: functions and records
        self.records: dict[str, Records] = {}
        self._add_norms(layers)
        self._add_attention(layers)
        self._add_products(list(chain(*products)))
        # The layers that see the same keys, and with each rope.
        self.seen = _places([layer.seen for layer in layers])
        self.ropes = _places([layer.rope for layer in layers])

    def _add(
        self,
        name: str,
        parts: Mapping[str, Sequence[str]],  # what a pass reads and writes, by argument
        functions: Sequence[int] | None = None,  # addresses; None for the function of this name
    ) -> NDArray[np.void]:
        """Add the records of all calls with a name, and return them to be filled in."""
        numbers = np.flatnonzero(self.order == name)
        self.calls[numbers, 0] = functions or self.kernels.of_record(name)
        fields = ARGUMENTS if functions else {**FIELDS[name], **UNITS}
        values = np.zeros(len(numbers), record_type(fields))
        places = {
            argument: np.array([self.starts[part] for part in found])
            for argument, found in parts.items()
        }
        self.records[name] = Records(values, places, numbers)
        return values

    def _add_norms(self, layers: Sequence[CalledLayer]) -> None:
        """Add the norms: of the first input, and then of each network's and the next input."""
        norms = [x for layer in layers for x in (layer.input_norm, layer.network_norm)]
        addresses = [norm.data_ptr() for norm in norms]
        first = self._add("norm", {"y": ["x"], "normed": ["normed"]})
        residuals, totals = ["x", "attended"] * len(layers), ["attended", "x"] * len(layers)
        parts = {"y": ["y"], "normed": ["normed"], "residual": residuals[:-1], "total": totals[:-1]}
        sums = self._add("norm_sum", parts)
        for values, found in ((first, addresses[:1]), (sums, addresses[1:])):
            values["weight"] = found
            values["size"], values["eps"] = self.stack.hidden_size, self.stack.eps

    def _add_attention(self, layers: Sequence[CalledLayer]) -> None:
        """Add what norms and rotates heads, what attends, and the activations."""
        stack = self.stack
        turns = self._add("turn", {"heads": ["heads"]})
        norms = [0 if x.head_norms is None else x.head_norms.data_ptr() for x in layers]
        turns["norms"], turns["is_normed"], turns["eps"] = norms, np.sign(norms), stack.eps
        turns["heads_of_row"] = stack.heads + 2 * stack.kv_heads
        turns["is_rotated"] = [layer.rope is not None for layer in layers]
        attends = self._add("attend", {"queries": ["heads"], "output": ["mixed"]})
        attends["stride"], attends["group"] = self.widths["heads"], stack.heads // stack.kv_heads
        attends["scale"], attends["cap"] = stack.score_scale, stack.score_cap or 0.0
        gates = self._add(stack.activation, {"gate_up": ["gate_up"], "output": ["active"]})
        gates["size"] = stack.intermediate_size

    def _add_products(self, products: Sequence[Product]) -> None:
        parts = {"x": [x.source for x in products], "y": [x.target for x in products]}
        scratch = {name: [name] for name in SCRATCH}
        functions = [kernel(x.layer.stored.format).of_record for x in products]
        values = self._add(PRODUCT, parts | scratch, functions)
        values["groups"] = [x.layer.shape[1] // GROUP for x in products]
        values["width"] = [self.widths[x.target] for x in products]
        values["y"] = [x.column * self.dtype.itemsize for x in products]
        values["wide"] = self.dtype == torch.float32
        self.of_context = np.array([x.of_context for x in products])
        for name, *read in zip(
            Operands._fields, *(x.layer.operands for x in products), strict=True
        ):
            values[name] = read

    def run(
        self,
        x: Tensor,
        rotations: Sequence[Rotation],
        attention: CalledAttention,
        captured: Collection[int] = (),
        context: Tensor | None = None,  # (c, hidden_size), rotated and placed behind the rows
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Run (n, hidden_size) rows: the last layer's two parts, and what `captured` asks for."""
        rows = len(x)
        all_rows = rows if context is None else rows + len(context)
        # Parts that rows of context do not have stay unwritten, and take no memory.
        memory = torch.empty(all_rows * self.row_nbytes, dtype=torch.uint8)
        self._part(memory, all_rows, "x")[:rows] = x
        if context is not None:
            self._part(memory, all_rows, "normed")[rows:] = context
        values = {
            name: found.of_pass(memory.data_ptr(), all_rows) for name, found in self.records.items()
        }
        outputs = {-1: x} if -1 in captured else {}
        sums = values["norm_sum"]
        for layer in captured:
            if 0 <= layer < len(self.stack.layers) - 1:
                # The sum that the next layer reads, which its second norm reads too.
                output = outputs[layer] = torch.empty_like(x)
                number = 2 * layer + 1
                sums["total"][number] = sums["residual"][number + 1] = output.data_ptr()
        held = self._fill(values, rotations, attention, rows, all_rows)
        calls = self.calls.copy()
        for name, found in self.records.items():
            own = values[name]
            calls[found.numbers, 1] = own.ctypes.data + np.arange(len(own)) * own.itemsize
        self.kernels.run_calls(calls)
        del held
        y, attended = (self._part(memory, all_rows, name)[:rows] for name in ("y", "attended"))
        return y, attended, outputs

    def _fill(
        self,
        values: Mapping[str, NDArray[np.void]],
        rotations: Sequence[Rotation],
        attention: CalledAttention,
        rows: int,
        all_rows: int,  # rows, with the rows of context behind them
    ) -> Tensor:
        """Write to the records what a pass has of its own; returns the memory that they need."""
        stack, shared = self.stack, self.kernels.shared
        numbers = {"norm": "y", "norm_sum": "y", "turn": "heads", stack.activation: "gate_up"}
        for name, part in numbers.items():
            # Rows of context have no queries: whatever stands in their place is turned, and unread.
            units = values[name]["units"] = all_rows if name == "turn" else rows
            values[name]["threads"] = shared(units * self.widths[part])
        turns, attends, products = (values[name] for name in ("turn", "attend", "product"))
        for rope, layers in self.ropes.items():
            if rope is not None:
                turns["cos"][layers], turns["sin"][layers] = (x.data_ptr() for x in rotations[rope])
        attention.places.fill(turns, np.arange(len(stack.layers)))
        for seen, layers in self.seen.items():
            bounds, table = attention.layout(seen)
            attends["bounds"][layers] = bounds.data_ptr()
            table.fill(attends, layers)
        threads, size = self.kernels.attending(table, stack.head_dim)
        scratch = torch.empty(threads * size)
        attends["scratch"], attends["scratch_size"] = scratch.data_ptr(), size
        attends["units"], attends["threads"] = table.units, threads
        products["rows"] = np.where(self.of_context, all_rows, rows)
        products["threads"] = self.kernels.threads
        return scratch

    def _part(self, memory: Tensor, rows: int, name: str) -> Tensor:
        """Return the rows of a part of the memory of a pass."""
        width = self.widths[name]
        first, nbytes = rows * self.starts[name], rows * width * self.dtype.itemsize
        return memory[first : first + nbytes].view(self.dtype).view(rows, width)


def products_of(
    modules: Sequence[tuple[Sequence[nn.Module], str, str]],
) -> list[Product] | None:
    """Return the products of a layer in order; None if one of them cannot be a call.

    Linear layers that read one part of a pass's memory write to columns after columns of another:
    `modules` has these layers and the names of both parts.
    """
    found = []
    for layers, source, target in modules:
        column = 0
        for layer in layers:
            if not isinstance(layer, LowBitLinear) or layer.order is not None:
                return None
            if layer.shape[0] % BLOCK_ROWS:
                return None
            found.append(Product(layer, source, target, column))
            column += layer.shape[0]
    return found


def _order(number: int, products: Sequence[Sequence[Product]], activation: str) -> Iterator[str]:
    """Yield the names of a layer's functions in the order of their calls."""
    counts = Counter(x.target for x in products[number] if x.target != "y")
    yield "norm_sum" if number else "norm"
    yield from [PRODUCT] * counts["heads"]
    yield from ("turn", "attend", PRODUCT, "norm_sum")
    yield from [PRODUCT] * counts["gate_up"]
    yield from (activation, PRODUCT)


def _places(found: Sequence[Any]) -> dict[Any, NDArray[np.int64]]:
    """Return where each of some values stands among them."""
    return {x: np.flatnonzero([x == y for y in found]) for x in dict.fromkeys(found)}
