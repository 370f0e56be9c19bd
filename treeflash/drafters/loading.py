"""Load a drafter for a target: the steps before a backend builds its own modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from treeflash.drafters import formats, mtp_formats
from treeflash.drafters.config import DrafterConfig, DrafterShape
from treeflash.drafters.folder import (
    ModelFolder,
    StoredTensor,
    check_dtype,
    mlx_quantisation,
    open_folder,
    read_config,
    read_quantised,
)
from treeflash.drafters.format import Config, Format, Names, Shapes
from treeflash.drafters.formats import HEADS, TRAINING_TENSORS
from treeflash.drafters.heads import treeflash
from treeflash.drafters.mtp_heads import MtpConfig
from treeflash.drafters.mtp_tensors import split_fused, stack_experts
from treeflash.errors import CheckpointError, UnsupportedModelError

Tensor = TypeVar("Tensor")
Read: TypeAlias = Callable[[Path, Collection[str]], Mapping[str, Tensor]]
"""Reads the tensors with given stored names from a safetensors file."""
Dequantise: TypeAlias = Callable[[Path, Mapping[str, StoredTensor]], Mapping[str, Tensor]]
"""Reads the numbers of weights that MLX has quantised, by stored name, from a safetensors file."""
VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "d2t")
"""Tensors of a drafter's own embeddings, output head, and vocabulary."""
MASK_EMBEDDING = "mask_embedding.pt"
"""The file of a drafter whose mask is no token."""


@dataclass(frozen=True, kw_only=True)
class DrafterTensors(Generic[Tensor]):
    """The tensors of a drafter's folder, checked against the target that it drafts for."""

    config: Any  # a DrafterConfig or a MtpConfig, by the kind of the format
    backbone: dict[str, Tensor]  # tensors of the layers and norms, by canonical name
    # tensors of the conditional head, by name without the prefix of the head; empty without a head
    head: dict[str, Tensor]
    head_size: int  # I, the inner width of a TreeFlash head; 0 for other heads
    vocabulary: dict[str, Tensor]  # the tensors of `VOCABULARY` that the folder has


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A drafter's configuration and tensors, which fit its target; no tensor is read yet."""

    folder: ModelFolder
    format: Format
    config: Any  # a DrafterConfig or a MtpConfig, by the kind of the format
    names: Names  # canonical names of the drafter's tensors, by stored name
    shapes: Shapes  # the shapes of these tensors, by canonical name
    vocab_size: int  # tokens of the target

    def read(
        self,
        read: Read[Tensor],
        dequantise: Dequantise[Tensor],
        stack: Callable[[list[Tensor]], Tensor],  # stacks tensors of one shape along a first axis
    ) -> DrafterTensors[Tensor]:
        """Read the drafter's tensors, which may stand in the folder of a whole target.

        Raises a CheckpointError if a file is damaged, or a drafter can propose tokens that its
        target does not have.
        """
        stored, tensors = self.folder.tensors, dict[str, Tensor]()
        for path in self.folder.files:
            wanted = {name: stored[name] for name in self.names if stored[name].path == path}
            plain = [name for name, tensor in wanted.items() if not tensor.bits]
            quantised = {name: tensor for name, tensor in wanted.items() if tensor.bits}
            found = {
                **(read(path, plain) if plain else {}),
                **(dequantise(path, quantised) if quantised else {}),
            }
            tensors |= {self.names[name]: tensor for name, tensor in found.items()}
        _check_tokens(self, tensors)
        if self.format.kind == "block":
            return arrange_block(self, tensors)
        vocabulary = {name: tensors.pop(name) for name in VOCABULARY if name in tensors}
        layers = stack_experts(tensors, self.config, stack)
        return DrafterTensors(
            config=self.config, backbone=layers, head={}, head_size=0, vocabulary=vocabulary
        )


