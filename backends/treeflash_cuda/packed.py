"""Several texts in one forward pass: their rows follow one another, without padding.

Linear layers see one sequence. Attention runs text by text, each with its own mask and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from treeflash.errors import UnsupportedModelError
from treeflash_cuda.attention import AttentionContext, MaskFunction
from treeflash_cuda.cache import TreeCache


class PackedContext:
    """`treeflash_cuda.attention.Context` of several texts.

    Attributes:
        texts: the context of each, in the order of their rows.
        cache: of the same texts.
        positions: (rows,) of all of them.
    """

    def __init__(self, texts: Sequence[AttentionContext], cache: TreeCache) -> None:
        """Describe one forward pass."""
        self.texts = texts
        self.cache = cache
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
        cache, rows = self.cache, list(self.cache.rows)
        out = []
        for text, kept, own, part in zip(
            self.texts, cache.texts, masks, query.split(rows, 2), strict=True
        ):
            k, v = kept.until(cache.layer, kept.length + part.shape[2])
            out.append(text.attend(module, part, k, v, own, scale))
        return torch.cat(out, 1)
