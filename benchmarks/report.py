"""A report about a machine: parts that do not stop each other, in a file that is always complete.

A person with an accelerator runs one command and sends one file. So whatever a part meets is a part
of the report, and the file is written again after each part: a machine that hangs or restarts in
the middle leaves what the parts before have found.

A report on another kind of accelerator has other parts, and the same frame: `Report.run` for each.
"""

from __future__ import annotations

import json
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.common import Row, machine, show
from treeflash.errors import first_line, is_device_lost

PROBLEMS = 1
"""The exit status of a report with problems."""


@dataclass
class Part:
    """What one part of a report has found so far.

    Attributes:
        name: of the part.
        tables: rows by the title of their table.
        problems: a line for each way in which the device or its software disappoints.
        notes: lines about what was left out.
        error: the traceback of what ended the part; empty if it ran to its end.
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

    def problem(self, line: str) -> None:
        """Add a problem, once."""
        if line not in self.problems:
            self.problems.append(line)


class Report:
    """A report in the making.

    Args:
        benchmark: the name of the command.
        path: the file; None writes none.
        facts: about the device, by name.
        seconds: the time for all parts. A part that has tables of several sizes looks at `is_late`.
    """

    def __init__(self, benchmark: str, path: Path | None, facts: Row, seconds: float) -> None:
        self.benchmark = benchmark
        self.path = path
        self.facts = facts
        self.parts: list[Part] = []
        self.lost = False  # whether the device refuses all work
        self._machine = machine()
        self._end = time.monotonic() + seconds
        self.write()

    @property
    def is_late(self) -> bool:
        """Whether the time for all parts is over."""
        return time.monotonic() > self._end

    @property
    def problems(self) -> list[str]:
        """The problems of all parts."""
        return [line for part in self.parts for line in part.problems]

    def run(self, name: str, find: Callable[[Part], None]) -> None:
        """Run a part, print its tables, and write the report.

        An error ends the part alone. After the loss of the device no other part runs.
        """
        part = Part(name)
        self.parts.append(part)
        if self.lost or self.is_late:
            why = "the device was lost before" if self.lost else "the time was over"
            part.notes.append(f"{name} was left out: {why}")
        else:
            self._find(part, find)
        self.write()
        for title, rows in part.tables.items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            show(f"{name}: {title}", [{x: row.get(x) for x in columns} for row in rows])
        for line in [*part.notes, *(f"PROBLEM: {line}" for line in part.problems)]:
            print(line, flush=True)

    def _find(self, part: Part, find: Callable[[Part], None]) -> None:
        started = time.monotonic()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                find(part)
        except KeyboardInterrupt:
            part.notes.append("interrupted")
            self.write()
            raise
        except Exception as error:
            self.lost = is_device_lost(error)
            part.error = traceback.format_exc()
            part.problem(f"{part.name}: {type(error).__name__}: {first_line(error)}")
        finally:
            part.seconds = time.monotonic() - started
        for warning in caught:
            if Path(warning.filename).parent.name.startswith("treeflash"):
                part.problem(f"{part.name}: {warning.message}")

    def write(self) -> None:
        """Write what was found so far; the file is never half written."""
        if self.path is None:
            return
        record = {
            "benchmark": self.benchmark,
            "machine": self._machine,
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
