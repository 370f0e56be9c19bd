"""Attention over committed positions and a block, as transformers' models ask for it.

A model makes its masks and calls its attention through two public interfaces of transformers, by
the name of an implementation. The one registered here lets each model say, in its own way, which
distances a layer sees (all, a window, a chunk), and adds what it cannot know: that a block is a
tree, whose positions are not its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from treeflash.errors import UnsupportedModelError

# transformers takes a name with "flash" in it for a kernel to be fetched.
NAME = "draft_tree"

ALIGNED = 8
MANY = 256
"""Queries from which on copies of a mask cost more than folding heads saves."""

Rule: TypeAlias = Callable[..., Tensor]
"""A layer's own: (batch, head, query position, key position) to whether the key is seen."""


class FoldedMasks:
    """The masks of one forward as `grouped_attention` takes them, made once for all layers."""

    def __init__(self) -> None:
        """Start with none."""
        self._found: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def of(self, mask: Tensor | None, groups: int) -> Tensor | None:
        """See `folded`."""
        if mask is None:
            return None
        key = id(mask), groups
        if key not in self._found:  # the mask is kept as well: no other may take over its id
            self._found[key] = mask, folded(mask, groups)
        return self._found[key][1]


class Visibility:
    """What the queries of one forward see.

    Attributes:
        committed: positions before the block.
        positions: (n,) absolute positions of the block.
        block: (n, n) bool, which of the block a query sees, if the layer's rule permits; None where
            that is all before it, and itself.
        masks: of the layers.
    """

    def __init__(self, committed: int, positions: Tensor, block: Tensor | None) -> None:
        """Describe one forward."""
        self.committed = committed
        self.positions = positions
        self.block = block
        self.masks = FoldedMasks()

    @classmethod
    def whole(cls, length: int, device: torch.device) -> Visibility:
        """A text from its beginning."""
        return cls(0, torch.arange(length, device=device), None)

    @property
    def is_whole_text(self) -> bool:
        """Whether the block is all there is, for which kernels need no mask."""
        return self.block is None and self.committed == 0

    def mask(self, rule: Rule, dtype: torch.dtype) -> Tensor | None:
        """(1, 1, n, committed + n) additive; None where everything before a query is seen.

        Args:
            rule: of a layer.
            dtype: of the queries.
        """
        everything = rule is causal_mask_function
        if everything and (len(self.positions) == 1 or self.is_whole_text):
            return None
        n, device = len(self.positions), self.positions.device
        keys = torch.cat([torch.arange(self.committed, device=device), self.positions])
        seen = follow(rule, self.positions[:, None], keys[None, :]).expand(n, -1).clone()
        if self.block is None:
            seen[:, self.committed :].tril_()
        else:
            seen[:, self.committed :] &= self.block
        return additive(seen, dtype)[None, None]


class SlotVisibility:
    """What one new token of each of many texts sees: its own text, column by column.

    Attributes:
        positions: (slots,) of the new tokens; a text's columns are its positions.
        columns: that are looked at.
        reaching: for each chunk of columns, how many first slots look at it.
    """

    def __init__(self, positions: Tensor, columns: int, reaching: Sequence[int]) -> None:
        """Describe one forward."""
        self.positions = positions
        self.columns = columns
        self.reaching = reaching

    def mask(self, rule: Rule, dtype: torch.dtype) -> Tensor:
        """(slots, 1, 1, columns) additive."""
        keys = torch.arange(self.columns, device=self.positions.device)
        return additive(follow(rule, self.positions[:, None], keys[None, :]), dtype)[:, None, None]


