"""The KV caches of a forward pass, as transformers' models see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import Cache

from treeflash.errors import UnsupportedModelError
from treeflash_cuda.cache import KVCache, SeenColumns, Slab, WrittenRows

DIFFERENT_SHAPES = (
    "their layers have keys and values of different shapes, which the cuda backend's cache does "
    "not support"
)


class TreeCache(Cache):
    """The caches of the sequences of one forward pass, as transformers' models see them."""

    def __init__(self, sequences: Sequence[KVCache], rows: Sequence[int]) -> None:
        super().__init__(layers=[])
        self.sequences = sequences  # in the order of their rows
        self.rows = rows  # number of rows of each sequence
        self.layer = 0  # the one that was updated last, or whose keys are attended to
        # The layers by the keys and values that they stored, which later layers may share.
        self._stored_by = WeakTensorKeyDictionary()
        # These are made when the first layer stores keys of this shape.
        self._shape = torch.Size()
        self._written: WrittenRows | None = None
        self._seen: list[SeenColumns] = []  # the columns of each sequence, its rows included

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of all rows; layers call it.

        Returns views of the stored columns of a single sequence. For several sequences it returns
        its arguments: `MaskedContext` reads the columns of each.
        """
        self.layer = layer_idx
        keys, values = map(self.sequences[0].arena.encode, (key_states, value_states))
        if self._written is None:
            self._shape, self._written = keys.shape, self.written_rows(keys)
            sizes = zip(self.sequences, self.rows, strict=True)
            self._seen = [SeenColumns(x, x.length + n) for x, n in sizes]
        if not keys.shape == values.shape == self._shape:
            raise UnsupportedModelError(DIFFERENT_SHAPES)
        self._written.write(layer_idx, keys[0], values[0])
        if len(self.sequences) > 1:
            return self.noted(key_states, value_states)
        return self.noted(*self.visible_columns()[0])

    def written_rows(self, like: Tensor, width: int | None = None) -> WrittenRows:
        """Reserve the columns of all rows; see `WrittenRows`."""
        sizes = zip(self.sequences, self.rows, strict=True)
        return WrittenRows([(x, x.length, n) for x, n in sizes], like, width)

    def noted(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Note that `layer` stored these keys and values, and return them."""
        self._stored_by[keys] = self._stored_by[values] = self.layer
        return keys, values

    def stored_by(self, x: Tensor) -> int | None:
        """Return the layer that stored these keys or values; None if none did."""
        layer: int | None = self._stored_by.get(x)
        return layer

    def select(self, keys: Tensor) -> None:
        """Go back to the layer that stored these keys.

        Raises an UnsupportedModelError if no layer did.
        """
        layer = self.stored_by(keys)
        if layer is None:
            raise UnsupportedModelError("a layer changes its keys after it has stored them")
        self.layer = layer

    def visible_columns(self) -> list[tuple[Tensor, Tensor]]:
        """Return `layer`'s stored keys and values, (1, kv_heads, length + n, width)."""
        return [seen.layer(self.layer) for seen in self._seen]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Count the committed positions; models are given the positions of all rows."""
        return max(sequence.length for sequence in self.sequences)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the mask's number of columns for `query_length` rows, and the first column."""
        return self.get_seq_length() + query_length, 0


class SlabCache(TreeCache):
    """The columns of a slab; a tensor says which of them are written, as CUDA graphs need it."""

    def __init__(
        self, slab: Slab | None, encode: Callable[[Tensor], Tensor], slots: Tensor
    ) -> None:
        TreeCache.__init__(self, [], [])
        self.slab = slab  # the slab of all sequences; None for a model without attention layers
        self.encode = encode  # see `Arena.encode`
        self.slots = slots  # (rows,) int64 the column of each row

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of all rows, and return them."""
        self.layer = layer_idx
        for storage, x in zip(self.stored_columns(), (key_states, value_states), strict=True):
            storage.index_copy_(1, self.slots.to(x.device), self.encode(x)[0])
        return self.noted(key_states, value_states)

    def stored_columns(self) -> tuple[Tensor, Tensor]:
        """Return the stored (kv_heads, columns, width) keys and values of the latest layer."""
        assert self.slab is not None
        keys, values = self.slab.layer(self.layer)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: committed positions are tensors, and models are given all rows' positions."""
        return 0
