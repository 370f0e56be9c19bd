"""Check that a GGUF file is whole, from its header alone.

Reading a whole header into Python objects takes seconds for a large vocabulary; this walks over it.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from treeflash.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = 2, 3
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number by its type."""
UINT32, STRING, ARRAY = 4, 8, 9
DEFAULT_ALIGNMENT = 32


def refuse_short(path: Path) -> None:
    """Raise a CheckpointError for a little-endian file that ends before its last tensor.

    Files that are no GGUF files, or that have unknown types, are left to the reader.
    """
    with path.open("rb") as file:
        header = _Header(file, os.fstat(file.fileno()).st_size)
        try:
            needed = header.needed_size()
        except EOFError:
            problem = "in its header"
        except (LookupError, ValueError, RecursionError):
            return
        else:
            if header.size >= needed:
                return
            problem = f"at {header.size} of {needed} bytes"
    raise CheckpointError(f"{path.name} ends too early, {problem}; fetch it again")


class _Header:
    """The header of a file of `size` bytes; reading beyond them raises an EOFError."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def needed_size(self) -> int:
        """Walk over the header, and return where the last tensor ends.

        Raises a LookupError or ValueError for what is unknown.
        """
        if self._read(len(MAGIC)) != MAGIC or self._number("I") not in VERSIONS:
            raise LookupError("format")
        tensors, settings = self._number("Q"), self._number("Q")
        alignment = DEFAULT_ALIGNMENT
        for _ in range(settings):
            name, kind = self._read(self._number("Q")), self._number("I")
            if name == b"general.alignment" and kind == UINT32:
                alignment = self._number("I") or DEFAULT_ALIGNMENT
            else:
                self._skip_value(kind)
        end = 0
        for _ in range(tensors):
            self._skip(self._number("Q"))  # the name
            elements = math.prod([self._number("Q") for _ in range(self._number("I"))])
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(self._number("I"))]
            end = max(end, self._number("Q") + elements // block * nbytes)
        return -(-self.file.tell() // alignment) * alignment + end

    def _skip_value(self, kind: int) -> None:
        if kind == STRING:
            self._skip(self._number("Q"))
        elif kind == ARRAY:
            kind, count = self._number("I"), self._number("Q")
            if kind in SCALARS:
                self._skip(count * SCALARS[kind])
            else:
                for _ in range(count):
                    self._skip_value(kind)
        else:
            self._skip(SCALARS[kind])

    def _number(self, kind: str) -> int:
        value: int
        (value,) = struct.unpack(f"<{kind}", self._read(struct.calcsize(f"<{kind}")))
        return value

    def _read(self, count: int) -> bytes:
        if self.file.tell() + count > self.size:
            raise EOFError
        return self.file.read(count)

    def _skip(self, count: int) -> None:
        if self.file.tell() + count > self.size:
            raise EOFError
        self.file.seek(count, os.SEEK_CUR)
