"""A target: the model whose tokens are generated, as the verifier, drafters and heads see it.

`decoder.target` has targets with layers of our own, and `hf.model_target` models of transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.decoding.backend_base import Outputs, PassRows
from treeflash.decoding.families import family_of, refusal
from treeflash.decoding.image_processor import Processor
from treeflash.decoding.passed_checks import PassedChecks
from treeflash.decoding.probe import ImageSample
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_config
from treeflash.errors import CheckpointError, UnsupportedModelError, first_line
from treeflash_cuda.cache import Arena, Span
from treeflash_cuda.cpu.threads import Threads, cpu_threads
from treeflash_cuda.gpu.graphs import Graphs
from treeflash_cuda.gpu.prompt_attention import CausalAttention
from treeflash_cuda.gpu.state_arena import StateArena
from treeflash_cuda.images import VisionTower
from treeflash_cuda.linear import token_products
from treeflash_cuda.low_bit_linear import LowBitEmbedding, LowBitLinear
from treeflash_cuda.operations import Operations
from treeflash_cuda.recurrent_states import RecurrentStates
from treeflash_cuda.sampling import Logits
from treeflash_cuda.state import State

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PASS_NAME = "the target"
"""The name of the pass over rows as a function that is captured."""
UNLIMITED = 1 << 20
"""Positions of models that have no limit."""

TREE_LAYERS = {"full_attention", "sliding_attention"}
RECURRENT_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
STATELESS_LAYERS = {"mlp", "moe"}
"""Feed-forward networks, in models where they are layers of their own."""

Rows: TypeAlias = tuple[State, DraftTree | Sequence[int]]
"""A sequence, and its tree or its next tokens."""


@dataclass(frozen=True, eq=False)
class RowsResult:
    """The result of passes over rows of sequences, in the order of the sequences."""

    logits: Logits
    rows: list[PassRows[State]]

    @classmethod
    def of_pass(
        cls,
        logits: Logits,
        rows: Sequence[Rows],
        outputs: dict[int, Tensor],
        firsts: Iterable[int],
        written: Sequence[Any] = (),
    ) -> RowsResult:
        """Return the result of one pass.

        Args:
            logits: logits of all sequences.
            rows: the sequences, with their trees or next tokens.
            outputs: outputs of captured layers, by layer.
            firsts: index of each sequence's first row in the outputs.
            written: what recurrent layers wrote for each sequence; empty without such layers.
        """
        shared = Outputs(outputs)
        parts = [
            PassRows(state, shared, first, token_ids(tokens), written=part)
            for (state, tokens), first, part in zip(
                rows, firsts, written or [None] * len(rows), strict=True
            )
        ]
        return cls(logits, parts)

    @classmethod
    def joined(cls, passes: Sequence[tuple[Sequence[int], RowsResult]]) -> RowsResult:
        """Join the results of passes over sequences with these indices, which cover all."""
        if len(passes) == 1:
            return passes[0][1]
        logits = Logits.of_passes([(members, found.logits) for members, found in passes])
        rows = {i: part for x, found in passes for i, part in zip(x, found.rows, strict=True)}
        return cls(logits, [rows[i] for i in sorted(rows)])


def token_ids(tokens: DraftTree | Sequence[int]) -> NDArray[np.int32]:
    """Return the (n,) tokens of a tree, or next tokens."""
    return tokens.tokens if isinstance(tokens, DraftTree) else np.asarray(tokens, np.int32)


def logit_counts(rows: Sequence[Rows], needs_logits: Sequence[bool]) -> list[int]:
    """Return how many of its last rows need logits, by sequence: a whole tree, or one token."""
    return [
        (len(tokens) if isinstance(tokens, DraftTree) else 1) if is_needed else 0
        for (_, tokens), is_needed in zip(rows, needs_logits, strict=True)
    ]


def last_rows(sizes: Sequence[int], counts: Sequence[int]) -> NDArray[np.int64]:
    """Return the last rows of sequences, `counts` of each, where all rows follow one another."""
    pairs = zip(np.cumsum(sizes), counts, strict=True)
    return np.concatenate([np.arange(end - n, end) for end, n in pairs])


def read_model_config(folder: Path) -> PreTrainedConfig:
    """Read the configuration of a folder, as transformers reads it.

    Raises a CheckpointError if the configuration is damaged, or of a type that transformers lacks.
    """
    from transformers import AutoConfig

    read_config(folder)  # its message about a damaged file is clearer
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a validation error of another library has any type
        raise CheckpointError(
            f"{folder / 'config.json'} is not usable: {first_line(error)}"
        ) from error


def skeleton(config: PreTrainedConfig) -> Any:
    """Make a decoder without memory for its weights; None if it cannot be made from these settings.

    What is wrong with them is said when the model is loaded.
    """
    from transformers import AutoModelForCausalLM  # takes seconds

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception:  # the model's own code may raise anything
        return None


def max_positions(config: Any) -> int:
    """Return the model's positions, or how many there are before longrope's frequencies change."""
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        # transformers picks the frequencies of a whole forward pass by its last position.
        if part.get("rope_type") == "longrope":
            return int(part["original_max_position_embeddings"])
    return int(getattr(config, "max_position_embeddings", None) or UNLIMITED)


def refuse_stateful(config: PreTrainedConfig) -> None:
    """Raise for layers whose state is of an unsupported kind, or that attend in chunks."""
    text_config = config.get_text_config()
    for name in (config.model_type, text_config.model_type):
        if family_of(name).refusal is not None:
            raise UnsupportedModelError(refusal(name))
    known = TREE_LAYERS | RECURRENT_LAYERS | STATELESS_LAYERS
    if kinds := set(getattr(text_config, "layer_types", None) or ()) - known:
        raise UnsupportedModelError(
            refusal(config.model_type, f"they have {', '.join(sorted(kinds))} layers")
        )


class Target(ABC):
    """The model, its keys and values, and the outputs of the layers that a drafter reads."""

    model: nn.Module
    dtype: torch.dtype
    # (vocab, hidden_size) the input table, without any scaling by the model.
    embeddings: Tensor | LowBitEmbedding
    lm_head: nn.Module  # hidden_size to vocab
    # (vocab, hidden_size) of the output head; None if quantised, or on another device.
    lm_head_weight: Tensor | LowBitLinear | None

    def __init__(
        self,
        config: Any,  # transformers' configuration of the decoder
        device: torch.device,  # the device of its embeddings, and of its inputs and outputs
        layers: Sequence[nn.Module],  # the layers of the decoder
        spans: list[Span] | None = None,  # None for one device
    ) -> None:
        self.config, self.device, self.layers, self.spans = config, device, layers, spans
        self.layers_from = "treeflash"  # whose layers they are, and why, for `doctor`
        self.max_positions = max_positions(config)  # fewer if later ones change earlier ones
        self.split = False  # whether other processes have parts of its layers
        self.is_hybrid = False  # whether the model has recurrent layers
        self.states_nbytes = 0  # size of a sequence's recurrent states, bytes
        self.state_arena: StateArena | None = None  # arena of recurrent states; None without them
        self.softcap: float | None = None  # the scores' softcap, see `AttentionInputs`
        self.has_sinks = False  # whether layers have attention sinks
        # For long prompts, which are rows like others without it.
        self.prompt_attention: CausalAttention | None = None
        self.operations: Operations | None = None  # for rows; None attends with masks
        self.is_exact = False  # see `make_exact`
        self.exact_refusal: str | None = None  # why the backend's default is not exact mode
        self.captured: tuple[int, ...] = ()  # the layers of `capture`
        self._exact_changes = ExitStack()  # undoes what exact mode changes on a CPU
        self.token_rows = 1  # equal rows of a lone token in exact mode on a CPU
        # Threads are chosen for each pass on a CPU; a GPU has None.
        self.threads: Threads | None = cpu_threads() if device.type == "cpu" else None
        # Whether functions of our own compute all products, also its drafter's; see `Threads`.
        self.is_compiled = False
        self.graphs = Graphs(device)  # replay forward passes, if they are enabled
        # The arena holds the keys and values of all sequences.
        self.arena = Arena(len(layers), spans=spans, device=device)
        self.tower: VisionTower | None = None  # None if the target takes no images
        # The processor of images, or why the target takes none.
        self.processor: Processor | str = "it is used as a text model"
        self.samples: Sequence[ImageSample] = ()  # prompts for `check_images`, if it takes images

    @property
    def vocab_size(self) -> int:
        return int(self.embeddings.shape[0])

    @property
    def devices(self) -> list[torch.device]:
        """The devices of its layers, in their order."""
        return [self.device] if self.spans is None else [device for device, _ in self.spans]

    @property
    def groups(self) -> int:
        """Heads that share a key head."""
        heads: int = self.config.num_attention_heads
        return heads // (getattr(self.config, "num_key_value_heads", None) or heads)

    @property
    def column_nbytes(self) -> int:
        """Size of the keys and values of one position in all layers, bytes."""
        return self.arena.column_nbytes

    @abstractmethod
    def make_exact(self, passed: PassedChecks) -> None:
        """Compute each position in the same way whatever is computed with it; see `exact`.

        What checks of products found before, `passed` tells. Raises an UnsupportedModelError if a
        layer cannot be computed in this way, or has other bits on this machine.
        """

    def make_inexact(self, reason: str) -> None:
        """Undo what `make_exact` changed on a CPU, where it was tried by default but refused."""
        self._exact_changes.close()
        self.is_exact, self.exact_refusal = False, reason

    def _change(self, **attributes: Any) -> None:
        """Change attributes until `_exact_changes` ends."""
        for name, value in attributes.items():
            self._exact_changes.callback(setattr, self, name, getattr(self, name))
            setattr(self, name, value)

    @abstractmethod
    def capture(self, layer_ids: Sequence[int]) -> None:
        """Keep the outputs of these layers, and no others, in every forward pass.

        -1 stands for the embeddings, and the number of layers for the final norm.
        """

    def embed(self, tokens: Tensor) -> Tensor:
        """Compute the (..., hidden_size) rows of the input table."""
        table = self.embeddings
        return table(tokens) if isinstance(table, LowBitEmbedding) else F.embedding(tokens, table)

    def shortlist_logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the (n, v) logits of some tokens, from (n, hidden_size); see `token_products`."""
        if self.lm_head_weight is not None:
            bias = getattr(self.lm_head, "bias", None)
            return token_products(hidden, self.lm_head_weight, tokens, bias)
        logits = self.lm_head(hidden)
        if tokens.ndim == 1:
            return logits.index_select(-1, tokens)
        return logits.gather(1, tokens.repeat_interleave(len(logits) // len(tokens), 0))

    def new_recurrent_states(self) -> RecurrentStates | None:
        """Create the recurrent states of an empty sequence; None if the model has none."""
        return None

    @abstractmethod
    def run_rows(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> RowsResult:
        """Run trees and new tokens: logits of all nodes, and of last tokens where needed.

        The KV caches then have the keys and values of the rows, uncommitted.
        """

    def most_rows(self, state: State, tokens: Sequence[int]) -> int | None:
        """Return how many new tokens of a sequence one pass may have; None without such a limit."""
        return None
