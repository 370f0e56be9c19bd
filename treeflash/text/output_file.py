"""Output files: JSON lines that an interrupted run can resume, written by one process at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from treeflash.errors import ConfigError

T = TypeVar("T")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other processes from writing an output file while this one reads and appends to it.

    The hidden lock file beside it remains, but locks nothing once its process has ended.

    Raises:
        ConfigError: the file is not a regular file, its folder cannot be written, or another
            process is writing to it.
    """
    try:
        output.touch()
        if not output.is_file():
            raise ConfigError(f"{output} cannot be written: it is not a regular file")
        path = output.resolve()
        lock = FileLock(path.with_name(f".{path.name}.lock"), blocking=False)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{output} is being written by another process; wait for it, or give another --output"
        ) from None
    except OSError as error:
        raise _not_writable(output, error) from error
    try:
        yield
    finally:
        lock.release()


class OutputFile:
    """An output file open for appending; a line is handed to the system once it is appended."""

    def __init__(self, path: Path, size: int) -> None:
        """Open the file and cut it to a size, which drops a line that an interruption tore."""
        self.path = path
        # Unbuffered: closing a buffered file after a failure would try to write again, and fail.
        self._file = path.open("ab", buffering=0)
        self._file.truncate(size)

    def append(self, line: str) -> None:
        """Append one line.

        Raises:
            ConfigError: the disk is full, or the file cannot be written for another reason.
        """
        data = memoryview(f"{line}\n".encode())
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise _not_writable(self.path, error) from error

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def finished_records(output: Path, start: bytes, parse: Callable[[Any], T]) -> list[tuple[T, int]]:
    """The records that an earlier run left in an output file, and the size of each line.

    The file is created if it does not exist. A last line without its end, which an interruption
    tore, is left out.

    Args:
        output: JSON lines.
        start: how each line begins.
        parse: turns a line's JSON into a record; it raises ValueError, KeyError or TypeError for
            anything that such a run does not write.

    Raises:
        ConfigError: the file cannot be written, or another program wrote it.
    """
    try:
        output.touch()
        lines = output.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise _not_writable(output, error) from error
    records = []
    for number, line in enumerate(lines, 1):
        complete = line.endswith(b"\n")
        try:
            record = parse(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            torn = isinstance(error, json.JSONDecodeError | UnicodeDecodeError) and not complete
            if torn and line[: len(start)] == start[: len(line)]:
                break
            raise ConfigError(
                f"{output}:{number} was not written by a run like this one; give another --output"
            ) from None
        if complete:
            records.append((record, len(line)))
    return records


def _not_writable(output: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{output} cannot be written: {error.strerror}")
