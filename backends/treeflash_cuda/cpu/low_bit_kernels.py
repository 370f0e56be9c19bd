"""The functions of `low_bit_code`, compiled for this processor, over PyTorch's tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from treeflash.errors import UnsupportedModelError
from treeflash.low_bits import GROUP, LowBitFormat
from treeflash_cuda.cpu import low_bit_code
from treeflash_cuda.cpu.ir_builder import Isa
from treeflash_cuda.cpu.low_bit_code import ENTRY, build
from treeflash_cuda.cpu.machine_code import best_isa, compiled, has_threads
from treeflash_cuda.cpu.threads import cpu_threads

ARGUMENTS = (*[ctypes.c_void_p] * 9, *[ctypes.c_int64] * 4, *[ctypes.c_int] * 2)
"""Of the compiled function: addresses, sizes, whether rows are float32, and threads."""


class Kernel:
    """The product with weights of a format."""

    def __init__(self, isa: Isa, kind: LowBitFormat) -> None:
        self.isa, self.format = isa, kind
        self._has_threads = has_threads()
        self._engine = compiled(  # holds the code
            isa,
            (low_bit_code,),
            (kind, self._has_threads),
            lambda: build(isa, kind, self._has_threads),
        )
        address = self._engine.get_function_address(ENTRY)
        self._run: Callable[..., None] = ctypes.CFUNCTYPE(None, *ARGUMENTS)(address)

    def __call__(
        self, x: Tensor, weight: tuple[int, int, int | None], blocks: int, width: int
    ) -> Tensor:
        """Multiply (..., size) numbers, in float32 or bfloat16, by a weight: (..., width).

        The weight has the addresses of a `PackedWeight`, whose blocks have `width` rows.
        """
        size = x.shape[-1]
        flat = x.reshape(-1, size).contiguous()
        rows, groups = flat.shape[0], size // GROUP
        y = x.new_empty(*x.shape[:-1], width)
        if rows:
            # For each group: a scale and a low (float32), two starts (int32), 32 integers (int8).
            count = rows * groups
            scratch = torch.empty(count * (4 + 4 + 8 + GROUP), dtype=torch.uint8)
            d = scratch.data_ptr()
            lows, starts, q = d + 4 * count, d + 8 * count, d + 16 * count
            threads = cpu_threads().of_compiled if self._has_threads else 1
            self._run(
                flat.data_ptr(),
                *weight,
                y.data_ptr(),
                *(q, d, starts, lows),
                *(rows, width, groups, blocks),
                *(x.dtype == torch.float32, threads),
            )
        return y


@functools.cache
def kernel(kind: LowBitFormat) -> Kernel:
    """Return the kernel of a format; compiled once for a process, and kept on disk.

    Raises an UnsupportedModelError if this processor has no instructions for it.
    """
    isa = best_isa()
    if isa is None:
        raise UnsupportedModelError("this processor has no instructions for products of bytes")
    return Kernel(isa, kind)
