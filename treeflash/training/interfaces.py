"""The entry point of a backend that can train, how it is found, and how its records are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console

from treeflash.cli.console import progress
from treeflash.config import LoadConfig
from treeflash.errors import BackendError
from treeflash.registry import available, installed, load_entry_point
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response

GROUP = "treeflash.trainers"
"""The group of entry points."""


class Trainer(Protocol):
    """A module with a function that trains."""

    def train(
        self,
        target: Path,
        responses: Sequence[Response],
        output: Path,
        config: TrainConfig,
        load: LoadConfig,
        held_out: Sequence[Response] = (),
    ) -> Iterator[dict[str, Any]]:
        """Train a drafter for the target of a folder, or resume a run of the same configuration.

        Args:
            target: its folder.
            responses: the training data.
            output: folder for the checkpoint, its model card, the log and the state.
            config: of the run.
            load: device, and the precision of the target and of mixed-precision training.
            held_out: validation data; other responses to its prompts are removed from
                `responses`. If empty, `validation_sequences` of `responses` are held out.

        Yields:
            Before the first step, the numbers of dropped responses (`too_short`, `too_long`), if
            there are any, and the progress of the feature cache (`shard`, `shards`); then a record
            for each step, as in the log. A run that has done all its steps yields nothing, and its
            target is not loaded.

        Raises:
            ConfigError: the configuration does not fit the target or the run in `output`, or
                `output` cannot be written.
            NumericalError: the loss is not finite.
        """


def trainer(name: str | None) -> Trainer:
    """The trainer of a backend, None for the first installed; a BackendError if it cannot train."""
    entries = available(GROUP)
    if name is None:
        name = next(filter(installed, sorted(entries)), "cuda")
    if name not in entries and name in available():
        raise BackendError(f"backend {name!r} cannot train; use --backend {', '.join(entries)}")
    return cast(Trainer, load_entry_point(name, entries))


def show_records(records: Iterator[dict[str, Any]], config: TrainConfig, console: Console) -> None:
    """Run a training to its end, with a progress bar and a line for each validation."""
    with progress(console) as bar:
        shards = bar.add_task("features", total=None, visible=False)
        steps = bar.add_task("steps", total=config.steps)
        for record in records:
            if "too_short" in record:
                too_short, too_long = record["too_short"], record["too_long"]
                console.print(
                    f"dropped {too_short + too_long} responses: {too_short} shorter than two "
                    f"tokens, {too_long} after truncation to --max-length {config.max_length}"
                )
            elif "shard" in record:
                done, total = record["shard"], record["shards"]
                bar.update(shards, completed=done, total=total, visible=True)
            else:
                loss = f"loss {record['loss']:.3f}"
                bar.update(steps, completed=record["step"], description=loss)
                if "validation" in record:
                    metrics = record["validation"].items()
                    chains = [f"{k} {v:.3f}" for k, v in metrics if k.startswith("chain")]
                    console.print(f"step {record['step']}: {', '.join([loss, *chains])}")
        bar.update(steps, completed=config.steps)  # a finished run has no records
