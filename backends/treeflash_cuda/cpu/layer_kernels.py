"""The functions of `layer_code`, compiled for this processor, over PyTorch's tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash_cuda.cpu import layer_code
from treeflash_cuda.cpu.ir_builder import Isa
from treeflash_cuda.cpu.layer_code import ACTIVATIONS, LANES, SEQUENCE, Element, LayerKind, build
from treeflash_cuda.cpu.machine_code import best_isa, compiled, has_threads
from treeflash_cuda.cpu.threads import cpu_threads

ADDRESS, SIZE, FLAG, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SEQUENCES = (ADDRESS, SIZE, SIZE, SIZE)
ARGUMENTS = {
    "norm": (*[ADDRESS] * 3, SIZE, NUMBER),
    "norm_sum": (*[ADDRESS] * 5, SIZE, NUMBER),
    "turn": (*[ADDRESS] * 4, SIZE, NUMBER, FLAG, FLAG, *SEQUENCES),
    "attend": (*[ADDRESS] * 3, SIZE, SIZE, NUMBER, NUMBER, *SEQUENCES, ADDRESS, SIZE),
    **dict.fromkeys(ACTIVATIONS, (ADDRESS, ADDRESS, SIZE)),
    "cap": (ADDRESS, SIZE, NUMBER),
}
"""Kinds of the functions' arguments, before the numbers of units and of threads."""
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
    ) -> None:
        self.kv_heads, self.columns, self._lines = kv_heads, columns, lines
        last = dict(zip(SEQUENCE, lines[0, -1].tolist(), strict=True))
        self.rows, self.units = last["row_end"], last["unit_end"]
        self._first, self._step = lines.ctypes.data, lines.strides[0]
        self._counts = lines.shape[1], kv_heads, column_stride

    def with_masks(self, addresses: Sequence[int]) -> SequencesTable:
        """Return a copy with the address of each sequence's mask; 0 for a sequence without one."""
        lines = self._lines.copy()
        lines[..., SEQUENCE.index("mask")] = addresses
        return SequencesTable(lines, self.kv_heads, self._counts[2], self.columns)

    def of_layer(self, layer: int) -> tuple[int, ...]:
        """Return the arguments that functions take."""
        return self._first + layer * self._step, *self._counts


class LayerKernels:
    """The functions for rows of one dtype, and caches of another or the same one."""

    def __init__(self, isa: Isa, dtype: torch.dtype, cached: torch.dtype, kind: LayerKind) -> None:
        self.isa = isa
        elements = ELEMENTS[dtype], ELEMENTS[cached]
        self._threads = has_threads()
        self._engine = compiled(  # holds the code
            isa,
            (layer_code,),
            (*elements, kind, self._threads),
            lambda: build(*elements, kind, self._threads),
        )
        self._run = {
            name: ctypes.CFUNCTYPE(None, *kinds, SIZE, FLAG)(
                self._engine.get_function_address(name)
            )
            for name, kinds in ARGUMENTS.items()
        }

    def _shared(self, numbers: int) -> int:
        """Return how many threads share the work on so many numbers."""
        return cpu_threads().of_compiled if self._threads and numbers >= SHARED else 1

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the (n, size) normed sum, and the sum itself."""
        n, size = x.shape
        normed = torch.empty_like(x)
        threads = self._shared(n * size)
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
            *(heads.shape[0], self._shared(heads.numel())),
        )

    def attend(
        self,
        queries: Tensor,  # (n, heads, head_dim), with any stride between rows
        firsts: Tensor,  # (n,) int32: the first column that each row sees
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
        units = table.units
        threads = min(self._shared(units * table.columns * d), units)
        size = (d + 1 + table.columns) * LANES
        scratch = torch.empty(threads * size)
        self._run["attend"](
            *(queries.data_ptr(), output.data_ptr(), firsts.data_ptr()),
            *(queries.stride(0), heads // table.kv_heads, scale, cap or 0.0),
            *table.of_layer(layer),
            *(scratch.data_ptr(), size, units, threads),
        )
        return output

    def gated(self, gate_and_up: Tensor, activation: str) -> Tensor:
        """Return (n, size) activation(gate) * up, from (n, 2 * size) gates and then factors."""
        n, size = gate_and_up.shape[0], gate_and_up.shape[1] // 2
        output = gate_and_up.new_empty(n, size)
        pointers = gate_and_up.data_ptr(), output.data_ptr()
        self._run[activation](*pointers, size, n, self._shared(gate_and_up.numel()))
        return output

    def capped(self, x: Tensor, cap: float) -> Tensor:
        """Change (n, size) numbers to cap * tanh(x / cap), and return them."""
        n, size = x.shape
        self._run["cap"](x.data_ptr(), size, cap, n, self._shared(x.numel()))
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
