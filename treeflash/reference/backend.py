"""Loading: the entry point of the NumPy backend."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np

from treeflash.config import LoadConfig
from treeflash.decoding.backend_base import BaseBackend, check_settings
from treeflash.decoding.interfaces import ARHead
from treeflash.drafters.config import DrafterShape
from treeflash.drafters.folder import read_file, read_quantised
from treeflash.drafters.loading import read_layout
from treeflash.drafters.mtp_heads import refuse_missing_targets, refuse_window
from treeflash.errors import BackendError, ConfigError
from treeflash.reference.drafter import Drafter
from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.heads import make_head
from treeflash.reference.mtp_head import MtpDrafter, MtpHead, MtpModel, ParallelDrafter
from treeflash.reference.target import Target
from treeflash.reference.verifier import State, Verifier


class ReferenceBackend(BaseBackend):
    """`treeflash.decoding.interfaces.Backend` in NumPy; see `LoadConfig.draft_window`."""

    name = "reference"
    device = "cpu"
    device_name = platform.processor() or platform.machine()
    stores_states = True

    def __init__(
        self, target: Target, drafter: DrafterModel | None, *, draft_window: int | None = None
    ) -> None:
        self.verifier = Verifier(target)
        self.drafter: Drafter | MtpDrafter | None = None
        head: ARHead | None = None
        if isinstance(drafter, MtpModel) and drafter.config.has_marginals:
            self.drafter = ParallelDrafter(drafter)
        elif isinstance(drafter, MtpModel):
            self.drafter, head = MtpDrafter(drafter), MtpHead(drafter)
        elif drafter is not None:
            self.drafter = Drafter(drafter, draft_window)
            head = make_head(drafter) if drafter.config.head else None
        super().__init__(target, drafter, head)

    def open(self, capacity: int, *, drafts: bool) -> State:
        return State(self.target, self.drafter_model if drafts else None, capacity)


def load(target: Path, drafter: Path | None, config: LoadConfig) -> ReferenceBackend:
    check_config(config)
    choose_device(config.device)
    model = Target(target, Path(config.adapter) if config.adapter else None)
    pair = load_drafter(drafter, model) if drafter else None
    if isinstance(pair, MtpModel):
        refuse_window(config)
    return ReferenceBackend(model, pair, draft_window=config.draft_window)


def check_config(config: LoadConfig) -> None:
    check_settings(config, "reference", supported=("adapter", "draft_window"))
    if config.dtype not in (None, "float32"):
        raise ConfigError(f"dtype must be float32 on the reference backend, got {config.dtype}")


def choose_device(name: str | None) -> None:
    """Raise a BackendError for any device but the CPU."""
    if name not in (None, "cpu"):
        raise BackendError(f"device must be cpu on the reference backend, got {name!r}")


def check_drafter(config: DrafterShape) -> None:
    refuse_missing_targets(config, "reference", latents=True)


def load_drafter(folder: Path, target: Target) -> DrafterModel:
    """Read a drafter and check that it belongs to the target."""
    layout = read_layout(
        folder,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_hidden_layers=target.layers,
    )
    check_drafter(layout.config)
    tensors = layout.read(read_file, read_quantised, np.stack)
    offset = np.float32(tensors.config.norm_offset)
    weights = {
        name: x + offset if name.endswith("norm.weight") else x
        for name, x in tensors.backbone.items()
    }
    model = MtpModel if layout.format.kind == "rows" else DrafterModel
    return model(tensors.config, weights, tensors.head, tensors.vocabulary, target)
