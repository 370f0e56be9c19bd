"""Attention of new tokens over KV caches, and its masks.

The problem. A model of transformers takes its input for the continuation of one sequence: a token's
column in the KV cache is its position, and it sees every column before it. In a draft tree siblings
share a position, and a token must see its ancestors alone. Several sequences in one pass have
columns that have nothing to do with each other. The model's code is not ours to change.

The idea. A model builds its masks and computes its attention through two registries of
transformers, under the name of an implementation. The implementation that is registered here
evaluates the layer's own mask function (full attention, a sliding window, ...) at positions instead
of columns, and adds what no model knows: which of the new tokens are ancestors.

An example. Five tokens are committed; the tree has the root `a`, its children `b` and `c`, and
`d` after `b`. The last two rows say what `d` sees, at first in a layer that attends to everything
and then with a window of three positions:

    column     0 1 2 3 4   5 6 7 8
    position   0 1 2 3 4   5 6 6 7
    token      . . . . .   a b c d
    full       x x x x x   x x - x
    window 3   - - - - -   x x - x         positions 5 to 7; columns 6 to 8 would be `b c d`

The rule: a token sees a key if the mask function allows it at their positions and, where the key is
a node, if the node is its ancestor or the token itself.

Each forward pass has a `Context`, which makes the masks and computes the attention. A model passes
a mask from where it is made to its layers, so a context that needs no mask makes a placeholder and
finds by it what the layers' mask function was. (As keys of dictionaries, tensors are equal only to
themselves.)

- `AttentionContext`: one sequence, with a mask over all its keys. A GPU's kernel for prompts needs
  no mask.
- `PackedContext`: several sequences. Linear layers see their rows as one sequence; attention runs
  sequence by sequence, each with its own mask and columns.
- `TreeContext`: rows of one or more sequences, by the operation `tree_attention`. It consists of
  tensors alone, with shapes that a CUDA graph can have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from treeflash.errors import UnsupportedModelError
from treeflash_cuda.attention import (
    MANY_QUERIES,
    GroupedMasks,
    additive_mask,
    grouped_attention,
)
from treeflash_cuda.cache import decoded
from treeflash_cuda.gpu.kernels import CausalAttention
from treeflash_cuda.hf.model_caches import SlabCache, TreeCache
from treeflash_cuda.operations import Operations
from treeflash_cuda.visible_keys import VisibleKeys

# transformers would try to download a kernel for a name that contains "flash".
IMPLEMENTATION = "draft_tree"

MASK = "attention_mask"
"""The argument by which models pass masks to their layers."""

MaskFunction: TypeAlias = Callable[..., Tensor]
"""A layer's (batch, head, query position, key position) -> whether the query sees the key."""


@dataclass(frozen=True, eq=False, slots=True)
class AttentionInputs:
    """The inputs of one attention layer."""

    module: nn.Module  # the layer, for error messages
    query: Tensor  # (1, heads, n, head_dim) of the new tokens
    key: Tensor  # (1, kv_heads, m, head_dim), as the cache returned it, perhaps in 8 bits
    value: Tensor  # (1, kv_heads, m, head_dim), as the cache returned it, perhaps in 8 bits
    mask: Tensor | None  # the result of `Context.mask` for the layer's mask function
    scale: float  # factor on the scores
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: Tensor | None = None  # (heads,) scores of a key per head whose value is zero

    @property
    def needs_products(self) -> bool:
        """Whether PyTorch's fused attention does not compute these scores."""
        return self.softcap is not None or self.sinks is not None

    @property
    def score_options(self) -> dict[str, Any]:
        """The arguments of functions of attention that say how scores are computed."""
        return {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}


class Context(Protocol):
    """The masks and the attention of one forward pass."""

    positions: Tensor
    """(n,) absolute positions of the new tokens."""

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """Return the additive mask of the layers with this mask function; None if none is needed.

        `window` is the width of the window that the model gives for these layers, if it does.
        """

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Return the (1, n, heads, head_dim) attention of one layer, contiguous.

        Raises:
            UnsupportedModelError: the layer does not use the mask that `mask` returned.
        """


# The context of a model's call, and the outputs of layers that are captured during it. A context
# variable has a value per thread, so that threads can share a model.
_FORWARD_PASS: ContextVar[tuple[Context, dict[int, Tensor]]] = ContextVar("forward_pass")


@contextmanager
def attention_context(context: Context) -> Iterator[dict[int, Tensor]]:
    """Use a context in the model calls inside; yields the outputs of captured layers, by index."""
    outputs: dict[int, Tensor] = {}
    token = _FORWARD_PASS.set((context, outputs))
    try:
        yield outputs
    finally:
        _FORWARD_PASS.reset(token)


def is_attending() -> bool:
    """Return whether a model is being called in an `attention_context`."""
    return _FORWARD_PASS.get(None) is not None


@torch.compiler.disable
def capture_output(layer_id: int, output: Tensor) -> None:
    """Keep a layer's output for the caller of the current forward pass, if it asks for outputs."""
    if is_attending():
        _FORWARD_PASS.get()[1][layer_id] = output


