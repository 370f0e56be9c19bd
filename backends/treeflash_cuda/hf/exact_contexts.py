"""Exact attention in models of transformers: a context and a cache over `exact_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from treeflash.errors import UnsupportedModelError
from treeflash_cuda.attention import TokenBlock
from treeflash_cuda.cache import KVCache, widen
from treeflash_cuda.exact_attention import AttentionPlan, VisibleRows, visible_rows
from treeflash_cuda.hf.attention_contexts import (
    AttentionInputs,
    MaskFunction,
    evaluate,
)
from treeflash_cuda.hf.model_caches import TreeCache
from treeflash_cuda.numerics import concatenate


class ExactContext:
    """`Context` over float32 keys and values, in `exact_attention`'s order."""

    def __init__(
        self,
        blocks: Sequence[TokenBlock],  # the block of each sequence, in the order of their rows
        cache: ExactCache,  # the cache of the sequences
        repeats: int = 1,  # equal rows of a lone token; only the first one attends
    ) -> None:
        self.blocks, self.cache, self.repeats = blocks, cache, repeats
        self.positions = concatenate([block.positions for block in blocks]).repeat(repeats)
        # Rows, each with its sequence, by the tensor that stands for the layers' mask function.
        self._rows: dict[Tensor | None, list[tuple[VisibleRows, KVCache]]] = {}
        self._plans: dict[tuple[Tensor | None, int], AttentionPlan] = {}

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor:
        """Return a tensor that stands for the layers' mask function."""
        placeholder = self.positions.new_empty(1, 1, 1, 1)
        sees = None if function is causal_mask_function else partial(evaluate, function)
        self._rows[placeholder] = [
            (rows, sequence)
            for block, sequence in zip(self.blocks, self.cache.sequences, strict=True)
            for rows in visible_rows(block, sees)
        ]
        return placeholder

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attend to the columns of the cache.

        Raises an UnsupportedModelError if the layer changes its mask, or attends to keys that it
        did not store.
        """
        problem = None
        if inputs.key is not self.cache.keys:
            problem = "does not attend to the keys that it stores"
        elif inputs.mask not in self._rows:
            problem = "changes its mask"
        if problem is not None:
            name = type(inputs.module).__name__
            raise UnsupportedModelError(f"{name} {problem}, which exact mode does not support")
        key = inputs.mask, inputs.query.shape[1]
        if key not in self._plans:
            members = [(rows, sequence.parts) for rows, sequence in self._rows[inputs.mask]]
            self._plans[key] = AttentionPlan(members, inputs.key.shape[1], inputs.query)
        return self._plans[key].attend(inputs.query, self.cache.layer, inputs.scale)


class ExactCache(TreeCache):
    """Stores keys and values in float32, beside the ones that the arena has after them."""

    keys: Tensor | None = None  # the keys of the layer that was updated last

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of all rows, and return them: contexts read the columns."""
        self.layer, self.keys = layer_idx, key_states
        if self._written is None:
            like = widen(key_states[:, :, :1])
            self._written = self.written_rows(like, key_states.shape[3])
        self._written.write(layer_idx, key_states[0], value_states[0])
        return key_states, value_states
