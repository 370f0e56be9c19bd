"""Heads that draft depth by depth: the rows of committed positions, and their caches.

See `treeflash.drafters.mtp_heads` for what a row is. The KV cache of a sequence has a row for each
committed position, and behind them the rows of the drafts of one table. The keys and values of
committed rows need no attention, so a prompt costs little more than their projections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.decoding import mtp_head
from treeflash.decoding.backend_base import note_drafted, project_contexts
from treeflash.decoding.interfaces import StateArrays, TableOptions
from treeflash.decoding.mtp_head import (
    MtpBlock,
    MtpRows,
    NewRows,
    merge_features,
    root_blocks,
    row_positions,
    row_tokens,
    unread_states,
)
from treeflash.decoding.recurrent_head import tables
from treeflash.decoding.sampling import Noise
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.mtp_heads import MtpConfig, first_visible
from treeflash.drafters.mtp_layer import MtpLayer
from treeflash_cuda.attention import additive_mask, group_mask, grouped_attention
from treeflash_cuda.cache import (
    Arena,
    Index,
    KVCache,
    SeenColumns,
    Slab,
    WrittenRows,
    from_host,
    to_host,
)
from treeflash_cuda.drafter import MAX_CONTEXT, Block, Drafter, OutputStage
from treeflash_cuda.drafter_model import OPERATIONS, OwnVocabulary, Rotary, Rotation, join, split
from treeflash_cuda.gpu.graphs import (
    MAX_ROWS,
    Outputs,
    padded_order,
    power_of_four,
    power_of_two,
    round_up,
)
from treeflash_cuda.numerics import pack, unpack, upload
from treeflash_cuda.operations import Operations
from treeflash_cuda.target import Target
from treeflash_cuda.visible_keys import RowPlan, SharedWork, VisibleKeys, equal_work, page_tables

PARALLEL_CHUNK = 512
"""Committed rows of P-EAGLE, which attend, that are computed at once."""
CHUNK = 2048
"""Committed rows whose keys and values are computed at once."""
NO_COLUMNS: NDArray[np.integer] = np.empty(0, np.int64)


class MtpModel(MtpLayer, nn.Module):
    """The layer as a module of PyTorch, with the rotations of its rows and its own vocabulary."""

    ops = OPERATIONS
    operations: Operations | None = None  # for rows; None attends with masks

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
        WrittenRows(segments, k).write(0, k[0], v[0])

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
        for i, (cache, length) in enumerate(zip(caches, committed, strict=True)):
            first = first_visible(config, length, depth)
            keys, values = SeenColumns(cache, length + drafted).layer(0)
            keys_and_values.append((keys[:, :, first:], values[:, :, first:]))
            mask = None
            if visible is not None:
                mask = F.pad(additive_mask(visible[i], queries.dtype), (length - first, 0))
                mask = group_mask(mask, config.groups)
            masks.append(mask)
        sizes, scale = [n] * len(caches), config.attention_scale
        return grouped_attention(queries, keys_and_values, masks, sizes, scale)[0]


class MtpCache(KVCache):
    """The rows of one sequence, and the target's states that they read.

    The row of the last position holds the token after it, which is not committed: it is computed
    again for every draft.
    """

    rewritten = 1

    def allocate(self) -> MtpSlab:
        slab = super().allocate()
        assert isinstance(slab, MtpSlab)
        return slab

    def reserve_draft(self) -> MtpSlab:
        """Reserve the columns that a draft and its table write, and return their slab."""
        self.reserve_rows(max(self.length - self.rewritten, 0), self.capacity)
        return self.allocate()

    def export(self, first: int, stop: int) -> StateArrays:
        """Export all rows but the last position's: it depends on the token after it."""
        if not self.length:
            return {}
        rows = super().export(max(first - 1, 0), max(stop - 1, 0))
        return rows | {"hidden": to_host(self.allocate().hidden[self.index(first, stop)])}

    def load(self, arrays: StateArrays, length: int) -> None:
        rows = dict(arrays)
        if (hidden := rows.pop("hidden", None)) is not None:
            self.write_stored(rows, max(self.length - 1, 0))
            self.reserve_rows(self.length, length)
            index, storage = self.index(self.length, length), self.allocate().hidden
            storage[index] = from_host(hidden).to(storage.device)
            self.length = length

    def read(self) -> NDArray[np.float32]:
        return super().read()[..., : max(self.length - 1, 0), :]


