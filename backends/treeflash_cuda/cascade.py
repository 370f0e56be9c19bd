"""Attention in two parts that are merged by their log-sum-exps ("cascade attention").

Every node of a tree sees all committed positions of its text, so that part needs no mask, and a
kernel may split it along the keys. Only the nodes among themselves need a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from treeflash_cuda.attention import AttentionContext, MaskFunction, additive_mask, evaluate
from treeflash_cuda.attention_kernels import Kernels, Ranges, merge
from treeflash_cuda.grouped_attention import GroupedMasks


class CascadeContext(AttentionContext):
    """`AttentionContext` with the kernels for parts of attention, where they fit a layer.

    Attributes:
        kernels: for the parts.
    """

    def __init__(
        self, committed: int, positions: Tensor, ancestors: Tensor | None, kernels: Kernels
    ) -> None:
        """Describe one forward pass."""
        super().__init__(committed, positions, ancestors)
        self.kernels = kernels
        first = torch.zeros(1, dtype=torch.int32, device=positions.device)
        length = torch.full_like(first, committed)
        self.trees = TreeAttention(kernels, first, length, positions[None])
        self._windows: dict[int, tuple[Tensor, int | None]] = {}

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """A tensor that stands for the layers' window; of a tree (1, 1, n, n), the nodes' mask."""
        everything = function is causal_mask_function
        is_tree = self.ancestors is not None and len(self.positions) > 1
        plain = self.committed == 0 and (is_tree or everything)
        if plain or not (everything or is_window(function, window)):
            return super().mask(function, dtype, window)
        if is_tree:
            assert self.ancestors is not None
            mask = tree_mask(function, self.positions, self.ancestors, dtype)
        else:
            mask = self.positions.new_zeros(1, 1, 1, 1)
        self._windows[id(mask)] = mask, window
        return mask

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """See `Context.attend`."""
        if id(mask) not in self._windows:
            return super().attend(module, query, key, value, mask, scale)
        window = self._windows[id(mask)][1]
        n = query.shape[2]
        k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
        if self.ancestors is None and n > 1:
            out = self.kernels.causal(query[0].transpose(0, 1), k, v, window, scale)
            return out[None]
        own = key[:, :, -n:], value[:, :, -n:]
        return self.trees.attend(query, (k, v), own, mask, window, scale)


class TreeAttention:
    """Attention of the trees of t texts, n nodes each, over the texts and the trees themselves.

    Attributes:
        kernels: for the parts.
        first: (t,) int32 column of each text's first position.
        length: (t,) int32 committed positions.
        positions: (t, n) of the nodes.
    """

    def __init__(self, kernels: Kernels, first: Tensor, length: Tensor, positions: Tensor) -> None:
        """Describe one forward pass."""
        self.kernels = kernels
        self.first = first
        self.length = length
        self.positions = positions
        self.masks = GroupedMasks()
        self._ranges: dict[tuple[int | None, torch.device], Ranges] = {}

    def attend(
        self,
        query: Tensor,
        prefix: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        mask: Tensor | None,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            query: (1, heads, t * n, head_dim).
            prefix: keys and values, (m, kv_heads, head_dim) each, the nodes' included.
            own: keys and values of the nodes, (1, kv_heads, t * n, head_dim) each.
            mask: (t, 1, n, n) of the nodes among themselves; unused for single nodes.
            window: positions that each node sees; None for all before it.
            scale: factor on the scores.

        Returns:
            (1, t * n, heads, head_dim), contiguous.
        """
        (t, n), kv_heads, device = self.positions.shape, own[0].shape[1], query.device
        q = query[0].unflatten(0, (kv_heads, -1))  # (kv_heads, groups, t * n, head_dim)
        by_node = q.permute(2, 0, 1, 3)
        if n == 1:
            out, _ = self.kernels.shared(by_node, *prefix, self.ranges(window, device), scale)
            return out.flatten(1, 2)[None].contiguous()
        by_text = q.unflatten(2, (t, n)).permute(2, 0, 1, 3, 4).flatten(2, 3)
        if window is None:
            state = self.kernels.shared(by_text, *prefix, self.ranges(None, device), scale)
        else:
            out, lse = self.kernels.shared(by_node, *prefix, self.ranges(window, device), scale)
            state = (
                out.unflatten(0, (t, n)).permute(0, 2, 3, 1, 4).flatten(2, 3),
                lse.unflatten(0, (t, n)).permute(0, 2, 3, 1).flatten(2, 3),
            )
        k, v = (x[0].unflatten(1, (t, n)).transpose(0, 1) for x in own)
        grouped = self.masks.get(mask, q.shape[1], device)
        assert grouped is not None
        merged = merge(state, self.kernels.masked(by_text, k, v, grouped, scale))
        nodes = merged.unflatten(2, (-1, n)).permute(0, 3, 1, 2, 4)  # (t, n, kv_heads, groups, ...)
        return nodes.flatten(2, 3).flatten(0, 1)[None].contiguous()

    def ranges(self, window: int | None, device: torch.device) -> Ranges:
        """What nodes see of their texts: t ranges without a window, else t * n; on a device.

        Single nodes see themselves too, in the column after the committed positions.
        """
        if (window, device) not in self._ranges:
            first, length = self.first, self.length
            if window is not None:
                start = (self.positions - (window - 1)).clamp(min=0)
                start = torch.minimum(start, length[:, None])
                first = (first[:, None] + start).flatten()
                length = (length[:, None] - start).flatten()
            used = length + 1 if self.positions.shape[1] == 1 else length
            self._ranges[window, device] = Ranges(first.int().to(device), used.int().to(device))
        return self._ranges[window, device]


def tree_mask(
    function: MaskFunction, positions: Tensor, ancestors: Tensor, dtype: torch.dtype
) -> Tensor:
    """(..., 1, n, n) additive mask of the nodes of a tree among themselves.

    Args:
        function: of the layer.
        positions: (..., n).
        ancestors: (..., n, n).
        dtype: of the mask.
    """
    visible = evaluate(function, positions[..., :, None], positions[..., None, :])
    return additive_mask(visible & ancestors, dtype)[..., None, :, :]


def is_window(function: MaskFunction, window: int | None) -> bool:
    """Whether a layer's mask function is a causal window of so many positions."""
    if window is None:
        return False
    keys = torch.tensor([-window, 1 - window, 0, 1])
    expected = torch.tensor([False, True, True, False])
    query = torch.tensor([2 * window])
    return not bool((evaluate(function, query, query + keys) != expected).any())