def follow(rule: Rule, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether positions are seen from others, by the rule of a layer; both broadcast."""
    zero = torch.zeros((), dtype=torch.long, device=queries.device)
    return rule(zero, zero, queries, keys)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros where a key is seen, -inf where not."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, float("-inf"))


_CURRENT: ContextVar[Visibility | SlotVisibility] = ContextVar("visibility")


@contextmanager
def looking(visibility: Visibility | SlotVisibility) -> Iterator[None]:
    """Let a model that runs inside see this."""
    token = _CURRENT.set(visibility)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def tree_mask(*, mask_function: Rule, dtype: torch.dtype, **_: Any) -> Any:
    """The mask of one kind of layer; None where everything before a query is seen."""
    return _CURRENT.get().mask(mask_function, dtype)


def tree_attention(
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
        UnsupportedModelError: the layer asks for what is not done here.
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} soft-caps its scores or has attention sinks, "
            "which the cuda backend does not compute"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    visibility = _CURRENT.get()
    if isinstance(visibility, SlotVisibility):
        return slot_attention(query, key, value, attention_mask, scale, visibility.reaching), None
    n = query.shape[2]
    causal = attention_mask is None and n > 1
    if causal and not visibility.is_whole_text:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends without a mask, so it cannot run a draft tree"
        )
    # On a CPU the kernel can share keys under a mask too; on a GPU none that is fast does.
    if causal or (n >= MANY and query.device.type == "cpu"):
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).contiguous(), None
    mask = visibility.masks.of(attention_mask, query.shape[1] // key.shape[1])
    return grouped_attention(query, key, value, mask, scale), None


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, reaching: Sequence[int]
) -> Tensor:
    """Grouped-query attention of one query a head in each of many texts, chunk by chunk.

    Plain products: a fused kernel spends more on entering each text than on its few queries. Keys
    come first in theirs, which for so few queries is twice as fast on a CPU, and chunks lie
    together in memory, so that none is copied.

    Args:
        q: (slots, heads, 1, head_dim).
        k: (chunks, slots, kv_heads, columns of a chunk, head_dim).
        v: likewise.
        bias: (slots, 1, 1, columns of all).
        scale: factor on the scores.
        reaching: for each chunk, how many first slots look at it; the others see nothing there.

    Returns:
        (slots, 1, heads, head_dim).
    """
    assert bias is not None
    _, slots, kv_heads, width, head_dim = k.shape
    folded = (q * scale).view(slots, kv_heads, -1, head_dim)
    scores = bias.expand(-1, kv_heads, folded.shape[2], -1).clone()
    for chunk, (own, n) in enumerate(zip(scores.split(width, -1), reaching, strict=True)):
        own[:n] += (k[chunk, :n] @ folded[:n].transpose(-1, -2)).transpose(-1, -2)
    out = torch.zeros_like(folded)
    probs = scores.softmax(-1)
    for chunk, (own, n) in enumerate(zip(probs.split(width, -1), reaching, strict=True)):
        out[:n] += own[:n] @ v[chunk, :n]
    return out.view(slots, 1, -1, head_dim)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Grouped-query attention without repeating keys: a group's heads become more queries.

    Args:
        q: (batch, heads, n, head_dim).
        k: (batch, kv_heads, m, head_dim).
        v: (batch, kv_heads, m, head_dim).
        bias: (..., groups * n, m) that broadcasts over batch and kv_heads, as `folded` makes it;
            None where all is seen.
        scale: factor on the scores.

    Returns:
        (batch, n, heads, head_dim).
    """
    batch, heads, n, head_dim = q.shape
    queries = q.reshape(batch, k.shape[1], heads // k.shape[1] * n, head_dim)
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=bias, scale=scale)
    return out.view(batch, heads, n, head_dim).transpose(1, 2).contiguous()


def folded(bias: Tensor | None, groups: int) -> Tensor | None:
    """(..., groups * n, m) of an (..., n, m) mask: the same for every head of a group.

    Rows begin at multiples of `ALIGNED` numbers, or a GPU's kernel would copy the mask once more.
    """
    if bias is None:
        return None
    *batch, n, m = bias.shape
    whole = bias.new_zeros(*batch, groups, n, -(-m // ALIGNED) * ALIGNED)
    whole[..., :m] = bias[..., None, :, :]
    return whole.flatten(-3, -2)[..., :m]


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, tree_mask)
