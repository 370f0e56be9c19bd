"""Two passes of clang over the sources of Metal kernels, without Apple's compiler.

`errors` parses a source with real address spaces. `registers` optimises it and looks for what a
kernel must not have: an array that stays in the memory of a thread, and an element of a vector that
is picked by a variable. A loop over registers that is not unrolled leaves both; on a GPU each
access is then a load or a store.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from clang import cindex

FOLDER = Path(__file__).parent
FLAGS = ("-std=c++17", "-nostdinc", f"-I{FOLDER}")
INCLUDE = re.compile(r'^#include "mlx/.*"$', re.MULTILINE)
INSTANTIATION = re.compile(r'template \[\[host_name\("[^"]*"\)\]\] \[\[kernel\]\] decltype')
ERROR = cindex.Diagnostic.Error


@dataclass(frozen=True)
class Registers:
    """What the optimiser left of a kernel."""

    arrays: tuple[str, ...]  # types of arrays in the memory of a thread
    picked: int  # elements of vectors that a variable picks
    products: int  # products of matrices, in line


def as_cpp(source: str) -> str:
    """Translate a source as MLX writes it to C++ for clang."""
    source, count = INCLUDE.subn('#include "metal_clang.h"', source)
    assert count == 1, "a source includes one header of MLX"
    return INSTANTIATION.sub("template decltype", source)


def errors(source: str) -> list[str]:
    """List clang's errors, each with its line."""
    files = [("kernel.cpp", as_cpp(source))]
    parsed = cindex.Index.create().parse("kernel.cpp", ["-x", "c++", *FLAGS], files)
    found = (x for x in parsed.diagnostics if x.severity >= ERROR)
    return [f"line {x.location.line}: {x.spelling}" for x in found]


def registers(source: str, folder: Path) -> Registers:
    """Optimise a source and count what is left; `folder` keeps the compiler's files."""
    (folder / "kernel.cpp").write_text(as_cpp(source))
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", *FLAGS]
    command += ["-w", "-O2", "-fno-vectorize", "-fno-slp-vectorize", "-S", "-emit-llvm"]
    caches = {f"ZIG_{scope}_CACHE_DIR": str(folder) for scope in ("GLOBAL", "LOCAL")}
    output = folder / "kernel.ll"
    subprocess.run(
        [*command, "-o", str(output), str(folder / "kernel.cpp")],
        check=True,
        env={**os.environ, **caches},
    )
    text = output.read_text()
    return Registers(
        tuple(re.findall(r"alloca (\[[^\n,]*)", text)),
        len(re.findall(r"extractelement <[^>]+> %[\w.]+, i(?:32|64) %", text)),
        len(re.findall(r"call .*@gpu_multiply_accumulate", text)),
    )
