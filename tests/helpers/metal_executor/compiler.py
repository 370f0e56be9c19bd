"""Compiles kernels and the scheduler; compiled files are kept by what they were made of."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
REQUIRED = "TREEFLASH_REQUIRE_BACKENDS"  # see `treeflash.testing.require`
SCHEDULER_FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-U_FORTIFY_SOURCE", "-fno-exceptions")
# Literals without a suffix are float in Metal. Accesses to memory are announced to the scheduler.
KERNEL_FLAGS = (
    *("-std=gnu++17", "-O1", "-g1", "-fPIC", "-w", "-ffp-contract=off", "-fno-exceptions"),
    *("-fsingle-precision-constant", "-fno-strict-aliasing", "-fno-threadsafe-statics"),
    "-fstack-clash-protection",  # touches every page, so that no array leaps over a guard page
    *(
        "-fsanitize=thread,bounds,shift-exponent,integer-divide-by-zero",
        "-fno-sanitize-recover=all",
    ),
    *("--param", "tsan-instrument-func-entry-exit=0"),
)


class MetalCompileError(Exception):
    """A kernel does not compile."""


def find_compiler() -> str | None:
    """The C++ compiler of this machine; GCC if there is one."""
    return shutil.which("g++") or shutil.which("c++")


def require_compiler() -> None:
    """Skip the calling module where kernels cannot be executed; see `treeflash.testing.require`."""
    if not sys.platform.startswith("linux"):
        pytest.skip("Metal kernels are executed on Linux only", allow_module_level=True)
    if find_compiler() is None:
        reason = "needs a C++ compiler to execute Metal kernels (Debian: g++)"
        if os.environ.get(REQUIRED):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason, allow_module_level=True)


@cache
def _version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout


class Compiler:
    """A C++ compiler with a folder of what it has compiled."""

    def __init__(self, folder: Path) -> None:
        """Use the folder for compiled files; several processes may."""
        command = find_compiler()
        assert command is not None, "there is no C++ compiler"
        self.command, self.folder = command, folder
        self._version = _version(command)
        headers = [FOLDER / "scheduler.h", FOLDER / "metal_stdlib.h"]
        self._headers = "".join(path.read_text() for path in headers)
        scheduler = self._build((FOLDER / "scheduler.cpp").read_text(), SCHEDULER_FLAGS)
        # Kernels find the scheduler's functions by name.
        self.scheduler = ctypes.CDLL(str(scheduler), mode=ctypes.RTLD_GLOBAL)
        self._loaded: dict[str, ctypes.CDLL] = {}

    def load(self, source: str) -> ctypes.CDLL:
        """A compiled kernel.

        Raises:
            MetalCompileError: the text is not a kernel.
        """
        if source not in self._loaded:
            self._loaded[source] = ctypes.CDLL(str(self._build(source, KERNEL_FLAGS)))
        return self._loaded[source]

    def _build(self, source: str, flags: tuple[str, ...]) -> Path:
        parts = (self.command, self._version, self._headers, *flags, source)
        name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.so"
        if path.exists():
            return path
        # Under a temporary name until it is complete: other processes may build the same.
        made = self.folder / f"{name}.{os.getpid()}"
        text, objects, library = (
            made.with_suffix(f".{os.getpid()}.{x}") for x in ("cpp", "o", "so")
        )
        text.write_text(source)
        try:
            self._run([*flags, f"-I{FOLDER}", "-c", str(text), "-o", str(objects)])
            # Linked without the sanitiser's flags: the scheduler takes its library's place.
            self._run(["-shared", str(objects), "-o", str(library)])
            library.replace(path)
        finally:
            for file in (text, objects, library):
                file.unlink(missing_ok=True)
        return path

    def _run(self, arguments: list[str]) -> None:
        result = subprocess.run([self.command, *arguments], capture_output=True, text=True)
        if result.returncode:
            raise MetalCompileError(result.stderr)


def line_of(file: str, offset: int) -> int | None:
    """The line of a source that an instruction comes from; None if it cannot be found."""
    tool = shutil.which("addr2line")
    if not tool or not file or not offset:
        return None
    # The instruction before: a call returns to the one after it.
    command = [tool, "-i", "-e", file, hex(offset - 1)]
    found = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    # Outermost last: functions of the library are inlined into the kernel.
    for place in reversed(found):
        path, _, line = place.partition(":")
        if not path.endswith((".h", "??")) and (number := line.split(" ")[0]).isdigit():
            return int(number)
    return None
