"""Loading: the entry point of the NumPy backend."""

from __future__ import annotations

import platform
from pathlib import Path

from treeflash.config import LoadConfig
from treeflash.decoding.snapshots import MOST
from treeflash.drafters.folder import read_file
from treeflash.drafters.loading import load_tensors
from treeflash.errors import BackendError, ConfigError
from treeflash.reference.drafter import Drafter
from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.head import ARHead
from treeflash.reference.recurrent import CELLS, RecurrentHead
from treeflash.reference.scores import scores_of
from treeflash.reference.state import State
from treeflash.reference.target import Target
from treeflash.reference.verifier import Verifier


class ReferenceBackend:
    """`treeflash.decoding.interfaces.Backend` in NumPy."""

    name = "reference"
    device = "cpu"
    device_name = platform.processor() or platform.machine()
    dtype = "float32"

    def __init__(
        self, target: Target, drafter: DrafterModel | None, *, draft_window: int | None = None
    ) -> None:
        """Hold a target, and a drafter for it; see `LoadConfig.draft_window`."""
        self.target = target
        self.drafter_model = drafter
        self.vocab_size = target.vocab_size
        self.max_positions = target.max_positions
        self.drafter_config = drafter.config if drafter else None
        self.verifier = Verifier(target)
        self.drafter = Drafter(drafter, draft_window) if drafter else None
        self.head = head_of(drafter) if drafter and drafter.config.head else None

    def open(self, capacity: int, *, drafts: bool) -> State:
        """See `Backend.open`."""
        return State(self.target, self.drafter_model if drafts else None, capacity)

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        """See `Backend.state_nbytes`."""
        target = self.target
        attending = target.layers - len(target.recurrent)
        numbers = 2 * attending * target.kv_heads * target.head_dim
        if drafts and (config := self.drafter_config):
            numbers += 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        states = sum(layer.start.nbytes for layer in target.recurrent.values())
        return 4 * capacity * numbers + (1 + MOST) * states

    def memory_bytes(self) -> int:
        """See `Backend.memory_bytes`."""
        return 0


def load(target: Path, drafter: Path | None, config: LoadConfig) -> ReferenceBackend:
    """See `Loader`."""
    if config.compile or config.device_map:
        option = "--compile" if config.compile else "--device-map"
        raise ConfigError(f"only the cuda backend has {option}; leave it out")
    choose_device(config.device)
    if config.dtype not in (None, "float32"):
        raise ConfigError(f"the reference backend computes in float32 only, not {config.dtype}")
    if config.draft_bits or config.kv_bits:
        raise ConfigError(
            "the reference backend does not quantise; leave --draft-bits and --kv-bits out"
        )
    model = Target(target)
    pair = load_drafter(drafter, model) if drafter else None
    return ReferenceBackend(model, pair, draft_window=config.draft_window)


def head_of(drafter: DrafterModel) -> ARHead | RecurrentHead:
    """The conditional head of a drafter that has one."""
    if drafter.config.head in CELLS:
        return RecurrentHead(drafter)
    return ARHead(drafter, scores_of(drafter))


def choose_device(name: str | None) -> None:
    """Raise a BackendError for any device but the CPU."""
    if name not in (None, "cpu"):
        raise BackendError(f"the reference backend runs on cpu only, not on {name!r}")


def load_drafter(folder: Path, target: Target) -> DrafterModel:
    """Read a drafter and check that it belongs to the target."""
    tensors = load_tensors(
        folder,
        read_file,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_hidden_layers=target.layers,
    )
    return DrafterModel(tensors.config, tensors.backbone, tensors.head, tensors.vocabulary, target)
