"""The entry point for training in PyTorch on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from treeflash.config import LoadConfig
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response
from treeflash_cuda.device import on_cpu
from treeflash_cuda.training import entry


def train(
    target: Path,
    responses: Sequence[Response],
    output: Path,
    config: TrainConfig,
    load: LoadConfig,
    held_out: Sequence[Response] = (),
) -> Iterator[dict[str, Any]]:
    """Train as `treeflash.training.interfaces.Trainer.train` describes, on the CPU."""
    return entry.train(target, responses, output, config, on_cpu(load), held_out)
