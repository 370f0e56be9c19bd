"""Exact attention in models of transformers: contexts and a cache over `exact_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from treeflash.errors import UnsupportedModelError
from treeflash_cuda.cache import Columns, KVCache, PackedRows, widen
from treeflash_cuda.exact_attention import ExactBlock, Plan, Rows
from treeflash_cuda.hf.attention_contexts import (
    AttentionContext,
    AttentionInputs,
    MaskFunction,
    PackedContext,
    evaluate,
)
from treeflash_cuda.hf.model_caches import TreeCache


class ExactContext(AttentionContext):
    """`AttentionContext` over float32 keys and values, in `exact_attention`'s order."""

    def __init__(self, committed: int, positions: Tensor, ancestors: Tensor | None) -> None:
        super().__init__(committed, positions, ancestors)
        # The tokens, without the equal rows that `repeat` adds.
        self.block = ExactBlock(committed, positions, ancestors)
        # The cache has the keys and values of the layers; None if `attend` is given them.
        self.cache: ExactCache | None = None
        self._layouts: dict[Tensor | None, list[Rows]] = {}

    def repeat(self, times: int) -> None:
        """Let a block of one token have several equal rows; the first one attends."""
        assert self.block.tokens == 1
        self.positions = self.positions.repeat(times)

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor:
        """Return a tensor that stands for the layers' mask function."""
        placeholder = self.positions.new_empty(1, 1, 1, 1)
        sees = None if function is causal_mask_function else partial(evaluate, function)
        self._layouts[placeholder] = list(self.block.rows(sees))
        return placeholder

    def layout(self, inputs: AttentionInputs, mask: Tensor | None) -> list[Rows]:
        """Return the rows of the block in layers with a mask that `mask` made.

        Raises an UnsupportedModelError if the layer changes its mask.
        """
        if mask not in self._layouts:
            raise UnsupportedModelError(
                f"{type(inputs.module).__name__} changes its mask, which exact mode does not "
                "support"
            )
        return self._layouts[mask]

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend to the columns of the cache.

        Without a cache, key and value have all columns, as `widen` makes them. Raises what `layout`
        and `ExactCache.attend` raise.
        """
        if self.cache is not None:
            return self.cache.attend(inputs, [self], [inputs.mask])
        stored = [torch.stack([inputs.key[0], inputs.value[0]])[None]]
        members = [(rows, stored) for rows in self.layout(inputs, inputs.mask)]
        plan = Plan(members, inputs.key.shape[1], inputs.query)
        return plan.attend(inputs.query, 0, inputs.scale)


class PackedExactContext(PackedContext):
    """`Context` of several sequences."""

    sequences: Sequence[ExactContext]
    cache: ExactCache

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend to the columns of the cache. Raises what `ExactContext.attend` raises."""
        unknown: list[Tensor | None] = [None] * len(self.sequences)
        masks = self._sequence_masks.get(inputs.mask, unknown)
        return self.cache.attend(inputs, self.sequences, masks)


class ExactCache(TreeCache):
    """Stores keys and values in float32, beside the ones that the arena has after them."""

    def __init__(self, sequences: Sequence[KVCache], rows: Sequence[int]) -> None:
        super().__init__(sequences, rows)
        self._keys: Tensor | None = None  # the keys of the layer that was updated last
        # Several sequences have an entry for each slab: the keys and values of all its columns, by
        # layer, the indices of its rows (None for all of them), and their columns.
        self._slabs: list[tuple[Columns, Tensor | None, Tensor]] = []
        self._plans: dict[tuple[Tensor | None, int], Plan] = {}

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of all rows, and return them: `attend` reads the columns."""
        self.layer, self._keys = layer_idx, key_states
        if not self._new and not self._slabs:
            self._reserve(widen(key_states[:, :, :1]), *key_states.shape[2:])
        states = key_states, value_states
        if self._new:
            for storage, x in zip(self._new[layer_idx], states, strict=True):
                storage.copy_(x if x.shape == storage.shape else x[:, :, : storage.shape[2]])
            return states
        wide = [x.float() for x in states]
        for storages, rows, columns in self._slabs:
            for storage, x in zip(storages[layer_idx], wide, strict=True):
                x = x if rows is None else x.index_select(2, rows)
                storage.index_copy_(2, columns, x)
        return states

    def _reserve(self, like: Tensor, tokens: int, width: int) -> None:
        """Reserve columns for stored keys like these, whose first `width` numbers are written.

        Rows that `ExactContext.repeat` adds are stored in the columns after the last one, which no
        row reads, as far as there is room.
        """
        segments = [(x, x.length, n) for x, n in zip(self.sequences, self.rows, strict=True)]
        if len(segments) > 1:
            for slab, rows, columns in PackedRows(segments, like).slabs:
                self._slabs.append((slab.views(slice(None), width), rows, columns))
        else:
            ((sequence, first, n),) = segments
            sequence.reserve(like, like, first, first + n)
            self._new = sequence.views(first, min(first + tokens, sequence.capacity), width)

    def attend(
        self,
        inputs: AttentionInputs,
        sequences: Sequence[ExactContext],
        masks: Sequence[Tensor | None],  # the masks of each sequence, for the layer
    ) -> Tensor:
        """Return the (1, tokens, heads, width) attention of the layer that was updated last.

        Raises an UnsupportedModelError if the layer attends to keys that it did not store, and what
        `ExactContext.layout` raises.
        """
        if inputs.key is not self._keys:
            raise UnsupportedModelError(
                f"{type(inputs.module).__name__} does not attend to the keys that it stores, which "
                "exact mode does not support"
            )
        key = inputs.mask, inputs.query.shape[1]
        if key not in self._plans:
            members = [
                (rows, cache.parts)
                for context, mask, cache in zip(sequences, masks, self.sequences, strict=True)
                for rows in context.layout(inputs, mask)
            ]
            self._plans[key] = Plan(members, inputs.key.shape[1], inputs.query)
        return self._plans[key].attend(inputs.query, self.layer, inputs.scale)
