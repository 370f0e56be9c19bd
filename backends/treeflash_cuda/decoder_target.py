"""A target whose layers are our own; see `decoder`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import LoadConfig
from treeflash.decoding.passed_checks import PassedChecks
from treeflash.decoding.tree import DraftTree
from treeflash_cuda.cache import check_quantisation
from treeflash_cuda.decoder import Decoder
from treeflash_cuda.decoder_attention import Block, ExactAttention, MaskedAttention
from treeflash_cuda.decoder_facts import DecoderFacts
from treeflash_cuda.decoder_operations import PYTORCH, DecoderOperations
from treeflash_cuda.decoder_weights import Checkpoint
from treeflash_cuda.exact import LINEAR_ROWS, bound_products, check_gates, token_rows
from treeflash_cuda.exact_attention import check_attention
from treeflash_cuda.numerics import concatenate
from treeflash_cuda.sampling import Logits
from treeflash_cuda.target import Merge, Rows, Target

CPU = torch.device("cpu")


class DecoderTarget(Target):
    """A decoder on a CPU, and the pass over rows of sequences."""

    model: Decoder

    def __init__(
        self, config: Any, facts: DecoderFacts, decoder: Decoder, *, kv_bits: int | None = None
    ) -> None:
        """Take a decoder made of these facts, which transformers' configuration has.

        Raises a ConfigError if its keys and values cannot be stored in `kv_bits` bits.
        """
        super().__init__(config, CPU, list(decoder.layers))
        self.model, self.facts = decoder, facts
        self.processor = "it has no vision tower"
        self.embeddings = decoder.embeddings.weight.data
        self.lm_head, self.lm_head_weight = decoder.lm_head, decoder.head_weight
        self.dtype = self.embeddings.dtype
        like = torch.empty(1, facts.kv_heads, 0, facts.head_dim, dtype=self.dtype)
        if kv_bits is not None:
            check_quantisation(facts.head_dim, config.model_type)
            self.arena.dtype = self.dtype
        self.arena.set_shape(self.arena.encode(like))

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: Any,
        facts: DecoderFacts,
        dtype: torch.dtype,
        settings: LoadConfig,
        operations: DecoderOperations = PYTORCH,
    ) -> DecoderTarget:
        """Read the weights of a checkpoint; raises a CheckpointError if they do not fit."""

        def read(name: str, shape: tuple[int, ...]) -> Tensor:
            return checkpoint.read(name, shape, dtype)

        decoder = Decoder(facts, operations, read).eval()
        return cls(config, facts, decoder, kv_bits=settings.kv_bits)

    def make_exact(self, passed: PassedChecks) -> None:
        facts = self.facts
        with torch.inference_mode():
            self.token_rows = token_rows(self.model, self.dtype)
            least = min(self.token_rows, LINEAR_ROWS)
            bound_products(self.model, self.dtype, self._exact_changes, least, passed)
            check_gates(self.model.operations.gated, facts.intermediate_size, self.dtype)
            check_attention(facts.heads, facts.kv_heads, facts.head_dim)
            self._widen_arena()
        self.is_exact = True

    def capture(self, layer_ids: Sequence[int]) -> None:
        self.captured = tuple(layer_ids)

    def run_rows(self, rows: Sequence[Rows], needs_logits: Sequence[bool], merge: Merge) -> Logits:
        blocks: list[Block] = []
        ids: list[NDArray[np.int64]] = []
        kept: list[int] = []  # rows that need logits
        counts: list[int] = []  # their numbers, by sequence
        count = 0
        for (state, tokens), is_needed in zip(rows, needs_logits, strict=True):
            tree = tokens if isinstance(tokens, DraftTree) else None
            ancestors = None if tree is None else torch.from_numpy(tree.ancestor_mask())
            positions = torch.from_numpy(state.rotary_positions(tokens).copy())
            blocks.append(Block(state.kv_cache, positions, ancestors))
            ids.append(np.asarray(tokens if tree is None else tree.tokens, np.int64))
            state.first_row, count = count, count + len(positions)
            counts.append((1 if tree is None else len(tree)) * is_needed)
            kept += range(count - counts[-1], count)
        token_ids = torch.from_numpy(np.concatenate(ids))
        places = concatenate([block.positions for block in blocks])
        if count == 1 < self.token_rows:
            token_ids, places = (x.repeat(self.token_rows) for x in (token_ids, places))
        kind = ExactAttention if self.is_exact else MaskedAttention
        attention = kind(blocks, self.facts.kv_heads, len(token_ids))
        hidden, outputs = self.model(token_ids, places, attention, self.captured)
        for state, _ in rows:
            state.outputs = outputs
        if not kept:
            logits = hidden.new_empty(0, self.vocab_size)
        elif len(kept) == count:
            logits = self.lm_head(hidden)[:count]
        else:
            logits = self.lm_head(hidden[torch.tensor(kept)])
        return Logits.split(logits, counts)
