"""The entry point of a backend that can train, how it is found, and how a run is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console

import treeflash
from treeflash.cli.console import progress
from treeflash.config import LoadConfig
from treeflash.drafters.formats import parse_drafter_config
from treeflash.errors import BackendError
from treeflash.registry import available, installed, load_entry_point
from treeflash.training.config import NEW_DRAFTERS, SHAPE, TrainConfig
from treeflash.training.distillation import Response

TRAINER_ENTRY_POINTS = "treeflash.trainers"
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
            NumericalError: the loss or its gradient is not finite.
            KeyboardInterrupt: after Ctrl-C; the step that was running is done and its state saved.
            SystemExit: after SIGTERM, likewise.
        """


def trainer(name: str | None) -> Trainer:
    """Return a backend's trainer, or the first installed one; a BackendError if it cannot train."""
    entries = available(TRAINER_ENTRY_POINTS)
    if name is None:
        # `cpu` is `cuda` without its GPU.
        name = next(filter(installed, sorted(entries.keys() - {"cpu"})), "cuda")
    if name not in entries and name in available():
        raise BackendError(
            f"backend {name!r} cannot train; use --backend {' or '.join(sorted(entries))}"
        )
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
        if not bar.tasks[steps].completed:  # a finished run has no records
            bar.update(steps, completed=config.steps)


CARD = """\
# TreeFlash drafter

{layers}, hidden size {hidden}, block size {block}, head {head}; context features from
target {layer_ids}. Trained with `treeflash train`, treeflash {version}.

## Training

After {step} of {steps} steps; data fingerprint {data}.

| option | value |
| --- | --- |
{options}

## Validation on held-out responses

{metrics}
"""


def model_card(
    settings: Mapping[str, Any], identity: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> str:
    """Write the text of a checkpoint's `README.md`.

    It takes the drafter's `config.json`, the configuration, target and data of the run, and the
    run's log.
    """
    # An existing drafter keeps its shape, whatever the options say.
    omitted = {"data"} if identity["init"] in NEW_DRAFTERS else {"data", *SHAPE}
    drafter = parse_drafter_config(settings)
    count, layer_ids = drafter.num_hidden_layers, drafter.target_layer_ids
    validations = _validations(records)
    return CARD.format(
        layers=f"{count} layer{'s' * (count != 1)}",
        hidden=drafter.hidden_size,
        block=drafter.block_size,
        head=drafter.head or "none",
        layer_ids=f"layer{'s' * (len(layer_ids) != 1)} {', '.join(map(str, layer_ids))}",
        version=treeflash.__version__,
        step=records[-1]["step"] if records else 0,
        steps=identity["steps"],
        data=identity["data"],
        options="\n".join(f"| {k} | {v} |" for k, v in identity.items() if k not in omitted),
        metrics=_table(validations[-1]) if validations else "No responses were held out.",
    )


def evaluation(
    identity: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return the contents of a checkpoint's `evaluation.json`; None if nothing was held out.

    The arguments are what `model_card` takes.
    """
    validations = _validations(records)
    return {"max_length": identity["max_length"], **validations[-1]} if validations else None


def _validations(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [record["validation"] for record in records if "validation" in record]


def _table(validation: Mapping[str, Any]) -> str:
    by_depth = {name: value for name, value in validation.items() if isinstance(value, list)}
    lines = ["| depth | " + " | ".join(by_depth) + " |", "| --- |" + " --- |" * len(by_depth)]
    for depth, values in enumerate(zip(*by_depth.values(), strict=True), 1):
        lines.append(f"| {depth} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    chains = [f"`{k}` {v:.2f}" for k, v in validation.items() if k.startswith("chain")]
    return "\n".join(lines) + "\n\nBlock efficiency of a chain: " + ", ".join(chains) + "."
