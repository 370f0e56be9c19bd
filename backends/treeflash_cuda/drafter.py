"""The one-shot drafter (DFlash, arXiv 2602.06036): its blocks, and its output stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from treeflash.config import SINK
from treeflash.decoding import output_stage
from treeflash.decoding.backend_base import (
    MAX_READ,
    note_drafted,
    project_contexts,
    unread_parts,
)
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.sampling import Noise
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.config import LayerKind, window_gap
from treeflash.drafters.layers import Rotations, visible_positions
from treeflash_cuda.attention import additive_mask, group_mask, grouped_attention
from treeflash_cuda.cache import SeenColumns, Slab, WrittenRows
from treeflash_cuda.drafter_model import OPERATIONS, DrafterModel, Rotation
from treeflash_cuda.gpu.graphs import Graphs, Outputs, power_of_four, power_of_two
from treeflash_cuda.linear import token_products
from treeflash_cuda.numerics import concatenate, pack, topk, unpack, upload, upload_all
from treeflash_cuda.operations import PYTORCH, Operations
from treeflash_cuda.state import State
from treeflash_cuda.target import Target
from treeflash_cuda.visible_keys import SharedWork, VisibleKeys, equal_work, page_tables

MAX_CONTEXT = 64
"""More new positions for each sequence, as after prompts, run without a graph."""


class OutputStage(output_stage.OutputStage):
    """The output stage in PyTorch."""

    ops = OPERATIONS

    def embed(self, tokens: Tensor) -> Tensor:
        table = self.own.embed_tokens
        return self.target.embed(tokens) if table is None else F.embedding(tokens, table)

    def head_logits(self, normed: Tensor, tokens: Tensor | None) -> Tensor:
        lm_head = self.own.lm_head
        if tokens is None and self.own.quantised_lm_head is not None:
            return self.own.quantised_lm_head(normed)
        if lm_head is not None:
            return token_products(normed, lm_head, tokens)
        if tokens is None:
            return self.target.lm_head(normed)
        return self.target.shortlist_logits(normed, tokens)

    def upload(self, noise: Noise | None) -> Tensor:
        """Return (n, 3) int32 keys of noise and the bits of its scales; (0, 3) without noise."""
        if noise is None:
            return torch.empty((0, 3), dtype=torch.int32, device=self.target.device)
        numbers = np.column_stack([noise.keys.view(np.int32), noise.scales.view(np.int32)])
        return upload(numbers, self.target.device)

    @property
    def operations(self) -> Operations:
        """The operations of the device."""
        return self.target.operations or PYTORCH

    def noise(self, uploaded: Tensor, tokens: Tensor | None = None) -> Tensor | None:
        """Return noise to add to logits, from the result of `upload`, or None.

        It is (n, Vd), or (n, v) for (groups, v) of the drafter's tokens; see `draft_noise`.
        """
        if not len(uploaded):
            return None
        ids, draw = self.own.token_ids, self.operations.draft_noise
        if ids is None:
            return draw(uploaded, self.vocab_size if tokens is None else tokens)
        if tokens is not None:
            return draw(uploaded, ids[tokens])
        if self.target.operations is None:  # a CPU keeps whole rows
            return draw(uploaded, self.target.vocab_size)[:, ids]
        return draw(uploaded, ids[None])

    def noisy_log_probs(self, logits: Tensor, uploaded: Tensor, temperature: float) -> Tensor:
        """Return (n, Vd) log probabilities of logits with noise, the result of `upload`."""
        if self.target.operations is None and (noise := self.noise(uploaded)) is not None:
            logits, uploaded = logits + noise, uploaded[:0]
        ids = self.own.token_ids
        return self.operations.noisy_log_probs(logits, uploaded, temperature, ids)

    def noise_by_depth(self, noise: Noise | None, depths: int) -> Iterator[Tensor | None]:
        uploaded = self.upload(noise)
        return (self.noise(uploaded[depth::depths]) for depth in range(depths))


@dataclass(frozen=True, eq=False)
class Block(output_stage.Block):
    slots: Tensor  # outputs of the last layer at the slots of all depths, like `hidden`
    token: Tensor  # (1,) the root on the device


def join_blocks(
    blocks: Sequence[Block], noise: Tensor, graphs: Graphs, most: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Join blocks and their noise; for CUDA graphs, with `most` depths.

    Returns:
        (blocks * D, hidden_size) outputs, (blocks,) roots, (blocks * D, 3) noise as
        `OutputStage.upload` returns it, and D: the wanted depths, or for CUDA graphs `most` depths
        of a power of two of blocks.
    """
    wanted, parts = len(blocks[0].hidden), [block.hidden for block in blocks]
    roots, depths = [block.token for block in blocks], wanted
    if graphs.is_capturing:
        extra, depths = power_of_two(len(blocks)) - len(blocks), most
        parts = [block.slots[:most] for block in blocks]
        parts, roots = parts + extra * parts[:1], roots + extra * roots[:1]
        noise = padded_noise(noise, (len(blocks), wanted), (len(parts), depths))
    return concatenate(parts), concatenate(roots), noise, depths


