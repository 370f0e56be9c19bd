"""The entry point of training in PyTorch."""

from __future__ import annotations

from pathlib import Path

from treeflash.config import LoadConfig
from treeflash_cuda.backend import load_target
from treeflash_cuda.training.loop import train
from treeflash_cuda.training.responder import Responder

__all__ = ["responder", "train"]


def responder(target: Path, config: LoadConfig) -> Responder:
    """See `Trainer.responder`."""
    return Responder(load_target(target, config))
