"""Loading: the entry point of the NumPy backend."""

from __future__ import annotations

from pathlib import Path

from treeflash.config import LoadConfig
from treeflash.drafters.checkpoints import (
    canonical_name,
    check_pair,
    check_tensors,
    drafter_config,
    read_tensors,
)
from treeflash.errors import BackendError, ConfigError
from treeflash.reference.drafter import Drafter, DrafterWeights
from treeflash.reference.head import ARHead
from treeflash.reference.target import Target
from treeflash.reference.verifier import Verifier


class ReferenceBackend:
    """`treeflash.decoding.interfaces.Backend` in NumPy."""

    name = "reference"
    device = "cpu"
    dtype = "float32"

    def __init__(self, target: Target, weights: DrafterWeights | None) -> None:
        """Hold a target, and a drafter for it."""
        self.target = target
        self.weights = weights
        self.vocab_size = target.vocab_size
        self.max_positions = target.max_positions
        self.drafter_config = weights.config if weights else None
        self.head = ARHead(weights) if weights and weights.config.head else None

    def verifier(self, *, features: bool) -> Verifier:
        """See `Backend.verifier`."""
        config = self.drafter_config if features else None
        return Verifier(self.target, config.target_layer_ids if config else ())

    def drafter(self) -> Drafter:
        """See `Backend.drafter`."""
        assert self.weights is not None
        return Drafter(self.weights)

    def memory_bytes(self) -> int:
        """See `Backend.memory_bytes`."""
        return 0


def load(target: Path, drafter: Path | None, config: LoadConfig) -> ReferenceBackend:
    """See `Loader`."""
    if config.device not in (None, "cpu"):
        raise BackendError(f"the reference backend runs on cpu only, not on {config.device!r}")
    if config.dtype not in (None, "float32"):
        raise ConfigError(f"the reference backend computes in float32 only, not {config.dtype}")
    if config.draft_bits or config.kv_bits:
        raise ConfigError("the reference backend does not quantise; leave the bits out")
    if config.cuda_graphs:
        raise ConfigError("the reference backend does not compile; leave --cuda-graphs out")
    model = Target(target)
    return ReferenceBackend(model, load_drafter(drafter, model) if drafter else None)


def load_drafter(folder: Path, target: Target) -> DrafterWeights:
    """Read a drafter and check that it belongs to the target."""
    config = drafter_config(folder)
    check_pair(
        config,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_hidden_layers=target.layers,
    )
    tensors = {canonical_name(name): tensor for name, tensor in read_tensors(folder).items()}
    check_tensors(folder, config, {name: tensor.shape for name, tensor in tensors.items()})
    return DrafterWeights(config, tensors, target)
