"""The folder of a run: its files, configuration, log, checkpoints, and the exported drafter."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn

from treeflash.drafters.evaluation import EVALUATION
from treeflash.errors import ConfigError, first_line, is_out_of_memory
from treeflash.training.interfaces import evaluation, model_card

Record: TypeAlias = dict[str, Any]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of writing a file or folder into one that names it.

    Raises a ConfigError if the disk is full, or the path cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError) as error:  # safetensors and torch.save raise them
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise ConfigError(f"{path} cannot be written; is the disk full? ({reason})") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which then replaces `path`: readers never see half a file.

    Raises a ConfigError if the file cannot be written.
    """
    scratch = path.with_name(path.name + ".tmp")
    with writing(path):
        scratch.touch()
        mode = stat.S_IMODE(scratch.stat().st_mode)
        yield scratch
        scratch.chmod(mode)  # safetensors makes files that only their owner can read
        scratch.replace(path)


class Log:
    """The files `log.jsonl` and `tensorboard/` of a run's folder."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the log and drop its records after `step`, as these steps will be repeated.

        Raises a ConfigError if the log cannot be written.
        """
        self._path = folder / "log.jsonl"
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        finished = [json.loads(line) for line in lines if line.endswith("\n")]
        # The records are of all steps so far, including the steps before the run was resumed.
        self.records: list[Record] = [record for record in finished if record["step"] <= step]
        with replacing(self._path) as scratch:
            scratch.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        # TensorBoard's own writer is a thread, which fails with a traceback.
        self._events = (
            folder / "tensorboard" / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        )
        with writing(self._events):
            self._events.parent.mkdir(exist_ok=True)
            self._file = self._events.open("wb", buffering=0)
            self._writer = RecordWriter(self._file)
            first = step + 1
            self._add(Event(step=first, file_version="brain.Event:2"))
            # TensorBoard then forgets the records of earlier files from this step on.
            self._add(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def append(self, record: Record) -> None:
        """Add the record of a step.

        Raises a ConfigError if the log cannot be written.
        """
        self.records.append(record)
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(record)]
        with writing(self._events):
            self._add(Event(step=record["step"], summary=Summary(value=values)))

    def close(self) -> None:
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


CONTINUE = (
    "give another --output, whose run can begin with this drafter (train --init, adapt --drafter)"
)
"""What to do with a folder whose run is another one."""
CHECKPOINT = ("model.safetensors", "config.json", "README.md")
DAMAGED = (OSError, EOFError, LookupError, ValueError, RuntimeError, UnpicklingError)
"""Exceptions that reading a damaged state raises."""


def has_checkpoint(folder: Path) -> bool:
    """Return whether the drafter is in the folder."""
    return all((folder / name).exists() for name in CHECKPOINT)


def is_finished(folder: Path, request: str) -> bool:
    """Return whether a run for this request is over and has its drafter."""
    try:
        saved = json.loads((folder / "state" / "run.json").read_text())
        done = saved["request"] == request and saved["finished"] is True
    except (OSError, ValueError, LookupError, TypeError):
        return False  # `TrainingRun` then says what is wrong
    return done and has_checkpoint(folder)


