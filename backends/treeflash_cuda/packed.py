"""Several texts in one forward pass: their rows follow one another, without padding.

Linear layers see one sequence. Attention runs text by text, each with its own mask and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash.errors import UnsupportedModelError
from treeflash_cuda.attention import MANY_QUERIES, AttentionContext, MaskFunction
from treeflash_cuda.cache import TreeCache
from treeflash_cuda.grouped_attention import ALIGNMENT


class PackedContext:
    """`treeflash_cuda.attention.Context` of several texts.

    Attributes:
        texts: the context of each, in the order of their rows.
        cache: of the same texts.
        positions: (rows,) of all of them.
        rows: of each text.
        one_by_one: whether each text attends in its own way.
    """

    def __init__(self, texts: Sequence[AttentionContext], cache: TreeCache) -> None:
        """Describe one forward pass."""
        self.texts = texts
        self.cache = cache
        self.rows = list(cache.rows)
        # Others have kernels of their own, and long parts of prompts have kernels for their shape.
        self.one_by_one = max(self.rows) >= MANY_QUERIES or any(
            type(text) is not AttentionContext or (text.is_whole_text and n > 1)
            for text, n in zip(texts, self.rows, strict=True)
        )
        self._masks: dict[Any, tuple[Tensor | None, list[Tensor | None]]] = {}
        self.positions = torch.cat([text.positions for text in texts])

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor:
        """A tensor that stands for the masks of all texts, which it carries."""
        placeholder = self.positions.new_zeros(1, 1, 1, 1)
        placeholder.texts = [text.mask(function, dtype, window) for text in self.texts]  # type: ignore[attr-defined]
        return placeholder

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """See `Context.attend`; key and value are those of the new rows alone.

        Raises:
            UnsupportedModelError: the layer attends without the mask that it was given.
        """
        masks = getattr(mask, "texts", None)
        if masks is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} changes its mask, so it cannot run several texts at once"
            )
        if self.one_by_one:
            parts = zip(
                self.texts, self.cache.seen(), masks, query.split(self.rows, 2), strict=True
            )
            return torch.cat(
                [text.attend(module, q, *kv, own, scale) for text, kv, own, q in parts], 1
            )
        groups = query.shape[1] // key.shape[1]
        grouped = self._grouped(mask, masks, groups, query.device)
        return packed_attention(query, self.cache.seen(), grouped, self.rows, scale)

    def _grouped(
        self,
        mask: Tensor | None,
        masks: Sequence[Tensor | None],
        groups: int,
        device: torch.device,
    ) -> list[Tensor | None]:
        """(n * groups, m) masks of all texts, made once for all layers of a device."""
        key = id(mask), groups, device
        if key not in self._masks:  # holding the mask itself keeps its id from being reused
            self._masks[key] = (
                mask,
                [None if own is None else repeat_rows(own.to(device), groups) for own in masks],
            )
        return self._masks[key][1]


def packed_attention(
    query: Tensor,
    seen: Sequence[tuple[Tensor, Tensor]],
    masks: Sequence[Tensor | None],
    rows: Sequence[int],
    scale: float,
) -> Tensor:
    """Grouped-query attention of several texts, without repeated keys.

    The heads of a group become further queries, next to each other, so that the queries of a text
    are a slice, which costs nothing.

    Args:
        query: (1, heads, rows, head_dim) of all texts.
        seen: keys and values of each text, (1, kv_heads, m, head_dim) each.
        masks: of each text, as `repeat_rows` makes them; None if every key is visible.
        rows: of each text.
        scale: factor on the scores.

    Returns:
        (1, rows, heads, head_dim), contiguous.
    """
    kv_heads = seen[0][0].shape[1]
    groups = query.shape[1] // kv_heads
    queries = query[0].unflatten(0, (kv_heads, groups)).transpose(1, 2).flatten(1, 2)[None]
    parts = zip(queries.split([n * groups for n in rows], 2), seen, masks, strict=True)
    out = [
        F.scaled_dot_product_attention(q, *kv, attn_mask=mask, scale=scale) for q, kv, mask in parts
    ]
    together = out[0] if len(out) == 1 else torch.cat(out, 2)
    return together.unflatten(2, (-1, groups)).transpose(1, 2).flatten(2, 3).contiguous()


def repeat_rows(mask: Tensor | None, groups: int) -> Tensor | None:
    """(n * groups, m) from a (..., n, m) mask: each row so many times, with an aligned start."""
    if mask is None:
        return None
    n, m = mask.shape[-2:]
    padded = mask.new_zeros(n, groups, -(-m // ALIGNMENT) * ALIGNMENT)
    padded[..., :m] = mask.reshape(n, 1, m)
    return padded.flatten(0, 1)[:, :m]
