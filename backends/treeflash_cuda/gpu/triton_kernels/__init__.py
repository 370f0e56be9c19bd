"""Triton kernels of the operations in `treeflash_cuda.operations`, with the same arguments.

Whatever a kernel computes for a row depends on that row alone, bit for bit: neither on the number
of rows nor on what they hold. Sums over keys are products of tiles that lie at multiples of the
tile's size in the order of positions, added in that order; sums over elements of a row are made by
one program with a width that the model fixes; and no multiplication is fused with an addition,
because compilers would fuse them in one kernel and not in another.
"""

from functools import cache

import torch
import triton
from triton.runtime.driver import driver

MAX_REGISTERS = 255
"""Registers that a thread may have. Without a limit of ours the assembler keeps some below the next
number with which one more program fits into a multiprocessor, and spills a few for that."""
FIRST_TENSOR_CORES = 80
"""The compute capability from which on Triton uses tensor cores: it knows no earlier ones."""


def needs_registers(dtype: torch.dtype) -> bool:
    """Return whether products on the current GPU have no tensor cores, but registers of threads."""
    if dtype == torch.float32:  # with all bits
        return True
    if triton.knobs.runtime.interpret:
        return False
    return _is_older(driver.active.get_current_device())


@cache
def _is_older(device: int) -> bool:
    """Return whether a GPU, which must be the current one, is older than Triton's tensor cores."""
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch < FIRST_TENSOR_CORES
