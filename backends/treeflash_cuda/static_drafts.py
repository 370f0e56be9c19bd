"""Drafts as functions of tensors alone, for CUDA graphs; see `treeflash_cuda.static_trees`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from treeflash.drafters.context_window import SINK
from treeflash_cuda.arena import Slab
from treeflash_cuda.attention_kernels import Kernels, Ranges, merge
from treeflash_cuda.cache import upload
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.graphs import Outputs, power_of_two
from treeflash_cuda.output_stage import OutputStage
from treeflash_cuda.state import State
from treeflash_cuda.target import Target

MAX_CONTEXT = 64
"""More new positions of a text, as after its prompt, run without static shapes."""

Kind: TypeAlias = tuple[int | None, bool]
"""A layer's window, and whether it is causal."""


class StaticDrafts:
    """Runs the drafts of several texts."""

    def __init__(
        self, model: DrafterModel, target: Target, output: OutputStage, window: int | None
    ) -> None:
        """Hold the models; a draft sees so many positions before it, and the first few."""
        self.window = window
        self.model = model
        self.target = target
        self.output = output

    def run(self, roots: Sequence[tuple[State, int]]) -> tuple[Tensor, Tensor] | None:
        """(texts, S, hidden_size) blocks, (texts,) roots; None for texts that must run without."""
        graphs, states = self.target.graphs, [state for state, _ in roots]
        if not graphs.enabled or self.target.kernels is None:
            return None
        caches = [state.drafter for state in states if state.drafter is not None]
        regions = [cache.region for cache in caches if cache.region is not None]
        slabs = {id(region.slab): region.slab for region in regions}
        new = [state.length - cache.length for state, cache in zip(states, caches, strict=True)]
        one_slab = len(regions) == len(roots) and len(slabs) == 1
        if not one_slab or min(new) == 0 or max(new) > MAX_CONTEXT:
            return None
        (slab,) = slabs.values()
        texts, size = power_of_two(len(roots)), power_of_two(max(new))
        # Texts are filled up with copies of their last position, and further texts with copies of
        # the first one: these write the same keys and values to the same columns.
        chosen = [*range(len(roots)), *[0] * (texts - len(roots))]
        numbers = np.array(
            [
                [roots[i][1] for i in chosen],
                [regions[i].first for i in chosen],
                [caches[i].length for i in chosen],
                [states[i].length for i in chosen],
            ],
            np.int32,
        )
        parts = []
        for i in chosen:
            parts += states[i].context
            parts.append(states[i].context[-1][-1:].expand(size - new[i], -1))

        def draft(numbers: Tensor, context: Tensor) -> Outputs:
            return (self._draft(slab, numbers, context),)

        uploaded = upload(numbers, self.target.device)
        (hidden,) = graphs.run(
            "the drafter", texts, draft, uploaded, torch.cat(parts), store=slab.graphs
        )
        blocks = hidden.unflatten(0, (texts, -1))
        return blocks[: len(roots)], uploaded[0, : len(roots)]

    def _draft(self, slab: Slab, numbers: Tensor, context: Tensor) -> Tensor:
        """(texts * S, hidden_size) outputs.

        Args:
            slab: of the drafter's keys and values.
            numbers: (4, texts) roots, first columns, positions that the drafter has read, and
                committed positions.
            context: (texts * c, hidden_size) features of the positions between the last two.
        """
        config, device = self.model.config, context.device
        roots, first, known, start = numbers.long()[..., None]
        slots = torch.arange(config.block_size, device=device)
        masks = torch.full_like(slots[1:], config.mask_token_id).expand(len(roots), -1)
        x = self.output.embed(torch.cat([roots, masks], 1).flatten())[None]
        if config.input_scale != 1:
            x = x * config.input_scale
        new = torch.arange(len(context) // len(roots), device=device)
        positions = [known + torch.minimum(new, start - known - 1), start + slots]
        rotation = self.model.rotary(torch.cat([part.flatten() for part in positions]), x.dtype)
        columns = torch.cat([(first + part).flatten() for part in positions])
        kinds = list(zip(config.sliding_windows, config.causal, strict=True))
        ranges = {kind: self._ranges(kind, first, start, slots) for kind in set(kinds)}
        kernels = self.target.kernels
        assert kernels is not None
        for n, (layer, kind) in enumerate(zip(self.model.layers, kinds, strict=True)):
            attend = functools.partial(
                _attend, kernels, slab.layer(n), columns, ranges[kind], len(roots)
            )
            x = layer(x, context[None], rotation, attend)
        return x[0]

    def _ranges(self, kind: Kind, first: Tensor, start: Tensor, slots: Tensor) -> list[Ranges]:
        """What the slots of each text see: one range if that is the same for all, else for each.

        If the context is limited, those of the first positions come before the others.

        Args:
            kind: of the layer.
            first: (texts, 1) columns of the texts' first positions.
            start: (texts, 1) positions of the roots.
            slots: (S,) from 0.
        """
        window, causal = kind
        end, low = start + len(slots), torch.zeros_like(start)
        if window is not None or causal:
            positions = start + slots
            end, low = end.expand_as(positions), low.expand_as(positions)
            if causal:
                end = positions + 1
            if window is not None and self.model.config.window_from_root:
                low = (start - window).clamp(min=0).expand_as(positions)
            elif window is not None:
                low = (positions - (window - 1)).clamp(min=0)
                end = torch.minimum(end, positions + window)
        parts = [(low, end)]
        if self.window is not None:
            sink = start.clamp(max=SINK).expand_as(low)
            latest = torch.maximum(low, torch.maximum(sink, start - self.window))
            parts = [(low, torch.maximum(low, sink)), (latest, end)]
        return [Ranges((first + i).flatten().int(), (j - i).flatten().int()) for i, j in parts]


def _attend(
    kernels: Kernels,
    storage: Tensor,
    columns: Tensor,
    ranges: Sequence[Ranges],
    texts: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """Attention of all blocks over their texts, whose new keys and values are stored first.

    Args:
        kernels: for attention.
        storage: (2, kv_heads, columns, head_dim) of the layer.
        columns: (n,) where the new keys and values belong.
        ranges: of the blocks, or of their slots; the last ones are not empty.
        texts: how many blocks.
        q: (1, heads, texts * S, head_dim).
        k: (1, kv_heads, n, head_dim).
        v: (1, kv_heads, n, head_dim).

    Returns:
        (1, texts * S, heads, head_dim).
    """
    for kept, new in zip(storage, (k, v), strict=True):
        kept.index_copy_(1, columns, new[0])
    keys, values = storage.transpose(1, 2)
    groups, kv_heads = len(ranges[0].first), k.shape[1]
    size = q.shape[2] // groups
    queries = q[0].unflatten(1, (groups, size)).unflatten(0, (kv_heads, -1)).permute(2, 0, 1, 3, 4)
    scale = q.shape[-1] ** -0.5
    found = [kernels.shared(queries.flatten(2, 3), keys, values, x, scale) for x in ranges]
    out = found[0][0] if len(found) == 1 else merge(*found)
    return out.unflatten(2, (-1, size)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)[None]
