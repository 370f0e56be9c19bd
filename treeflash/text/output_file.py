"""Output files: JSON lines that an interrupted run resumes, written by one process at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import KW_ONLY, dataclass, field
from io import FileIO
from pathlib import Path
from types import UnionType
from typing import Any, TypeAlias

from filelock import FileLock, Timeout

from treeflash.errors import ConfigError

Record: TypeAlias = dict[str, Any]
INTERRUPTED = "interrupted"
"""The finish reason of a text that the next run decodes again."""


@dataclass(eq=False)
class OutputFile:
    """A file of records, one JSON object per line.

    Entering it as a context locks the file and reads the records that earlier runs finished.
    Lines at its end that an interruption tore, or whose `finish_reason` is `interrupted`, count as
    unfinished; they stay until `resume` or the first `append`. While the context lasts, a hidden
    lock file is beside the output. A process that was killed leaves its lock file, which then locks
    nothing.

    `recognise` tells whether a JSON object is a record of a run like this one. The fields `key`
    identify a record; the first one begins every line. `compact` lines have no spaces.

    Attributes:
        records: finished records by the values of their `key`; of two with one key the later.
    """

    path: Path
    recognise: Callable[[Record], bool]
    _: KW_ONLY
    key: tuple[str, ...] = ("id", "turn")
    compact: bool = False
    records: dict[tuple[Any, ...], Record] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._separators = (",", ":") if self.compact else (", ", ": ")
        self._size = 0
        self._file: FileIO | None = None
        self._exit = ExitStack()

    def __enter__(self) -> OutputFile:
        """Lock and read the file.

        A ConfigError is raised if it is not a regular file, cannot be written, is being written by
        another process, or has lines of another program.
        """
        with ExitStack() as stack:
            try:
                self.path.touch()
                if not self.path.is_file():
                    raise ConfigError(f"{self.path} cannot be written: it is not a regular file")
                resolved = self.path.resolve()
                lock = resolved.with_name(f".{resolved.name}.lock")
                stack.enter_context(FileLock(lock, blocking=False))
                stack.callback(_remove_lock_file, lock)
                self._read()
            except Timeout:
                raise ConfigError(
                    f"{self.path} is being written by another process; wait until it has finished, "
                    "or give another --output"
                ) from None
            except OSError as error:
                raise self._not_writable(error) from error
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def select(self, keys: Iterable[tuple[Any, ...]]) -> list[Record]:
        """Select the finished records that have these keys."""
        return [self.records[key] for key in keys if key in self.records]

    def check_settings(self, record: Record, settings: Record) -> None:
        """Raise a ConfigError if a record was generated with other settings."""
        for name, value in settings.items():
            if record.get(name, value) != value:
                raise ConfigError(
                    f"{self.path} has lines generated with {name} {record[name]}, not {value}; use "
                    "the same settings and prompts, or give another --output"
                )

    def resume(self) -> FileIO:
        """Return the file without its unfinished end, open to append; a ConfigError if it fails."""
        if self._file is None:
            try:
                # The file is unbuffered: closing a buffered one after a failure would write again,
                # and fail.
                self._file = self._exit.enter_context(self.path.open("ab", buffering=0))
                self._file.truncate(self._size)
            except OSError as error:
                raise self._not_writable(error) from error
        return self._file

    def append(self, record: Record) -> None:
        """Append a record, whose line the system has on return; a ConfigError if it fails."""
        file = self.resume()
        line = json.dumps(record, ensure_ascii=False, separators=self._separators)
        data = memoryview(f"{line}\n".encode())
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            raise self._not_writable(error) from error
        if _is_finished(record):
            self.records[self._identify(record)] = record

    def _read(self) -> None:
        start = json.dumps({self.key[0]: 0}, separators=self._separators)[:-2].encode()
        lines: list[tuple[Record, int]] = []
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            complete = line.endswith(b"\n")
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not self.recognise(record):
                    raise ValueError
            except (ValueError, RecursionError) as error:
                torn = isinstance(error, json.JSONDecodeError | UnicodeDecodeError) and not complete
                if torn and line[: len(start)] == start[: len(line)]:
                    break
                raise ConfigError(
                    f"{self.path}:{number} was not written by a run like this one; "
                    "give another --output"
                ) from None
            if complete:
                lines.append((record, len(line)))
        while lines and not _is_finished(lines[-1][0]):
            lines.pop()
        self._size = sum(size for _, size in lines)
        self.records |= {self._identify(record): record for record, _ in lines}

    def _identify(self, record: Record) -> tuple[Any, ...]:
        return tuple(record[name] for name in self.key)

    def _not_writable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.path} cannot be written: {error.strerror}")


def _remove_lock_file(lock: Path) -> None:
    """Remove a lock file whose lock this process still holds.

    A process that has already opened the file sees, once it gets the lock, that the file is gone,
    and does not count it as locked.
    """
    with suppress(PermissionError):  # Windows keeps open files; there filelock removes them
        lock.unlink(missing_ok=True)


def has_fields(record: Record, **kinds: type | UnionType) -> bool:
    """Return whether a record has these fields, each with a value of its type."""
    return all(isinstance(record.get(name), kind) for name, kind in kinds.items())


def _is_finished(record: Record) -> bool:
    return record.get("finish_reason") != INTERRUPTED
