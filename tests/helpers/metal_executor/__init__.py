"""Runs Metal kernels on a CPU, so that MLX's custom kernels are executed without a Mac.

A kernel for `mx.fast.metal_kernel` is the body of a function in Metal's language, which is C++ with
another library. MLX writes a signature around the body (`kernel_source`). Here a C++ compiler
compiles that text against a library of the same names (`metal_stdlib.h`, `compiler`), and a
scheduler runs it (`scheduler.cpp`, `execution`): one threadgroup at a time, and within it a fiber
for each thread, which runs until it waits for others. `installation` puts the executor in MLX's
place, so that the code of mlx-lm and of the backend takes its Metal paths with arrays on the CPU.

A test takes the fixture `metal` and calls code that makes kernels as it would on a Mac;
`metal.launches` tells which ran. With the fixture `executor`, MLX stays as it is, and
`executor.metal_kernel` makes a kernel. `KernelSource.metal` is the text for Apple's compiler. A
kernel is compiled once for each text, in half a second, and kept in pytest's cache.

A kernel runs under three schedules, whose outputs must be equal in every bit (outputs of atomic
operations on floats: nearly equal). Ascending and descending, the threads of the lowest or highest
simdgroup run as far as they can before others do. In the random schedule any thread may run next
after any access to memory. In each of them, what nothing has written holds another NaN.

A kernel fails, with the line of its source, if

- it reads or writes outside of its buffers or threadgroup variables, or writes an input. Every
  access is checked under the first schedule; under all of them buffers lie between pages that
  cannot be accessed, at the start or at the end of their own pages;
- it reads threadgroup memory or an output that nothing has written;
- two threads use the same element, one of them writes it, and no barrier for that kind of memory
  lies between, or the threads are of two threadgroups. Atomic operations may meet, and lanes of a
  simdgroup may write the same value;
- a barrier is not reached by all threads, or threads wait at different barriers;
- the lanes of a simdgroup do not all reach the same operation of simdgroups. Lanes that have
  returned take no part, as in Metal; operations on matrices need all 32. A branch to
  one of these operations that only some lanes take is legal in Metal, and an error here;
- a shuffle reads a lane that takes no part;
- an index leaves an array, an integer is divided by zero or shifted too far, 32 KiB of threadgroup
  memory do not suffice, or a run takes more than a minute of the processor.

Sums of simdgroups are added as a butterfly, as on Apple's GPUs, and products of `simdgroup_matrix`
in ascending order in float32. float becomes half without a cast, but bfloat only with one.

What it cannot show: speed, the pressure on registers, misaligned vectors, the rounding of Apple's
exponentials and other functions, whether a threadgroup has too many threads for a kernel, and what
Apple's compiler refuses. Its library lacks textures, swizzles of components that are not
neighbours, and 64-bit atomics. It runs on Linux.
"""

from metal_executor.compiler import MetalCompileError, find_compiler, require_compiler
from metal_executor.execution import (
    ASCENDING,
    DESCENDING,
    RANDOM,
    SCHEDULES,
    MetalExecutor,
    MetalKernel,
    MetalKernelError,
)
from metal_executor.installation import install
from metal_executor.kernel_source import KernelSource

__all__ = [
    "ASCENDING",
    "DESCENDING",
    "RANDOM",
    "SCHEDULES",
    "KernelSource",
    "MetalCompileError",
    "MetalExecutor",
    "MetalKernel",
    "MetalKernelError",
    "find_compiler",
    "install",
    "require_compiler",
]
