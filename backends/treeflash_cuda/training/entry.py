"""The entry point for training in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from treeflash.config import LoadConfig
from treeflash.errors import BackendError
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response
from treeflash_cuda.device import choose_device


def train(
    target: Path,
    responses: Sequence[Response],
    output: Path,
    config: TrainConfig,
    load: LoadConfig,
    held_out: Sequence[Response] = (),
) -> Iterator[dict[str, Any]]:
    """Train as `treeflash.training.interfaces.Trainer.train` describes, in PyTorch."""
    if find_spec("tensorboard") is None:
        raise BackendError(
            "training needs tensorboard; pip install '.[cuda,train]' in a clone of treeflash"
        )
    choose_device(load.device)  # fail now, not at the first record
    from treeflash_cuda.training import loop  # imports the package above

    return loop.train(target, responses, output, config, load, held_out)
