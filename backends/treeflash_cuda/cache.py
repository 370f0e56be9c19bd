"""Keys and values in preallocated storage, committed in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from treeflash.errors import UnsupportedModelError

INITIAL_CAPACITY = 512


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for the copy."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class KeyValues:
    """Keys and values of all layers in one tensor: committed positions, then one block.

    Attributes:
        storage: (layers, 2, kv_heads, capacity, head_dim); None before the first block.
        length: committed positions.
    """

    def __init__(self, layers: int) -> None:
        """Start empty."""
        self.layers = layers
        self.storage: Tensor | None = None
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a block after the committed positions; return views of both together.

        Args:
            layer: index.
            k: (1, kv_heads, n, head_dim).
            v: (1, kv_heads, n, head_dim).

        Returns:
            Keys and values, (1, kv_heads, length + n, head_dim) each.

        Raises:
            UnsupportedModelError: the layers' keys and values differ in shape.
        """
        end = self.length + k.shape[2]
        if self.storage is None:
            self.storage = k.new_zeros(self.layers, 2, k.shape[1], INITIAL_CAPACITY, k.shape[3])
        if k.shape != v.shape or k.shape[1::2] != self.storage.shape[2::2]:
            raise UnsupportedModelError(
                "the target's layers have keys and values of different shapes, which the cuda "
                "backend's cache does not support"
            )
        storage = self.reserve(end)
        storage[layer, 0, :, self.length : end] = k[0]
        storage[layer, 1, :, self.length : end] = v[0]
        return storage[layer, 0, None, :, :end], storage[layer, 1, None, :, :end]

    def commit(self, rows: NDArray[np.int32]) -> None:
        """Keep these rows of the block, in this order; rows already in place are not moved."""
        assert self.storage is not None
        first, end = self.length, self.length + len(rows)
        if not np.array_equal(rows, np.arange(len(rows))):
            index = upload(rows.astype(np.int64) + first, self.storage.device)
            self.storage[:, :, :, first:end] = self.storage.index_select(3, index)
        self.length = end

    def read(self) -> NDArray[np.float32]:
        """The committed part, (layers, 2, kv_heads, length, head_dim)."""
        assert self.storage is not None
        committed: NDArray[np.float32] = self.storage[:, :, :, : self.length].float().cpu().numpy()
        return committed

    def reserve(self, end: int) -> Tensor:
        """The storage; if it has fewer than `end` columns, it grows to a power of two.

        It grows between blocks or in a block's first layer, so only committed columns are copied.
        """
        old = self.storage
        assert old is not None
        if end > old.shape[3]:
            self.storage = old.new_zeros(*old.shape[:3], 1 << (end - 1).bit_length(), old.shape[4])
            self.storage[:, :, :, : self.length] = old[:, :, :, : self.length]
        return self.storage


class TreeCache(Cache):
    """The storage as transformers' models see it."""

    def __init__(self, layers: int) -> None:
        """Start empty."""
        super().__init__(layers=[])
        self.key_values = KeyValues(layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by a layer with its block's keys and values."""
        return self.key_values.update(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed positions."""
        return self.key_values.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The column of a block's first row."""
        return self.key_values.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The columns of the mask for a block of `query_length` rows, and the first of them."""
        return self.key_values.length + query_length, 0
