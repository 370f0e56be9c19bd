"""Heads that draft depth by depth: the rows of committed positions, and their caches.

See `treeflash.drafters.mtp_heads` for what a row is. The KV cache of a sequence has a row for each
committed position, and behind them the rows of the drafts of one table. The keys and values of
committed rows need no attention, so a prompt costs little more than their projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

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
        if positions.ndim == 2 and (axes := self.config.rotary_axes) is not None:
            return self.rotary.turn(upload(positions[list(axes)].T, like.device), like.dtype)
        time = positions if positions.ndim == 1 else positions[0]
        return self.rotary(upload(time, like.device), like.dtype)

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
    # The first position and the (n, hidden_size) embeddings of new tokens among which are features
    # of images, until their rows are computed.
    merged: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.hidden is None else self.hidden.nbytes)

    def append(self, states: Sequence[Tensor]) -> None:
        """Note the (n, hidden_size) states of new committed positions.

        They are (n, 2, hidden_size) with `BaseState.merged`.
        """
        self.merged = []
        for part in states:
            if part.ndim == 3:
                part, embedded = part.unbind(1)
                self.merged.append((self.length, embedded))
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


NewRows: TypeAlias = tuple[Any, int, list[int]]
"""The state of a sequence, the first of its rows that are computed, and their tokens."""


def embed_rows(output: OutputStage, rows: Sequence[NewRows], device: torch.device) -> Tensor:
    """Return the (n, hidden_size) embeddings of rows' tokens, or features of images."""
    tokens = np.array([token for _, _, part in rows for token in part])
    embedded, start = output.embed(upload(tokens, device)), 0
    for state, first, part in rows:
        for position, merged in state.drafter.merged:
            row = position - 1 - first  # a row has the token after its own position
            begin, end = max(row, 0), min(row + len(merged), len(part))
            if begin < end:
                embedded[start + begin : start + end] = merged[begin - row : end - row]
        start += len(part)
    return embedded


def row_positions(rows: Sequence[NewRows]) -> NDArray[np.int32]:
    """Return the (3, n) rotary positions of rows."""
    parts = [state.row_positions(first, first + len(tokens)) for state, first, tokens in rows]
    return np.concatenate(parts, 1)


class MtpDrafter:
    """`treeflash.decoding.interfaces.Drafter` in PyTorch: the rows of committed positions."""

    def __init__(self, model: MtpModel, target: Target) -> None:
        self.model = model
        self.target = target
        self.output = OutputStage(model, target)  # embeds tokens, and computes logits

    @torch.inference_mode()
    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[MtpBlock]:
        """Compute the rows of all sequences together; earlier parts of prompts chunk by chunk."""
        new: list[NewRows] = []
        for state, root in roots:
            cache = state.drafter
            assert isinstance(cache, MtpCache)
            first = max(cache.length - 1, 0)
            cache.append(state.context)
            state.context = []
            tokens = [*state.tokens[first + 1 :], root]
            while len(tokens) > CHUNK:
                self._write([(state, first, tokens[:CHUNK])])
                first, tokens = first + CHUNK, tokens[CHUNK:]
            new.append((state, first, tokens))
        read, rotation = self._write(new)
        ends = np.cumsum([len(tokens) for _, _, tokens in new]) - 1
        last = upload(ends, self.target.device)
        y, residual = (x.index_select(0, last) for x in read)
        caches = [state.drafter for state, _, _ in new]
        for cache in caches:
            cache.merged = []
        cos, sin = (x.index_select(0, last) for x in rotation)
        q, gate = self.model.layer.self_attn.queries(y, (cos, sin))
        attended = self.model.attend(q, caches, [x.length for x in caches], 0, None)
        outputs = self.model.finish(attended, gate, residual)
        most = self.model.config.depths
        return [
            MtpBlock(
                *(output, state.drafter, state.length),
                position=state.length - 1 + state.shift,
                depths=min(depths or most, most),
            )
            for output, (state, _) in zip(outputs.split(1), roots, strict=True)
        ]

    def _write(
        self, rows: Sequence[NewRows]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Write keys and values of rows; returns what `MtpModel.read` does, and the rotation."""
        embedded = embed_rows(self.output, rows, self.target.device)
        states = [x.drafter.hidden[first : first + len(tokens)] for x, first, tokens in rows]
        read = self.model.read(embedded, torch.cat(states))
        rotation = self.model.rotation(row_positions(rows), read[0])
        k, v = self.model.layer.self_attn.keys_and_values(read[0], rotation)
        self.model.write([(x.drafter, first, len(tokens)) for x, first, tokens in rows], k, v)
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
        runs: list[tuple[NewRows, Tensor]] = []
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
                rows = state, first, tokens[:PARALLEL_CHUNK]
                self._run([(rows, cache.hidden[first:stop])])
                first, tokens = stop, tokens[PARALLEL_CHUNK:]
            states = torch.cat([cache.hidden[first : cache.length], mask.expand(masks, -1)])
            tokens += [config.mask_token_id or 0] * masks
            runs.append(((state, first, tokens), states))
        parts = self._run(runs).split([len(tokens) for (_, _, tokens), _ in runs])
        blocks = []
        for (state, root), part in zip(roots, parts, strict=True):
            state.drafter.merged = []
            hidden, token = part[-config.depths :], upload(np.array([root]), self.target.device)
            blocks.append(Block(root, token, hidden[:depths], hidden, hidden, state.tokens[-1]))
        return blocks

    def _run(self, runs: Sequence[tuple[NewRows, Tensor]]) -> Tensor:
        """Run rows of several sequences, with their states."""
        device, groups = self.target.device, self.rows.config.num_attention_heads
        groups //= self.rows.config.num_key_value_heads
        rows = [run[0] for run in runs]
        embedded = embed_rows(self.output, rows, device)
        segments = [(state.drafter, first, len(tokens)) for state, first, tokens in rows]
        sizes, masks = [n for _, _, n in segments], []
        for _, first, n in segments:
            seen = torch.ones(n, first + n, dtype=torch.bool, device=device)
            masks.append(group_mask(additive_mask(seen.tril(first), embedded.dtype), groups))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            PackedRows(segments, k).write(layer, k, v)
            keys_and_values = [x.first_columns(layer, first + n) for x, first, n in segments]
            return grouped_attention(q, keys_and_values, masks, sizes, q.shape[-1] ** -0.5)[0]

        rotation = self.rows.rotation(row_positions(rows), embedded)
        states = torch.cat([run[1] for run in runs])
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
