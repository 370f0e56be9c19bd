"""The one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.gumbel import Noise
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.context_window import left_out
from treeflash_mlx.cache import share_storage
from treeflash_mlx.drafter_model import DrafterModel
from treeflash_mlx.output_stage import OutputStage
from treeflash_mlx.storage import Storage
from treeflash_mlx.target import Target
from treeflash_mlx.topk import log_softmax, top_log_probs

Kind: TypeAlias = tuple[int | None, bool]
"""A layer's window, and whether it is causal."""


@dataclass(frozen=True, eq=False)
class Block:
    """A drafted block.

    Attributes:
        root: token id of the first slot.
        hidden: (D, hidden_size) outputs of the last layer at the slots that predict and are wanted.
    """

    root: int
    hidden: mx.array


@dataclass(frozen=True, eq=False)
class _Text:
    """A text in a draft.

    Attributes:
        storage: its keys and values, and no other text's.
        first: the first position that is new to the drafter.
        start: the block's first position.
        left_out: positions that the block does not see; see `left_out`.
        masks: of the block, by kind of layer.
    """

    storage: Storage
    first: int
    start: int
    left_out: tuple[int, int]
    masks: dict[Kind, mx.array | None]


class Drafter:
    """`treeflash.decoding.interfaces.Drafter` in MLX."""

    def __init__(self, model: DrafterModel, target: Target, window: int | None = None) -> None:
        """Hold the models; a draft sees so many positions before it, and the first few."""
        self.model = model
        self.window = window
        self.output = OutputStage(model.config, model.own, target)

    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[Block]:
        """See `Drafter.draft`; the rows of all texts follow one another."""
        config = self.model.config
        size = config.block_size
        kinds = list(zip(config.sliding_windows, config.causal, strict=True))
        masks = [config.mask_token_id] * (size - 1)
        x = self.output.embed(mx.array([token for _, root in roots for token in (root, *masks)]))
        if config.input_scale != 1:
            x = x * config.input_scale
        texts, contexts = [], []
        for state, _ in roots:
            start = state.length
            gap, masks_ = left_out(start, self.window), {}
            for kind in set(kinds):
                mask = block_mask(start, size, *kind, config.window_from_root)
                masks_[kind] = mask if mask is None else without(mask, gap, 1)
            storage = share_storage([state.drafter])
            texts.append(_Text(storage, state.drafter.length, start, gap, masks_))
            # There may be nothing new, as after a fork at what the drafter has read.
            parts = state.context or [x[:0]]
            contexts.append(parts[0] if len(parts) == 1 else mx.concatenate(parts))
        of_blocks = np.concatenate([np.arange(t.start, t.start + size) for t in texts])
        of_rows = np.concatenate([np.arange(t.first, t.start + size) for t in texts])
        positions = mx.array(of_blocks, mx.int32), mx.array(of_rows, mx.int32)
        for n, (layer, kind) in enumerate(zip(self.model.layers, kinds, strict=True)):
            attend = functools.partial(self._attend, texts, n, kind)
            x = layer(x, contexts, positions, attend)
        for state, _ in roots:
            # The blocks' keys and values are scratch: the next context overwrites them.
            state.drafter.length, state.context = state.length, []
        hidden = mx.split(x, len(roots)) if len(roots) > 1 else [x]
        pairs = zip(roots, hidden, strict=True)
        return [Block(root, part[config.first_slot :][:depths]) for (_, root), part in pairs]

    def marginals(
        self, blocks: Sequence[Block], k: int, temperature: float, noise: Noise | None = None
    ) -> list[TransitionTable]:
        """See `Drafter.marginals`."""
        logits = self.output.logits(self.model.norm(drafted(blocks)))
        if noise is not None:
            logits = logits + self.output.noise(noise)
        tokens, log_probs = top_log_probs(logits, min(k, logits.shape[1]), temperature)
        tokens = self.output.to_target(tokens)
        # Token ids are exact in float32, and one array needs one read from the device.
        read = np.array(mx.stack([tokens.astype(mx.float32), log_probs]))
        return [
            TransitionTable.from_marginals(part[0].astype(np.int32), part[1])
            for part in np.split(read, len(blocks), 1)
        ]

    def log_probs(self, block: Block) -> NDArray[np.float32]:
        """See `Drafter.log_probs`."""
        log_probs = log_softmax(self.output.logits(self.model.norm(block.hidden)))
        return np.array(self.output.over_target_vocabulary(log_probs))

    def _attend(
        self,
        texts: Sequence[_Text],
        layer: int,
        kind: Kind,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
    ) -> mx.array:
        """Attention of each text's block over everything before it and itself.

        Args:
            texts: in the order of their rows.
            layer: index.
            kind: of the layer.
            queries: (1, heads, texts * S, head_dim) of the blocks.
            keys: (1, kv_heads, rows, head_dim) of each text's new context and block in turn.
            values: (1, kv_heads, rows, head_dim).

        Returns:
            (texts * S, heads * head_dim).
        """
        size = self.model.config.block_size
        out, row = [], 0
        for i, text in enumerate(texts):
            stop = text.start + size
            rows = slice(row, row + stop - text.first)
            row = rows.stop
            text.storage.write(layer, [keys[:, :, rows], values[:, :, rows]], text.first)
            y = mx.fast.scaled_dot_product_attention(
                queries[:, :, i * size : (i + 1) * size],
                *(without(x, text.left_out, 2) for x in text.storage.until(layer, stop)),
                scale=self.model.config.head_dim**-0.5,
                mask=text.masks[kind],
            )
            out.append(y[0].swapaxes(0, 1).reshape(size, -1))
        return out[0] if len(out) == 1 else mx.concatenate(out)


def drafted(blocks: Sequence[Block]) -> mx.array:
    """(blocks * D, hidden_size) outputs of all blocks."""
    hidden = [block.hidden for block in blocks]
    return hidden[0] if len(hidden) == 1 else mx.concatenate(hidden)


def without(x: mx.array, gap: tuple[int, int], axis: int) -> mx.array:
    """An array without the columns of a gap."""
    first, end = gap
    if first == end:
        return x
    before, _, after = mx.split(x, [first, end], axis)
    return mx.concatenate([before, after], axis)


def block_mask(
    start: int, size: int, window: int | None, causal: bool, from_root: bool = False
) -> mx.array | None:
    """(size, start + size) mask of a block at `start`; None if everything is visible.

    The window is around each slot, or before the root.
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
