"""Heads that draft depth by depth: their layer, their rows, and the tables they give.

See `treeflash.drafters.mtp_heads` for what a row is. The KV cache of a sequence has a row for each
committed position, and behind them the rows of the drafts of one table. The keys and values of
committed rows need no attention, so a prompt costs little more than their projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

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
from treeflash_mlx.cache import KVCache, share_storage, to_host
from treeflash_mlx.drafter import OutputStage
from treeflash_mlx.drafter_model import OwnVocabulary
from treeflash_mlx.head_operations import OPERATIONS
from treeflash_mlx.numerics import log_softmax, top_log_probs
from treeflash_mlx.state import State, project_contexts
from treeflash_mlx.target import Target

CHUNK = 2048
"""Committed rows whose keys and values are computed at once."""


class MtpModel(MtpLayer, nn.Module):
    """The layer as a module of MLX, with its own vocabulary."""

    ops = OPERATIONS

    def __init__(self, config: MtpConfig, own: OwnVocabulary) -> None:
        super().__init__(config)
        self._own = own  # loaded already, so not among the parameters

    @property
    def own(self) -> OwnVocabulary:
        """The parts of the vocabulary that are not the target's."""
        return self._own


@dataclass(eq=False)
class MtpCache(KVCache):
    """The rows of one sequence, and the target's states that they read.

    The last position's row has an uncommitted token: it is computed again for every draft.
    """

    layers_without_keys = 1  # the last, which has the states as (1, 1, columns, hidden_size)

    def append(self, states: Sequence[mx.array]) -> None:
        """Note the (n, hidden_size) states of new committed positions."""
        for part in states:
            share_storage([self]).write(self.num_layers - 1, [part[None, None]], self.length)
            self.length += len(part)

    def states(self, first: int, stop: int) -> mx.array:
        """Return the (stop - first, hidden_size) states of committed positions."""
        return share_storage([self]).read(self.num_layers - 1, stop, first)[0][0, 0]

    def export(self, first: int, stop: int) -> StateArrays:
        """Export all rows but the last position's: it depends on the token after it."""
        rows = super().export(max(first - 1, 0), max(stop - 1, 0))
        if self.storage is not None:
            rows[f"{self.num_layers - 1}.0"] = to_host(self.states(first, stop)[None, None])
        return rows

    def stored_columns(self, layer: int) -> int:
        return self.length if layer == self.num_layers - 1 else max(self.length - 1, 0)

    def read(self) -> NDArray[np.float32]:
        return super().read()[..., : max(self.length - 1, 0), :]


