"""What users are told about the compilation of Triton kernels: that it takes time, or why it fails.

Triton compiles kernels for each GPU once, and keeps them in a folder. Some of it is done by a C
compiler, whose errors Triton does not put into its own.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from treeflash.errors import first_line


def c_compiler() -> str | None:
    """Return the C compiler that Triton takes; None if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def python_header() -> Path:
    """Return the place of a file that is compiled in, which some Pythons come without."""
    return Path(sysconfig.get_path("include"), "Python.h")


def toolchain_problems(compiler: str | None, header: Path) -> Iterator[str]:
    """Yield a line for each thing that Triton needs to compile and does not find."""
    if compiler is None:
        yield "Triton finds no C compiler, so no kernel can be used: install gcc"
    if not header.is_file():
        yield f"Triton finds no {header}, so no kernel can be used: install python3-dev"


def reason_of(error: Exception) -> str:
    """Return why a kernel cannot be used, in one line."""
    if not isinstance(error, subprocess.CalledProcessError):
        return first_line(error)
    command = error.cmd if isinstance(error.cmd, str) else " ".join(map(str, error.cmd))
    failed = f"the C compiler that Triton runs fails; see what this prints: {command}"
    return next(toolchain_problems(c_compiler(), python_header()), failed)


@cache
def announce_compiling() -> None:
    """Say why loading takes longer than usual, once in a process."""
    logging.getLogger(__name__).warning(
        "compiling Triton kernels, once on this machine for each kind of model"
    )


@contextmanager
def compiling_announced() -> Iterator[None]:
    """Announce the first kernel that Triton compiles, and not one that it has kept."""
    from triton import knobs

    before = knobs.compilation.listener

    def listen(*, cache_hit: bool, **facts: Any) -> None:
        if not cache_hit:
            announce_compiling()
        if before is not None:
            before(cache_hit=cache_hit, **facts)

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        knobs.compilation.listener = before