def padded_noise(noise: Tensor, shape: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """Return the noise of more blocks and depths, as `OutputStage.upload` gives it, with zeros."""
    if not len(noise):
        return noise
    extra = padded[0] - shape[0], padded[1] - shape[1]
    return F.pad(noise.unflatten(0, shape), (0, 0, 0, extra[1], 0, extra[0])).flatten(0, 1)


class MaskedDrafts:
    """Each sequence attends for itself, with a mask where its block does not see everything."""

    def __init__(self, model: DrafterModel, states: Sequence[State], window: int | None) -> None:
        self.model, self.config = model, model.config
        caches = [(state.drafter, state.length) for state in states]
        # Each sequence has its KV cache and the position of its root here.
        self.sequences = [(cache, start) for cache, start in caches if cache is not None]
        # Block i does not see the positions `gaps[i]`; see `window_gap`.
        self.gaps = [window_gap(state.length, window) for state in states]
        self._masks: dict[LayerKind, list[Tensor | None]] = {}
        self._rows: WrittenRows | None = None  # the columns of the rows
        self._seen: list[SeenColumns] = []  # the columns of each sequence, its block's included

    @property
    def has_gaps(self) -> bool:
        """Whether a block does not see some positions before its window."""
        return any(first != end for first, end in self.gaps)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from (1, heads, t * S, head_dim) queries: (1, t * S, heads, head_dim).

        The (1, kv_heads, c + t * S, head_dim) keys and values, of the new context of all sequences
        and then of the blocks, are written to the drafter's KV cache first.
        """
        size, kind = self.config.block_size, self.config.layer_kinds[layer]
        if self._rows is None:
            contexts = [(x, x.length, start - x.length) for x, start in self.sequences]
            blocks = [(cache, start, size) for cache, start in self.sequences]
            self._rows = WrittenRows([*contexts, *blocks], k)
            self._seen = [SeenColumns(cache, start + size) for cache, start in self.sequences]
        self._rows.write(layer, k[0], v[0])
        keys_and_values = []
        for seen, gap in zip(self._seen, self.gaps, strict=True):
            keys, values = seen.layer(layer)
            keys_and_values.append((cut_gap(keys, gap, 2), cut_gap(values, gap, 2)))
        if kind not in self._masks:
            pairs = zip(self.sequences, self.gaps, strict=True)
            self._masks[kind] = [self._mask(start, kind, gap, q) for (_, start), gap in pairs]
        sinks = self.model.layers[layer].self_attn.attention_sink_bias
        return grouped_attention(
            *(q, keys_and_values, self._masks[kind], [size] * len(keys_and_values)),
            scale=self.config.attention_scale,
            sinks=sinks,
        )

    def _mask(
        self, start: int, kind: LayerKind, gap: tuple[int, int], query: Tensor
    ) -> Tensor | None:
        """Return the grouped mask of a block at position `start`; None if everything is visible.

        It has the dtype and the device of the query.
        """
        config = self.config
        visible = visible_positions(OPERATIONS, config, start, kind, query)
        if visible is None:
            return None
        mask = cut_gap(additive_mask(visible, query.dtype), gap, 1)
        return group_mask(mask, config.groups)


@dataclass(frozen=True, eq=False)
class SlabDrafts:
    """The sequences of one slab attend by the operation `tree_attention`: a function of tensors."""

    operations: Operations
    model: DrafterModel
    rotation: Rotation  # (c + t * S, head_dim), the new context's and then the blocks'
    window: int | None  # positions that a block sees besides the first few; None for all
    slab: Slab  # the slab of the drafter's KV caches
    columns: Tensor  # (c + t * S,), the new context's and then the blocks'
    positions: Tensor  # (t * S,) int32 positions of the blocks' slots
    start: Tensor  # (t * S,) int32 position of each slot's root
    pages: Tensor  # see `VisibleKeys`
    table: Tensor  # (t * S,) int32 of each slot's sequence; see `VisibleKeys`
    work: SharedWork  # work that the blocks share
    _keys: dict[LayerKind, VisibleKeys] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Norm, rotate and attend, with the shapes of `MaskedDrafts.attend`."""
        kind = self.model.config.layer_kinds[layer]
        queries, new_keys, new_values = (x[0].transpose(0, 1) for x in (q, k, v))
        attention = self.model.layers[layer].self_attn
        keys, values = self.slab.layer(layer)
        context = len(new_keys) - len(queries)

        def store(part: Tensor, rows: slice) -> Tensor:
            return self.operations.rotate_and_store(
                *(part, new_keys[rows], new_values[rows]),
                *(self.rotation[0][rows], self.rotation[1][rows]),
                *(keys, values, self.columns[rows]),
                norms=(attention.q_norm.weight, attention.k_norm.weight),
                eps=self.model.config.rms_norm_eps,
            )

        store(new_keys[:context], slice(context))  # the context has no queries: any will do
        queries = store(queries, slice(context, None))
        if kind not in self._keys:
            self._keys[kind] = self._visible(kind)
        out = self.operations.tree_attention(
            queries,
            keys,
            values,
            self._keys[kind],
            scale=self.model.config.attention_scale,
            sinks=attention.attention_sink_bias,
        )
        return out[None]

    def _visible(self, kind: LayerKind) -> VisibleKeys:
        """Return the keys that the slots of the blocks see in a kind of layer."""
        (window, causal), end = kind, self.start + self.model.config.block_size
        shared, low = end, torch.zeros_like(end)
        if causal:
            end = self.positions + 1
        if window is not None and self.model.config.window_from_root:
            low = (self.start - window).clamp(min=0)
        elif window is not None:
            low = (self.positions - (window - 1)).clamp(min=0)
            end = torch.minimum(end, self.positions + window)
        sink = None
        if self.window is not None:
            sink = self.start.clamp(max=SINK)
            low = torch.maximum(low, self.start - self.window)
        paths = end.new_empty(len(end), 0)
        return VisibleKeys(self.pages, self.table, shared, low, end, paths, self.work, sink)


class Drafter:
    """`treeflash.decoding.interfaces.Drafter` in PyTorch."""

    def __init__(self, model: DrafterModel, target: Target, window: int | None = None) -> None:
        self.model = model
        self.window = window  # positions that a block sees besides the first few; None for all
        self.max_read = MAX_READ
        self.target = target
        self.output = OutputStage(model, target)  # embeds tokens, and computes logits
        # The first positions are outside of the windows of a layer, but not of the draft's window.
        operations = model.operations
        self._has_slab_pass = (
            operations is not None
            and operations.runs_trees
            and (window is None or not any(model.config.sliding_windows))
        )

    @torch.inference_mode()
    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[Block]:
        """Draft for all sequences of a slab in one pass: their rows follow one another."""
        project_contexts([state for state, _ in roots], self.model.project, torch.cat)
        if self.model.calls is None:  # they take no memory for each row
            for state, _ in roots:
                self._read_ahead(state)
        passes: dict[Slab | None, list[int]] = {}
        for i, (state, _) in enumerate(roots):
            slab = state.drafter.allocate() if self._has_slab_pass else None
            passes.setdefault(slab, []).append(i)
        first, blocks = self.model.config.first_slot, {}
        for slab, members in passes.items():
            part = [roots[i] for i in members]
            for i, hidden, token in zip(members, *self._draft(part, slab), strict=True):
                slots = hidden[first:]
                blocks[i] = Block(roots[i][1], slots[:depths], slots, token[None])
        note_drafted(state for state, _ in roots)
        return [blocks[i] for i in range(len(roots))]

    def _read_ahead(self, state: State) -> None:
        """Write the keys and values of all but the last `max_read` new positions.

        They depend on the features of their positions alone.
        """
        cache = state.drafter
        assert cache is not None
        for parts in unread_parts(state, self.max_read):
            context, first = concatenate(parts), cache.length
            positions = torch.arange(first, first + len(context), device=context.device)
            rotation, written = self.model.rotary(positions, context.dtype), None
            for n, layer in enumerate(self.model.layers):
                keys, values = layer.self_attn.keys_and_values(context[None], rotation)
                if written is None:
                    written = WrittenRows([(cache, first, len(context))], keys)
                written.write(n, keys[0], values[0])

    def _draft(
        self, roots: Sequence[tuple[State, int]], slab: Slab | None
    ) -> tuple[Tensor, Tensor]:
        """Return the (sequences, S, hidden_size) blocks, and (sequences,) roots."""
        if slab is not None:
            return self._draft_in_slab(roots, slab)
        states, size = [state for state, _ in roots], self.model.config.block_size
        masked, calls = MaskedDrafts(self.model, states, self.window), self.model.calls
        new = [np.arange(cache.length, start) for cache, start in masked.sequences]
        blocks = [start + np.arange(size) for _, start in masked.sequences]
        arrays = np.array([root for _, root in roots]), np.concatenate([*new, *blocks])
        tokens, positions = upload_all(arrays, self.target.device)
        context = self._context([part for state in states for part in state.context])
        if calls is not None and not masked.has_gaps:
            hidden = calls.run(self._inputs(tokens), context, positions, masked.sequences)
        else:
            rotation = self.model.rotary(positions, context.dtype)
            hidden = self._blocks(tokens, context, rotation, masked.attend)
        return hidden.unflatten(0, (-1, size)), tokens

    def _draft_in_slab(
        self, roots: Sequence[tuple[State, int]], slab: Slab
    ) -> tuple[Tensor, Tensor]:
        """Do what `_draft` does by operations on the columns of a slab, which a graph may replay.

        For CUDA graphs the number of sequences is rounded up to a power of two, and the number of
        new positions to a power of four.
        """
        graphs, size = self.target.graphs, self.model.config.block_size
        states, order = [state for state, _ in roots], [*range(len(roots))]
        caches = [state.drafter for state in states if state.drafter is not None]
        pairs = list(zip(caches, states, strict=True))
        new = [np.arange(cache.length, state.length) for cache, state in pairs]
        parts = [part for state in states for part in state.context]
        for cache, state in pairs:
            cache.reserve_rows(cache.length, state.length + size)
        positions = np.concatenate(new)
        columns = np.concatenate(
            [cache.columns_at(x) for cache, x in zip(caches, new, strict=True)]
        )
        block_columns = np.stack(
            [cache.columns_at(state.length + np.arange(size)) for cache, state in pairs]
        )
        tables = [cache.table(state.length + size) for cache, state in pairs]
        captured = graphs.is_capturing and len(positions) <= MAX_CONTEXT * len(roots)
        if captured:
            # Further rows are copies of the last one, and further sequences of the first one: they
            # write the same keys and values to the same columns.
            order += [0] * (power_of_two(len(roots)) - len(roots))
            if extra := power_of_four(len(positions)) - len(positions) if parts else 0:
                parts.append(parts[-1][-1:].expand(extra, -1))
                positions, columns = (np.pad(x, (0, extra), "edge") for x in (positions, columns))
        tokens, starts = np.array([(roots[i][1], states[i].length) for i in order]).T
        row_starts, (pages, firsts) = np.repeat(starts, size), page_tables(tables)
        positions = np.concatenate([positions, row_starts + np.tile(np.arange(size), len(order))])
        config = self.model.config
        arrays = [
            *(tokens, positions, np.concatenate([columns, block_columns[order].ravel()])),
            *(row_starts, np.repeat(firsts[order], size), pages),
            *equal_work(starts[: len(roots)] + size, size, order, config.groups),
        ]
        uploaded, shapes = upload(pack(arrays), self.target.device), [x.shape for x in arrays]
        given = unpack(uploaded, shapes)[0]

        def draft(uploaded: Tensor, context: Tensor) -> Outputs:
            tokens, positions, columns, start, table, pages, *work = unpack(uploaded, shapes)
            assert self.model.operations is not None
            attention = SlabDrafts(
                operations=self.model.operations,
                model=self.model,
                rotation=self.model.rotary(positions, context.dtype),
                window=self.window,
                slab=slab,
                columns=columns.long(),
                positions=positions[len(context) :],
                start=start,
                pages=pages,
                table=table,
                work=SharedWork(*work),
            )
            return (self._blocks(tokens, context, None, attention.attend),)

        settings, inputs = (slab, *shapes), (uploaded, self._context(parts))
        (hidden,) = graphs.run("the drafter", settings, draft, *inputs, capture=captured)
        return hidden.unflatten(0, (-1, size))[: len(roots)], given[: len(roots)]

    def _context(self, parts: list[Tensor]) -> Tensor:
        """Join (n, hidden_size) features; there are none if a draft follows another at once."""
        if not parts:
            return self.output.embed(torch.empty(0, dtype=torch.int32, device=self.target.device))
        return concatenate(parts)

    def _blocks(
        self,
        tokens: Tensor,  # (t,) roots
        context: Tensor,  # (c, hidden_size) features of positions that the drafter has not read
        rotation: Rotation | None,  # for context and blocks; None if `attend` rotates
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],  # attention of a layer
    ) -> Tensor:
        """Return the (t * S, hidden_size) outputs of the blocks."""
        x = self._inputs(tokens)[None]
        rotations: Rotations = (None, None)
        if rotation is not None:
            cos, sin = rotation
            rotations = (cos[len(context) :], sin[len(context) :]), rotation

        def with_context(y: Tensor) -> Tensor:
            return torch.cat([context[None], y], 1)

        for n, layer in enumerate(self.model.layers):
            x = layer(x, with_context, rotations, functools.partial(attend, n))
        return x[0]

    def _inputs(self, tokens: Tensor) -> Tensor:
        """Return the (t * S, hidden_size) embeddings of blocks with these (t,) roots."""
        config, roots = self.model.config, tokens[:, None]
        masks = torch.full_like(roots, config.mask_token_id).expand(-1, config.block_size - 1)
        x = self.output.embed(torch.cat([roots, masks], 1).flatten())
        return x if config.input_scale == 1 else x * config.input_scale

    @torch.inference_mode()
    def marginals(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:

        def search(hidden: Tensor, uploaded: Tensor) -> tuple[Tensor]:
            logits = self.output.logits(self.output.norm(hidden))
            marginals = self.output.noisy_log_probs(logits, uploaded, options.temperature)
            log_probs, tokens = topk(marginals, options.k)
            tokens = self.output.to_target(tokens.int())
            # One read from the device brings both.
            return (torch.cat([tokens, log_probs.view(torch.int32)], 1),)

        graphs, settings = self.target.graphs, (options.k, options.temperature)
        noise, most = self.output.upload(options.noise), self.output.config.depths
        hidden, _, noise, depths = join_blocks(blocks, noise, graphs, most)
        (numbers,) = graphs.run("marginals", settings, search, hidden, noise)
        rows = numbers.unflatten(0, (-1, depths)).cpu().numpy()
        k = rows.shape[2] // 2
        return [
            TransitionTable.from_marginals(part[:, :k], part[:, k:].view(np.float32))
            for part in rows[: len(blocks), : len(blocks[0].hidden)]
        ]

    @torch.inference_mode()
    def log_probs(self, block: Block) -> NDArray[np.float32]:
        log_probs = self.output.logits(self.output.norm(block.hidden)).float().log_softmax(-1)
        return self.output.over_target_vocabulary(log_probs).cpu().numpy()


def cut_gap(x: Tensor, gap: tuple[int, int], axis: int) -> Tensor:
    """Return a tensor without the columns from the first of a gap to its end."""
    first, end = gap
    if first == end:
        return x
    return torch.cat([x.narrow(axis, 0, first), x.narrow(axis, end, x.shape[axis] - end)], axis)
