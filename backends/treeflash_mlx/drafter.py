"""The one-shot drafter (DFlash, arXiv 2602.06036): its blocks, and the logits of their slots.

`OutputStage` is what the drafter shares with its conditional head: the embeddings of tokens, and
the way from hidden states to logits. `Drafter` runs the drafter's layers over the new context and
the blocks of several sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.config import SINK
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.sampling import Noise
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.config import LayerKind, window_gap
from treeflash_mlx.cache import BatchStorage, share_storage, storages_of
from treeflash_mlx.drafter_model import DrafterModel
from treeflash_mlx.drafter_operations import read
from treeflash_mlx.numerics import gumbel, log_softmax, top_log_probs
from treeflash_mlx.state import project_contexts
from treeflash_mlx.target import Target, shortlist_logits


class OutputStage:
    """From tokens to embeddings and from hidden states to logits, for a drafter and its head.

    `norm` is the final norm, to apply before `logits`.
    """

    def __init__(self, model: DrafterModel, target: Target) -> None:
        self.config, self.norm = model.config, model.norm
        self._own, self._target = model.own, target

    def embed(self, tokens: mx.array) -> mx.array:
        """Compute (..., hidden_size) rows of the input table, from (...) tokens of the target."""
        table = self._own.embed_tokens
        return self._target.embed(tokens) if table is None else table(tokens)

    def logits(self, normed: mx.array, tokens: mx.array | None = None) -> mx.array:
        """Compute (..., n, Vd) logits of normalised outputs, or (..., n, v) of (..., v) tokens.

        They are float32 if the drafter has a factor or a softcap on its logits.
        """
        head = self._own.lm_head
        if tokens is not None:
            module = self._target.output_module if head is None else head
            logits = shortlist_logits(module, normed, tokens)
        else:
            logits = self._target.output_head(normed) if head is None else head(normed)
        if self.config.output_multiplier != 1:
            logits = logits.astype(mx.float32) * self.config.output_multiplier
        if (cap := self.config.softcap) is not None:
            logits = cap * mx.tanh(logits.astype(mx.float32) / cap)
        return logits

    def noise(self, noise: Noise) -> mx.array:
        """Return the (n, Vd) noise to add to logits."""
        scaled = gumbel(noise.keys, self._target.vocab_size) * mx.array(noise.scales)[:, None]
        ids = self._own.token_ids
        return scaled if ids is None else scaled[:, ids]

    def noise_by_depth(self, noise: Noise | None, depths: int) -> list[mx.array | None]:
        """Compute the (sequences, Vd) noise of each depth, or None without noise."""
        if noise is None:
            return [None] * depths
        whole = self.noise(noise)
        return [whole[depth::depths] for depth in range(depths)]

    def to_target(self, tokens: mx.array) -> mx.array:
        """Return the target's ids of the drafter's tokens."""
        ids = self._own.token_ids
        return tokens if ids is None else ids[tokens]

    def over_target_vocabulary(self, log_probs: mx.array) -> mx.array:
        """Return the (n, vocab) from (n, Vd); tokens that the drafter cannot propose have -inf."""
        ids = self._own.token_ids
        if ids is None:
            return log_probs
        wide = mx.full((len(log_probs), self._target.vocab_size), -mx.inf)
        wide[:, ids] = log_probs
        return wide


@dataclass(frozen=True, eq=False)
class Block:
    root: int  # token id of the first slot
    hidden: mx.array  # (D, hidden_size) outputs of the last layer at the wanted slots
    slots: mx.array  # (S, hidden_size) outputs of the last layer at all slots
    before: int  # token id before the root
    anchor: mx.array | None = None  # (hidden_size,) features of the last committed position


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

    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[Block]:
        """Draft blocks after the roots; the rows of all sequences follow one another."""
        config = self.model.config
        size = config.block_size
        kinds = config.layer_kinds
        masks = [config.mask_token_id] * (size - 1)
        x = self.output.embed(mx.array([token for _, root in roots for token in (root, *masks)]))
        if config.input_scale != 1:
            x = x * config.input_scale
        project_contexts([state for state, _ in roots], self.model.project)
        if config.correlation is not None:
            for state, _ in roots:
                state.anchor = state.context[-1][-1] if state.context else state.anchor
        sequences, contexts = [], []
        for state, _ in roots:
            start = state.length
            gap, end = window_gap(start, self.window)
            first_seen = end if gap < end else 0
            storage = share_storage([state.drafter])
            block_masks = {kind: self._block_mask(start, kind, first_seen) for kind in set(kinds)}
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
            attend = partial(self._attend, sequences, n, kind)
            x = layer(x, with_context, (block_positions, row_positions), attend)
            # The device begins while Python builds what follows, and moves the rows of the commit
            # behind the drafts, which do not read them.
            if on_gpu and n == len(kinds) - 1:
                storages = storages_of(state.kv_cache for state, _ in roots)
                mx.async_eval([x, *(y for storage in storages for y in storage.arrays)])
            elif on_gpu and n == 0:
                mx.async_eval(x)
        for state, _ in roots:
            # The blocks' keys and values are scratch: the next context overwrites them.
            state.drafter.length, state.context = state.length, []
        pairs = zip(roots, mx.split(x, len(roots)), strict=True)
        return [
            Block(
                *(root, part[config.first_slot :][:depths], part),
                *(state.tokens[-1], state.anchor),
            )
            for (state, root), part in pairs
        ]

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

    def _block_mask(self, start: int, kind: LayerKind, first_seen: int) -> mx.array | None:
        config = self.model.config
        mask = block_mask(start, config.block_size, *kind, config.window_from_root)
        if mask is None or not first_seen:
            return mask
        return mx.concatenate([mask[:, first_seen:], mask[:, :SINK]], 1)

    def _attend(
        self,
        sequences: Sequence[_DraftedSequence],
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
        size = self.model.config.block_size
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
    start: int, size: int, window: int | None, causal: bool, from_root: bool = False
) -> mx.array | None:
    """Return the (size, start + size) mask of a block at `start`; None if all is visible.

    The window is around each slot, or `from_root` before the root.
    """
    if window is not None and window >= start + size:
        window = None
    if window is None and not causal:
        return None
    keys = mx.arange(start + size)
    distance = keys[start:, None] - keys
    mask = distance >= 0 if causal else mx.ones(distance.shape, mx.bool_)
    if window is None:
        return mask
    return mask & (keys >= start - window if from_root else mx.abs(distance) < window)