class MtpSlab(Slab):
    """One allocation of rows: (columns, hidden_size) states beside their keys and values."""

    def __init__(self, parts: Sequence[Tensor], page: int, hidden_size: int) -> None:
        super().__init__(parts, page)
        self.hidden = parts[0].new_empty(self.columns, hidden_size)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.hidden.nbytes

    def copy(self, target: Index, other: Slab, source: Index) -> None:
        super().copy(target, other, source)
        assert isinstance(other, MtpSlab)
        self.hidden[target] = other.hidden[source]


class MtpArena(Arena):
    """Hands out the columns of row caches."""

    def __init__(self, layers: int, hidden_size: int) -> None:
        super().__init__(layers)
        self.hidden_size = hidden_size

    def set_shape(self, like: Tensor) -> None:
        super().set_shape(like)
        self.column_nbytes += self.hidden_size * like.element_size()

    def new_cache(self, capacity: int) -> MtpCache:
        return MtpCache(self, capacity)

    def new_slab(self, parts: Sequence[Tensor]) -> MtpSlab:
        return MtpSlab(parts, self.page, self.hidden_size)


@dataclass(frozen=True, eq=False)
class SlabColumns:
    """`DraftedColumns` of the sequences of one slab: a function of tensors."""

    model: MtpModel
    operations: Operations
    slab: MtpSlab
    pages: Tensor  # see `VisibleKeys`
    table: Tensor  # (t,) int32 of each sequence; see `VisibleKeys`
    columns: Tensor  # (t, n) int32 of the rows of the drafts of one table
    length: Tensor  # (t,) int32 committed rows, the root's last
    position: Tensor  # (t,) int32 rotary position of the root's row
    work: Mapping[int, SharedWork]  # work by the rows of a sequence

    def rotation(self, depth: int, n: int, like: Tensor) -> Rotation:
        positions = (self.position + depth).repeat_interleave(n)
        return self.model.rotary(positions, like.dtype)

    def attend(self, depth: int, rows: MtpRows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert rows.paths is not None
        n = rows.paths.shape[1]
        columns = self.columns[:, rows.drafted - n : rows.drafted].flatten()
        self.slab.write_layer(columns.long(), k, v)
        return self.read(depth, n, q, rows.paths.flatten(0, 1))

    def read(self, depth: int, n: int, q: Tensor, paths: Tensor) -> Tensor:
        """Attend from n rows of each sequence, with (t * n, depth) `MtpRows.paths`."""
        table, shared = (x.repeat_interleave(n) for x in (self.table, self.length))
        end = shared + depth
        parts = self.pages, table, shared, torch.zeros_like(end), end, paths.int(), self.work[n]
        seen, (window,) = VisibleKeys(*parts), self.model.config.sliding_windows
        keys, values = self.slab.layer(0)
        return self.operations.tree_attention(
            *(q[0].transpose(0, 1).contiguous(), keys, values),
            seen if window is None else seen.within(window),
            scale=self.model.config.attention_scale,
        )


def columns_of(rows: NewRows) -> NDArray[np.integer]:
    """Return the columns of rows in the slab."""
    state, first, tokens = rows
    columns: NDArray[np.integer] = state.drafter.columns_at(first + np.arange(len(tokens)))
    return columns


def is_plain(rows: NewRows) -> bool:
    """Return whether rows have tokens alone, and one rotary position; so has the root's row."""
    state, first, tokens = rows
    positions = state.positions.rows(first, first + len(tokens))
    has_features = any(part.ndim == 3 for part in state.context)
    return not has_features and bool((positions == positions[0]).all())


def by_slab(roots: Sequence[tuple[Any, int]]) -> dict[MtpSlab, list[int]]:
    """Return the indices of the sequences of each slab, where their drafts have columns."""
    passes: dict[MtpSlab, list[int]] = {}
    for i, (state, _) in enumerate(roots):
        passes.setdefault(state.drafter.reserve_draft(), []).append(i)
    return passes


def lacking_rows(
    slab: MtpSlab,
    roots: Sequence[tuple[Any, int]],
    most: int,
    compute: Callable[[list[NewRows]], object],
) -> tuple[list[NewRows], list[Tensor], NDArray[np.integer]]:
    """Return the rows that drafts lack, `most` of a sequence at most.

    `compute` is called with earlier rows of each sequence, and with all but the root's where they
    are not plain. The other results are states of new positions that are to be written, and their
    columns in the slab.
    """
    states: list[Tensor] = []
    columns: list[NDArray[np.integer]] = []
    rows: list[NewRows] = []
    for state, root in roots:
        cache, known = state.drafter, state.drafter.length
        states += unread_states(state)
        columns.append(cache.columns_at(np.arange(known, state.length)))
        first = max(known - 1, 0)
        rows.append((state, first, [*state.tokens[first + 1 :], root]))
    written, limits = np.concatenate(columns), [most if is_plain(x) else 1 for x in rows]
    if all(len(x[2]) <= limit for x, limit in zip(rows, limits, strict=True)):
        return rows, states, written
    slab.hidden.index_copy_(0, upload(written, slab.hidden.device), torch.cat(states))
    for i, limit in enumerate(limits):
        state, first, tokens = rows[i]
        while len(tokens) > limit:
            size = min(most, len(tokens) - limit)
            compute([(state, first, tokens[:size])])
            first, tokens = first + size, tokens[size:]
        rows[i] = state, first, tokens
    return rows, [], NO_COLUMNS


def padded(x: NDArray[Any], n: int) -> NDArray[Any]:
    """Return n numbers; the last ones are copies."""
    return np.pad(x, (0, n - len(x)), "edge")


class MtpDrafter(mtp_head.MtpDrafter):
    """`treeflash.decoding.interfaces.Drafter` in PyTorch: the rows of committed positions."""

    def __init__(self, model: MtpModel, target: Target) -> None:
        self.model = model
        self.target = target
        self.output = OutputStage(model, target)  # embeds tokens, and computes logits
        self.chunk = CHUNK

    @torch.inference_mode()
    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[MtpBlock]:
        """Compute the rows of all sequences of a slab together."""
        project_contexts([state for state, _ in roots], self.model.project, torch.cat)
        outputs: list[Any] = [None] * len(roots)
        for slab, members in by_slab(roots).items():
            found = self._draft([roots[i] for i in members], slab)
            for i, output in zip(members, found.split(1), strict=False):
                outputs[i] = output
        note_drafted(state for state, _ in roots)
        return root_blocks(roots, outputs, depths, self.model.config.depths)

    def _draft(self, roots: Sequence[tuple[Any, int]], slab: MtpSlab) -> Tensor:
        """Return the outputs of the roots' rows, (sequences, hidden_size) or more.

        For CUDA graphs the number of sequences is rounded up to a power of two, and the number of
        rows to a power of four.
        """
        graphs, operations, device = self.target.graphs, self.model.operations, self.target.device
        write = functools.partial(self._write_rows, slab)
        new, context, columns = lacking_rows(slab, roots, self.chunk, write)
        tokens = row_tokens(new)
        positions = row_positions(new)[0]
        places = np.concatenate([columns_of(rows) for rows in new])
        last = np.cumsum([len(part) for *_, part in new]) - 1
        order = [*range(len(new))]
        has_kernel = operations is not None and operations.runs_trees
        captured = has_kernel and graphs.is_capturing and len(tokens) <= MAX_CONTEXT * len(new)
        if captured:
            order += [0] * (power_of_two(len(new)) - len(new))
            # The added rows are copies of the last one, and so are their states.
            rows = power_of_four(len(tokens))
            tokens, positions, places = (padded(x, rows) for x in (tokens, positions, places))
            if context:
                extra = rows - len(columns)
                context.append(context[-1][-1:].expand(extra, -1))
                columns = padded(columns, rows)
        lengths = np.array([state.length for state, _ in roots])
        pages, firsts = page_tables([state.drafter.table(state.length) for state, _ in roots])
        arrays = [tokens, positions, places, columns, last[order], pages]
        arrays += [firsts[order], lengths[order]]
        arrays += equal_work(lengths, 1, order, self.model.config.groups)
        shapes = tuple(x.shape for x in arrays)

        def draft(uploaded: Tensor, context: Tensor) -> Outputs:
            tokens, positions, places, columns, last, pages, table, length, *work = unpack(
                uploaded, shapes
            )
            slab.hidden.index_copy_(0, columns.long(), context)
            embedded = self.output.embed(tokens)
            rotation = self.model.rotary(positions, embedded.dtype)
            read = self._write(slab, embedded, rotation, places)
            y, residual, cos, sin = (x.index_select(0, last) for x in (*read, *rotation))
            q, gate = self.model.layer.self_attn.queries(y, (cos, sin))
            if has_kernel:
                assert operations is not None
                columns_of_roots = SlabColumns(
                    *(self.model, operations, slab, pages, table),
                    *(table.new_empty(len(table), 0), length, length),
                    work={1: SharedWork(*work)},
                )
                attended = columns_of_roots.read(0, 1, q, last.new_empty(len(last), 0))
            else:
                caches = [state.drafter for state, _ in roots]
                attended = self.model.attend(q, caches, lengths.tolist(), 0, None)
            return (self.model.layer.finish(attended, gate, residual),)

        states = torch.cat(context) if context else slab.hidden[:0]
        inputs = upload(pack(arrays), device), states
        (outputs,) = graphs.run("the drafter", (slab, shapes), draft, *inputs, capture=captured)
        return outputs

    def _write_rows(self, slab: MtpSlab, rows: list[NewRows]) -> None:
        """Write rows of a sequence, among which may be features of images."""
        embedded = self.output.embed(upload(row_tokens(rows), self.target.device))
        embedded = merge_features(embedded, rows)
        rotation = self.model.rotation(row_positions(rows), embedded)
        self._write(slab, embedded, rotation, upload(columns_of(rows[0]), self.target.device))

    def _write(
        self, slab: MtpSlab, embedded: Tensor, rotation: Rotation, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values of (n,) rows; returns what `MtpModel.read` does."""
        columns = columns.long()
        read = self.model.read(embedded, slab.hidden.index_select(0, columns))
        k, v = self.model.layer.self_attn.keys_and_values(read[0], rotation)
        slab.write_layer(columns, k, v)
        return read


class ParallelDrafter(mtp_head.ParallelDrafter, Drafter):
    """`treeflash.decoding.interfaces.Drafter` in PyTorch, for P-EAGLE."""

    def __init__(self, model: Any, target: Target) -> None:
        super().__init__(model, target)
        self.rows: MtpModel = model
        self.chunk = PARALLEL_CHUNK

    @torch.inference_mode()
    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[Block]:
        """Run the rows of all sequences of a slab together; earlier parts of prompts before."""
        project_contexts([state for state, _ in roots], self.rows.project, torch.cat)
        blocks: dict[int, Block] = {}
        size = self.rows.config.depths
        for slab, members in by_slab(roots).items():
            part = [roots[i] for i in members]
            run = functools.partial(self._run, slab)
            rows, states, written = lacking_rows(slab, part, self.chunk, run)
            outputs, tokens = run(rows, states, written, masks=size - 1)
            ends = np.cumsum([len(tokens) + size - 1 for *_, tokens in rows]).tolist()
            for i, end in zip(members, ends, strict=True):
                slots, token = outputs[end - size : end], tokens[end - size][None]
                blocks[i] = Block(roots[i][1], slots[:depths], slots, token)
        note_drafted(state for state, _ in roots)
        return [blocks[i] for i in range(len(roots))]

    def _run(
        self,
        slab: MtpSlab,
        rows: Sequence[NewRows],
        states: Sequence[Tensor] = (),  # states of new positions
        written: NDArray[np.integer] = NO_COLUMNS,  # their columns in the slab
        masks: int = 0,  # rows with the mask token behind the rows of each sequence
    ) -> tuple[Tensor, Tensor]:
        """Return the (n, hidden_size) outputs of all rows, or more, and their (n,) tokens.

        For CUDA graphs the number of rows is rounded up, which alone fixes their shapes.
        """
        graphs, operations = self.target.graphs, self.rows.operations
        plain, rows = all(map(is_plain, rows)), self.with_masks(rows, masks)
        caches = [state.drafter for state, *_ in rows]
        counts, firsts = [len(tokens) for *_, tokens in rows], [first for _, first, _ in rows]
        has_kernel, count = operations is not None and operations.runs_trees, sum(counts)
        captured = has_kernel and graphs.is_capturing and plain and count <= MAX_ROWS
        order = padded_order(count, round_up(count) if captured else count)
        pairs = list(zip(caches, firsts, counts, strict=True))
        tables = [cache.table(first + n) for cache, first, n in pairs]
        slots = np.concatenate(
            [cache.columns_at(first + np.arange(n)) for cache, first, n in pairs]
        )
        plan = RowPlan.of(tables, np.array(firsts), counts, self.rows.config.groups)
        plan = plan.arranged(order, 0)
        context = list(states)
        if captured and context:
            context.append(context[-1][-1:].expand(len(order) - len(written), -1))
            written = padded(written, len(order))
        is_mask = np.concatenate([np.arange(n) >= n - masks for n in counts])
        arrays = [row_tokens(rows)[order], row_positions(rows)[0][order], is_mask[order]]
        arrays += [slots[order], written, *plan.arrays()]
        shapes, mask = tuple(x.shape for x in arrays), self.mask

        def draft(uploaded: Tensor, context: Tensor) -> Outputs:
            tokens, positions, is_mask, slots, written, *arrays = unpack(uploaded, shapes)
            slab.hidden.index_copy_(0, written.long(), context)
            hidden = slab.hidden.index_select(0, slots := slots.long())
            embedded = self.output.embed(tokens)
            if plain:
                rotation = self.rows.rotary(positions, embedded.dtype)
            else:
                embedded = merge_features(embedded, rows)
                rotation = self.rows.rotation(row_positions(rows), embedded)

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                slab.write_layer(slots, k, v, layer)
                if not has_kernel:
                    return self._attend_with_masks(layer, q, caches, firsts, counts)
                assert operations is not None
                return operations.tree_attention(
                    *(q[0].transpose(0, 1).contiguous(), *slab.layer(layer)),
                    VisibleKeys.of_rows(*arrays),
                    scale=self.rows.config.attention_scale,
                )

            hidden = torch.where(is_mask.bool()[:, None], mask, hidden)
            return (self.rows.run(embedded, hidden, rotation, attend),)

        uploaded = upload(pack(arrays), self.target.device)
        inputs = uploaded, torch.cat(context) if context else slab.hidden[:0]
        (outputs,) = graphs.run("the drafter", (slab, shapes), draft, *inputs, capture=captured)
        return outputs, unpack(uploaded, shapes)[0]

    def _attend_with_masks(
        self,
        layer: int,
        q: Tensor,
        caches: Sequence[MtpCache],
        firsts: Sequence[int],
        counts: Sequence[int],
    ) -> Tensor:
        """Attend from consecutive rows of sequences, from their first ones on."""
        keys_and_values, masks = [], []
        for cache, first, n in zip(caches, firsts, counts, strict=True):
            seen = torch.ones(n, first + n, dtype=torch.bool, device=q.device).tril(first)
            masks.append(group_mask(additive_mask(seen, q.dtype), self.rows.config.groups))
            keys_and_values.append(SeenColumns(cache, first + n).layer(layer))
        return grouped_attention(
            q, keys_and_values, masks, counts, self.rows.config.attention_scale
        )[0]


class MtpHead(mtp_head.MtpHead):
    """`treeflash.decoding.interfaces.ARHead` in PyTorch."""

    output: OutputStage

    @torch.inference_mode()
    def transitions(
        self, blocks: Sequence[MtpBlock], options: TableOptions
    ) -> list[TransitionTable]:
        """Run each depth of all sequences as one batch of rows, and read all depths at once.

        For CUDA graphs the number of sequences is rounded up to a power of two.
        """
        operations = self.model.operations
        slab, *others = {x.cache.reserve_draft(): None for x in blocks}
        if operations is None or not operations.runs_trees or others:
            return super().transitions(blocks, options)
        target, count, depths = self.output.target, len(blocks), blocks[0].depths
        width, order = mtp_head.width_of(options), [*range(len(blocks))]
        if target.graphs.is_capturing:
            order += [0] * (power_of_two(count) - count)
        noise = options.noise
        if noise is not None:  # copies of a sequence must write equal rows
            rows = np.arange(count * depths).reshape(count, depths)[order].ravel()
            noise = Noise(noise.keys[rows], noise.scales[rows])
        lengths, positions = np.array([(x.length, x.position) for x in blocks]).T
        k = min(options.k, self.output.vocab_size)
        by_depth = mtp_head.rows_by_depth(k, width, depths)
        sizes, drafted = sorted(set(by_depth)), np.arange(sum(by_depth))
        pages, firsts = page_tables([x.cache.table(x.length + len(drafted)) for x in blocks])
        columns = np.stack([x.cache.columns_at(x.length + drafted) for x in blocks])
        arrays = [pages, firsts[order], columns[order], lengths[order], positions[order]]
        for n in sizes:
            arrays += equal_work(lengths, n, order, self.model.config.groups)
        shapes = tuple(x.shape for x in arrays)

        def search(uploaded: Tensor, outputs: Tensor, noise: Tensor) -> Outputs:
            pages, table, columns, length, position, *work = unpack(uploaded, shapes)
            parts = zip(sizes, work[::3], work[1::3], work[2::3], strict=True)
            works = {n: SharedWork(items, m, at) for n, items, m, at in parts}
            rows = SlabColumns(
                *(self.model, operations, slab, pages, table, columns, length, position), works
            )
            noises = [self.output.noise(noise[depth::depths]) for depth in range(depths)]
            return join(self.search(rows, outputs, width, options, noises))

        settings = slab, shapes, width, depths, k, options.temperature
        outputs = torch.cat([blocks[i].output for i in order])
        inputs = upload(pack(arrays), target.device), outputs, self.output.upload(noise)
        found, layout = target.graphs.run("the AR head", settings, search, *inputs)
        return tables(split(found.cpu().numpy()[:count], layout), depths, depths)

    @torch.inference_mode()
    def log_probs(self, block: MtpBlock, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        return super().log_probs(block, previous)
