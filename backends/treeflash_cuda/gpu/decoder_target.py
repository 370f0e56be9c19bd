"""A target on a GPU whose layers are our own: their operations, their attention, and its passes.

`decoder.model` has the layers. `TreeAttention` is for rows of any sequences, in a pass that a CUDA
graph can replay; `PromptAttention` is for long parts of prompts, by a kernel that is faster for
them. Both are over the columns of a slab.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treeflash.config import LoadConfig
from treeflash.decoding.passed_checks import PassedChecks
from treeflash.decoding.probe import INEXACT
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.cache import SeenColumns, Slab
from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.model import Decoder
from treeflash_cuda.decoder.operations import DecoderOperations, GroupedLinear, Rotation
from treeflash_cuda.decoder.recurrences import SequenceRecurrences
from treeflash_cuda.decoder.target import DecoderTarget, read_decoder
from treeflash_cuda.decoder.weights import Checkpoint
from treeflash_cuda.exact import check_products
from treeflash_cuda.gpu.exact_products import use_kernel_for_products
from treeflash_cuda.gpu.graphs import MAX_ROWS
from treeflash_cuda.gpu.prompt_attention import CausalAttention
from treeflash_cuda.gpu.row_pass import RowInputs, RowTarget, path_room, plan_rows, rows_of, slab_of
from treeflash_cuda.gpu.state_arena import StateArena
from treeflash_cuda.gpu.tree_recurrences import TreeRecurrences
from treeflash_cuda.numerics import concatenate, upload_all
from treeflash_cuda.operations import Operations, Shapes
from treeflash_cuda.recurrent_states import SequenceRows
from treeflash_cuda.sampling import Logits
from treeflash_cuda.state import State
from treeflash_cuda.target import Rows, RowsResult
from treeflash_cuda.visible_keys import PAGE, VisibleKeys

GROUPED_MM = 8, 0
"""The least compute capability for which PyTorch has a grouped product."""


def decoder_operations(operations: Operations, device: torch.device) -> DecoderOperations:
    """Return the operations of a decoder's layers, made of a GPU's operations."""
    is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < GROUPED_MM

    def gated(gate_and_up: Tensor, activation: str) -> Tensor:
        return operations.gated(*gate_and_up.chunk(2, -1), activation)

    def grouped_linear(rows: int) -> GroupedLinear:
        # Long parts of prompts have no graph, and many rows for each expert.
        return operations.grouped_linear if rows <= MAX_ROWS or is_old else grouped_mm

    return DecoderOperations(
        rms_norm=operations.rms_norm,
        rotation=rotation,
        gated=gated,
        grouped_linear=grouped_linear,
    )


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Compute `operations.grouped_linear` with PyTorch's product, which may read `ends`."""
    return F.grouped_mm(x, weight.mT, offs=ends)


def rotation(
    positions: Tensor, frequencies: Tensor, scale: Tensor | float, dtype: torch.dtype
) -> Rotation:
    """Compute (n, head_dim) cosines and sines, as `Operations.rotate_and_store` takes them."""
    angles = positions[:, None] * frequencies
    if not isinstance(scale, Tensor) and scale == 1:
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)
    parts = angles.cos() * scale, angles.sin() * scale
    cos, sin = (torch.cat([x, x], -1).to(dtype) for x in parts)
    return cos, sin