@torch.compiler.disable
def attention_mask(
    *, mask_function: MaskFunction, dtype: torch.dtype, local_size: int | None = None, **_: Any
) -> Tensor | None:
    """Return the mask that transformers passes to the layers with this mask function."""
    return _FORWARD_PASS.get()[0].mask(mask_function, dtype, local_size)


@torch.compiler.disable
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend for a layer of a model, which finds this function in transformers' registry."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = AttentionInputs(module, query, key, value, attention_mask, scale, softcap, s_aux)
    return _FORWARD_PASS.get()[0].attend(inputs), None


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)


def evaluate(function: MaskFunction, queries: Tensor, keys: Tensor) -> Tensor:
    """Return whether query positions see key positions by a mask function; both broadcast."""
    zero = torch.zeros((), dtype=torch.long, device=queries.device)
    return function(zero, zero, queries, keys)


def is_window(function: MaskFunction, window: int | None) -> bool:
    """Return whether a layer's mask function is a causal window of `window` positions."""
    if window is None:
        return False
    keys = torch.tensor([-window, 1 - window, 0, 1])
    expected = torch.tensor([False, True, True, False])
    query = torch.tensor([2 * window])
    return not bool((evaluate(function, query, query + keys) != expected).any())


class AttentionContext:
    """A block after `committed` positions: the next tokens of a sequence, or a draft tree."""

    def __init__(
        self,
        committed: int,
        positions: Tensor,
        ancestors: Tensor | None,
        prompt_attention: CausalAttention | None = None,
    ) -> None:
        self.committed = committed  # positions before the block
        self.positions = positions  # (n,) absolute positions of the block's tokens
        # (n, n) bool, which of the block's tokens each token sees, if the layer's mask function
        # allows it; None for consecutive tokens.
        self.ancestors = ancestors
        # It attends for consecutive tokens; None attends with a mask.
        self.prompt_attention = prompt_attention
        self.masks = GroupedMasks()  # the masks of the layers
        self._windows: dict[Tensor | None, int | None] = {}

    @classmethod
    def whole_sequence(cls, length: int, device: torch.device) -> AttentionContext:
        return cls(0, torch.arange(length, device=device), None)

    @property
    def is_whole_sequence(self) -> bool:
        """Whether the block is a whole sequence in order, for which kernels need no mask."""
        return self.ancestors is None and self.committed == 0

    @property
    def attends_alone(self) -> bool:
        """Whether the block cannot attend together with other sequences."""
        return self.has_kernel or (self.is_whole_sequence and len(self.positions) > 1)

    @property
    def has_kernel(self) -> bool:
        """Whether the block is a part of a prompt for which there is a kernel."""
        return self.prompt_attention is not None and self.ancestors is None

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """Return (1, 1, n, committed + n) additive; None if each token sees everything before it.

        For the kernel a tensor that stands for the layers' window. Only a CPU attends to a whole
        sequence of several tokens without a mask: on a GPU PyTorch may choose cuDNN for it, which
        builds a plan for every new length.
        """
        is_causal = function is causal_mask_function
        if self.has_kernel and (is_causal or is_window(function, window)):
            placeholder = self.positions.new_empty(1, 1, 1, 1)
            self._windows[placeholder] = None if is_causal else window
            return placeholder
        n, device = len(self.positions), self.positions.device
        if is_causal and (n == 1 or (self.is_whole_sequence and device.type == "cpu")):
            return None
        keys = torch.cat([torch.arange(self.committed, device=device), self.positions])
        visible = evaluate(function, self.positions[:, None], keys[None, :]).expand(n, -1)
        if self.ancestors is not None:
            visible = visible.clone()
            visible[:, self.committed :] &= self.ancestors
        return additive_mask(visible, dtype)[None, None]

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend; key and value cover the committed positions and the block, as they are stored.

        Raises:
            UnsupportedModelError: the layer attends without a mask where the block needs one.
        """
        query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
        n, scale = query.shape[2], inputs.scale
        if self.prompt_attention is not None and mask in self._windows:
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            window = self._windows[mask]
            return self.prompt_attention(q, k, v, window, inputs.scale)[None]
        key, value = (decoded(x, query.dtype) for x in (key, value))
        causal = mask is None and n > 1
        if causal and not self.is_whole_sequence:
            raise UnsupportedModelError(
                f"{type(inputs.module).__name__} attends without a mask, so it cannot run a draft "
                "tree"
            )
        # With a mask, only the CPU's kernel shares keys between heads without copying them.
        many = n >= MANY_QUERIES and query.device.type == "cpu"
        if (causal or many) and not inputs.needs_products:
            output = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
            )
            return output.transpose(1, 2).contiguous()
        grouped = self.masks.get(
            self._causal_mask if causal else mask, query.shape[1] // key.shape[1], query.device
        )
        return grouped_attention(query, [(key, value)], [grouped], [n], **inputs.score_options)

    @cached_property
    def _causal_mask(self) -> Tensor:
        """(1, 1, n, n) additive mask of a whole sequence, float32."""
        visible = self.positions[:, None] >= self.positions
        return additive_mask(visible, torch.float32)[None, None]


class PackedContext:
    """`Context` of several sequences."""

    def __init__(self, sequences: Sequence[AttentionContext], cache: TreeCache) -> None:
        self.sequences = sequences  # the context of each sequence, in the order of their rows
        self.cache = cache  # the cache of the same sequences
        self.positions = torch.cat([x.positions for x in sequences])  # (rows,) of all sequences
        self.rows = list(cache.rows)  # the rows of each sequence
        # Whether each sequence attends in its own way, as long parts of prompts do.
        self.one_by_one = max(self.rows) >= MANY_QUERIES or any(
            sequence.attends_alone for sequence in sequences
        )
        self.masks = GroupedMasks()  # the masks of the layers
        self._sequence_masks: dict[Tensor | None, list[Tensor | None]] = {}

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor:
        """Return a tensor that stands for the masks of all sequences."""
        placeholder = self.positions.new_zeros(1, 1, 1, 1)
        masks = [sequence.mask(function, dtype, window) for sequence in self.sequences]
        self._sequence_masks[placeholder] = masks
        return placeholder

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend sequence by sequence; key and value cover the new rows alone."""
        if inputs.mask not in self._sequence_masks:
            raise UnsupportedModelError(
                f"{type(inputs.module).__name__} changes its mask, so it cannot run several "
                "sequences at once"
            )
        self.cache.select(inputs.key)
        query, keys_and_values = inputs.query, self.cache.visible_columns()
        masks = self._sequence_masks[inputs.mask]
        if not self.one_by_one:
            groups = query.shape[1] // inputs.key.shape[1]
            grouped = [self.masks.get(mask, groups, query.device) for mask in masks]
            keys_and_values = [
                (decoded(k, query.dtype), decoded(v, query.dtype)) for k, v in keys_and_values
            ]
            return grouped_attention(
                query, keys_and_values, grouped, self.rows, **inputs.score_options
            )
        parts = zip(self.sequences, query.split(self.rows, 2), keys_and_values, masks, strict=True)
        outputs = [
            sequence.attend(replace(inputs, query=q, key=k, value=v, mask=mask))
            for sequence, q, (k, v), mask in parts
        ]
        return torch.cat(outputs, 1)


