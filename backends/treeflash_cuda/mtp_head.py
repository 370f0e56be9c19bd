"""Heads that draft depth by depth: their layer, their rows, and the tables they give.

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

from treeflash.decoding.interfaces import StateArrays, TableOptions
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.mtp_heads import (
    MAX_PATHS,
    NO_MARGINALS,
    MtpConfig,
    first_visible,
    hidden_rows,
)
from treeflash.drafters.mtp_layer import MtpLayer
from treeflash.errors import ConfigError
from treeflash_cuda.attention import additive_mask, group_mask, grouped_attention
from treeflash_cuda.cache import Arena, KVCache, PackedRows, from_host, to_host
from treeflash_cuda.drafter import OutputStage
from treeflash_cuda.drafter_model import OwnVocabulary, Rotary
from treeflash_cuda.head_operations import OPERATIONS
from treeflash_cuda.numerics import top_log_probs, upload
from treeflash_cuda.target import Target

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
        return [self.layer]


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


@dataclass(frozen=True, eq=False)
class MtpBlock:
    """The root's row after a draft."""

    root: int  # token id
    output: Tensor  # (1, hidden_size) of the layer
    cache: MtpCache
    length: int  # rows of the sequence, the root's last
    depths: int  # wanted


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of one depth of all sequences, n of each."""

    outputs: Tensor  # (sequences * n, hidden_size) of the layer
    visible: Tensor  # (sequences, n, c) bool: the drafted rows so far that each row sees
    sizes: tuple[int, ...] = ()  # the numbers of rows of a sequence at the depths so far


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
        attended = attend(self.model.config, q, caches, [x.length for x in caches], 0, None)
        outputs = self.model.finish(attended, gate, residual)
        most = self.model.config.depths
        blocks = zip(roots, outputs.split(1), caches, strict=True)
        return [
            MtpBlock(root, output, cache, cache.length, min(depths or most, most))
            for (_, root), output, cache in blocks
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
        tokens_, positions = upload(flat, device), upload(numbers, device)
        states = [x.hidden[first : first + len(tokens)] for x, first, tokens in rows]  # type: ignore[index]
        read = self.model.read(self.output.embed(tokens_), torch.cat(states))
        rotation = self.model.rotary(positions, read[0].dtype)
        k, v = self.model.layer.self_attn.keys_and_values(read[0], rotation)
        PackedRows([(x, first, len(tokens)) for x, first, tokens in rows], k).write(0, k, v)
        return read, rotation

    def marginals(self, blocks: Sequence[MtpBlock], options: TableOptions) -> list[TransitionTable]:
        raise ConfigError(NO_MARGINALS)

    def log_probs(self, block: MtpBlock) -> NDArray[np.float32]:
        raise ConfigError(NO_MARGINALS)


def attend(
    config: MtpConfig,
    queries: Tensor,  # (1, heads, sequences * n, head_dim)
    caches: Sequence[MtpCache],
    committed: Sequence[int],  # columns of each sequence's committed rows and root
    depth: int,  # of the rows
    visible: Tensor | None,  # (sequences, n, c) bool, of the c columns after these; None for none
) -> Tensor:
    """Attend from each sequence's rows to its columns: (sequences * n, heads, head_dim)."""
    n, drafted = queries.shape[2] // len(caches), 0 if visible is None else visible.shape[2]
    kv_caches, masks = [], []
    groups = config.num_attention_heads // config.num_key_value_heads
    for i, (cache, length) in enumerate(zip(caches, committed, strict=True)):
        first = first_visible(config, length, depth)
        keys, values = cache.first_columns(0, length + drafted)
        kv_caches.append((keys[:, :, first:], values[:, :, first:]))
        mask = None
        if visible is not None:
            mask = F.pad(additive_mask(visible[i], queries.dtype), (length - first, 0))
            mask = group_mask(mask, groups)
        masks.append(mask)
    sizes, scale = [n] * len(caches), config.head_dim**-0.5
    return grouped_attention(queries, kv_caches, masks, sizes, scale)[0]


