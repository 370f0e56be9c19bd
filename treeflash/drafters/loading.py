"""Loading a drafter for a target: what every backend does before it builds its own modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters import dflash2, domino, markov
from treeflash.drafters.folder import stored_shapes, weight_files
from treeflash.drafters.formats import (
    canonical_name,
    drafter_config,
    drafter_shapes,
    optional_shapes,
)
from treeflash.drafters.speculators import IGNORED
from treeflash.drafters.treeflash import HEAD_PREFIX, HEADS, head_size
from treeflash.errors import CheckpointError, UnsupportedModelError

Tensor = TypeVar("Tensor")
HEAD_PREFIXES = (HEAD_PREFIX, dflash2.HEAD_PREFIX, markov.HEAD_PREFIX)
"""Of the tensors of heads, which are read without them."""
VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "d2t")


@dataclass(frozen=True, kw_only=True)
class DrafterTensors(Generic[Tensor]):
    """A drafter as its folder holds it, checked against the target that it drafts for.

    Attributes:
        config: its shape.
        backbone: the tensors of its layers and norms, by canonical name.
        head: the tensors of the conditional head, by name without a prefix such as
            `ar_approximation.`; empty if there is none.
        head_size: I, the inner width of a TreeFlash head; 0 for others.
        vocabulary: those of `embed_tokens.weight`, `lm_head.weight` and `d2t` that it has.
    """

    config: DrafterConfig
    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    head_size: int
    vocabulary: dict[str, Tensor]


def refuse_extensions(
    config: DrafterConfig, user: str, vocabulary: Collection[str] = VOCABULARY
) -> None:
    """For a backend, or training, that knows DFlash and TreeFlash alone.

    Args:
        config: of a drafter.
        user: named in the error, such as `the mlx backend`.
        vocabulary: its own tensors of `VOCABULARY`; all that it may have, if they are not known.

    Raises:
        UnsupportedModelError: names the first thing that DFlash and TreeFlash do not have.
    """
    extensions = {
        f"the head {config.head!r}": config.head not in (None, *HEADS),
        "convolutions": config.conv_kernel_size,
        "a first token predicted by the root's slot": config.first_slot == 0,
        "windows measured from the root": config.window_from_root and any(config.sliding_windows),
        "a factor on its logits": config.output_multiplier != 1,
        "a softcap": config.softcap is not None,
        "features of the embeddings": -1 in config.target_layer_ids,
        "embeddings or an output head of its own": config.own_vocabulary and vocabulary,
    }
    for name, present in extensions.items():
        if present:
            raise UnsupportedModelError(f"{user} does not support a drafter with {name}")


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
    check_shapes(folder, config, shapes, vocab_size)
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}, "vocabulary": {}}
    for path in weight_files(folder):
        for stored, tensor in read(path).items():
            name = canonical_name(stored)
            prefix = next((p for p in HEAD_PREFIXES if name.startswith(p)), "")
            if prefix or name.startswith((markov.CONFIDENCE_PREFIX, *domino.PREFIXES)):
                parts["head"][name.removeprefix(prefix)] = tensor
            elif name in VOCABULARY:
                parts["vocabulary"][name] = tensor
            elif name not in IGNORED:
                parts["backbone"][name] = tensor
    return DrafterTensors(config=config, head_size=head_size(shapes), **parts)


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
    elif not all(-1 <= i < num_hidden_layers for i in config.target_layer_ids):
        problem = (
            f"it reads target layers {list(config.target_layer_ids)}, "
            f"the target has {num_hidden_layers}"
        )
    if problem:
        raise CheckpointError(f"drafter and target do not fit: {problem}")


def check_shapes(
    folder: Path,
    config: DrafterConfig,
    shapes: Mapping[str, tuple[int, ...]],
    vocab_size: int | None = None,
) -> None:
    """Compare the tensors that a folder holds with those that its configuration asks for.

    Args:
        folder: named in the error.
        config: of the drafter.
        shapes: of the stored tensors, by canonical name.
        vocab_size: of the target, if the configuration does not give it.

    Raises:
        CheckpointError: names the first missing, misshapen or unexpected tensor.
    """
    needed = drafter_shapes(config, head_size(shapes), vocab_size=vocab_size)
    expected = needed | optional_shapes(config, vocab_size)
    for name, shape in expected.items():
        if name not in needed and name not in shapes:
            continue
        if name not in shapes:
            raise CheckpointError(f"{folder} lacks the tensor {name} of shape {shape}")
        if shapes[name] != shape:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {shapes[name]}, config.json asks for {shape}"
            )
    if extra := sorted(set(shapes) - set(expected) - IGNORED):
        raise CheckpointError(
            f"{folder} holds an unexpected tensor for its configuration: {extra[0]}"
        )