@dataclass(eq=False)
class SlabAttention:
    """The half of `Attention` that comes before attending: one operation for a layer's heads."""

    facts: DecoderFacts
    operations: Operations
    unrotated: Rotation  # (1, head_dim) cosines and sines of layers that do not rotate
    slab: Slab  # the slab of all sequences
    slots: Tensor  # (n,) column of each row's own key

    def turn(
        self,
        layer: int,
        heads: Tensor,
        rotation: Rotation | None,
        norms: Tensor | None,
        eps: float,
    ) -> Tensor:
        facts, operations = self.facts, self.operations
        q, k, v = heads.split([facts.heads, facts.kv_heads, facts.kv_heads], 1)
        of_heads = None
        if norms is not None and facts.norms_heads == "all":
            weights = norms.tensor_split([facts.heads])
            q, k = (
                operations.rms_norm(x.flatten(1), weight.flatten(), eps)[0].view(x.shape)
                for x, weight in zip((q, k), weights, strict=True)
            )
        elif norms is not None:
            of_heads = norms[0], norms[-1]
        angles = rotation or [x.expand(len(heads), -1) for x in self.unrotated]
        rotated: Tensor = self.operations.rotate_and_store(
            *(q, k, v, *angles, *self.slab.layer(layer), self.slots), norms=of_heads, eps=eps
        )
        return rotated


@dataclass(eq=False)
class TreeAttention(SlabAttention):
    """`Attention` of nodes of draft trees, and of next tokens."""

    keys: VisibleKeys  # the keys that rows see in layers without a window
    _within: dict[int, VisibleKeys] = field(default_factory=dict)  # in layers with one

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        keys = self.keys
        if window is not None:
            if window not in self._within:
                self._within[window] = keys.within(window)
            keys = self._within[window]
        output: Tensor = self.operations.tree_attention(
            *(queries, *self.slab.layer(layer), keys),
            scale=self.facts.score_scale,
            softcap=self.facts.factors.score_cap,
        )
        return output.flatten(1)


@dataclass(eq=False)
class PromptAttention(SlabAttention):
    """`Attention` of the last tokens of some sequences, which attend one after the other."""

    sizes: Sequence[int]  # rows of each sequence
    seen: Sequence[SeenColumns]  # the columns of each sequence, up to its last row's
    kernel: CausalAttention

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        scale, outputs = self.facts.score_scale, []
        for q, columns in zip(queries.split(self.sizes), self.seen, strict=True):
            keys, values = (x[0].transpose(0, 1) for x in columns.layer(layer))
            outputs.append(self.kernel(q, keys, values, window, scale))
        return concatenate(outputs).flatten(1)


def decoder_shapes(facts: DecoderFacts, *, quantised: bool) -> Shapes:
    """Return the sizes of a decoder that kernels depend on; see `Shapes.quantised`."""
    nets = facts.delta_nets
    return Shapes(
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        hidden_size=facts.hidden_size,
        softcap=facts.factors.score_cap,
        quantised=quantised,
        experts=facts.experts is not None,
        recurrent=() if nets is None else ((nets.heads, nets.key_dim, nets.value_dim, False),),
        convolutions=() if nets is None else ((nets.channels, nets.kernel),),
    )


