"""Triton kernels of the operations in `treeflash_cuda.operations`, with the same arguments.

Whatever a kernel computes for a row depends on that row alone, bit for bit: neither on the number
of rows nor on what they hold. Sums over keys are products of tiles that lie at multiples of the
tile's size in the order of positions, added in that order; sums over elements of a row are made by
one program with a width that the model fixes; and no multiplication is fused with an addition,
because compilers would fuse them in one kernel and not in another.
"""

MAX_REGISTERS = 255
"""Registers that a thread may have. Without a limit of ours the assembler keeps some below the next
number with which one more program fits into a multiprocessor, and spills a few for that."""
