"""How heads draft depth by depth, written once for PyTorch and MLX.

A depth of a draft is one pass of the layer over rows, `MAX_PATHS` of a sequence at most: the best
children of all paths so far, which become the rows of the next depth. A row attends to the
committed rows of its sequence, its ancestors and itself. `treeflash.drafters.mtp_layer` has the
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.output_stage import OutputStage
from treeflash.decoding.recurrent_head import best_children, tables
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.heads.operations import Array, Operations
from treeflash.drafters.mtp_heads import MAX_PATHS, NO_MARGINALS, hidden_depths
from treeflash.errors import ConfigError


@dataclass(frozen=True, eq=False)
class MtpBlock:
    """The root's row after a draft."""

    output: Array  # (1, hidden_size) of the layer
    cache: Any  # keys of the sequence's rows; for Gemma 4's assistant the target's KV cache
    length: int  # rows of the sequence, the root's last
    position: int  # the rotary position of the root's row
    depths: int  # wanted


@dataclass(frozen=True, eq=False)
class MtpRows:
    """The rows of one depth of all sequences, n of each."""

    outputs: Array  # (sequences * n, hidden_size) of the layer
    # (sequences, n, depth) the drafted rows that each row sees: its ancestors and itself, by their
    # numbers among the drafted rows of the sequence; None of roots
    paths: Array | None = None
    drafted: int = 0  # rows of a sequence so far, without the root's


class DraftedColumns(Protocol):
    """The columns of KV caches for drafted rows, behind the committed rows of each sequence."""

    def rotation(self, depth: int, n: int, like: Array) -> Any:
        """Return the rotation of n rows of each sequence, in the dtype of `like`."""

    def attend(self, depth: int, rows: MtpRows, q: Array, k: Array, v: Array) -> Array:
        """Write the keys and values of rows of a depth, then attend from them.

        The (1, heads, sequences * n, head_dim) queries give (sequences * n, heads, head_dim). The
        rows have no outputs yet.
        """


@dataclass(frozen=True, eq=False)
class CacheColumns:
    """`DraftedColumns` of caches that are written and read one by one."""

    ops: Operations
    model: Any  # the backend's `MtpLayer`
    blocks: Sequence[MtpBlock]

    def rotation(self, depth: int, n: int, like: Array) -> Any:
        positions = np.repeat([block.position + depth for block in self.blocks], n)
        return self.model.rotation(positions, like)

    def attend(self, depth: int, rows: MtpRows, q: Array, k: Array, v: Array) -> Array:
        assert rows.paths is not None
        before = rows.drafted - rows.paths.shape[1]
        segments = [(x.cache, x.length + before, rows.paths.shape[1]) for x in self.blocks]
        self.model.write(segments, k, v)
        seen = rows.paths[:, :, hidden_depths(self.model.config, depth) :, None]
        visible = (seen == self.ops.arange(rows.drafted, q)).any(2)
        caches, lengths = [x.cache for x in self.blocks], [x.length for x in self.blocks]
        return self.model.attend(q, caches, lengths, depth, visible)


class MtpDrafter:
    """A drafter of heads that draft depth by depth, which have no marginals."""

    def marginals(self, blocks: Sequence[MtpBlock], options: TableOptions) -> list[TransitionTable]:
        raise ConfigError(NO_MARGINALS)

    def log_probs(self, block: MtpBlock) -> NDArray[np.float32]:
        raise ConfigError(NO_MARGINALS)


def root_blocks(
    roots: Sequence[tuple[Any, int]], outputs: Sequence[Array], depths: int | None, most: int
) -> list[MtpBlock]:
    """Return the blocks of sequences from the (1, hidden_size) outputs of their roots' rows.

    At most `depths` are wanted, of the `most` that the head drafts.
    """
    return [
        MtpBlock(
            *(output, state.drafter, state.length),
            position=state.length - 1 + state.positions.shift,
            depths=min(depths or most, most),
        )
        for output, (state, _) in zip(outputs, roots, strict=True)
    ]


