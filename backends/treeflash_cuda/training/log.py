"""The log of a run: a JSON line for each step, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TypeAlias

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from treeflash_cuda.training.files import replacing, writing

Record: TypeAlias = dict[str, Any]


class Log:
    """`log.jsonl` and `tensorboard/` of a run's folder.

    Attributes:
        records: of all steps so far, earlier runs included.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Open the log and drop what it has after `step`, as those steps will be repeated.

        Raises:
            ConfigError: the log cannot be written.
        """
        self._path = folder / "log.jsonl"
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        finished = [json.loads(line) for line in lines if line.endswith("\n")]
        self.records: list[Record] = [record for record in finished if record["step"] <= step]
        with replacing(self._path) as scratch:
            scratch.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        # Written here and now: TensorBoard's own writer is a thread, whose failure is a traceback.
        self._events = (
            folder / "tensorboard" / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        )
        with writing(self._events):
            self._events.parent.mkdir(exist_ok=True)
            self._file = self._events.open("wb", buffering=0)
            self._writer = RecordWriter(self._file)
            first = step + 1
            self._add(Event(step=first, file_version="brain.Event:2"))
            # TensorBoard then forgets what earlier files have from this step on.
            self._add(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def append(self, record: Record) -> None:
        """Add the record of a step.

        Raises:
            ConfigError: the log cannot be written.
        """
        self.records.append(record)
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(record)]
        with writing(self._events):
            self._add(Event(step=record["step"], summary=Summary(value=values)))

    def close(self) -> None:
        """Close the files."""
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())


def _scalars(record: Record) -> list[tuple[str, float]]:
    scalars = []
    for name, value in record.items():
        if isinstance(value, int | float) and name != "step":
            scalars.append((f"train/{name}", float(value)))
    for name, value in record.get("validation", {}).items():
        if isinstance(value, list):
            scalars += [(f"validation/{name}/{depth}", v) for depth, v in enumerate(value, 1)]
        else:
            scalars.append((f"validation/{name}", float(value)))
    return scalars