def refuse_extensions(
    config: DrafterShape,
    user: str,
    vocabulary: Collection[str] = VOCABULARY,
    *,
    heads: Collection[str] = tuple(treeflash.HEADS),
    supported: Collection[str] = (),
) -> None:
    """Refuse a drafter that a backend cannot run.

    Every backend reads DFlash's windows and causal layers (`DrafterConfig.layer_kinds`). One that
    also has other `heads`, or reads other fields of the configuration, names them; `supported` are
    keys of the table here. `vocabulary` has the names of the drafter's own tensors of `VOCABULARY`,
    if they are known. The UnsupportedModelError names `user`, such as `the mlx backend`, and the
    first property that it lacks.
    """
    refusal = f"{user} does not support a drafter with"
    if not isinstance(config, DrafterConfig):
        raise UnsupportedModelError(f"{refusal} the head {config.head!r}")
    from_root = config.window_from_root and any(config.sliding_windows)
    properties: dict[str, tuple[str, object]] = {
        "head": (f"the head {config.head!r}", config.head not in (None, *heads)),
        "conv_kernel_size": ("convolutions", config.conv_kernel_size),
        "first_slot": ("a first token predicted by the root's slot", config.first_slot == 0),
        "window_from_root": ("windows measured from the root", from_root),
        **config.extensions,
        "target_layer_ids": ("features of the embeddings", -1 in config.target_layer_ids),
        "own_vocabulary": (
            "embeddings or an output head of its own",
            config.own_vocabulary and vocabulary,
        ),
        "draft_vocab_size": ("a smaller vocabulary", config.draft_vocab_size),
        "input_scale": ("a factor on its embeddings", config.input_scale != 1),
    }
    for name, (property, present) in properties.items():
        if present and name not in supported:
            raise UnsupportedModelError(f"{refusal} {property}")


def drafter_config(folder: Path) -> DrafterConfig:
    """Read the block drafter of a folder; a CheckpointError if it is invalid or not supported."""
    config = read_config(folder)
    with explained(folder, lambda: formats.detect_format(config)):
        return formats.parse_drafter_config(config)


@contextmanager
def explained(folder: Path, find: Callable[[], Format]) -> Iterator[None]:
    """Make errors of a configuration errors for users; `find` finds the folder's format."""
    path = folder / "config.json"
    if (folder / MASK_EMBEDDING).exists():
        raise CheckpointError(f"{folder} has a {MASK_EMBEDDING}, which is not supported")
    try:
        yield
    except KeyError as error:
        # A configuration of no other format passes for one of DFlash.
        name = find().name
        hint = f"{name} drafters need it; set it to the value used in training"
        if name in (formats.DFLASH.name, formats.TREEFLASH.name):
            hint = "is it a DFlash or TreeFlash drafter?"
        raise CheckpointError(f"{path} lacks {error}; {hint}") from error
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is not valid: {error}") from error


def find_head_format(folder: ModelFolder) -> Format | None:
    """Tell the format of the MTP or EAGLE head in a folder; None if the folder holds none.

    Raises an UnsupportedModelError if the head is of a family that is not supported, and a
    CheckpointError if the configuration is invalid.
    """
    # Only speculators have a setting elsewhere that tells the family, and may lack it.
    with explained(folder.path, lambda: formats.SPECULATORS):
        return mtp_formats.detect(folder.config, folder.tensors)


def parse_folder(folder: ModelFolder, target_layers: int) -> tuple[Format, Names, DrafterShape]:
    """Tell the format of a drafter for a target of some layers; read its configuration.

    Returns the format, the names of its tensors, and the configuration. Raises a CheckpointError or
    an UnsupportedModelError if one of them is not supported.
    """
    format = find_head_format(folder)
    with explained(folder.path, lambda: format or formats.DFLASH):
        format = format or formats.detect_format(folder.config)
        names = format.names(folder.config, folder.tensors)
        return format, names, format.parse(folder.config, folder.tensors, target_layers)


