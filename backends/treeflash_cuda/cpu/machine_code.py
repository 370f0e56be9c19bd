"""Compile LLVM's intermediate representation for this processor, to run in PyTorch's threads.

Compiling takes about a second, so the object code is kept in the user's cache. The name of a file
there is a hash of what the code depends on: the sources that write it, the version of LLVM, the
instructions and the facts that the writer takes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import torch

from treeflash.config import cache_folder, remember
from treeflash_cuda.cpu import ir_builder
from treeflash_cuda.cpu.ir_builder import FORK, ISAS, Isa

HASH_NBYTES = hashlib.sha256().digest_size
"""Bytes of the hash of a file's code, which begins the file."""


@functools.cache
def best_isa() -> Isa | None:
    """Return the best instructions that this processor has; None if it has none of them."""
    found = {name for name, has in llvm.get_host_cpu_features().items() if has}
    return next((isa for isa in ISAS if found.issuperset(isa.needed)), None)


def compiled(
    isa: Isa, sources: Sequence[ModuleType], facts: Sequence[object], build: Callable[[], str]
) -> Any:
    """Load the code that `build` writes; its `get_function_address` finds a function.

    Args:
        isa: the instructions that the code may use.
        sources: the modules that write it.
        facts: what they take.
        build: writes the code, if it is not in the cache.
    """
    with suppress(RuntimeError):  # newer versions do it themselves, and say so
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = ",".join([*(f"+{name}" for name in isa.needed), *filter(None, [isa.features])])
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(features=features, opt=3, jit=True)
    modules = *sources, ir_builder, sys.modules[__name__]
    texts = [Path(str(module.__file__)).read_bytes() for module in modules]
    known = repr((isa, facts, llvmlite.__version__, llvm.llvm_version_info, machine.triple))
    digest = hashlib.sha256(b"".join([*texts, known.encode()])).hexdigest()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    code = _object_code(cache_folder() / "kernels" / f"{digest[:32]}.o", machine, build)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def _object_code(path: Path, machine: Any, build: Callable[[], str]) -> bytes:
    """Read code from the cache, or compile it."""
    # LLVM crashes at a damaged file, which a machine leaves that loses power. So the code stands
    # behind its hash.
    with suppress(OSError):
        stored = path.read_bytes()
        if hashlib.sha256(stored[HASH_NBYTES:]).digest() == stored[:HASH_NBYTES]:
            return stored[HASH_NBYTES:]
    code: bytes = machine.emit_object(optimised(build(), machine))
    remember(path, hashlib.sha256(code).digest() + code)
    return code


def optimised(text: str, machine: Any) -> Any:
    """Return the module that a text describes, as it should run on a machine."""
    module = llvm.parse_assembly(text)
    # In a module without a layout, integers of 8 bytes begin at multiples of 4. A counter that
    # threads share could then cross two lines of the cache: an addition to it would stop all
    # processors, for 50 microseconds in some virtual machines.
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


@functools.cache
def has_threads() -> bool:
    """Let code find `FORK` in PyTorch's OpenMP; return whether it is there.

    The threads of a function are then the ones of PyTorch's operations. It is looked up from
    PyTorch's library, because other packages load an OpenMP of their own (sentencepiece): the
    threads of two take turns at waiting for work on processors that the other one needs. On systems
    where PyTorch has another OpenMP, functions have one thread.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with suppress(OSError, AttributeError):
        function = getattr(ctypes.CDLL(str(library)), FORK)
        llvm.add_symbol(FORK, ctypes.cast(function, ctypes.c_void_p).value)
        return True
    return False
