"""Heads that draft depth by depth: the rows of committed positions, and their caches.

See `treeflash.drafters.mtp_heads` for what a row is. The KV cache of a sequence has a row for each
committed position, and behind them the rows of the drafts of one table. The keys and values of
committed rows need no attention, so a prompt costs little more than their projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.decoding import mtp_head
from treeflash.decoding.interfaces import StateArrays, TableOptions
from treeflash.decoding.mtp_head import MtpBlock
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.mtp_heads import NO_MARGINALS, MtpConfig, first_visible
from treeflash.drafters.mtp_layer import MtpLayer
from treeflash.errors import ConfigError
from treeflash_cuda.attention import additive_mask, group_mask, grouped_attention
from treeflash_cuda.cache import Arena, KVCache, PackedRows, from_host, to_host
from treeflash_cuda.drafter import Block, Drafter, OutputStage
from treeflash_cuda.drafter_model import OwnVocabulary, Rotary, Rotation
from treeflash_cuda.head_operations import OPERATIONS
from treeflash_cuda.numerics import upload
from treeflash_cuda.target import Target

PARALLEL_CHUNK = 512
"""Committed rows of P-EAGLE, which attend, that are computed at once."""
CHUNK = 2048
"""Committed rows whose keys and values are computed at once."""


class MtpModel(MtpLayer, nn.Module):
    """The layer as a module of PyTorch, with the rotations of its rows and its own vocabulary."""

    ops = OPERATIONS

    def __init__(self, config: MtpConfig, own: OwnVocabulary) -> None:
        super().__init__(config)
        self.own = own
        self.rotary = Rotary(config)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [self.layer, *self.further_layers]

    def rotation(self, positions: NDArray[np.integer], like: Tensor) -> Rotation:
        return self.rotary(upload(positions, like.device), like.dtype)

    def write(self, segments: Sequence[tuple[MtpCache, int, int]], k: Tensor, v: Tensor) -> None:
        PackedRows(segments, k).write(0, k, v)

    def attend(
        self,
        queries: Tensor,
        caches: Sequence[MtpCache],
        committed: Sequence[int],
        depth: int,
        visible: Tensor | None,
    ) -> Tensor:
        n, drafted = queries.shape[2] // len(caches), 0 if visible is None else visible.shape[2]
        config, keys_and_values, masks = self.config, [], []
        groups = config.num_attention_heads // config.num_key_value_heads
        for i, (cache, length) in enumerate(zip(caches, committed, strict=True)):
            first = first_visible(config, length, depth)
            keys, values = cache.first_columns(0, length + drafted)
            keys_and_values.append((keys[:, :, first:], values[:, :, first:]))
            mask = None
            if visible is not None:
                mask = F.pad(additive_mask(visible[i], queries.dtype), (length - first, 0))
                mask = group_mask(mask, groups)
            masks.append(mask)
        sizes, scale = [n] * len(caches), config.attention_scale
        return grouped_attention(queries, keys_and_values, masks, sizes, scale)[0]


@dataclass(eq=False)
class MtpCache(KVCache):
    """The rows of one sequence, and the target's states that they read.

    The row of the last position holds the token after it, which is not committed: it is computed
    again for every draft.
    """

    hidden: Tensor | None = None  # (columns, hidden_size); None before the first draft

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.hidden is None else self.hidden.nbytes)

    def append(self, states: Sequence[Tensor]) -> None:
        """Note the (n, hidden_size) states of new committed positions."""
        for part in states:
            if self.hidden is None:
                self.hidden = part.new_empty(self.capacity, part.shape[1])
            self.hidden[self.length : self.length + len(part)] = part
            self.length += len(part)

    def copy_from(self, other: KVCache, length: int) -> None:
        super().copy_from(other, length)
        assert isinstance(other, MtpCache)
        if self.length and other.hidden is not None:
            self.hidden = other.hidden.new_empty(self.capacity, other.hidden.shape[1])
            self.hidden[: self.length] = other.hidden[: self.length]

    def export(self, first: int, stop: int) -> StateArrays:
        """Export all rows but the last position's: it depends on the token after it."""
        if self.hidden is None:
            return {}
        rows = super().export(max(first - 1, 0), max(stop - 1, 0))
        return rows | {"hidden": to_host(self.hidden[first:stop])}

    def load(self, arrays: StateArrays, length: int) -> None:
        rows = dict(arrays)
        if (hidden := rows.pop("hidden", None)) is not None:
            assert self.arena.like is not None
            self.write_stored(rows, max(self.length - 1, 0))
            self.append([from_host(hidden).to(self.arena.like.device)])

    def read(self) -> NDArray[np.float32]:
        return super().read()[..., : max(self.length - 1, 0), :]

    def close(self) -> None:
        super().close()
        self.hidden = None


class MtpArena(Arena):
    """Hands out the columns of row caches."""

    def new_cache(self, capacity: int) -> MtpCache:
        return MtpCache(self, capacity)