def read_layout(
    folder: Path | ModelFolder, *, hidden_size: int, vocab_size: int, num_hidden_layers: int
) -> Layout:
    """Check from headers alone that a drafter belongs to a target of this shape.

    Raises a CheckpointError or an UnsupportedModelError if its layout is not supported, or a
    setting or a tensor is missing, or does not fit.
    """
    opened = open_folder(folder) if isinstance(folder, Path) else folder
    stored = opened.tensors
    format, names, config = parse_folder(opened, num_hidden_layers)
    shapes = {names[x]: stored[x].shape for x in names}
    if format.kind == "rows":
        shapes = split_fused(shapes)
    required, optional = format.shapes(config, vocab_size, shapes)
    check_pair(
        config,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=num_hidden_layers,
        own_embeddings="embed_tokens.weight" in names.values(),
    )
    for name in names:
        tensor, mode = stored[name], mlx_quantisation(opened.config, name).get("mode", "affine")
        if tensor.dtype in ("U8", "U32") and mode != "affine":
            raise CheckpointError(
                f"{opened.path} is quantised in the mode {mode!r}; the mode 'affine' is supported"
            )
        if not tensor.bits:
            check_dtype(tensor.path, name, tensor.dtype)
    owner = "its configuration" if format.kind == "block" else "an MTP or EAGLE-3 head"
    compare_shapes(opened.path, required | optional, shapes, optional.keys(), owner)
    if isinstance(config, DrafterConfig) and config.vocab_size is not None:
        config = replace(config, vocab_size=vocab_size)  # `arrange_block` leaves out other tokens
    return Layout(
        folder=opened,
        format=format,
        config=config,
        names=names,
        shapes=shapes,
        vocab_size=vocab_size,
    )


def check_drafter(folder: Path | ModelFolder, target: Config) -> DrafterShape | None:
    """Check from headers alone that the drafter of a folder fits a target's configuration.

    Returns the drafter's configuration; None if the target's does not name its sizes as most do.
    Raises a CheckpointError or an UnsupportedModelError as loading the drafter would.
    """
    settings = mtp_formats.text_config(target)
    keys = ("hidden_size", "vocab_size", "num_hidden_layers")
    shape = {key: settings[key] for key in keys if isinstance(settings.get(key), int)}
    if len(shape) < len(keys):
        return None
    config: DrafterShape = read_layout(folder, **shape).config
    return config


def load_tensors(
    folder: Path, read: Read[NDArray[Any]], **target: int
) -> DrafterTensors[NDArray[Any]]:
    """Read a block drafter for a target; `read_layout` and `Layout.read` in one.

    It raises their errors, and an UnsupportedModelError for a head that drafts depth by depth.
    """
    layout = read_layout(folder, **target)
    if layout.format.kind != "block":
        raise UnsupportedModelError(
            f"{folder} has the head {layout.config.head!r}, which drafts depth by depth; this "
            "backend runs block drafters only"
        )
    return layout.read(read, read_quantised, np.stack)


def _check_tokens(layout: Layout, tensors: Mapping[str, Any]) -> None:
    """Raise a CheckpointError for ids of tokens that are outside the target's vocabulary.

    Running them would end all sequences of a GPU.
    """
    for name in ("d2t", "masked_embedding.token_ordering"):
        if name not in tensors:
            continue
        ids = np.asarray(tensors[name])
        if name == "d2t":  # differences to the drafter's own ids
            ids = ids + np.arange(len(ids))
        if ids.min() < 0 or ids.max() >= layout.vocab_size:
            raise CheckpointError(
                f"{layout.folder.path}: the tensor {name} names tokens from {ids.min()} to "
                f"{ids.max()}, and the target has {layout.vocab_size} tokens"
            )


def arrange_block(layout: Layout, tensors: Mapping[str, Tensor]) -> DrafterTensors[Tensor]:
    """Bring tensors of a block drafter, by canonical name, into the form in which models have them.

    The gates of queries become tensors of their own, `gate_proj`. Tokens beyond the target's
    vocabulary keep their embeddings alone, since no target draws them and a mask may be among them.
    Rows are chosen and moved, so in place of weights there may be their words, scales or biases.
    """
    config, vocab_size = layout.config, layout.vocab_size
    head_size = formats.head_inner_size(layout.shapes)
    head_shapes, prefix = Shapes(), ""
    if config.head is not None:
        head = HEADS[config.head]
        head_shapes, prefix = head.shapes(config, vocab_size, head_size), head.prefix
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}, "vocabulary": {}}
    for name, tensor in tensors.items():
        if name in head_shapes:
            parts["head"][name.removeprefix(prefix)] = _first_rows(tensor, head_shapes[name][0])
        elif name == "lm_head.weight":
            rows = config.draft_vocab_size or vocab_size
            parts["vocabulary"][name] = _first_rows(tensor, rows)
        elif name in VOCABULARY:
            parts["vocabulary"][name] = tensor
        else:
            if config.gated and ".self_attn.q_proj." in name:
                tensor, gate = _split_gate(tensor, config.head_dim)
                parts["backbone"][name.replace("q_proj", "gate_proj")] = gate
            if re.search(r"\.[qk]_(proj|norm)\.", name):
                tensor = _join_halves(tensor, config)
            parts["backbone"][name] = tensor
    return DrafterTensors(config=config, head_size=head_size, **parts)


