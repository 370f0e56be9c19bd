"""A report about a machine: parts that do not stop each other, in a file that is always complete.

A person with an accelerator runs `device_report` and sends one file. So whatever a part meets is a
part of the report. A fault of a kernel can end a process, or make the device refuse all its later
work. Therefore each part runs in its own process, which sends each finding at once. The file is
written again after each part, so that a fault, an interruption or a restart of the machine loses
nothing that was found before. A part that hangs is ended some time after the time for the report.

Another kind of accelerator has other parts (`cuda_parts`, `mlx_parts`), and the same frame.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from signal import Signals
from typing import Any, TypeAlias

from benchmarks.common import Row, machine, show
from treeflash.errors import first_line


class LeftOutError(Exception):
    """The reason why a part has nothing to measure."""


PROBLEMS = 1
"""The exit status of a report with problems."""
JOIN_SECONDS = 120
"""Seconds that a process of a part may take to end."""


@dataclass
class Part:
    """What one part of a report has found so far.

    Attributes:
        name: of the part.
        tables: rows by the title of their table.
        problems: a line for each way in which the device or its software disappoints.
        notes: lines about what was left out.
        error: the traceback of the error that ended the part; empty without one.
        seconds: that it took.
    """

    name: str
    tables: dict[str, list[Row]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    def add(self, table: str, **cells: object) -> None:
        """Add a row to a table."""
        self.tables.setdefault(table, []).append(cells)

    def note(self, line: str) -> None:
        """Add a note."""
        self.notes.append(line)

    def problem(self, line: str) -> None:
        """Add a problem, once."""
        if line not in self.problems:
            self.problems.append(line)

    def fail(self, error: str, trace: str = "") -> None:
        """Add what ended the part."""
        self.error = trace
        self.problem(f"{self.name}: {error}")


Find: TypeAlias = Callable[[Part], object]
"""Adds what it finds to a part."""


def find_here(part: Part, find: Find) -> None:
    """Run a part in this process; its error and the warnings of treeflash are problems."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            find(part)
    except LeftOutError as error:
        part.note(f"{part.name} was left out: {error}")
    except Exception as error:
        part.fail(f"{type(error).__name__}: {first_line(error)}", traceback.format_exc())
    for warning in caught:
        if is_of_treeflash(Path(warning.filename)):
            part.problem(f"{part.name}: {warning.message}")


def is_of_treeflash(file: Path) -> bool:
    """Return whether a file lies in a package of treeflash, at most three folders deep."""
    folders = file.parent.parts[-3:]
    if "site-packages" in folders:
        folders = folders[folders.index("site-packages") + 1 :]
    return any(folder.startswith("treeflash") for folder in folders)


def find_apart(part: Part, find: Find, end: float) -> None:
    """Run a part in its own process, which ends at the time `end` at the latest."""
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_findings, args=(part.name, find, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, end - time.time())):
            method, arguments, cells = receiver.recv()
            getattr(part, method)(*arguments, **cells)
        part.fail("it did not end in time")
    except EOFError:  # the process has sent everything, or it was ended
        process.join(JOIN_SECONDS)
        if code := process.exitcode:
            how = f"signal {Signals(-code).name}" if code < 0 else f"exit status {code}"
            part.fail(f"its process ended with {how}")
    finally:
        process.kill()
        process.join(JOIN_SECONDS)  # a call of a driver may never end


class _SentPart:
    """Stands for a part in another process, and sends the calls of its methods there."""

    def __init__(self, name: str, pipe: Connection) -> None:
        self.name = name
        self._pipe = pipe

    def __getattr__(self, method: str) -> Callable[..., None]:
        return lambda *arguments, **cells: self._pipe.send((method, arguments, cells))


def _send_findings(name: str, find: Find, pipe: Connection) -> None:
    part: Any = _SentPart(name, pipe)
    with suppress(KeyboardInterrupt):  # the process of the report is interrupted, too
        find_here(part, find)


@dataclass
class Report:
    """A report in the making.

    Attributes:
        benchmark: the name of the command.
        path: the file; None writes none.
        facts: facts about the device, by name.
        seconds: the time for all parts.
        grace: seconds that a part may still take when this time is over.
        end: when this time is over. A part that has tables of several sizes looks at it.
    """

    benchmark: str
    path: Path | None
    facts: Row
    seconds: float
    grace: float = 120
    parts: list[Part] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.end = time.time() + self.seconds
        self.machine = machine()
        self.write()

    @property
    def problems(self) -> list[str]:
        """The problems of all parts."""
        return [line for part in self.parts for line in part.problems]

    def run(self, name: str, find: Find) -> None:
        """Run a part, write the report, and print the part's tables."""
        part = Part(name)
        self.parts.append(part)
        started = time.time()
        try:
            if started > self.end:
                part.note(f"{name} was left out: the time was over")
            else:
                find_apart(part, find, self.end + self.grace)
        except KeyboardInterrupt:
            part.note("interrupted")
            raise
        finally:
            part.seconds = time.time() - started
            self.write()
        for title, rows in part.tables.items():
            show(f"{name}: {title}", rows)
        for line in [*part.notes, *(f"PROBLEM: {line}" for line in part.problems)]:
            print(line, flush=True)

    def write(self) -> None:
        """Write what was found so far; the file is never half written."""
        if self.path is None:
            return
        record = {
            "benchmark": self.benchmark,
            "machine": self.machine,
            "device": self.facts,
            "problems": self.problems,
            "parts": [asdict(part) for part in self.parts],
        }
        scratch = self.path.with_name(f"{self.path.name}.tmp")
        scratch.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
        scratch.replace(self.path)

    def close(self) -> int:
        """Print how it ended; returns the exit status."""
        problems = self.problems
        print(f"{len(problems)} problem(s)" + "".join(f"\n- {line}" for line in problems))
        if self.path is not None:
            print(f"send {self.path}")
        return PROBLEMS if problems else 0
