"""Keys and values of many texts that each run one token per forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from treeflash_cuda.training.slot_attention import SlotContext

CHUNK = 128
"""Columns per chunk: longer chunks need fewer calls, shorter ones waste less at the ends."""


class SlotCache(Cache):
    """A slot for each text, in storage of fixed size.

    Attributes:
        storage: (layers, 2, chunks, slots, kv_heads, CHUNK, head_dim); None until the first
            forward.
        positions: (taken,) position of the next token of each text, in the first slots.
        prefix: length of the common prefix of all texts, which every slot has.
        prompts: slots whose prompts are being run; None while every text runs one token.
        chunks: number of chunks that such a forward pass attends to.
    """

    def __init__(self, layers: int, slots: int, capacity: int, device: torch.device) -> None:
        """Start empty."""
        super().__init__(layers=[])
        self.shape = (layers, 2, _chunks(capacity), slots)
        self.storage: Tensor | None = None
        self.positions = torch.zeros(0, dtype=torch.long, device=device)
        self.prefix = 0
        self.prompts: slice | None = None
        self.chunks = 0

    def share(self, length: int) -> None:
        """Copy the first positions of the first slot, a common prefix, to all; empty the slots."""
        assert self.storage is not None
        chunks = slice(_chunks(length))
        self.storage[:, :, chunks, 1:] = self.storage[:, :, chunks, :1]
        self.prefix, self.positions = length, self.positions[:0]

    def append(self, lengths: Sequence[int]) -> None:
        """Take slots for prompts with these numbers of tokens after the prefix."""
        new = torch.tensor(lengths, device=self.positions.device) + self.prefix
        self.positions = torch.cat([self.positions, new])

    def keep(self, lengths: dict[int, int]) -> None:
        """Keep the texts of some slots, given with their lengths in ascending order; close gaps."""
        assert self.storage is not None or not lengths
        for slot, (old, length) in enumerate(lengths.items()):
            if slot != old:
                # One by one, as together they would need a second copy.
                chunks = slice(_chunks(length))
                self.storage[:, :, chunks, slot] = self.storage[:, :, chunks, old]
        self.positions = self.positions[list(lengths)]

    def context(self, lengths: Sequence[int]) -> SlotContext:
        """Prepare a forward pass of one token per text.

        Args:
            lengths: (taken,) of the texts, that token included; 0 for a text that has ended,
                whose slot still takes part.
        """
        columns = max(lengths)
        self.chunks = _chunks(columns)
        self.positions.clamp_(max=columns - 1)
        reaching = [
            1 + max(slot for slot, length in enumerate(lengths) if length > chunk * CHUNK)
            for chunk in range(self.chunks)
        ]
        return SlotContext(self.positions, self.chunks * CHUNK, reaching)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a layer's forward pass; returns what it attends to."""
        if self.storage is None:
            heads, head_dim = key_states.shape[1], key_states.shape[3]
            self.storage = key_states.new_zeros(*self.shape, heads, CHUNK, head_dim)
        keys, values = self.storage[layer_idx]
        if self.prompts is not None:
            end = self.prefix + key_states.shape[2]
            new = torch.arange(self.prefix, end, device=keys.device)
            seen = []
            for stored, states in ((keys, key_states), (values, value_states)):
                stored[new // CHUNK, self.prompts, :, new % CHUNK] = states.permute(2, 0, 1, 3)
                whole = stored[: _chunks(end), self.prompts].permute(1, 2, 0, 3, 4).flatten(2, 3)
                seen.append(whole[:, :, :end])
            return seen[0], seen[1]
        rows = torch.arange(len(self.positions), device=keys.device)
        chunk, column = self.positions // CHUNK, self.positions % CHUNK
        keys[chunk, rows, :, column] = key_states[:, :, 0]
        values[chunk, rows, :, column] = value_states[:, :, 0]
        return keys[: self.chunks, : len(rows)], values[: self.chunks, : len(rows)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: the model is given positions, so it needs no length."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """0: the model is given positions, so it needs no offset."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of columns that a forward pass attends to, and the first of them."""
        columns = self.chunks * CHUNK if self.prompts is None else self.prefix + query_length
        return columns, 0


def _chunks(columns: int) -> int:
    return -(-columns // CHUNK)