def _first_rows(tensor: Any, rows: int) -> Any:
    return tensor[:rows]


def _split_gate(tensor: Any, head_dim: int) -> tuple[Any, Any]:
    """Split the rows of the queries and the rows of the gates, which alternate by head."""
    rest = tuple(tensor.shape[1:])
    heads = tensor.reshape(-1, 2, head_dim, *rest)
    return heads[:, 0].reshape(-1, *rest), heads[:, 1].reshape(-1, *rest)


def _join_halves(tensor: Any, config: DrafterConfig) -> Any:
    """Reorder rows of queries or keys so that the halves of a head are rotary pairs.

    In the stored tensors neighbours may be pairs, or the halves of the first channels alone.
    """
    shape, half = tuple(tensor.shape), config.head_dim // 2
    if config.interleaved_rope:
        return tensor.reshape(-1, half, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    pairs = sum(frequency > 0 for frequency in config.inv_freq)
    if pairs == half or config.gemma4:
        return tensor
    heads = tensor.reshape(-1, 2 * half, *shape[1:])
    ordered = heads + 0  # a copy in every framework
    ordered[:, pairs:half] = heads[:, 2 * pairs : half + pairs]
    ordered[:, half : half + pairs] = heads[:, pairs : 2 * pairs]
    return ordered.reshape(shape)


def check_pair(
    config: DrafterShape,
    *,
    hidden_size: int,
    vocab_size: int,
    num_hidden_layers: int,
    own_embeddings: bool = False,
) -> None:
    """Raise a CheckpointError if a drafter cannot belong to a target of this shape.

    A block drafter with its own embeddings may have more tokens than the target.
    """
    problem, mask, layer_ids, tokens = None, 0, config.target_layer_ids, vocab_size
    if isinstance(config, DrafterConfig):
        mask = config.mask_token_id
        if own_embeddings and not config.draft_vocab_size:
            tokens = max(vocab_size, config.vocab_size or 0)
    elif isinstance(config, MtpConfig):
        mask = config.mask_token_id or 0
        if config.final_state:
            layer_ids = ()  # it reads the states after all layers
    if config.hidden_size != hidden_size:
        problem = f"its hidden size is {config.hidden_size}, the target's is {hidden_size}"
    elif config.vocab_size not in (None, tokens):
        problem = f"its vocabulary has {config.vocab_size} tokens, the target's has {vocab_size}"
    elif not 0 <= mask < tokens:
        problem = f"its mask token {mask} is outside the vocabulary of {tokens}"
    elif config.num_target_layers not in (None, num_hidden_layers):
        problem = (
            f"it was trained for a target of {config.num_target_layers} layers, "
            f"this one has {num_hidden_layers}"
        )
    elif not all(-1 <= i < num_hidden_layers for i in layer_ids):
        problem = f"it reads target layers {list(layer_ids)}, the target has {num_hidden_layers}"
    if problem:
        raise CheckpointError(f"drafter and target do not fit: {problem}")


def check_shapes(
    folder: Path, config: DrafterConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise a CheckpointError for the first missing, misshapen or unexpected stored tensor."""
    required, optional = formats.block_shapes(config, None, dict(shapes))
    stored = {name: shape for name, shape in shapes.items() if name not in TRAINING_TENSORS}
    compare_shapes(folder, required | optional, stored, optional.keys(), "its configuration")


def compare_shapes(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, tuple[int, ...]],
    optional: Collection[str],
    owner: str,
) -> None:
    """Raise a CheckpointError for the first tensor that is missing, misshapen or unexpected.

    The tensors named `optional` may be missing; `owner` is what the others belong to, for messages.
    """
    for name, shape in expected.items():
        if name not in stored and name not in optional:
            raise CheckpointError(f"{folder} lacks the tensor {name} of shape {shape}")
        if stored.get(name, shape) != shape:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {stored[name]}, config.json asks for {shape}"
            )
    if extra := sorted(set(stored) - set(expected)):
        raise CheckpointError(f"{folder} holds an unexpected tensor for {owner}: {extra[0]}")
