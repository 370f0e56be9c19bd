"""Attention of new tokens over a cache, as transformers' models call it.

A model builds its masks and computes its attention through two registries of transformers, under
the name of an implementation. The implementation registered here evaluates each layer's own mask
function (full attention, a sliding window, ...) and adds what no model knows: the new tokens may
be a draft tree, in which a token's position is not its column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from treeflash.errors import UnsupportedModelError
from treeflash_cuda.grouped_attention import GroupedMasks, grouped_attention

# transformers would try to download a kernel for a name that contains "flash".
IMPLEMENTATION = "draft_tree"

MANY_QUERIES = 256
"""From this many queries on, copying a mask for every head costs more than grouping saves."""

MASK = "attention_mask"
"""The argument by which models pass masks to their layers."""

MaskFunction: TypeAlias = Callable[..., Tensor]
"""A layer's (batch, head, query position, key position) -> whether the query sees the key."""


class Context(Protocol):
    """What one forward pass of a model tells its attention layers."""

    positions: Tensor
    """(n,) absolute positions of the new tokens."""

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """The additive mask of the layers with this mask function; None if none is needed.

        Args:
            function: of the layers.
            dtype: of the mask.
            window: the width of the window that the model gives for these layers, if it does.
        """

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            module: the layer, for error messages.
            query: (batch, heads, n, head_dim).
            key: as the cache returned it.
            value: as the cache returned it.
            mask: what `mask` returned for the layer's mask function.
            scale: factor on the scores.

        Returns:
            (batch, n, heads, head_dim), contiguous.
        """


@dataclass(frozen=True, eq=False)
class _ForwardPass:
    """One call of a model: its context, and the outputs of layers that are captured during it."""

    context: Context
    outputs: dict[int, Tensor] = field(default_factory=dict)


# A context variable has a value per thread, so that threads can share a model.
_FORWARD_PASS: ContextVar[_ForwardPass] = ContextVar("forward_pass")


@contextmanager
def attention_context(context: Context) -> Iterator[dict[int, Tensor]]:
    """Use a context in the model calls inside; yields the outputs of captured layers, by index."""
    forward_pass = _ForwardPass(context)
    token = _FORWARD_PASS.set(forward_pass)
    try:
        yield forward_pass.outputs
    finally:
        _FORWARD_PASS.reset(token)


def is_attending() -> bool:
    """Whether a model is being called in an `attention_context`."""
    return _FORWARD_PASS.get(None) is not None


@torch.compiler.disable
def capture_output(layer_id: int, output: Tensor) -> None:
    """Keep a layer's output for the caller of the current forward pass."""
    _FORWARD_PASS.get().outputs[layer_id] = output


@torch.compiler.disable
def attention_mask(
    *, mask_function: MaskFunction, dtype: torch.dtype, local_size: int | None = None, **_: Any
) -> Any:
    """The mask that transformers passes to the layers with this mask function."""
    return _FORWARD_PASS.get().context.mask(mask_function, dtype, local_size)


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
    """What a model's attention layers call.

    Raises:
        UnsupportedModelError: the layer uses a variant of attention that is not implemented.
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses soft-capped scores or attention sinks, which the cuda "
            "backend does not support"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    context = _FORWARD_PASS.get().context
    return context.attend(module, query, key, value, attention_mask, scale), None


class BlockContext:
    """Attention of a block of new tokens over the cache and the block itself.

    Attributes:
        masks: of the layers.
    """

    def __init__(self) -> None:
        """Start a forward pass."""
        self.masks = GroupedMasks()

    @property
    def is_whole_text(self) -> bool:
        """Whether the block is a whole text in order, for which kernels need no mask."""
        return False

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """See `Context.attend`; key and value are (batch, kv_heads, m, head_dim).

        Raises:
            UnsupportedModelError: the layer attends without a mask where the block needs one.
        """
        n = query.shape[2]
        causal = mask is None and n > 1
        if causal and not self.is_whole_text:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends without a mask, so it cannot run a draft tree"
            )
        # With a mask, only the CPU's kernel shares keys between heads without copying them.
        if causal or (n >= MANY_QUERIES and query.device.type == "cpu"):
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=causal,
                scale=scale,
                enable_gqa=True,
            )
            return out.transpose(1, 2).contiguous()
        grouped = self.masks.get(mask, query.shape[1] // key.shape[1], query.device)
        return grouped_attention(query, key, value, grouped, scale)


class AttentionContext(BlockContext):
    """A block after `committed` positions: the next tokens of a text, or a draft tree.

    Attributes:
        committed: positions before the block.
        positions: (n,) absolute positions of the block's tokens.
        ancestors: (n, n) bool, which of the block's tokens each token sees, if the layer's mask
            function allows it; None for consecutive tokens.
    """

    def __init__(self, committed: int, positions: Tensor, ancestors: Tensor | None) -> None:
        """Describe one forward pass."""
        super().__init__()
        self.committed = committed
        self.positions = positions
        self.ancestors = ancestors

    @classmethod
    def whole_text(cls, length: int, device: torch.device) -> AttentionContext:
        """The context of a text that is run from its beginning."""
        return cls(0, torch.arange(length, device=device), None)

    @property
    def is_whole_text(self) -> bool:
        """See `BlockContext.is_whole_text`."""
        return self.ancestors is None and self.committed == 0

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """(1, 1, n, committed + n) additive; None if each token sees everything before it."""
        is_causal = function is causal_mask_function
        if is_causal and (len(self.positions) == 1 or self.is_whole_text):
            return None
        n, device = len(self.positions), self.positions.device
        keys = torch.cat([torch.arange(self.committed, device=device), self.positions])
        visible = evaluate(function, self.positions[:, None], keys[None, :]).expand(n, -1)
        if self.ancestors is not None:
            visible = visible.clone()
            visible[:, self.committed :] &= self.ancestors
        return additive_mask(visible, dtype)[None, None]


def evaluate(function: MaskFunction, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether query positions see key positions under a layer's mask function; both broadcast."""
    zero = torch.zeros((), dtype=torch.long, device=queries.device)
    return function(zero, zero, queries, keys)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 for keys that are visible, -inf for the others."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf"))


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)
