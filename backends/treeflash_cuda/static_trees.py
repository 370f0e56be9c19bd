"""Forward passes over trees as functions of tensors alone, for CUDA graphs.

Their shapes depend on two numbers: of texts, and of nodes of the largest tree, each rounded up to a
power of two. Where a text begins and how long it is are tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.arena import Arena, Region, Slab
from treeflash_cuda.attention import MaskFunction
from treeflash_cuda.cache import TreeCache, upload
from treeflash_cuda.cascade import TreeAttention, is_window, tree_mask
from treeflash_cuda.graphs import Outputs, power_of_two
from treeflash_cuda.state import State
from treeflash_cuda.target import Target

MAX_ROWS = 512
"""More rows run without static shapes."""


class StaticTrees:
    """Runs the trees of several texts.

    Attributes:
        fits: whether the target can be run so: it has no recurrent layers, and was tried.
    """

    def __init__(self, target: Target) -> None:
        """Take the target."""
        self.target = target
        self.fits = target.transposed is None

    def run(self, trees: Sequence[tuple[State, DraftTree]]) -> tuple[Tensor, list[int]] | None:
        """Logits of all nodes and how many each tree has; None for trees that must run without."""
        graphs = self.target.graphs
        if not graphs.enabled or not self.fits or self.target.kernels is None:
            return None
        found = [state.key_values.region for state, _ in trees]
        regions = [region for region in found if region is not None]
        nodes = power_of_two(max(len(tree) for _, tree in trees))
        texts = power_of_two(len(trees))
        slabs = {id(region.slab): region.slab for region in regions}
        if len(regions) < len(trees) or len(slabs) > 1 or texts * nodes > MAX_ROWS:
            return None
        (slab,) = slabs.values()
        given = _inputs(trees, regions, texts, nodes)

        def forward(inputs: Tensor) -> Outputs:
            return self._forward(slab, texts, nodes, inputs)

        uploaded = upload(given, self.target.device)
        try:
            logits, layers, *outputs = graphs.run(
                "the target", (texts, nodes), forward, uploaded, store=slab.graphs
            )
        except UnsupportedModelError as error:
            self.fits = False
            warnings.warn(f"the target runs without CUDA graphs: {error}", stacklevel=2)
            return None
        counts = [len(tree) for _, tree in trees]
        for i, (state, _) in enumerate(trees):
            state.outputs = dict(zip(layers, outputs, strict=True))
            state.first_row = i * nodes
        parts = [logits[i * nodes : i * nodes + count] for i, count in enumerate(counts)]
        return parts[0] if len(parts) == 1 else torch.cat(parts), counts

    def _forward(self, slab: Slab, texts: int, nodes: int, inputs: Tensor) -> Outputs:
        """Logits, the indices of captured layers, and their outputs."""
        kernels, rows = self.target.kernels, texts * nodes
        assert kernels is not None
        tokens, positions, slots = inputs[: 3 * rows].long().view(3, rows)
        first, length = inputs[3 * rows : 3 * rows + 2 * texts].view(2, texts)
        ancestors = inputs[3 * rows + 2 * texts :].view(texts, nodes, nodes).bool()
        trees = TreeAttention(kernels, first, length, positions.view(texts, nodes))
        cache = StaticCache(self.target.arena, slab, slots)
        context = StaticContext(trees, positions, ancestors, cache)
        logits, outputs = self.target.forward(tokens, context, cache, logits_to_keep=0)
        return logits, tuple(outputs), *outputs.values()


def _inputs(
    trees: Sequence[tuple[State, DraftTree]], regions: Sequence[Region], texts: int, nodes: int
) -> NDArray[np.int32]:
    """Tokens, positions and slots of all nodes, first columns and lengths of texts, ancestors.

    Trees are filled up with copies of their roots, and texts with copies of the first one: these
    write the same keys and values to the same slots.
    """
    rows = np.zeros((3, texts, nodes), np.int32)
    ends = np.zeros((2, texts), np.int32)
    ancestors = np.zeros((texts, nodes, nodes), np.int32)
    for i, ((state, tree), region) in enumerate(zip(trees, regions, strict=True)):
        n, start = len(tree), state.length
        node = np.arange(nodes)
        node[n:] = 0
        rows[:, i] = tree.tokens[node], tree.positions(start)[node], region.first + start + node
        ends[:, i] = region.first, start
        ancestors[i, :n, :n] = tree.ancestor_mask()
        ancestors[i, n:, 0] = 1
    for filled in (rows.swapaxes(0, 1), ends.swapaxes(0, 1), ancestors):
        filled[len(trees) :] = filled[0]
    return np.concatenate([rows.ravel(), ends.ravel(), ancestors.ravel()])


class StaticContext:
    """`treeflash_cuda.attention.Context` of trees with static shapes.

    Attributes:
        trees: their attention.
        positions: (texts * nodes,) of the nodes.
        ancestors: (texts, nodes, nodes) bool.
        cache: of the same texts.
    """

    def __init__(
        self, trees: TreeAttention, positions: Tensor, ancestors: Tensor, cache: StaticCache
    ) -> None:
        """Describe one forward pass."""
        self.trees = trees
        self.positions = positions
        self.ancestors = ancestors
        self.cache = cache
        self._windows: dict[int, tuple[Tensor, int | None]] = {}

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor:
        """(texts, 1, nodes, nodes) additive: of the nodes among themselves.

        Raises:
            UnsupportedModelError: a mask function is neither causal nor a window.
        """
        if function is not causal_mask_function and not is_window(function, window):
            raise UnsupportedModelError("a layer's mask is neither causal nor a sliding window")
        mask = tree_mask(function, self.trees.positions, self.ancestors, dtype)
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
        """See `Context.attend`; key and value are those of the nodes alone.

        Raises:
            UnsupportedModelError: the layer attends without the mask that it was given.
        """
        if id(mask) not in self._windows:
            raise UnsupportedModelError(f"{type(module).__name__} changes its mask")
        own = key, value
        return self.trees.attend(
            query, self.cache.columns(), own, mask, self._windows[id(mask)][1], scale
        )


class StaticCache(TreeCache):
    """The columns of a slab, written where a tensor says.

    Attributes:
        arena: of the slab.
        slab: of all texts.
        slots: (rows,) the column of each row.
    """

    def __init__(self, arena: Arena, slab: Slab, slots: Tensor) -> None:
        """Describe one forward pass."""
        super().__init__([], [])
        self.arena = arena
        self.slab = slab
        self.slots = slots

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `TreeCache.update`; returns the arguments, as they are read from the slab."""
        self.layer = layer_idx
        new = self.arena.stored(key_states), self.arena.stored(value_states)
        for kept, x in zip(self.slab.layer(layer_idx), new, strict=True):
            kept.index_copy_(1, self.slots, x[0])
        return self.arena.read(new[0]), self.arena.read(new[1])

    def columns(self) -> tuple[Tensor, Tensor]:
        """(columns, kv_heads, head_dim) keys and values of the layer that was updated last."""
        keys, values = map(self.arena.read, self.slab.layer(self.layer))
        return keys.transpose(0, 1), values.transpose(0, 1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed positions are tensors; models are given the positions of all rows."""
        return 0
