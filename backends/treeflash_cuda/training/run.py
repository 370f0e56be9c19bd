"""The folder of a run: its log, and the state from which it goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter

from treeflash.errors import ConfigError
from treeflash.training.config import TrainConfig


class Run:
    """What is kept of a run, beside the checkpoint that it makes.

    Attributes:
        folder: holds `log.jsonl`, `tensorboard/`, `state/`, and `features/` where they are kept.
        records: of the log, by what this run and those before it wrote.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, data: str, accelerator: Accelerator
    ) -> None:
        """Open a folder, which need not exist.

        Raises:
            ConfigError: it holds a run of another configuration or of other data, or a drafter
                that no run here goes on with.
        """
        self.folder = folder
        self.config = config
        self.identity = {"data": data, "processes": accelerator.num_processes, **asdict(config)}
        self.records: list[dict[str, Any]] = []
        self._main = accelerator.is_main_process
        self._writer: SummaryWriter | None = None
        self._check()

    def features(self) -> Path | None:
        """Where features are kept; None where they are not."""
        if not self.config.cache_gb:
            return None
        folder = self.folder / "features" / self.identity["data"]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def resume(self, accelerator: Accelerator) -> int:
        """Load the last state, if there is one; returns the steps that are done."""
        state = self.folder / "state"
        step = 0
        if state.exists():
            accelerator.load_state(str(state))
            step = int(json.loads((state / "run.json").read_text())["step"])
        if self._main:
            self._open_log(step)
        return step

    def log(self, record: dict[str, Any]) -> None:
        """Write a record to the log and to TensorBoard."""
        self.records.append(record)
        if self._main:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            assert self._writer is not None
            for name, value in _scalars(record):
                self._writer.add_scalar(name, value, record["step"])

    def save(self, accelerator: Accelerator, step: int) -> None:
        """Keep the state after a step, in the place of the one before."""
        state, scratch = self.folder / "state", self.folder / "state.new"
        accelerator.save_state(str(scratch), safe_serialization=False)
        # Each process writes a file of its own, and the folder is renamed under none of them.
        accelerator.wait_for_everyone()
        if self._main:
            (scratch / "run.json").write_text(json.dumps({"step": step, **self.identity}))
            old = self.folder / "state.old"
            shutil.rmtree(old, ignore_errors=True)  # of a save that was interrupted
            if state.exists():
                state.rename(old)
            scratch.rename(state)
            shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()

    def close(self) -> None:
        """Finish what is being written."""
        if self._writer is not None:
            self._writer.close()

    def _check(self) -> None:
        state, old = self.folder / "state", self.folder / "state.old"
        if old.exists() and not state.exists() and self._main:
            old.rename(state)  # interrupted between the two renames of `save`
        if not state.exists():
            # Of an interrupted first save there is its beginning.
            saving = (self.folder / "state.new").exists()
            if (self.folder / "model.safetensors").exists() and not saving:
                raise ConfigError(
                    f"{self.folder} holds a drafter without the state of its training, which would "
                    "be overwritten; give another --output"
                )
            return
        found = json.loads((state / "run.json").read_text())
        mine = json.loads(json.dumps(self.identity))
        for name, value in mine.items():
            if found.get(name) != value:
                raise ConfigError(
                    f"{self.folder} holds a run with {name} {found.get(name)}, not {value}; "
                    "use the same configuration and data, or another --output"
                )

    def _open_log(self, step: int) -> None:
        """Drop records of steps that will be done again."""
        path = self.folder / "log.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        finished = [json.loads(line) for line in lines if line.endswith("\n")]
        self.records = [record for record in finished if record["step"] <= step]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: a reader never meets half of one."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    scratch.rename(path)


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    scalars = []
    for name, value in record.items():
        if isinstance(value, int | float) and name != "step":
            scalars.append((f"train/{name}", float(value)))
    for name, value in record.get("validation", {}).items():
        if isinstance(value, list):
            scalars += [(f"validation/{name}/{d}", v) for d, v in enumerate(value, 1)]
        else:
            scalars.append((f"validation/{name}", float(value)))
    return scalars