NewRows: TypeAlias = tuple[Any, int, list[int]]
"""The state of a sequence, the first of its rows that are computed, and their tokens."""


def unread_states(state: Any) -> list[Array]:
    """Return the (n, hidden_size) states of the positions that the drafter has not read.

    A part of the context is (n, 2, hidden_size) with `PassRows.merged`.
    """
    return [part if part.ndim == 2 else part[:, 0] for part in state.context]


def new_rows(state: Any, root: int, chunk: int, compute: Callable[[NewRows], object]) -> NewRows:
    """Return the new rows of a sequence, `chunk` at most; `compute` is called with earlier parts.

    A row has the token after its own position, so that the last one has the root.
    """
    state.drafter.write_states(unread_states(state))
    first = max(state.drafter.length - 1, 0)
    tokens = [*state.tokens[first + 1 :], root]
    while len(tokens) > chunk:
        compute((state, first, tokens[:chunk]))
        first, tokens = first + chunk, tokens[chunk:]
    return state, first, tokens


class ParallelDrafter:
    """P-EAGLE: rows with the mask token follow the root's, and all rows are one causal text."""

    rows: Any  # the backend's `MtpLayer`

    @cached_property
    def mask(self) -> Array:
        """The (1, hidden_size) state of rows with the mask token."""
        return self.rows.project(self.rows.mask_hidden.reshape(1, -1))

    def with_masks(self, rows: Sequence[NewRows], masks: int) -> list[NewRows]:
        """Return the rows of sequences, and behind each sequence's some with the mask token."""
        added = [self.rows.config.mask_token_id] * masks
        return [(state, first, [*tokens, *added]) for state, first, tokens in rows]


def row_tokens(rows: Sequence[NewRows]) -> NDArray[np.int32]:
    """Return the (n,) tokens of rows."""
    return np.array([token for _, _, tokens in rows for token in tokens], np.int32)


def row_positions(rows: Sequence[NewRows]) -> NDArray[np.int32]:
    """Return the (3, n) rotary positions of rows."""
    parts = [state.positions.rows(first, first + len(tokens)) for state, first, tokens in rows]
    return np.concatenate(parts, 1)


def merge_features(embedded: Array, rows: Sequence[NewRows]) -> Array:
    """Put features of images in place of the (n, hidden_size) embeddings of rows' tokens.

    They are in the context, whose parts with features have `PassRows.merged`.
    """
    start = 0
    for state, first, tokens in rows:
        row = state.drafter.length - 1 - first  # a row has the token after its own position
        for part in state.context:
            begin, end = max(row, 0), min(row + len(part), len(tokens))
            if part.ndim == 3 and begin < end:
                embedded[start + begin : start + end] = part[begin - row : end - row, 1]
            row += len(part)
        start += len(tokens)
    return embedded