@dataclass(frozen=True, eq=False)
class MtpBlock:
    """The root's row after a draft, with the (1, hidden_size) output of the layer.

    It has `length` rows. For Gemma 4's assistant `cache` is the target's.
    """

    root: int
    output: mx.array
    cache: KVCache
    length: int
    depths: int


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one depth of all sequences, n of each: (sequences * n, hidden_size) outputs.

    (sequences, n, c) `visible` says which of the c drafted rows so far each row sees, and `sizes`
    how many of them a sequence has at each depth.
    """

    outputs: mx.array
    visible: mx.array
    sizes: tuple[int, ...] = ()


class MtpDrafter:
    """`treeflash.decoding.interfaces.Drafter` in MLX: the rows of committed positions."""

    def __init__(self, model: MtpModel, target: Target) -> None:
        self.model, self.output = model, OutputStage(model, target)

    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[MtpBlock]:
        """Compute the rows of all sequences together; earlier parts of prompts chunk by chunk."""
        project_contexts([state for state, _ in roots], self.model.project)
        new: list[tuple[MtpCache, int, list[int]]] = []
        for state, root in roots:
            cache, tokens = self._append(state)
            first, tokens = cache.length - 1 - len(tokens), [*tokens, root]
            while len(tokens) > CHUNK:
                self._write([(cache, first, tokens[:CHUNK])])
                mx.eval(share_storage([cache]).layers)
                first, tokens = first + CHUNK, tokens[CHUNK:]
            new.append((cache, first, tokens))
        (y, residual), positions = self._write(new)
        last = mx.array(np.cumsum([len(tokens) for _, _, tokens in new]) - 1)
        q, gate = self.model.layer.self_attn.queries(y[last], positions[last])
        caches = [cache for cache, _, _ in new]
        attended = attend(self.model.config, q, caches, [x.length for x in caches], 0, None)
        outputs = self.model.finish(attended, gate, residual[last])
        most = self.model.config.depths
        return [
            MtpBlock(root, outputs[i : i + 1], cache, cache.length, min(depths or most, most))
            for i, ((_, root), cache) in enumerate(zip(roots, caches, strict=True))
        ]

    def _append(self, state: State) -> tuple[MtpCache, list[int]]:
        """Append the committed positions' states to the cache, and return new rows' tokens."""
        cache = state.drafter
        assert isinstance(cache, MtpCache)
        first = max(cache.length - 1, 0)
        cache.append(state.context)
        state.context = []
        return cache, state.tokens[first + 1 :]

    def _write(
        self, rows: Sequence[tuple[MtpCache, int, list[int]]]
    ) -> tuple[tuple[mx.array, mx.array], mx.array]:
        """Write the keys and values of rows: their cache, the first one, and their tokens.

        Returns what `MtpModel.read` does, and the positions.
        """
        flat = mx.array([token for _, _, tokens in rows for token in tokens], mx.int32)
        numbers = [first + np.arange(len(tokens)) for _, first, tokens in rows]
        positions = mx.array(np.concatenate(numbers), mx.int32)
        states = []
        for cache, first, tokens in rows:
            states.append(cache.states(first, first + len(tokens)))
        read = self.model.read(self.output.embed(flat), mx.concatenate(states))
        k, v = self.model.layer.self_attn.keys_and_values(read[0], positions)
        write([(cache, first, len(tokens)) for cache, first, tokens in rows], k, v)
        return read, positions

    def marginals(self, blocks: Sequence[MtpBlock], options: TableOptions) -> list[TransitionTable]:
        raise ConfigError(NO_MARGINALS)

    def log_probs(self, block: MtpBlock) -> NDArray[np.float32]:
        raise ConfigError(NO_MARGINALS)


def write(segments: Sequence[tuple[KVCache, int, int]], k: mx.array, v: mx.array) -> None:
    """Write the rows of several sequences: each cache, its first column and its number of rows."""
    row = 0
    for cache, first, n in segments:
        part = slice(row, row + n)
        share_storage([cache]).write(0, [k[:, :, part], v[:, :, part]], first)
        row += n


def attend(
    config: MtpConfig,
    queries: mx.array,
    caches: Sequence[KVCache],
    committed: Sequence[int],
    depth: int,
    visible: mx.array | None,
) -> mx.array:
    """Attend from each sequence's rows to its columns: (sequences * n, heads, head_dim).

    The (1, heads, sequences * n, head_dim) queries are of rows of a depth. They see the columns of
    committed rows and of the root as far as the window reaches, and of the c columns behind them
    what (sequences, n, c) `visible` tells; None if there are none.
    """
    n, drafted = queries.shape[2] // len(caches), 0 if visible is None else visible.shape[2]
    out = []
    for i, (cache, length) in enumerate(zip(caches, committed, strict=True)):
        mask, first = None, first_visible(config, length, depth)
        if visible is not None:
            mask = mx.pad(visible[i], [(0, 0), (length - first, 0)], constant_values=True)
        y = mx.fast.scaled_dot_product_attention(
            queries[:, :, i * n : (i + 1) * n],
            *share_storage([cache]).read(0, length + drafted, first),
            scale=config.head_dim**-0.5,
            mask=mask,
        )
        out.append(y[0].swapaxes(0, 1))
    return mx.concatenate(out)


class MtpHead:
    """`treeflash.decoding.interfaces.ARHead` in MLX, one pass of the layer for each depth."""

    def __init__(self, model: MtpModel, target: Target) -> None:
        self.model, self.output = model, OutputStage(model, target)

    def transitions(
        self, blocks: Sequence[MtpBlock], options: TableOptions
    ) -> list[TransitionTable]:
        """Run each depth of all sequences as one batch of rows, and read all depths at once."""
        depths, batch = blocks[0].depths, len(blocks)
        noise = None
        if options.noise is not None:
            noise = self.output.noise(options.noise).reshape(batch, depths, -1)
        width = min(options.m, MAX_PATHS if options.rows is None else options.rows, MAX_PATHS)
        rows = self._start(blocks)
        path_log_probs = mx.zeros((batch, 1))
        arrays: list[mx.array] = []
        for depth in range(depths):
            n = len(rows.outputs) // batch
            logits = self.output.logits(self.model.norm(rows.outputs)).astype(mx.float32)
            if noise is not None:
                logits = logits + mx.repeat(noise[:, depth], n, 0)
            k = min(options.k, logits.shape[1])
            tokens, log_probs = top_log_probs(logits, k, options.temperature)
            tokens = self.output.to_target(tokens).reshape(batch, n * k)
            log_probs = log_probs.reshape(batch, n, k)
            children = (path_log_probs[:, :, None] + log_probs).reshape(batch, n * k)
            ranks = mx.concatenate([mx.full((batch, 1), mx.inf), children[:, 1:]], 1)
            # The first child is the chain's, which must not end here.
            kept = mx.argsort(-ranks, axis=1)[:, : min(width, n * k)]
            arrays += [tokens, log_probs.reshape(batch, n * k), kept]
            if depth + 1 < depths:
                path_log_probs = mx.take_along_axis(children, kept, 1)
                next_tokens = mx.take_along_axis(tokens, kept, 1)
                rows = self._step(blocks, rows, depth + 1, next_tokens, kept // k)
        # Token ids are exact in float32, and one array needs one read from the device.
        numbers = np.array(mx.concatenate([array.astype(mx.float32) for array in arrays], 1))
        ends = np.cumsum([array.shape[1] for array in arrays])[:-1]
        tables = []
        for sequence in numbers:
            parts = np.split(sequence, ends)
            tokens_, kept_ = ([x.astype(np.int32) for x in parts[i::3]] for i in (0, 2))
            tables.append(TransitionTable.from_paths(tokens_, parts[1::3], kept_))
        return tables

    def log_probs(self, block: MtpBlock, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        rows = self._start([block])
        outputs = [rows.outputs]
        for depth in range(1, len(previous)):
            token, parent = mx.array(previous[None, depth : depth + 1]), mx.zeros((1, 1), mx.int32)
            rows = self._step([block], rows, depth, token, parent)
            outputs.append(rows.outputs)
        logits = self.output.logits(self.model.norm(mx.concatenate(outputs)))
        return np.array(self.output.over_target_vocabulary(log_softmax(logits)))

    def _start(self, blocks: Sequence[MtpBlock]) -> Rows:
        outputs = mx.concatenate([block.output for block in blocks])
        return Rows(outputs, mx.zeros((len(blocks), 1, 0), mx.bool_))

    def _step(
        self,
        blocks: Sequence[MtpBlock],
        rows: Rows,
        depth: int,
        tokens: mx.array,
        parents: mx.array,
    ) -> Rows:
        """Return the rows of (sequences, n) tokens, which follow rows of the depth before.

        `parents` are (sequences, n) indices of these rows in each sequence.
        """
        (batch, n), model = tokens.shape, self.model
        before, drafted = rows.visible.shape[1:]
        places = (parents + before * mx.arange(batch)[:, None]).reshape(-1)
        states = model.feedback(rows.outputs[places])
        y, residual = model.read(self.output.embed(tokens.reshape(-1)), states)
        numbers = np.repeat([block.length - 1 + depth for block in blocks], n)
        positions = mx.array(numbers, mx.int32)
        q, gate = model.layer.self_attn.queries(y, positions)
        k, v = model.layer.self_attn.keys_and_values(y, positions)
        caches = [block.cache for block in blocks]
        write([(block.cache, block.length + drafted, n) for block in blocks], k, v)
        ancestors = rows.visible.reshape(batch * before, drafted)[places].reshape(batch, n, drafted)
        itself = mx.broadcast_to(mx.eye(n, dtype=mx.bool_), (batch, n, n))
        visible = mx.concatenate([ancestors, itself], 2)
        if hidden := hidden_rows(model.config, rows.sizes, depth):
            visible[:, :, :hidden] = False
        lengths = [block.length for block in blocks]
        attended = attend(model.config, q, caches, lengths, depth, visible)
        return Rows(model.finish(attended, gate, residual), visible, (*rows.sizes, n))
