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

- `MaskedContext`: each sequence has its own mask and columns. Linear layers see the rows of several
  as one sequence. A GPU's kernel for prompts needs no mask.
- `TreeContext`: rows of one or more sequences, by the operation `tree_attention`. It consists of
  tensors alone, with shapes that a CUDA graph can have.
- `ExactContext` of `exact_contexts`: sums in the order of positions, in exact mode on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
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
    TokenBlock,
    additive_mask,
    grouped_attention,
)
from treeflash_cuda.cache import decoded
from treeflash_cuda.gpu.prompt_attention import CausalAttention
from treeflash_cuda.hf.model_caches import SlabCache, TreeCache
from treeflash_cuda.numerics import concatenate
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


def is_whole(block: TokenBlock) -> bool:
    """Return whether a block is a whole sequence in order, for which kernels need no mask."""
    return block.ancestors is None and block.committed == 0


class MaskedContext:
    """`Context` of one or several sequences, each with its mask.

    A single sequence has the mask that its layers pass on, which they may have changed. A tensor
    stands for the masks of several. Parts of prompts may have a kernel instead.
    """

    def __init__(
        self,
        blocks: Sequence[TokenBlock],  # the block of each sequence, in the order of their rows
        cache: TreeCache | None = None,  # the cache of the sequences; a single one needs none
        prompt_attention: CausalAttention | None = None,  # the kernel for next tokens, if any
    ) -> None:
        self.blocks, self.cache, self.prompt_attention = blocks, cache, prompt_attention
        self.positions = concatenate([block.positions for block in blocks])
        self.rows = [len(block) for block in blocks]
        # Whether each sequence attends in its own way, as long parts of prompts do.
        self.one_by_one = max(self.rows) >= MANY_QUERIES or any(
            self._has_kernel(x) or (is_whole(x) and len(x) > 1) for x in blocks
        )
        self.grouped = GroupedMasks()  # the masks of the layers
        # By tensors that stand for them: the masks of several sequences, and a kernel's windows.
        self._masks: dict[Tensor | None, list[Tensor | None]] = {}
        self._windows: dict[Tensor | None, int | None] = {}
        self._causal_masks: dict[TokenBlock, Tensor] = {}

    @classmethod
    def whole_sequence(cls, length: int, device: torch.device) -> MaskedContext:
        return cls([TokenBlock(0, torch.arange(length, device=device), None)])

    def _has_kernel(self, block: TokenBlock) -> bool:
        return self.prompt_attention is not None and block.ancestors is None

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor | None:
        masks = [self._block_mask(block, function, dtype, window) for block in self.blocks]
        if len(masks) == 1:
            return masks[0]
        placeholder = self.positions.new_zeros(1, 1, 1, 1)
        self._masks[placeholder] = masks
        return placeholder

    def _block_mask(
        self, block: TokenBlock, function: MaskFunction, dtype: torch.dtype, window: int | None
    ) -> Tensor | None:
        """Return a block's (1, 1, n, committed + n) mask; None if each token sees all before it.

        For the kernel a tensor that stands for the layers' window. Only a CPU attends to a whole
        sequence of several tokens without a mask: on a GPU PyTorch may choose cuDNN for it, which
        builds a plan for every new length.
        """
        is_causal = function is causal_mask_function
        if self._has_kernel(block) and (is_causal or is_window(function, window)):
            placeholder = self.positions.new_empty(1, 1, 1, 1)
            self._windows[placeholder] = None if is_causal else window
            return placeholder
        n, device = len(block), self.positions.device
        if is_causal and (n == 1 or (is_whole(block) and device.type == "cpu")):
            return None
        keys = torch.cat([torch.arange(block.committed, device=device), block.positions])
        visible = evaluate(function, block.positions[:, None], keys[None, :]).expand(n, -1)
        if block.ancestors is not None:
            visible = visible.clone()
            visible[:, block.committed :] &= block.ancestors
        return additive_mask(visible, dtype)[None, None]

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend; key and value are of the new rows alone if there are several sequences."""
        masks, seen = [inputs.mask], [(inputs.key, inputs.value)]
        if len(self.blocks) > 1:
            if inputs.mask not in self._masks:
                raise _refusal(inputs.module, "changes its mask", "run several sequences at once")
            assert self.cache is not None
            self.cache.select(inputs.key)
            masks, seen = self._masks[inputs.mask], self.cache.visible_columns()
        elif inputs.mask is None and self.rows[0] > 1 and not is_whole(self.blocks[0]):
            raise _refusal(inputs.module, "attends without a mask")
        if inputs.mask is not None and inputs.mask.shape[1] not in (1, inputs.key.shape[1]):
            raise _refusal(inputs.module, "has a mask for each query head")
        if not self.one_by_one:
            return self._attend_together(inputs, seen, masks)
        queries = inputs.query.split(self.rows, 2)
        outputs = [
            self._attend(block, replace(inputs, query=q, key=k, value=v), mask)
            for block, q, (k, v), mask in zip(self.blocks, queries, seen, masks, strict=True)
        ]
        return concatenate(outputs, 1)

    def _attend_together(
        self,
        inputs: AttentionInputs,
        seen: Sequence[tuple[Tensor, Tensor]],  # stored keys and values of each sequence
        masks: Sequence[Tensor | None],  # the mask of each sequence
    ) -> Tensor:
        query, groups = inputs.query, inputs.query.shape[1] // inputs.key.shape[1]
        decode = partial(decoded, dtype=query.dtype)
        grouped = [self.grouped.get(mask, groups, query.device) for mask in masks]
        keys_and_values = [(decode(k), decode(v)) for k, v in seen]
        return grouped_attention(query, keys_and_values, grouped, self.rows, **inputs.score_options)

    def _attend(self, block: TokenBlock, inputs: AttentionInputs, mask: Tensor | None) -> Tensor:
        """Attend for one sequence."""
        query, scale, n = inputs.query, inputs.scale, len(block)
        if self.prompt_attention is not None and mask in self._windows:
            q, k, v = (x[0].transpose(0, 1) for x in (query, inputs.key, inputs.value))
            return self.prompt_attention(q, k, v, self._windows[mask], scale)[None]
        key, value = (decoded(x, query.dtype) for x in (inputs.key, inputs.value))
        is_causal = mask is None and n > 1
        # With a mask, only the CPU's kernel shares keys between heads without copying them.
        many = n >= MANY_QUERIES and query.device.type == "cpu"
        if (is_causal or many) and not inputs.needs_products:
            output = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
            )
            return output.transpose(1, 2).contiguous()
        mask = self._causal_mask(block) if is_causal else mask
        grouped = self.grouped.get(mask, query.shape[1] // key.shape[1], query.device)
        return grouped_attention(query, [(key, value)], [grouped], [n], **inputs.score_options)

    def _causal_mask(self, block: TokenBlock) -> Tensor:
        """Return the (1, 1, n, n) additive mask of a whole sequence, float32."""
        if block not in self._causal_masks:
            visible = block.positions[:, None] >= block.positions
            self._causal_masks[block] = additive_mask(visible, torch.float32)[None, None]
        return self._causal_masks[block]


def _refusal(layer: nn.Module, cause: str, task: str = "run a draft tree") -> UnsupportedModelError:
    """Return the refusal of an attention layer, which lacks for a task what the cause says."""
    return UnsupportedModelError(f"{type(layer).__name__} {cause}, so it cannot {task}")


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
