"""The functions of `layer_code`, compiled for this processor, over PyTorch's tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash_cuda.cache import Segment
from treeflash_cuda.cpu import layer_code
from treeflash_cuda.cpu.ir_builder import OF_RECORD, Isa, argument_types
from treeflash_cuda.cpu.layer_code import (
    FIELDS,
    LANES,
    RUN_CALLS,
    SEQUENCE,
    UNITS,
    Element,
    LayerKind,
    build,
)
from treeflash_cuda.cpu.machine_code import best_isa, compiled, has_threads
from treeflash_cuda.cpu.threads import cpu_threads

SHARED = 1 << 17
"""Least numbers that a function reads for which threads share its work."""
ELEMENTS = {torch.float32: Element(is_wide=True), torch.bfloat16: Element(is_wide=False)}


class SequencesTable:
    """The sequences of a pass, for one layer after the other."""

    def __init__(
        self,
        lines: NDArray[np.int64],  # (layers, sequences, len(SEQUENCE)); see `layer_code.SEQUENCE`
        kv_heads: int,
        column_stride: int,  # between columns of the caches, in numbers
        columns: int,  # columns of the longest sequence after the pass
        masks: Sequence[Tensor | None] = (),  # what the lines have addresses of
    ) -> None:
        self._masks = masks
        self.kv_heads, self.columns, self._lines = kv_heads, columns, lines
        last = dict(zip(SEQUENCE, lines[0, -1].tolist(), strict=True))
        self.rows, self.units = last["row_end"], last["unit_end"]
        self._first, self._step = lines.ctypes.data, lines.strides[0]
        self._counts = lines.shape[1], kv_heads, column_stride

    @classmethod
    def of(cls, segments: Sequence[Segment], heads: int) -> SequencesTable:
        """Make the table of rows of sequences, without masks; their columns are reserved."""
        layers = segments[0][0].arena.layers
        lines = np.zeros((layers, len(segments), len(SEQUENCE)), np.int64)
        rows = units = columns = stride = kv_heads = 0
        for n, (cache, first, count) in enumerate(segments):
            cache.reserve_rows(first, first + count)
            (part,) = cache.parts
            kv_heads = part.shape[2]
            layer, kind, head, stride = part.stride()[:4]
            rows, columns = rows + count, max(columns, first + count)
            units += kv_heads * -(-count * (heads // kv_heads) // LANES)
            keys = part.data_ptr() + np.arange(layers) * (layer * part.itemsize)
            lines[:, n, 0], lines[:, n, 1] = keys, keys + kind * part.itemsize
            lines[:, n, 2:] = head, first, count, rows, units, 0
        return cls(lines, kv_heads, stride, columns)

    def with_masks(self, masks: Sequence[Tensor | None]) -> SequencesTable:
        """Return a copy with the mask of each sequence; None for a sequence without one."""
        lines = self._lines.copy()
        addresses = [0 if mask is None else mask.data_ptr() for mask in masks]
        lines[..., SEQUENCE.index("mask")] = addresses
        return SequencesTable(lines, self.kv_heads, self._counts[2], self.columns, masks)

    def first(self, count: int) -> SequencesTable:
        """Return a table of the first sequences alone."""
        lines = np.ascontiguousarray(self._lines[:, :count])
        return SequencesTable(lines, self.kv_heads, self._counts[2], self.columns)

    def of_layer(self, layer: int) -> tuple[int, ...]:
        """Return the arguments that functions take."""
        return self._first + layer * self._step, *self._counts

    def fill(self, records: NDArray[np.void], layers: NDArray[np.int64]) -> None:
        """Write the arguments to the records of functions in layers."""
        records["table"][layers] = self._first + layers * self._step
        records["sequences"], records["kv_heads"], records["column_stride"] = self._counts


class LayerKernels:
    """The functions for rows of one dtype, and caches of another or the same one."""

    def __init__(self, isa: Isa, dtype: torch.dtype, cached: torch.dtype, kind: LayerKind) -> None:
        self.isa = isa
        elements = ELEMENTS[dtype], ELEMENTS[cached]
        self._has_threads = has_threads()
        self._engine = compiled(  # holds the code
            isa,
            (layer_code,),
            (*elements, kind, self._has_threads),
            lambda: build(*elements, kind, self._has_threads),
        )
        self._run = {
            name: ctypes.CFUNCTYPE(None, *argument_types({**fields, **UNITS}))(
                self._engine.get_function_address(name)
            )
            for name, fields in FIELDS.items()
        }
        signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
        self._run_calls = signature(self._engine.get_function_address(RUN_CALLS))

    def of_record(self, name: str) -> int:
        """Return the address of the function that reads another one's arguments from a record."""
        address: int = self._engine.get_function_address(f"{name}{OF_RECORD}")
        return address

    def run_calls(self, calls: NDArray[np.int64]) -> None:
        """Call the (n, 2) functions and records with these addresses, one after the other."""
        self._run_calls(calls.ctypes.data, len(calls))

    @property
    def threads(self) -> int:
        """The number of threads that may share work."""
        return cpu_threads().of_compiled if self._has_threads else 1

    def shared(self, numbers: int) -> int:
        """Return how many threads share the work on so many numbers."""
        return self.threads if numbers >= SHARED else 1

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the (n, size) normed sum, and the sum itself."""
        n, size = x.shape
        normed = torch.empty_like(x)
        threads = self.shared(n * size)
        if residual is None:
            pointers = x.data_ptr(), weight.data_ptr(), normed.data_ptr()
            self._run["norm"](*pointers, size, eps, n, threads)
            return normed, x
        total = torch.empty_like(x)
        pointers = x.data_ptr(), weight.data_ptr(), normed.data_ptr()
        sums = residual.data_ptr(), total.data_ptr()
        self._run["norm_sum"](*pointers, *sums, size, eps, n, threads)
        return normed, total

    def turn(
        self,
        heads: Tensor,  # (n, heads + 2 * kv_heads, head_dim) queries, keys and values: changed
        rotation: tuple[Tensor, Tensor] | None,
        norms: Tensor | None,  # (heads + kv_heads, head_dim)
        eps: float,
        table: SequencesTable,
        layer: int,
    ) -> None:
        """Norm and rotate queries and keys, and store keys and values."""
        cos, sin = (None, None) if rotation is None else (x.data_ptr() for x in rotation)
        self._run["turn"](
            *(heads.data_ptr(), cos, sin, None if norms is None else norms.data_ptr()),
            *(heads.shape[1], eps, rotation is not None, norms is not None),
            *table.of_layer(layer),
            *(heads.shape[0], self.shared(heads.numel())),
        )

    def attend(
        self,
        queries: Tensor,  # (n, heads, head_dim), with any stride between rows
        bounds: Tensor,  # (n, 2) int32: the first and the last column that each row sees
        table: SequencesTable,
        layer: int,
        scale: float,  # factor on the products of queries and keys
        cap: float | None = None,  # bound of the scores, of layers that have one
    ) -> Tensor:
        """Return the attention of rows to their sequences: (n, heads * head_dim)."""
        n, heads, d = queries.shape
        # Repeated rows of a lone token belong to no sequence.
        shape = n, heads * d
        output = queries.new_empty(shape) if n == table.rows else queries.new_zeros(shape)
        threads, size = self.attending(table, d)
        scratch = torch.empty(threads * size)
        self._run["attend"](
            *(queries.data_ptr(), output.data_ptr(), bounds.data_ptr()),
            *(queries.stride(0), heads // table.kv_heads, scale, cap or 0.0),
            *table.of_layer(layer),
            *(scratch.data_ptr(), size, table.units, threads),
        )
        return output

    def attending(self, table: SequencesTable, head_dim: int) -> tuple[int, int]:
        """Return how many threads attend, and how many float32 numbers each of them writes."""
        threads = min(self.shared(table.units * table.columns * head_dim), table.units)
        return threads, (head_dim + 1 + table.columns) * LANES

    def gated(self, gate_and_up: Tensor, activation: str) -> Tensor:
        """Return (n, size) activation(gate) * up, from (n, 2 * size) gates and then factors."""
        n, size = gate_and_up.shape[0], gate_and_up.shape[1] // 2
        output = gate_and_up.new_empty(n, size)
        pointers = gate_and_up.data_ptr(), output.data_ptr()
        self._run[activation](*pointers, size, n, self.shared(gate_and_up.numel()))
        return output

    def capped(self, x: Tensor, cap: float) -> Tensor:
        """Change (n, size) numbers to cap * tanh(x / cap), and return them."""
        n, size = x.shape
        self._run["cap"](x.data_ptr(), size, cap, n, self.shared(x.numel()))
        return x


@functools.cache
def layer_kernels(
    dtype: torch.dtype, cached: torch.dtype, kind: LayerKind, sizes: Sequence[int]
) -> LayerKernels | None:
    """Return the functions for a decoder with rows of these sizes; None where there are none."""
    isa = best_isa()
    fits = kind.head_dim % 32 == 0 and all(size % LANES == 0 for size in sizes)
    if isa is None or not fits or not {dtype, cached} <= ELEMENTS.keys():
        return None
    return LayerKernels(isa, dtype, cached, kind)