class TreeContext:
    """`Context` of rows of several sequences, in the columns after the ones that they continue."""

    def __init__(
        self,
        operations: Operations,  # for attention
        cache: SlabCache,  # the cache of the sequences
        keys: VisibleKeys,  # the keys of the rows, in layers that attend to all positions
        positions: Tensor,  # (n,) of the rows
    ) -> None:
        self.operations = operations
        self.cache = cache
        self.positions = positions
        self._keys: dict[tuple[int | None, torch.device], VisibleKeys] = {}
        self._keys[None, positions.device] = keys
        self._windows: dict[Tensor | None, int | None] = {}

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor:
        """Return a tensor that stands for the layers' window.

        Raises:
            UnsupportedModelError: a mask function is neither causal nor a window.
        """
        is_causal = function is causal_mask_function
        if not is_causal and not is_window(function, window):
            raise UnsupportedModelError("a layer's mask is neither causal nor a sliding window")
        placeholder = self.positions.new_empty(1, 1, 1, 1)
        self._windows[placeholder] = None if is_causal else window
        return placeholder

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend to the columns of the cache, which has the nodes' keys and values."""
        if inputs.mask not in self._windows:
            raise UnsupportedModelError(f"{type(inputs.module).__name__} changes its mask")
        window = self._windows[inputs.mask]
        self.cache.select(inputs.key)
        output = self.operations.tree_attention(
            inputs.query[0].transpose(0, 1),
            *self.cache.stored_columns(),
            self._visible(window, inputs.query.device),
            **inputs.score_options,
        )
        return output[None]

    def _visible(self, window: int | None, device: torch.device) -> VisibleKeys:
        """Return the keys that rows see in layers with a window, on the device of a layer."""
        if (window, device) not in self._keys:
            keys = self._keys[None, self.positions.device]
            keys = keys if window is None else keys.within(window)
            self._keys[window, device] = keys.to(device)
        return self._keys[window, device]
