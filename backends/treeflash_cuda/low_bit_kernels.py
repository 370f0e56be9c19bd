"""Compile the code of `low_bit_code` for this processor, and run it in PyTorch's threads.

Compiling takes a second for each format, so the object code is kept in the user's cache. The name
of a file there is a hash of what the code depends on: this package's sources that write it, the
version of LLVM, the instructions and the format.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import torch
from torch import Tensor

from treeflash.config import cache_folder
from treeflash.errors import UnsupportedModelError
from treeflash.low_bits import GROUP, LowBitFormat
from treeflash_cuda import low_bit_code
from treeflash_cuda.low_bit_code import ENTRY, FORK, ISAS, Isa, build

ARGUMENTS = (*[ctypes.c_void_p] * 8, *[ctypes.c_int64] * 4, *[ctypes.c_int] * 2)
"""Of the compiled function: addresses, sizes, whether rows are float32, and threads."""


class Kernel:
    """The product with weights of a format."""

    def __init__(self, isa: Isa, kind: LowBitFormat) -> None:
        self.isa, self.format = isa, kind
        self._has_threads = _bind_threads()
        self._engine = _engine(isa, kind, self._has_threads)  # holds the code
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
        rows, groups = len(flat), size // GROUP
        y = x.new_empty(*x.shape[:-1], width)
        if rows:
            # For each group: a scale (float32), two sums (int32), 32 integers (int8).
            d = torch.empty(rows * groups * (4 + 8 + GROUP), dtype=torch.uint8)
            first = d.data_ptr()
            sums = first + rows * groups * 4
            threads = torch.get_num_threads() if self._has_threads else 1
            self._run(
                flat.data_ptr(),
                *weight,
                y.data_ptr(),
                sums + rows * groups * 8,
                first,
                sums,
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


@functools.cache
def best_isa() -> Isa | None:
    """Return the best instructions that this processor has; None if it has none of them."""
    found = {name for name, has in llvm.get_host_cpu_features().items() if has}
    return next((isa for isa in ISAS if found.issuperset(isa.needed)), None)


def _engine(isa: Isa, kind: LowBitFormat, threads: bool) -> Any:
    """Load the code of a format."""
    with suppress(RuntimeError):  # newer versions do it themselves, and say so
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = ",".join([*(f"+{name}" for name in isa.needed), *filter(None, [isa.features])])
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(features=features, opt=3, jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(_object_code(isa, kind, threads, machine)))
    engine.finalize_object()
    return engine


def _object_code(isa: Isa, kind: LowBitFormat, threads: bool, machine: Any) -> bytes:
    """Compile a format's code, or read it from the cache."""
    sources = [
        Path(str(module.__file__)).read_bytes() for module in (low_bit_code, sys.modules[__name__])
    ]
    facts = repr((isa, kind, threads, llvmlite.__version__, llvm.llvm_version_info, machine.triple))
    digest = hashlib.sha256(b"".join([*sources, facts.encode()])).hexdigest()
    path = cache_folder() / "kernels" / f"{digest[:32]}.o"
    with suppress(OSError):
        return path.read_bytes()
    module = llvm.parse_assembly(build(isa, kind, threads))
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    with suppress(OSError):  # the next process then compiles it again
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_bytes(code)
        scratch.replace(path)
    return code


@functools.cache
def _bind_threads() -> bool:
    """Let code find `FORK` in the OpenMP that PyTorch has loaded; return whether it is there.

    The threads of a product are then the ones of PyTorch's operations. On systems where PyTorch has
    another OpenMP, products have one thread.
    """
    if not sys.platform.startswith("linux"):
        return False
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    for path in sorted({line.split()[-1] for line in maps.splitlines() if "gomp" in line}):
        with suppress(OSError, AttributeError):
            function = getattr(ctypes.CDLL(path), FORK)
            llvm.add_symbol(FORK, ctypes.cast(function, ctypes.c_void_p).value)
            return True
    return False
