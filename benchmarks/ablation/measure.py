"""Train the drafter of a cell, and measure it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.ablation.cells import Cell
from benchmarks.ablation.setting import Setting
from treeflash.config import DecodeConfig, LoadConfig, Method, SamplingConfig
from treeflash.evaluation.run import Case, Evaluation
from treeflash.registry import loader
from treeflash.training.config import TrainConfig
from treeflash.training.trainers import trainer

Record = dict[str, Any]
BUDGET = 16
TEMPERATURES = {"greedy": 0.0, "temperature 1": 1.0}


def measure(
    cell: Cell, seed: int, base: TrainConfig, setting: Setting, load: LoadConfig, max_tokens: int
) -> Record:
    """Train with a seed, and decode all prompts.

    Returns:
        The cell's name, the seed, the last loss, and for each `figures()` the tokens and the
        forward passes of every prompt.
    """
    config = replace(base, **cell.changes, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        drafter = Path(folder)
        answers = setting.answers(cell.data)
        records = list(trainer("cuda").train(setting.target, answers, drafter, config, load))
        backend = loader("cuda")(setting.target, drafter, load)
    chain, tree = methods(config.head)
    found: Record = {"cell": cell.name, "seed": seed, "loss": records[-1]["loss"]}
    for name, temperature in TEMPERATURES.items():
        sampling = SamplingConfig(temperature=temperature, seed=seed)
        configs = {
            Case(method, BUDGET): DecodeConfig(
                method=method, budget=BUDGET, max_tokens=max_tokens, sampling=sampling
            )
            for method in (chain, tree)
        }
        evaluation = Evaluation()
        quiet = Console(stderr=True, quiet=True)
        evaluation.run(backend, {"": setting.prompts}, configs, quiet, len(setting.prompts))
        for shape, case in zip(("chain", "tree"), configs, strict=True):
            lengths = [sample.runs[case].accepted_lengths for sample in evaluation.samples[""]]
            found[f"{shape}, {name}"] = [[sum(own), len(own)] for own in lengths]
    return found


def methods(head: str) -> tuple[Method, Method]:
    """The chain and the tree of a drafter with this head."""
    return ("dflash", "ddtree") if head == "none" else ("treeflash-chain", "treeflash")


def figures() -> list[str]:
    """The columns of the table."""
    return [f"{shape}, {name}" for name in TEMPERATURES for shape in ("chain", "tree")]