class TrainingRun:
    def __init__(
        self, folder: Path, accelerator: Accelerator, identity: Record, request: str
    ) -> None:
        """Open a folder, which need not exist.

        Raises a ConfigError if the folder has a run with another configuration or other data, a
        drafter without its state, or a damaged state; or it cannot be written.
        """
        # It has the checkpoint, `log.jsonl`, `tensorboard/`, `state/`, and `features/` if they are
        # cached.
        self.folder = folder
        # The identity has configuration, target and `data`, a fingerprint of the responses and
        # their features, which must be equal to resume the run.
        self.identity = identity
        # `is_finished` compares this fingerprint of what is known before the target is loaded.
        self._request = request
        self._accelerator = accelerator
        self._main = accelerator.is_main_process
        self._log: Log | None = None
        self._state = folder / "state"
        self._check()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def feature_folder(self) -> Path | None:
        """Return the folder of cached features, or None if they are not cached."""
        if not self.identity["cache_gb"]:
            return None
        folder = self.folder / "features" / str(self.identity["data"])
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def resume(self) -> int:
        """Load the last state, if there is one; returns the number of steps it has done.

        Raises a ConfigError if the state or the log is damaged.
        """
        step = 0
        if self.has_state:
            step = int(self._read_state()["step"])
            try:
                self._accelerator.load_state(str(self._state))
            except DAMAGED as error:
                if isinstance(error, RuntimeError) and is_out_of_memory(error):
                    raise
                raise _damaged(self._state, error) from error
        if self._main:
            try:
                self._log = Log(self.folder, step)
            except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
                raise _damaged(self.folder / "log.jsonl", error) from error
        return step

    @property
    def has_state(self) -> bool:
        """Whether there is a state from which the run can be resumed."""
        return self._state.exists()

    @property
    def records(self) -> list[Record]:
        """The log so far; empty in all processes but the first."""
        return self._log.records if self._log else []

    def log(self, record: Record) -> None:
        if self._log:
            self._log.append(record)

    def save(self, step: int, *, finished: bool) -> None:
        """Replace the saved state by the state after `step`, which may be the last one.

        Raises:
            ConfigError: the state cannot be written; the earlier state is kept.
        """
        state, scratch = self._state, self.folder / "state.new"
        with writing(scratch):
            self._accelerator.save_state(str(scratch), safe_serialization=False)
        # Each process writes its own file; the folder must not be renamed before all have written.
        self._accelerator.wait_for_everyone()
        if self._main:
            with writing(scratch):
                saved = {"step": step, "finished": finished, "request": self._request}
                saved |= self.identity
                (scratch / "run.json").write_text(json.dumps(saved))
            old = self.folder / "state.old"
            shutil.rmtree(old, ignore_errors=True)  # left by an interrupted save
            if state.exists():
                state.rename(old)
            scratch.rename(state)
            shutil.rmtree(old, ignore_errors=True)
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        if self._log:
            self._log.close()

    def _check(self) -> None:
        state, old = self._state, self.folder / "state.old"
        if old.exists() and not state.exists() and self._main:
            old.rename(state)  # interrupted between the two renames of `save`
        self._accelerator.wait_for_everyone()  # all processes find the same state
        if not state.exists():
            # An interrupted first save leaves only `state.new`.
            was_saving = (self.folder / "state.new").exists()
            if (self.folder / "model.safetensors").exists() and not was_saving:
                raise ConfigError(
                    f"{self.folder} has a drafter but not the state of its training, so training "
                    "cannot be resumed and would overwrite it; give another --output"
                )
            return
        saved = self._read_state()
        for name, value in json.loads(json.dumps(self.identity)).items():
            if saved.get(name) == value:
                continue
            if name == "data":
                raise ConfigError(
                    f"{self.folder} has a run on other responses; use the same files, or {CONTINUE}"
                )
            raise ConfigError(
                f"{self.folder} has a run with {name} {saved.get(name)}, not {value}; use the "
                f"same configuration, or {CONTINUE}"
            )

    def _read_state(self) -> dict[str, Any]:
        try:
            saved = json.loads((self._state / "run.json").read_text())
            if not isinstance(saved, dict) or not isinstance(saved.get("step"), int):
                raise ValueError("run.json has no step")
        except (OSError, ValueError) as error:
            raise _damaged(self._state, error) from error
        return saved


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} is damaged, so training cannot be resumed ({first_line(error)}); "
        "give another --output"
    )


def export(
    accelerator: Accelerator, blocks: nn.Module, settings: dict[str, Any], run: TrainingRun
) -> None:
    """Write a checkpoint into a run's folder: configuration, weights (bfloat16) and `README.md`.

    If responses were held out, `evaluation.json` has what was measured on them. Raises a
    ConfigError if a file cannot be written.
    """
    state = accelerator.get_state_dict(blocks)
    if not accelerator.is_main_process:
        return
    tensors = {
        name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()
    }
    with replacing(run.folder / "model.safetensors") as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})
    with replacing(run.folder / "config.json") as scratch:
        scratch.write_text(json.dumps(settings, indent=2) + "\n")
    with replacing(run.folder / "README.md") as scratch:
        scratch.write_text(model_card(settings, run.identity, run.records))
    if (measured := evaluation(run.identity, run.records)) is not None:
        with replacing(run.folder / EVALUATION) as scratch:
            scratch.write_text(json.dumps(measured, indent=2) + "\n")
