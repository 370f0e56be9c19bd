"""The passes of a target on a CPU whose layers are our own; see `decoder.model`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from treeflash.config import LoadConfig
from treeflash.decoding.passed_checks import PassedChecks
from treeflash.decoding.probe import INEXACT
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.cpu.decoder_attention import CacheBlock, ExactAttention, MaskedAttention
from treeflash_cuda.cpu.low_bit_loading import UNPACKED_BITS
from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.model import Decoder
from treeflash_cuda.decoder.operations import PYTORCH, Attention, linear
from treeflash_cuda.decoder.recurrences import SequenceRecurrences
from treeflash_cuda.decoder.target import DecoderTarget, read_decoder
from treeflash_cuda.decoder.weights import Checkpoint
from treeflash_cuda.exact import LINEAR_ROWS, bound_products, check_gates, token_rows
from treeflash_cuda.exact_attention import check_attention
from treeflash_cuda.linear import Packing, join, rounding
from treeflash_cuda.numerics import concatenate
from treeflash_cuda.recurrent_states import SequenceRows
from treeflash_cuda.sampling import Logits
from treeflash_cuda.target import Rows, RowsResult, last_rows, logit_counts, token_ids

if TYPE_CHECKING:
    from treeflash_cuda.cpu.layer_calls import LayerCalls
    from treeflash_cuda.cpu.layer_kernels import LayerKernels

CPU = torch.device("cpu")


class CpuTarget(DecoderTarget):
    """A decoder on a CPU, and the pass over rows of sequences."""

    def __init__(
        self,
        config: Any,
        decoder: Decoder,
        dtype: torch.dtype,
        kernels: LayerKernels | None = None,  # None attends with PyTorch's operations
        *,
        kv_bits: int | None = None,
    ) -> None:
        """Take a decoder; raises the errors of `DecoderTarget`."""
        # Compiled functions read float32, whose numbers are broadcast in one instruction.
        stored = dtype if kernels is None else torch.float32
        super().__init__(config, decoder, dtype, CPU, stored=stored, kv_bits=kv_bits)
        self.kernels = kernels
        # The attention of a pass over blocks.
        self.attention: Callable[[DecoderFacts, Sequence[CacheBlock]], Attention] = MaskedAttention
        # The layers as calls of compiled functions, and the most rows of a pass that they run.
        self.calls: LayerCalls | None = None
        self.unsplit_rows = LINEAR_ROWS
        if kernels is not None:
            from treeflash_cuda.cpu.decoder_calls import KernelAttention, decoder_stack
            from treeflash_cuda.cpu.layer_calls import LayerCalls

            self.layers_from = f"treeflash, compiled for {kernels.isa.name}"
            self.attention = partial(KernelAttention, kernels=kernels)
            if (stack := decoder_stack(decoder)) is not None:
                self.calls = LayerCalls(stack, kernels)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: Any,
        facts: DecoderFacts,
        dtype: torch.dtype,
        settings: LoadConfig,
    ) -> CpuTarget:
        """Read the weights of a checkpoint; raises the errors of `read_decoder`."""
        operations, kernels = PYTORCH, None if settings.kv_bits else find_kernels(facts, dtype)
        if kernels is not None:
            operations = replace(
                operations, rms_norm=kernels.rms_norm, gated=kernels.gated, capped=kernels.capped
            )
        if settings.bits not in (None, UNPACKED_BITS):
            operations = replace(operations, linear=partial(packed, rounding(settings.bits)))
        unpack = settings.bits == UNPACKED_BITS
        decoder = read_decoder(checkpoint, facts, operations, dtype, settings, CPU, unpack=unpack)
        return cls(config, decoder, dtype, kernels, kv_bits=settings.kv_bits)

    def make_exact(self, passed: PassedChecks) -> None:
        self.refuse_recurrent()
        facts = self.facts
        if self.kernels is None and facts.is_capped:
            raise UnsupportedModelError(f"{INEXACT}: it does not support soft-capped scores")
        with torch.inference_mode():
            self._change(token_rows=token_rows(self.model, self.dtype))
            most = bound_products(self.model, self.dtype, self._exact_changes, passed)
            self._change(unsplit_rows=most)
            if self.kernels is None:
                gated = self.model.operations.gated
                for size in facts.inner_sizes:
                    check_gates(lambda x: gated(x, facts.activation), size, self.dtype)
                check_attention(facts.heads, facts.kv_heads, facts.head_dim)
                self._change(arena=self.arena.widened(), attention=ExactAttention)
        self.is_exact = True

    def run_rows(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> RowsResult:
        blocks: list[CacheBlock] = []
        parts: list[SequenceRows] = []  # for recurrent layers
        firsts: list[int] = []  # first row of each sequence
        count = 0
        for state, tokens in rows:
            tree = tokens if isinstance(tokens, DraftTree) else None
            ancestors = None if tree is None else torch.from_numpy(tree.ancestor_mask())
            positions = torch.from_numpy(state.rotary_positions(tokens).copy())
            blocks.append(CacheBlock(state.length, positions, ancestors, state.kv_cache))
            if state.recurrent is not None:
                n = len(positions)
                parts.append(SequenceRows(state.recurrent, count, n, tree, ancestors))
            firsts.append(count)
            count += len(positions)
        ids = np.concatenate([token_ids(tokens) for _, tokens in rows], dtype=np.int64)
        places = concatenate([block.positions for block in blocks])
        repeats = self.token_rows if count == 1 else 1
        inputs = [x.repeat(repeats) if repeats > 1 else x for x in (torch.from_numpy(ids), places)]
        attention = self.attention(self.facts, blocks)
        run = self.calls.run if self.calls and count * repeats <= self.unsplit_rows else None
        recurrences = SequenceRecurrences(parts) if parts else None
        hidden, outputs = self.model(*inputs, attention, self.captured, run, recurrences)
        counts = logit_counts(rows, needs_logits)
        kept = last_rows([len(block) for block in blocks], counts)
        if not len(kept):
            logits = hidden.new_empty(0, self.vocab_size)
        elif len(kept) == count:
            logits = self.model.logits(hidden, count)
        else:
            logits = self.model.logits(hidden[torch.from_numpy(kept)])
        written = [part.writes for part in parts]
        found = Logits.split(logits, counts)
        return RowsResult.of_pass(found, rows, outputs, firsts, written=written)


def find_kernels(facts: DecoderFacts, dtype: torch.dtype) -> LayerKernels | None:
    """Return the compiled functions for a decoder; None where PyTorch's operations run."""
    if find_spec("llvmlite") is None:
        return None
    from treeflash_cuda.cpu.layer_code import LayerKind
    from treeflash_cuda.cpu.layer_kernels import layer_kernels

    sizes = [facts.hidden_size, *facts.inner_sizes]
    if facts.factors.logit_cap is not None:
        sizes.append(facts.vocab_size)
    kind = LayerKind(
        facts.head_dim,
        caps_scores=facts.factors.score_cap is not None,
        norms_wholes=facts.norms_heads == "all",
    )
    return layer_kernels(dtype, torch.float32, kind, tuple(sizes))


def packed(
    packing: Packing, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> nn.Module:
    """Make one linear layer of the weights of some, in a packing where they fit."""
    if not packing.fits(weights[0]):
        return linear(weights, biases)
    return packing.pack(*join(weights, biases))