class GpuTarget(DecoderTarget, RowTarget):
    """A decoder on a GPU: a pass over rows, and one over long parts of prompts."""

    operations: Operations

    def __init__(
        self,
        config: Any,
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
        operations: Operations,
        prompt_attention: CausalAttention | None,  # None if prompts are rows like others
        *,
        kv_bits: int | None = None,
    ) -> None:
        """Take a decoder; raises the errors of `DecoderTarget`."""
        super().__init__(config, decoder, dtype, device, stored=dtype, kv_bits=kv_bits)
        self.operations, self.prompt_attention = operations, prompt_attention
        self.arena.page = PAGE
        angles = torch.zeros(1, self.facts.head_dim, dtype=dtype, device=device)
        self.unrotated = angles.cos(), angles.sin()
        if self.is_hybrid:
            self.state_arena = StateArena(self.first_states(), frozenset())

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: Any,
        facts: DecoderFacts,
        dtype: torch.dtype,
        settings: LoadConfig,
        device: torch.device,
        operations: Operations,
        prompt_attention: CausalAttention | None,
    ) -> GpuTarget:
        """Read the weights of a checkpoint; raises the errors of `read_decoder`."""
        layers = decoder_operations(operations, device)
        shared = facts.to(device), layers, dtype, settings, device
        decoder = read_decoder(checkpoint, *shared, unpack=True)
        made = config, decoder, dtype, device, operations, prompt_attention
        return cls(*made, kv_bits=settings.kv_bits)

    def make_exact(self, passed: PassedChecks) -> None:
        self.refuse_recurrent()
        if self.operations.fallbacks:
            raise UnsupportedModelError(f"{INEXACT}: {self.operations.fallbacks[0]}")
        self.prompt_attention = None
        with torch.inference_mode():
            use_kernel_for_products(self.model)
            check_products(self.model, self.dtype)
        self.is_exact = True

    def most_rows(self, state: State, tokens: Sequence[int]) -> int | None:
        return MAX_ROWS if self.prompt_attention is None else super().most_rows(state, tokens)

    def compute(self, rows: RowInputs) -> tuple[Tensor, dict[int, Tensor], Sequence[Tensor]]:
        assert rows.slab is not None
        shared = self.facts, self.operations, self.unrotated
        attention = TreeAttention(*shared, rows.slab, rows.slots, rows.keys)
        recurrences: TreeRecurrences | None = None
        if rows.recurrent is not None:
            assert self.state_arena is not None
            nodes, states = rows.recurrent
            recurrences = TreeRecurrences(self.operations, self.state_arena, states, nodes)
        made = rows.ids, rows.rotary, attention, self.captured
        hidden, outputs = self.model(*made, recurrences=recurrences)
        written = () if recurrences is None else recurrences.outputs()
        return self.model.logits(hidden), outputs, written

    def group_others(self, rows: Sequence[Rows], members: Sequence[int]) -> Iterable[list[int]]:
        by_slab: dict[Slab | None, list[int]] = {}
        for i in members:
            by_slab.setdefault(slab_of(rows[i][0]), []).append(i)
        return by_slab.values()

    def run_others(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> RowsResult:
        """Run next tokens of sequences in one slab, which attend by the kernel for prompts.

        Next tokens of targets with recurrent layers run here even without that kernel.
        """
        sizes = [len(tokens) for _, tokens in rows]
        count, ends, slab = sum(sizes), np.cumsum(sizes), slab_of(rows[0][0])
        assert slab is not None
        tables, slots = zip(*(rows_of(*row) for row in rows), strict=True)
        arrays = [
            np.concatenate([np.asarray(tokens) for _, tokens in rows]),
            np.concatenate([state.rotary_positions(tokens) for state, tokens in rows]),
            np.concatenate(slots),
            (ends - 1)[np.array(needs_logits)],
        ]
        if self.prompt_attention is None:
            found = plan_rows(rows, tables, self.groups)
            arrays += found.arranged(np.arange(count), path_room(found, count)).arrays()
        ids, rotary, places, kept, *plan = upload_all(arrays, self.device)
        attention: SlabAttention
        shared = self.facts, self.operations, self.unrotated, slab, places
        if self.prompt_attention is None:
            attention = TreeAttention(*shared, VisibleKeys.of_rows(*plan))
        else:
            seen = [
                SeenColumns(state.kv_cache, state.length + n)
                for (state, _), n in zip(rows, sizes, strict=True)
            ]
            attention = PromptAttention(*shared, sizes, seen, self.prompt_attention)
        parts = [
            SequenceRows(state.recurrent, int(first), n, None, None)
            for (state, _), first, n in zip(rows, ends - sizes, sizes, strict=True)
            if state.recurrent is not None
        ]
        recurrences = SequenceRecurrences(parts) if parts else None
        hidden, outputs = self.model(ids, rotary, attention, self.captured, recurrences=recurrences)
        logits = self.model.logits(hidden.index_select(0, kept))
        counts = [int(is_needed) for is_needed in needs_logits]
        firsts = (ends - sizes).tolist()
        written = [part.writes for part in parts]
        return RowsResult.of_pass(
            Logits.split(logits, counts), rows, outputs, firsts, written=written
        )