class MtpHead:
    """`treeflash.decoding.interfaces.ARHead`, one pass of the layer for each depth.

    Args:
        model: the backend's `MtpLayer`.
        output: the backend's output stage of the head.
    """

    def __init__(self, model: Any, output: OutputStage) -> None:
        self.model, self.output, self.ops = model, output, output.ops

    def transitions(
        self, blocks: Sequence[MtpBlock], options: TableOptions
    ) -> list[TransitionTable]:
        """Run each depth of all sequences as one batch of rows, and read all depths at once."""
        columns, depths = CacheColumns(self.ops, self.model, blocks), blocks[0].depths
        outputs = self.ops.concatenate([block.output for block in blocks], 0)
        noises = self.output.noise_by_depth(options.noise, depths)
        found = self.search(columns, outputs, width_of(options), options, noises)
        return tables(self.ops.read(found), depths, depths)

    def search(
        self,
        columns: DraftedColumns,
        outputs: Array,  # (B, hidden_size) of the roots' rows
        width: int,  # see `width_of`
        options: TableOptions,  # whose other sizes and noise are not used
        noises: Iterable[Array | None],  # (B, Vd) noise of each depth, added to the logits
    ) -> list[Array]:
        """Search the paths of B sequences, by arrays alone whose sizes the options fix.

        Returns for each depth (B, size) arrays as `RecurrentHead.follow` does.
        """
        ops, batch, rows, arrays = self.ops, len(outputs), MtpRows(outputs), list[Array]()
        path_log_probs: Array | None = None
        children: tuple[Array, Array] | None = None
        for depth, noise in enumerate(noises):
            if children is not None:
                rows = self._step(columns, rows, depth, *children)
            n = len(rows.outputs) // batch
            logits = ops.float32(self.output.logits(self.model.norm(rows.outputs)))
            if noise is not None:
                logits = logits + ops.repeat(noise, n)
            k = min(options.k, logits.shape[1])
            tokens, log_probs = ops.top_log_probs(logits, k, options.temperature)
            tokens = self.output.to_target(tokens).reshape(batch, n * k)
            log_probs = log_probs.reshape(batch, n * k)
            kept, path_log_probs = best_children(ops, path_log_probs, log_probs, k, width)
            arrays += [tokens, log_probs, kept]
            children = ops.gather(tokens, kept), kept // k
        return arrays

    def log_probs(self, block: MtpBlock, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        columns, rows = CacheColumns(self.ops, self.model, [block]), MtpRows(block.output)
        outputs = [rows.outputs]
        parents = self.ops.ids([[0]], rows.outputs)
        for depth in range(1, len(previous)):
            token = self.ops.ids([[int(previous[depth])]], rows.outputs)
            rows = self._step(columns, rows, depth, token, parents)
            outputs.append(rows.outputs)
        logits = self.output.logits(self.model.norm(self.ops.concatenate(outputs, 0)))
        log_probs = self.output.over_target_vocabulary(self.ops.log_softmax(logits))
        (found,) = self.ops.read([log_probs])
        return found

    def _step(
        self,
        columns: DraftedColumns,
        rows: MtpRows,
        depth: int,
        tokens: Array,  # (sequences, n) of the target's vocabulary
        parents: Array,  # (sequences, n) rows of the depth before, of each sequence
    ) -> MtpRows:
        """Return the rows of tokens, which follow rows of the depth before."""
        (batch, n), ops, model = tokens.shape, self.ops, self.model
        before = len(rows.outputs) // batch
        places = (parents + before * ops.arange(batch, parents)[:, None]).reshape(-1)
        states = model.feedback(ops.take(rows.outputs, places))
        y, residual = model.read(self.output.embed(tokens.reshape(-1)), states)
        itself = ops.broadcast_to(rows.drafted + ops.arange(n, y), (batch, n))
        paths = itself[:, :, None]
        if rows.paths is not None:
            ancestors = ops.take(rows.paths.reshape(batch * before, -1), places)
            paths = ops.concatenate([ancestors.reshape(batch, n, -1), paths], 2)
        new = MtpRows(rows.outputs, paths, rows.drafted + n)
        rotation = columns.rotation(depth, n, y)
        q, gate = model.layer.self_attn.queries(y, rotation)
        k, v = model.layer.self_attn.keys_and_values(y, rotation)
        attended = columns.attend(depth, new, q, k, v)
        return replace(new, outputs=model.layer.finish(attended, gate, residual))


def width_of(options: TableOptions) -> int:
    """Return the most paths that are expanded at a depth."""
    return min(options.m, MAX_PATHS if options.rows is None else options.rows, MAX_PATHS)


def rows_by_depth(k: int, width: int, depths: int) -> list[int]:
    """Return how many rows a sequence has at the depths after the root's."""
    return [min(k ** min(depth, width), width) for depth in range(1, depths)]
