"""Attention over committed positions and a block, as transformers' models call it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from treeflash.errors import UnsupportedModelError

# transformers takes a name with "flash" in it for a kernel to be fetched.
NAME = "draft_tree"


class Visibility:
    """Which keys the queries of one forward see, as additive biases made once per window.

    Attributes:
        committed: positions before the block; every query sees them, its window permitting.
        positions: (n,) absolute positions of the block.
        block: (n, n) bool, which of the block a query sees.
        causal: whether `block` is the lower triangle, for which a faster kernel exists.
    """

    def __init__(self, committed: int, positions: Tensor, block: Tensor, causal: bool) -> None:
        """Describe one forward."""
        self.committed = committed
        self.positions = positions
        self.block = block
        self.causal = causal
        self._biases: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(n, committed + n) zeros where a key is seen, -inf where not.

        Args:
            window: a query sees keys less than `window` positions away; None is all.
            dtype: of the queries.
        """
        if (window, dtype) not in self._biases:
            n, device = len(self.positions), self.positions.device
            before = torch.ones(n, self.committed, dtype=torch.bool, device=device)
            seen = torch.cat([before, self.block], 1)
            if window is not None:
                earlier = torch.arange(self.committed, device=device)
                keys = torch.cat([earlier, self.positions])
                seen &= (self.positions[:, None] - keys).abs() < window
            bias = torch.zeros(seen.shape, dtype=dtype, device=device)
            self._biases[window, dtype] = bias.masked_fill_(~seen, float("-inf"))
        return self._biases[window, dtype]


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Grouped-query attention without repeating keys: a group's heads become more queries.

    Args:
        q: (1, heads, n, head_dim).
        k: (1, kv_heads, m, head_dim).
        v: (1, kv_heads, m, head_dim).
        bias: (n, m) or None, where every query sees every key.
        scale: factor on the scores.

    Returns:
        (1, n, heads, head_dim).
    """
    _, heads, n, head_dim = q.shape
    groups = heads // k.shape[1]
    folded = q.reshape(1, k.shape[1], groups * n, head_dim)
    if bias is not None:
        bias = bias.repeat(groups, 1)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=bias, scale=scale)
    return out.view(1, heads, n, head_dim).transpose(1, 2)


def target_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    visibility: Visibility | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a model's attention layers call; the mask given by the model is not used.

    Raises:
        UnsupportedModelError: the layer asks for what is not done here.
    """
    if visibility is None or softcap is not None or s_aux is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses attention that cannot run a draft tree here "
            "(soft-capped scores, attention sinks, or masks of its own)"
        )
    n, length = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and length > sliding_window else None
    if window is None and n == 1:
        return grouped_attention(query, key, value, None, scale), None
    if window is None and visibility.causal and n == length:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2), None
    bias = visibility.bias(window, query.dtype)
    return grouped_attention(query, key, value, bias, scale), None


AttentionInterface.register(NAME, target_attention)