class MtpDrafter:
    """`treeflash.decoding.interfaces.Drafter` in PyTorch: the rows of committed positions."""

    def __init__(self, model: MtpModel, target: Target) -> None:
        self.model = model
        self.target = target
        self.output = OutputStage(model, target)  # embeds tokens, and computes logits

    @torch.inference_mode()
    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[MtpBlock]:
        """Compute the rows of all sequences together; earlier parts of prompts chunk by chunk."""
        new: list[tuple[MtpCache, int, list[int]]] = []
        for state, root in roots:
            cache = state.drafter
            assert isinstance(cache, MtpCache)
            first = max(cache.length - 1, 0)
            cache.append(state.context)
            state.context = []
            tokens = [*state.tokens[first + 1 :], root]
            while len(tokens) > CHUNK:
                self._write([(cache, first, tokens[:CHUNK])])
                first, tokens = first + CHUNK, tokens[CHUNK:]
            new.append((cache, first, tokens))
        read, rotation = self._write(new)
        ends = np.cumsum([len(tokens) for _, _, tokens in new]) - 1
        last = upload(ends, self.target.device)
        y, residual = (x.index_select(0, last) for x in read)
        caches = [cache for cache, _, _ in new]
        cos, sin = (x.index_select(0, last) for x in rotation)
        q, gate = self.model.layer.self_attn.queries(y, (cos, sin))
        attended = self.model.attend(q, caches, [x.length for x in caches], 0, None)
        outputs = self.model.finish(attended, gate, residual)
        most = self.model.config.depths
        return [
            MtpBlock(output, cache, cache.length, min(depths or most, most))
            for output, cache in zip(outputs.split(1), caches, strict=True)
        ]

    def _write(
        self, rows: Sequence[tuple[MtpCache, int, list[int]]]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Write the keys and values of rows: their cache, the first one, and their tokens.

        Returns what `MtpModel.read` does, and the rotation.
        """
        device = self.target.device
        flat = np.array([token for _, _, tokens in rows for token in tokens])
        numbers = np.concatenate([first + np.arange(len(tokens)) for _, first, tokens in rows])
        states = [x.hidden[first : first + len(tokens)] for x, first, tokens in rows]  # type: ignore[index]
        read = self.model.read(self.output.embed(upload(flat, device)), torch.cat(states))
        rotation = self.model.rotation(numbers, read[0])
        k, v = self.model.layer.self_attn.keys_and_values(read[0], rotation)
        self.model.write([(x, first, len(tokens)) for x, first, tokens in rows], k, v)
        return read, rotation

    def marginals(self, blocks: Sequence[MtpBlock], options: TableOptions) -> list[TransitionTable]:
        raise ConfigError(NO_MARGINALS)

    def log_probs(self, block: MtpBlock) -> NDArray[np.float32]:
        raise ConfigError(NO_MARGINALS)


class ParallelDrafter(Drafter):
    """P-EAGLE: rows with the mask token follow the root's, and all rows are one causal text."""

    def __init__(self, model: Any, target: Target) -> None:
        super().__init__(model, target)
        self.rows: MtpModel = model

    @torch.inference_mode()
    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[Block]:
        """Run the rows of all sequences together; earlier parts of prompts chunk by chunk."""
        config, masks = self.rows.config, self.rows.config.depths - 1
        mask = self.rows.project(self.rows.mask_hidden.flatten()[None])
        runs: list[tuple[MtpCache, int, list[int], Tensor]] = []
        for state, root in roots:
            cache = state.drafter
            assert isinstance(cache, MtpCache)
            first = max(cache.length - 1, 0)
            cache.append(state.context)
            state.context = []
            assert cache.hidden is not None
            tokens = [*state.tokens[first + 1 :], root]
            while len(tokens) > PARALLEL_CHUNK:
                stop = first + PARALLEL_CHUNK
                self._run([(cache, first, tokens[:PARALLEL_CHUNK], cache.hidden[first:stop])])
                first, tokens = stop, tokens[PARALLEL_CHUNK:]
            states = torch.cat([cache.hidden[first : cache.length], mask.expand(masks, -1)])
            runs.append((cache, first, [*tokens, *[config.mask_token_id or 0] * masks], states))
        parts = self._run(runs).split([len(tokens) for _, _, tokens, _ in runs])
        blocks = []
        for (state, root), part in zip(roots, parts, strict=True):
            hidden, token = part[-config.depths :], upload(np.array([root]), self.target.device)
            blocks.append(Block(root, token, hidden[:depths], hidden, hidden, state.tokens[-1]))
        return blocks

    def _run(self, runs: Sequence[tuple[MtpCache, int, list[int], Tensor]]) -> Tensor:
        """Run rows of several sequences: each cache, its first row, and the tokens and states."""
        device, groups = self.target.device, self.rows.config.num_attention_heads
        groups //= self.rows.config.num_key_value_heads
        tokens = upload(np.array([token for run in runs for token in run[2]]), device)
        positions = np.concatenate([first + np.arange(len(x)) for _, first, x, _ in runs])
        embedded, states = self.output.embed(tokens), torch.cat([run[3] for run in runs])
        sizes, masks = [len(x) for _, _, x, _ in runs], []
        for _, first, x, _ in runs:
            seen = torch.ones(len(x), first + len(x), dtype=torch.bool, device=device)
            masks.append(group_mask(additive_mask(seen.tril(first), embedded.dtype), groups))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            PackedRows([(x, first, len(t)) for x, first, t, _ in runs], k).write(layer, k, v)
            keys_and_values = [x.first_columns(layer, first + len(t)) for x, first, t, _ in runs]
            return grouped_attention(q, keys_and_values, masks, sizes, q.shape[-1] ** -0.5)[0]

        rotation = self.rows.rotation(positions, embedded)
        outputs: Tensor = self.rows.run(embedded, states, rotation, attend)
        return outputs


class MtpHead(mtp_head.MtpHead):
    """`treeflash.decoding.interfaces.ARHead` in PyTorch."""

    ops = OPERATIONS

    def __init__(self, model: MtpModel, target: Target) -> None:
        super().__init__(model, OutputStage(model, target))
        self.module = model

    @torch.inference_mode()
    def transitions(
        self, blocks: Sequence[MtpBlock], options: TableOptions
    ) -> list[TransitionTable]:
        return super().transitions(blocks, options)

    @torch.inference_mode()
    def log_probs(self, block: MtpBlock, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        return super().log_probs(block, previous)
