"""The one-shot drafter (DFlash, arXiv 2602.06036): its blocks, and its output stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.config import SINK
from treeflash.decoding import output_stage
from treeflash.decoding.backend_base import (
    MAX_READ,
    note_drafted,
    project_contexts,
    unread_parts,
)
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.output_stage import Block
from treeflash.decoding.sampling import Noise
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.config import DrafterConfig, LayerKind, window_gap
from treeflash.drafters.layers import visible_positions
from treeflash_mlx.cache import BatchStorage, share_storage, storages_of
from treeflash_mlx.drafter_model import OPERATIONS, DrafterModel, read
from treeflash_mlx.numerics import gumbel, log_softmax, top_log_probs
from treeflash_mlx.state import State
from treeflash_mlx.target import Target, shortlist_logits


class OutputStage(output_stage.OutputStage):
    """The output stage in MLX."""

    ops = OPERATIONS

    def embed(self, tokens: mx.array) -> mx.array:
        table = self.own.embed_tokens
        return self.target.embed(tokens) if table is None else table(tokens)

    def head_logits(self, normed: mx.array, tokens: mx.array | None) -> mx.array:
        head = self.own.lm_head
        if tokens is not None:
            module = self.target.output_module if head is None else head
            return shortlist_logits(module, normed, tokens)
        return self.target.output_head(normed) if head is None else head(normed)

    def noise(self, noise: Noise) -> mx.array:
        """Return the (n, Vd) noise to add to logits."""
        scaled = gumbel(noise.keys, self.target.vocab_size) * mx.array(noise.scales)[:, None]
        ids = self.own.token_ids
        return scaled if ids is None else scaled[:, ids]

    def noise_by_depth(self, noise: Noise | None, depths: int) -> list[mx.array | None]:
        if noise is None:
            return [None] * depths
        whole = self.noise(noise)
        return [whole[depth::depths] for depth in range(depths)]


@dataclass(frozen=True, eq=False)
class _DraftedSequence:
    """The rows of one sequence in a draft: its new context, then its block."""

    storage: BatchStorage  # the storage of this sequence alone
    first: int  # position of the new context
    start: int  # position of the block
    first_seen: int  # the first position that the block sees after a gap; 0 if it sees all
    masks: dict[LayerKind, mx.array | None]


class Drafter:
    """`treeflash.decoding.interfaces.Drafter` in MLX.

    It sees `window` positions before a block, beside the first few; None for all.
    """

    def __init__(self, model: DrafterModel, target: Target, window: int | None = None) -> None:
        self.model, self.window, self.output = model, window, OutputStage(model, target)
        self.max_read = MAX_READ

    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[Block]:
        """Draft blocks after the roots; the rows of all sequences follow one another."""
        config = replace(self.model.config, block_size=self._rows(depths))
        size = config.block_size
        kinds = config.layer_kinds
        masks = [config.mask_token_id] * (size - 1)
        x = self.output.embed(mx.array([token for _, root in roots for token in (root, *masks)]))
        if config.input_scale != 1:
            x = x * config.input_scale
        project_contexts([state for state, _ in roots], self.model.project, mx.concatenate)
        sequences, contexts = [], []
        for state, _ in roots:
            self._read_ahead(state)
            start = state.length
            gap, end = window_gap(start, self.window)
            first_seen = end if gap < end else 0
            storage = share_storage([state.drafter])
            block_masks = {kind: block_mask(config, start, kind, first_seen) for kind in set(kinds)}
            first = state.drafter.length
            sequences.append(_DraftedSequence(storage, first, start, first_seen, block_masks))
            # There may be no new context, as after a fork where the drafter has read everything.
            contexts.append(mx.concatenate(state.context or [x[:0]]))
        blocks = [np.arange(s.start, s.start + size) for s in sequences]
        rows = [np.arange(s.first, s.start + size) for s in sequences]
        block_positions, row_positions = (
            mx.array(np.concatenate(x), mx.int32) for x in (blocks, rows)
        )

        def with_context(y: mx.array) -> mx.array:
            pairs = zip(contexts, mx.split(y, len(contexts)), strict=True)
            return mx.concatenate([part for pair in pairs for part in pair])

        on_gpu = mx.default_device().type == mx.gpu
        for n, (layer, kind) in enumerate(zip(self.model.layers, kinds, strict=True)):
            attend = partial(self._attend, sequences, size, n, kind)
            x = layer(x, with_context, (block_positions, row_positions), attend)
            # The device begins while Python builds what follows, and moves the rows of the commit
            # behind the drafts, which do not read them.
            if on_gpu and n == len(kinds) - 1:
                storages = storages_of(state.kv_cache for state, _ in roots)
                mx.async_eval([x, *(y for storage in storages for y in storage.arrays)])
            elif on_gpu and n == 0:
                mx.async_eval(x)
        note_drafted(state for state, _ in roots)
        return [
            Block(root, part[config.first_slot :][:depths])
            for (_, root), part in zip(roots, mx.split(x, len(roots)), strict=True)
        ]

    def _read_ahead(self, state: State) -> None:
        """Write the keys and values of all but the last `max_read` new positions.

        They depend on the features of their positions alone.
        """
        cache = state.drafter
        assert cache is not None
        for parts in unread_parts(state, self.max_read):
            context, first = mx.concatenate(parts), cache.length
            positions = mx.arange(first, first + len(context), dtype=mx.int32)
            storage = share_storage([cache])
            for n, layer in enumerate(self.model.layers):
                storage.write(n, layer.self_attn.keys_and_values(context, positions), first)
            mx.eval(storage.arrays)

    def marginals(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        hidden = mx.concatenate([block.hidden for block in blocks])
        logits = self.output.logits(self.output.norm(hidden))
        if options.noise is not None:
            logits = logits + self.output.noise(options.noise)
        k = min(options.k, logits.shape[1])
        tokens, log_probs = top_log_probs(logits, k, options.temperature)
        arrays = read([self.output.to_target(tokens), log_probs])
        parts = zip(*(np.split(x, len(blocks)) for x in arrays), strict=True)
        return [TransitionTable.from_marginals(*part) for part in parts]

    def log_probs(self, block: Block) -> NDArray[np.float32]:
        log_probs = log_softmax(self.output.logits(self.output.norm(block.hidden)))
        return np.array(self.output.over_target_vocabulary(log_probs))

    def _rows(self, depths: int | None) -> int:
        """Return the rows of a block: up to the last depth that is used, if none sees later ones.

        Where slots see one another, fewer rows would be other drafts, of fewer accepted tokens.
        Convolutions know a block by its whole size.
        """
        config = self.model.config
        if depths is None or not all(config.causal) or config.conv_kernel_size:
            return config.block_size
        return min(config.first_slot + depths, config.block_size)

    def _attend(
        self,
        sequences: Sequence[_DraftedSequence],
        size: int,
        layer: int,
        kind: LayerKind,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
    ) -> mx.array:
        """Attend from each sequence's block to the positions before it and itself.

        From (1, heads, batch * S, head_dim) queries of the blocks, and (1, kv_heads, rows,
        head_dim) keys and values of each sequence's new context and block in turn, to (batch * S,
        heads, head_dim). After a gap, copies of the first positions come behind the block: the
        columns that it sees are neighbours, and none of them is copied.
        """
        sinks = self.model.layers[layer].self_attn.attention_sink_bias
        out, row = [], 0
        for i, sequence in enumerate(sequences):
            stop = sequence.start + size
            rows = slice(row, row + stop - sequence.first)
            row = rows.stop
            storage, first_seen = sequence.storage, sequence.first_seen
            storage.write(layer, [keys[:, :, rows], values[:, :, rows]], sequence.first)
            if first_seen:
                storage.write(layer, storage.first_copies(layer), stop)
                stop += SINK
            y = mx.fast.scaled_dot_product_attention(
                queries[:, :, i * size : (i + 1) * size],
                *storage.read(layer, stop, first_seen),
                scale=self.model.config.attention_scale,
                mask=sequence.masks[kind],
                sinks=sinks,
            )
            out.append(y[0].swapaxes(0, 1))
        return mx.concatenate(out)


def block_mask(
    config: DrafterConfig, start: int, kind: LayerKind, first_seen: int
) -> mx.array | None:
    """Return the mask of a block without the columns of a gap; see `visible_positions`."""
    mask = visible_positions(OPERATIONS, config, start, kind, None)
    if mask is None or not first_seen:
        return mask
    return mx.concatenate([mask[:, first_seen:], mask[:, :SINK]], 1)