class MtpHead:
    """`treeflash.decoding.interfaces.ARHead` in PyTorch, one pass of the layer for each depth."""

    def __init__(self, model: MtpModel, target: Target) -> None:
        self.module = self.model = model
        self.target = target
        self.output = OutputStage(model, target)

    @torch.inference_mode()
    def transitions(
        self, blocks: Sequence[MtpBlock], options: TableOptions
    ) -> list[TransitionTable]:
        """Run each depth of all sequences as one batch of rows, and read all depths at once."""
        depths, batch = blocks[0].depths, len(blocks)
        keys = self.output.upload(options.noise)
        width = min(options.m, MAX_PATHS if options.rows is None else options.rows, MAX_PATHS)
        rows = self._start(blocks)
        path_log_probs = torch.zeros(batch, 1, device=self.target.device)
        arrays: list[Tensor] = []
        for depth in range(depths):
            n = len(rows.outputs) // batch
            logits = self.output.logits(self.model.norm(rows.outputs)).float()
            if (noise := self.output.noise(keys[depth::depths])) is not None:
                logits = logits + noise.repeat_interleave(n, 0)
            tokens, log_probs = top_log_probs(logits, options.k, options.temperature)
            tokens, k = self.output.to_target(tokens), tokens.shape[1]
            log_probs = log_probs.view(batch, n * k)
            children = (path_log_probs[:, :, None] + log_probs.view(batch, n, k)).flatten(1)
            ranks = children.clone()
            ranks[:, 0] = torch.inf  # the first child is the chain's, which must not end here
            kept = ranks.topk(min(width, n * k)).indices
            tokens = tokens.view(batch, n * k)
            arrays += [tokens, log_probs.view(torch.int32), kept.int()]
            if depth + 1 < depths:
                path_log_probs = children.gather(1, kept)
                rows = self._step(blocks, rows, depth + 1, tokens.gather(1, kept).long(), kept // k)
        numbers = torch.cat(arrays, 1).cpu().numpy()  # one read from the device
        ends = np.cumsum([array.shape[1] for array in arrays])[:-1]
        tables = []
        for sequence in numbers:
            parts = np.split(sequence, ends)
            log_probs_ = [x.view(np.float32) for x in parts[1::3]]
            tables.append(TransitionTable.from_paths(parts[::3], log_probs_, parts[2::3]))
        return tables

    @torch.inference_mode()
    def log_probs(self, block: MtpBlock, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        tokens = torch.from_numpy(previous).to(self.target.device).long()
        rows = self._start([block])
        outputs = [rows.outputs]
        for depth in range(1, len(previous)):
            parents = tokens.new_zeros(1, 1)
            rows = self._step([block], rows, depth, tokens[None, depth : depth + 1], parents)
            outputs.append(rows.outputs)
        logits = self.output.logits(self.model.norm(torch.cat(outputs)))
        return self.output.over_target_vocabulary(logits.float().log_softmax(-1)).cpu().numpy()

    def _start(self, blocks: Sequence[MtpBlock]) -> _Rows:
        outputs = torch.cat([block.output for block in blocks])
        none = torch.zeros(len(blocks), 1, 0, dtype=torch.bool, device=outputs.device)
        return _Rows(outputs, none)

    def _step(
        self,
        blocks: Sequence[MtpBlock],
        rows: _Rows,
        depth: int,
        tokens: Tensor,  # (sequences, n) of the target's vocabulary
        parents: Tensor,  # (sequences, n) rows of the depth before, of each sequence
    ) -> _Rows:
        """Return the rows of tokens, which follow rows of the depth before."""
        (batch, n), model = tokens.shape, self.model
        before, drafted = rows.visible.shape[1:]
        places = (parents + before * torch.arange(batch, device=parents.device)[:, None]).flatten()
        states = model.feedback(rows.outputs.index_select(0, places))
        y, residual = model.read(self.output.embed(tokens.flatten()), states)
        numbers = np.repeat([block.length - 1 + depth for block in blocks], n)
        rotation = model.rotary(upload(numbers, self.target.device), y.dtype)
        q, gate = model.layer.self_attn.queries(y, rotation)
        k, v = model.layer.self_attn.keys_and_values(y, rotation)
        caches = [block.cache for block in blocks]
        segments = [(block.cache, block.length + drafted, n) for block in blocks]
        PackedRows(segments, k).write(0, k, v)
        ancestors = rows.visible.flatten(0, 1).index_select(0, places).unflatten(0, (batch, n))
        itself = torch.eye(n, dtype=torch.bool, device=y.device).expand(batch, n, n)
        visible = torch.cat([ancestors, itself], 2)
        visible[:, :, : hidden_rows(model.config, rows.sizes, depth)] = False
        lengths = [block.length for block in blocks]
        attended = attend(model.config, q, caches, lengths, depth, visible)
        return _Rows(model.finish(attended, gate, residual), visible, (*rows.sizes, n))
