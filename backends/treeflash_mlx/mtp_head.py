"""Heads that draft depth by depth: the rows of committed positions, and their caches.

See `treeflash.drafters.mtp_heads` for what a row is. The KV cache of a sequence has a row for each
committed position, and behind them the rows of the drafts of one table. The keys and values of
committed rows need no attention, so a prompt costs little more than their projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from treeflash.decoding import mtp_head
from treeflash.decoding.backend_base import note_drafted, project_contexts
from treeflash.decoding.interfaces import StateArrays
from treeflash.decoding.mtp_head import (
    MtpBlock,
    NewRows,
    merge_features,
    new_rows,
    root_blocks,
    row_positions,
    row_tokens,
)
from treeflash.decoding.output_stage import Block
from treeflash.drafters.mtp_heads import MtpConfig, first_visible
from treeflash.drafters.mtp_layer import MtpLayer
from treeflash_mlx.cache import KVCache, share_storage, to_host
from treeflash_mlx.drafter import Drafter, OutputStage
from treeflash_mlx.drafter_model import OPERATIONS, OwnVocabulary, VocabularyOwner
from treeflash_mlx.target import Target

CHUNK = 2048
"""Committed rows whose keys and values are computed at once."""


class MtpModel(MtpLayer, VocabularyOwner):
    """The layer as a module of MLX, with its own vocabulary."""

    ops = OPERATIONS

    def __init__(self, config: MtpConfig, own: OwnVocabulary) -> None:
        super().__init__(config)
        self._own = own

    def rotation(self, positions: NDArray[np.integer], like: mx.array) -> mx.array:
        return mx.array(positions, mx.int32)

    def write(self, segments: Sequence[tuple[KVCache, int, int]], k: mx.array, v: mx.array) -> None:
        row = 0
        for cache, first, n in segments:
            part = slice(row, row + n)
            share_storage([cache]).write(0, [k[:, :, part], v[:, :, part]], first)
            row += n

    def attend(
        self,
        queries: mx.array,
        caches: Sequence[KVCache],
        committed: Sequence[int],
        depth: int,
        visible: mx.array | None,
    ) -> mx.array:
        n, drafted = queries.shape[2] // len(caches), 0 if visible is None else visible.shape[2]
        out = []
        for i, (cache, length) in enumerate(zip(caches, committed, strict=True)):
            mask, first = None, first_visible(self.config, length, depth)
            if visible is not None:
                mask = mx.pad(visible[i], [(0, 0), (length - first, 0)], constant_values=True)
            keys, values = share_storage([cache]).read(0, length + drafted, first)
            if self.config.latent is not None:  # a latent and a rotary key, which all heads read
                keys = values = mx.concatenate([keys, values], -1)
            y = mx.fast.scaled_dot_product_attention(
                queries[:, :, i * n : (i + 1) * n],
                *(keys, values),
                scale=self.config.attention_scale,
                mask=mask,
            )
            out.append(y[0].swapaxes(0, 1))
        return mx.concatenate(out)


class MtpCache(KVCache):
    """The rows of one sequence, and the target's states that they read.

    The last position's row has an uncommitted token: it is computed again for every draft.
    """

    layers_without_keys = 1  # the last, which has the states as (1, 1, columns, hidden_size)

    def write_states(self, parts: Sequence[mx.array]) -> None:
        """Write the (n, hidden_size) states of positions behind the ones that were read."""
        first = self.length
        for part in parts:
            share_storage([self]).write(self.num_layers - 1, [part[None, None]], first)
            first += len(part)

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


def lacking_rows(
    roots: Sequence[tuple[Any, int]], most: int, run: Callable[[list[NewRows]], object]
) -> list[NewRows]:
    """Return the rows that drafts lack, `most` of a sequence at most; `run` writes earlier ones."""

    def compute(rows: NewRows) -> None:
        run([rows])
        mx.eval(share_storage([rows[0].drafter]).layers)

    return [new_rows(state, root, most, compute) for state, root in roots]


class MtpDrafter(mtp_head.MtpDrafter):
    """`treeflash.decoding.interfaces.Drafter` in MLX: the rows of committed positions."""

    def __init__(self, model: MtpModel, target: Target) -> None:
        self.model, self.output = model, OutputStage(model, target)
        self.chunk = CHUNK

    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[MtpBlock]:
        """Compute the rows of all sequences together; earlier parts of prompts chunk by chunk."""
        project_contexts([state for state, _ in roots], self.model.project, mx.concatenate)
        new = lacking_rows(roots, self.chunk, self._write)
        (y, residual), positions = self._write(new)
        last = mx.array(np.cumsum([len(tokens) for _, _, tokens in new]) - 1)
        q, gate = self.model.layer.self_attn.queries(y[last], positions[:, last])
        states = [state for state, _ in roots]
        caches, lengths = [x.drafter for x in states], [x.length for x in states]
        attended = self.model.attend(q, caches, lengths, 0, None)
        outputs = self.model.layer.finish(attended, gate, residual[last])
        note_drafted(states)
        return root_blocks(
            roots, list(mx.split(outputs, len(roots))), depths, self.model.config.depths
        )

    def _write(self, rows: Sequence[NewRows]) -> tuple[tuple[mx.array, mx.array], mx.array]:
        """Write keys and values of rows; returns what `MtpModel.read` does, and the positions."""
        states = [x.drafter.states(first, first + len(tokens)) for x, first, tokens in rows]
        embedded = merge_features(self.output.embed(mx.array(row_tokens(rows))), rows)
        read = self.model.read(embedded, mx.concatenate(states))
        positions = self.model.rotation(row_positions(rows), read[0])
        k, v = self.model.layer.self_attn.keys_and_values(read[0], positions)
        self.model.write([(x.drafter, first, len(tokens)) for x, first, tokens in rows], k, v)
        return read, positions


class ParallelDrafter(mtp_head.ParallelDrafter, Drafter):
    """`treeflash.decoding.interfaces.Drafter` in MLX, for P-EAGLE."""

    def __init__(self, model: Any, target: Target) -> None:
        super().__init__(model, target)
        self.rows: MtpModel = model
        self.chunk = CHUNK
        mx.eval(self.mask)  # only the thread that makes a lazy array can evaluate it

    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[Block]:
        """Run the rows of all sequences together; earlier parts of prompts chunk by chunk."""
        size = self.rows.config.depths
        project_contexts([state for state, _ in roots], self.rows.project, mx.concatenate)
        rows = lacking_rows(roots, self.chunk, self._run)
        ends = np.cumsum([len(tokens) + size - 1 for *_, tokens in rows])
        parts = mx.split(self._run(rows, masks=size - 1), ends[:-1].tolist())
        note_drafted(state for state, _ in roots)
        return [
            Block(root, part[-size:][:depths]) for (_, root), part in zip(roots, parts, strict=True)
        ]

    def _run(self, rows: Sequence[NewRows], masks: int = 0) -> mx.array:
        """Return the outputs of rows, and of rows with the mask token behind each sequence's."""
        states = []
        for state, first, tokens in rows:
            states += [state.drafter.states(first, first + len(tokens)), *[self.mask] * masks]
        rows = self.with_masks(rows, masks)
        embedded = merge_features(self.output.embed(mx.array(row_tokens(rows))), rows)

        def attend(layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            out, row = [], 0
            for state, first, tokens in rows:
                part, storage = slice(row, row + len(tokens)), share_storage([state.drafter])
                storage.write(layer, [k[:, :, part], v[:, :, part]], first)
                y = mx.fast.scaled_dot_product_attention(
                    q[:, :, part],
                    *storage.read(layer, first + len(tokens)),
                    scale=self.rows.config.attention_scale,
                    mask="causal",
                )
                out.append(y[0].swapaxes(0, 1))
                row += len(tokens)
            return mx.concatenate(out)

        rotation = self.rows.rotation(row_positions(rows), embedded)
        outputs: mx.array = self.rows.run(embedded, mx.concatenate(states), rotation, attend)
        return outputs
