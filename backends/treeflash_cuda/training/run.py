"""The folder of a run: its configuration, its log, and the state it resumes from."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator

from treeflash.errors import ConfigError, is_out_of_memory
from treeflash.training.config import TrainConfig
from treeflash_cuda.training.files import writing
from treeflash_cuda.training.log import Log, Record

CHECKPOINT = ("model.safetensors", "config.json", "README.md")
DAMAGED = (OSError, EOFError, LookupError, ValueError, RuntimeError, UnpicklingError)
"""What reading a damaged state raises."""


class Run:
    """What is kept of a run.

    Attributes:
        folder: has the checkpoint, `log.jsonl`, `tensorboard/`, `state/`, and `features/` if they
            are cached.
        identity: what a resumed run must have in common: configuration, target and data.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        target: str,
        dtype: str,
        data: str,
    ) -> None:
        """Open a folder, which need not exist.

        Args:
            folder: of the run.
            config: of the run.
            accelerator: its processes.
            target: name of the target.
            dtype: that the target runs in.
            data: fingerprint of the texts and of the features that they are trained on.

        Raises:
            ConfigError: the folder has a run with another configuration or other data, a drafter
                whose state of training is missing, or a damaged state; or it cannot be written.
        """
        self.folder = folder
        self.identity = {
            **asdict(config),
            "processes": accelerator.num_processes,
            "target": target,
            "dtype": dtype,
            "data": data,
        }
        self._accelerator = accelerator
        self._main = accelerator.is_main_process
        self._log: Log | None = None
        self._state = folder / "state"
        self._check()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def features(self) -> Path | None:
        """The folder of cached features; None if they are not cached."""
        if not self.identity["cache_gb"]:
            return None
        folder = self.folder / "features" / str(self.identity["data"])
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def resume(self) -> int:
        """Load the last state, if there is one; returns the number of steps it has done.

        Raises:
            ConfigError: the state is damaged.
        """
        step = 0
        if self._state.exists():
            step = int(self._read_state()["step"])
            try:
                self._accelerator.load_state(str(self._state))
            except DAMAGED as error:
                if isinstance(error, RuntimeError) and is_out_of_memory(error):
                    raise
                raise self._damaged(error) from error
        if self._main:
            self._log = Log(self.folder, step)
        return step

    @property
    def records(self) -> list[Record]:
        """The log so far; empty in all processes but the first."""
        return self._log.records if self._log else []

    def has_checkpoint(self) -> bool:
        """Whether the drafter is in the folder."""
        return all((self.folder / name).exists() for name in CHECKPOINT)

    def log(self, record: Record) -> None:
        """Write the record of a step."""
        if self._log:
            self._log.append(record)

    def save(self, step: int) -> None:
        """Replace the state by that after `step`.

        Raises:
            ConfigError: it cannot be written; the one before is kept.
        """
        state, scratch = self._state, self.folder / "state.new"
        with writing(scratch):
            self._accelerator.save_state(str(scratch), safe_serialization=False)
        # Each process writes its own file; the folder must not be renamed before all have.
        self._accelerator.wait_for_everyone()
        if self._main:
            with writing(scratch):
                (scratch / "run.json").write_text(json.dumps({"step": step, **self.identity}))
            old = self.folder / "state.old"
            shutil.rmtree(old, ignore_errors=True)  # left by an interrupted save
            if state.exists():
                state.rename(old)
            scratch.rename(state)
            shutil.rmtree(old, ignore_errors=True)
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Close the log."""
        if self._log:
            self._log.close()

    def _check(self) -> None:
        state, old = self._state, self.folder / "state.old"
        if old.exists() and not state.exists() and self._main:
            old.rename(state)  # interrupted between the two renames of `save`
        if not state.exists():
            # An interrupted first save leaves `state.new` alone.
            saving = (self.folder / "state.new").exists()
            if (self.folder / "model.safetensors").exists() and not saving:
                raise ConfigError(
                    f"{self.folder} has a drafter but not the state of its training, so training "
                    "cannot be resumed and would overwrite it; give another --output"
                )
            return
        found = self._read_state()
        expected = json.loads(json.dumps(self.identity))
        for name, value in expected.items():
            if found.get(name) == value:
                continue
            if name == "data":
                raise ConfigError(
                    f"{self.folder} has a run on other responses; use the same files, or another "
                    "--output"
                )
            raise ConfigError(
                f"{self.folder} has a run with {name} {found.get(name)}, not {value}; use the "
                "same configuration, or another --output"
            )

    def _read_state(self) -> dict[str, Any]:
        try:
            found = json.loads((self._state / "run.json").read_text())
            if not isinstance(found, dict) or not isinstance(found.get("step"), int):
                raise ValueError("run.json names no step")
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        return found

    def _damaged(self, error: Exception) -> ConfigError:
        reason = str(error).partition("\n")[0] or type(error).__name__
        return ConfigError(
            f"{self._state} is damaged, so training cannot be resumed ({reason}); "
            "give another --output"
        )
