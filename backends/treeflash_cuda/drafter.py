"""The one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.decoding.gumbel import Noise
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.context_window import left_out
from treeflash_cuda.attention import additive_mask
from treeflash_cuda.cache import KeyValues, PackedRows, upload
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.output_stage import OutputStage
from treeflash_cuda.packed import packed_attention, repeat_rows
from treeflash_cuda.static_drafts import Kind, StaticDrafts
from treeflash_cuda.target import Target
from treeflash_cuda.topk import top_log_probs


@dataclass(frozen=True, eq=False)
class Block:
    """A drafted block.

    Attributes:
        root: token id of the first slot.
        token: (1,) the same on the device.
        hidden: (D, hidden_size) outputs of the last layer at the slots that predict and are wanted.
    """

    root: int
    token: Tensor
    hidden: Tensor


@dataclass(frozen=True, eq=False)
class _Text:
    """A text in a draft.

    Attributes:
        cache: its keys and values.
        context: how many positions are new to the drafter.
        start: position of the block.
        left_out: positions that the block does not see; see `left_out`.
        masks: of the block, by kind of layer.
    """

    cache: KeyValues
    context: int
    start: int
    left_out: tuple[int, int]
    masks: dict[Kind, Tensor | None]


class Drafter:
    """`treeflash.decoding.interfaces.Drafter` in PyTorch."""

    def __init__(self, model: DrafterModel, target: Target, window: int | None = None) -> None:
        """Hold the models; a draft sees so many positions before it, and the first few."""
        self.model = model
        self.window = window
        self.target = target
        self.output = OutputStage(model.config, model.own, target)
        self.static = StaticDrafts(model, target, self.output, window)

    @torch.inference_mode()
    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[Block]:
        """See `Drafter.draft`; the rows of all texts follow one another."""
        found = self.static.run(roots) or self._draft(roots)
        for state, _ in roots:
            # The block's keys and values are scratch: the next context overwrites them.
            state.drafter.length, state.context = state.length, []
        first = self.model.config.first_slot
        each = zip(roots, *found, strict=True)
        return [Block(root, token[None], part[first:][:depths]) for (_, root), part, token in each]

    def _draft(self, roots: Sequence[tuple[Any, int]]) -> tuple[Tensor, Tensor]:
        """(texts, S, hidden_size) blocks, (texts,) roots."""
        config, device = self.model.config, self.target.device
        size, groups = config.block_size, config.num_attention_heads // config.num_key_value_heads
        kinds = list(zip(config.sliding_windows, config.causal, strict=True))
        tokens = torch.full((len(roots), size), config.mask_token_id, device=device)
        root_tokens = upload(np.array([root for _, root in roots]), device)
        tokens[:, 0] = root_tokens
        x = self.output.embed(tokens.flatten())[None]
        if config.input_scale != 1:
            x = x * config.input_scale
        parts = [part for state, _ in roots for part in state.context]
        context = torch.cat([x[0, :0], *parts])[None]  # a draft may follow another at once
        texts, known, drafted = [], [], []
        for state, _ in roots:
            first, start = state.drafter.length, state.length
            gap, masks = left_out(start, self.window), {}
            for kind in set(kinds):
                mask = block_mask(start, size, *kind, x.dtype, device, config.window_from_root)
                masks[kind] = repeat_rows(mask if mask is None else without(mask, gap, 1), groups)
            texts.append(_Text(state.drafter, start - first, start, gap, masks))
            known.append(torch.arange(first, start, device=device))
            drafted.append(torch.arange(start, start + size, device=device))
        packed: list[PackedRows] = []
        rotation = self.model.rotary(torch.cat(known + drafted), x.dtype)
        for n, (layer, kind) in enumerate(zip(self.model.layers, kinds, strict=True)):
            x = layer(x, context, rotation, functools.partial(self._attend, texts, packed, n, kind))
        return x[0].unflatten(0, (-1, size)), root_tokens

    @torch.inference_mode()
    def marginals(
        self, blocks: Sequence[Block], k: int, temperature: float, noise: Noise | None = None
    ) -> list[TransitionTable]:
        """See `Drafter.marginals`."""
        uploaded = self.output.upload(noise)

        def best(hidden: Tensor, uploaded: Tensor) -> tuple[Tensor]:
            logits = self.output.logits(self.model.norm(hidden))
            if (added := self.output.noise(uploaded)) is not None:
                logits = logits + added
            tokens, log_probs = top_log_probs(logits, k, temperature)
            tokens = self.output.to_target(tokens)
            # One read from the device for both.
            return (torch.cat([tokens, log_probs.view(torch.int32)], 1),)

        settings, inputs = (k, temperature), (drafted(blocks), uploaded)
        (found,) = self.target.graphs.run("marginals", settings, best, *inputs)
        read = found.cpu().numpy()
        k = read.shape[1] // 2
        return [
            TransitionTable.from_marginals(part[:, :k], part[:, k:].view(np.float32))
            for part in np.split(read, len(blocks))
        ]

    @torch.inference_mode()
    def log_probs(self, block: Block) -> NDArray[np.float32]:
        """See `Drafter.log_probs`."""
        log_probs = self.output.logits(self.model.norm(block.hidden)).float().log_softmax(-1)
        return self.output.over_target_vocabulary(log_probs).cpu().numpy()

    def _attend(
        self,
        texts: Sequence[_Text],
        packed: list[PackedRows],
        layer: int,
        kind: Kind,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        """Attention of each text's block over everything before it and itself.

        Args:
            texts: in the order of their rows.
            packed: where the rows are stored; empty in the first layer.
            layer: index.
            kind: of the layer.
            q: (1, heads, texts * S, head_dim).
            k: (1, kv_heads, c + texts * S, head_dim), the new context of all texts first.
            v: (1, kv_heads, c + texts * S, head_dim).
        """
        size = self.model.config.block_size
        if len(texts) == 1:
            texts[0].cache.write(layer, texts[0].cache.length, k, v)
        else:
            if not packed:
                contexts = [(x.cache, x.cache.length, x.context) for x in texts]
                blocks = [(x.cache, x.start, size) for x in texts]
                packed.append(PackedRows([*contexts, *blocks], k))
            packed[0].write(layer, k, v)
        seen = []
        for text in texts:
            keys, values = text.cache.until(layer, text.start + size)
            seen.append((without(keys, text.left_out, 2), without(values, text.left_out, 2)))
        masks, scale = [text.masks[kind] for text in texts], self.model.config.head_dim**-0.5
        return packed_attention(q, seen, masks, [size] * len(texts), scale)


def drafted(blocks: Sequence[Block]) -> Tensor:
    """(blocks * D, hidden_size) outputs of all blocks."""
    hidden = [block.hidden for block in blocks]
    return hidden[0] if len(hidden) == 1 else torch.cat(hidden)


def without(x: Tensor, gap: tuple[int, int], axis: int) -> Tensor:
    """A tensor without the columns of a gap."""
    first, end = gap
    if first == end:
        return x
    after = x.narrow(axis, end, x.shape[axis] - end)
    return torch.cat([x.narrow(axis, 0, first), after], axis)


def block_mask(
    start: int,
    size: int,
    window: int | None,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
    from_root: bool = False,
) -> Tensor | None:
    """(size, start + size) additive mask of a block at `start`; None if everything is visible.

    The window is around each slot, or before the root.
    """
    if window is None and not causal:
        return None
    keys = torch.arange(start + size, device=device)
    distance = keys[start:, None] - keys
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        visible = visible & (keys >= start - window if from_root else distance.abs() < window)
    return additive_mask(visible, dtype)
