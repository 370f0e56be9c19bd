"""The functions of `low_bit_code`, compiled for this processor, over PyTorch's tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from treeflash.errors import UnsupportedModelError
from treeflash.low_bits import BLOCK_ROWS, GROUP, LowBitFormat
from treeflash_cuda.cpu import low_bit_code
from treeflash_cuda.cpu.ir_builder import OF_RECORD, Isa, argument_types
from treeflash_cuda.cpu.low_bit_code import ARGUMENTS, ENTRY, build
from treeflash_cuda.cpu.machine_code import best_isa, compiled, has_threads
from treeflash_cuda.cpu.threads import cpu_threads

SCRATCH = {"q": GROUP, "d": 4, "starts": 8, "lows": 4}
"""What a product writes first, in bytes for a group of a row: 32 integers (int8), a scale
(float32), two starts (int32), and a low (float32)."""


class Operands(NamedTuple):
    """What a product reads of a layer: addresses, 0 for what it lacks, and the number of blocks."""

    numbers: int
    scales: int
    least: int
    factors: int
    bias: int
    blocks: int


class Kernel:
    """The product with weights of a format.

    Attributes:
        of_record: the address of the function that reads its arguments from a record.
    """

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
        signature = ctypes.CFUNCTYPE(None, *argument_types(ARGUMENTS))
        self._run: Callable[..., None] = signature(address)
        self.of_record = self._engine.get_function_address(f"{ENTRY}{OF_RECORD}")

    @property
    def threads(self) -> int:
        """The number of threads that may share a product."""
        return cpu_threads().of_compiled if self._has_threads else 1

    def __call__(self, x: Tensor, operands: Operands) -> Tensor:
        """Multiply (..., size) numbers, in float32 or bfloat16: (..., 16 * blocks)."""
        size = x.shape[-1]
        flat = x.reshape(-1, size).contiguous()
        rows, groups = flat.shape[0], size // GROUP
        *weight, blocks = operands
        y = x.new_empty(*x.shape[:-1], blocks * BLOCK_ROWS)
        if rows:
            *starts, nbytes = accumulate(SCRATCH.values(), initial=0)
            scratch = torch.empty(rows * groups * nbytes, dtype=torch.uint8)
            self._run(
                *(flat.data_ptr(), *weight, y.data_ptr()),
                *(scratch.data_ptr() + rows * groups * start for start in starts),
                *(rows, blocks * BLOCK_ROWS, groups, blocks),
                *(x.dtype == torch.float32, self.threads),
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
