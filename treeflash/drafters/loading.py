"""Loading a drafter for a target: what every backend does before it builds its own modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from treeflash.config import DrafterConfig
from treeflash.drafters.folder import stored_shapes, weight_files
from treeflash.drafters.formats import canonical_name, drafter_config, drafter_shapes
from treeflash.drafters.treeflash import HEAD_PREFIX, head_size
from treeflash.errors import CheckpointError

Tensor = TypeVar("Tensor")


@dataclass(frozen=True, kw_only=True)
class DrafterTensors(Generic[Tensor]):
    """A drafter as its folder holds it, checked against the target that it drafts for.

    Attributes:
        config: its shape.
        backbone: its tensors without those of the AR head, by canonical name.
        head: the tensors of the AR head, by name without `ar_approximation.`; empty if there is
            none.
        head_size: I, the inner width of the AR head; 0 if there is none.
    """

    config: DrafterConfig
    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    head_size: int


def load_tensors(
    folder: Path,
    read: Callable[[Path], Mapping[str, Tensor]],
    *,
    hidden_size: int,
    vocab_size: int,
    num_hidden_layers: int,
) -> DrafterTensors[Tensor]:
    """Read a drafter and check that it belongs to a target.

    Args:
        folder: of the drafter.
        read: reads a safetensors file into the tensors of a framework, by stored name.
        hidden_size: of the target, like those that follow.
        vocab_size: rows of its embeddings.
        num_hidden_layers: its depth.

    Raises:
        CheckpointError: the folder is damaged, incomplete, or not made for this target.
    """
    config = drafter_config(folder)
    check_pair(
        config,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=num_hidden_layers,
    )
    shapes = {canonical_name(name): shape for name, shape in stored_shapes(folder).items()}
    check_shapes(folder, config, shapes)
    backbone: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for stored, tensor in read(path).items():
            name = canonical_name(stored)
            if name.startswith(HEAD_PREFIX):
                head[name.removeprefix(HEAD_PREFIX)] = tensor
            else:
                backbone[name] = tensor
    return DrafterTensors(config=config, backbone=backbone, head=head, head_size=head_size(shapes))


def check_pair(
    config: DrafterConfig, *, hidden_size: int, vocab_size: int, num_hidden_layers: int
) -> None:
    """Raise a CheckpointError if a drafter cannot belong to a target of this shape."""
    problem = None
    if config.hidden_size != hidden_size:
        problem = f"its hidden size is {config.hidden_size}, the target's is {hidden_size}"
    elif config.vocab_size is not None and config.vocab_size != vocab_size:
        problem = f"its vocabulary has {config.vocab_size} tokens, the target's has {vocab_size}"
    elif not 0 <= config.mask_token_id < vocab_size:
        problem = f"its mask token {config.mask_token_id} is outside the vocabulary of {vocab_size}"
    elif config.num_target_layers not in (None, num_hidden_layers):
        problem = (
            f"it was trained for a target of {config.num_target_layers} layers, "
            f"this one has {num_hidden_layers}"
        )
    elif not all(0 <= i < num_hidden_layers for i in config.target_layer_ids):
        problem = (
            f"it reads target layers {list(config.target_layer_ids)}, "
            f"the target has {num_hidden_layers}"
        )
    if problem:
        raise CheckpointError(f"drafter and target do not fit: {problem}")


def check_shapes(
    folder: Path, config: DrafterConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the tensors that a folder holds with those that its configuration asks for.

    Args:
        folder: named in the error.
        config: of the drafter.
        shapes: of the stored tensors, by canonical name.

    Raises:
        CheckpointError: names the first missing, misshapen or unexpected tensor.
    """
    expected = drafter_shapes(config, head_size(shapes))
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(f"{folder} lacks the tensor {name} of shape {shape}")
        if shapes[name] != shape:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {shapes[name]}, config.json asks for {shape}"
            )
    if extra := sorted(set(shapes) - set(expected)):
        raise CheckpointError(
            f"{folder} holds an unexpected tensor for its configuration: {extra[0]}"
        )
