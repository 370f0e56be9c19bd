"""How heads draft depth by depth, written once for PyTorch and MLX.

A depth of a draft is one pass of the layer over rows, `MAX_PATHS` of a sequence at most: the best
children of all paths so far, which become the rows of the next depth. A row attends to the
committed rows of its sequence, its ancestors and itself. `treeflash.drafters.mtp_layer` has the
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.recurrent_head import best_children, on_host
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.heads.operations import Array, Operations
from treeflash.drafters.mtp_heads import MAX_PATHS, hidden_rows


@dataclass(frozen=True, eq=False)
class MtpBlock:
    """The root's row after a draft."""

    output: Array  # (1, hidden_size) of the layer
    cache: Any  # of the sequence's rows; for Gemma 4's assistant the target's KV cache
    length: int  # rows of the sequence, the root's last
    position: int  # the rotary position of the root's row
    depths: int  # wanted


@dataclass(frozen=True, eq=False)
class MtpRows:
    """The rows of one depth of all sequences, n of each."""

    outputs: Array  # (sequences * n, hidden_size) of the layer
    visible: Array  # (sequences, n, c) bool: the drafted rows so far that each row sees
    sizes: tuple[int, ...] = ()  # the numbers of rows of a sequence at the depths so far


class MtpHead:
    """`treeflash.decoding.interfaces.ARHead`, one pass of the layer for each depth.

    Args:
        model: the backend's `MtpLayer`.
        output: the backend's output stage, which embeds tokens and computes logits.
    """

    ops: Operations

    def __init__(self, model: Any, output: Any) -> None:
        self.model, self.output = model, output

    def transitions(
        self, blocks: Sequence[MtpBlock], options: TableOptions
    ) -> list[TransitionTable]:
        """Run each depth of all sequences as one batch of rows, and read all depths at once."""
        ops, depths, batch = self.ops, blocks[0].depths, len(blocks)
        width = min(options.m, MAX_PATHS if options.rows is None else options.rows, MAX_PATHS)
        rows, arrays = self._start(blocks), list[Array]()
        path_log_probs: Array | None = None
        for depth, noise in enumerate(self.output.noise_by_depth(options.noise, depths)):
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
            if depth + 1 < depths:
                rows = self._step(blocks, rows, depth + 1, ops.gather(tokens, kept), kept // k)
        return [
            TransitionTable.from_paths(numbers[::3], numbers[1::3], numbers[2::3])
            for numbers in ops.read(arrays)
        ]

    def log_probs(self, block: MtpBlock, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        rows = self._start([block])
        outputs = [rows.outputs]
        parents = self.ops.ids([[0]], rows.outputs)
        for depth in range(1, len(previous)):
            token = self.ops.ids([[int(previous[depth])]], rows.outputs)
            rows = self._step([block], rows, depth, token, parents)
            outputs.append(rows.outputs)
        logits = self.output.logits(self.model.norm(self.ops.concatenate(outputs, 0)))
        log_probs = self.output.over_target_vocabulary(self.ops.log_softmax(logits))
        return on_host(self.ops, log_probs)

    def _start(self, blocks: Sequence[MtpBlock]) -> MtpRows:
        outputs = self.ops.concatenate([block.output for block in blocks], 0)
        none = self.ops.zeros((len(blocks), 1, 0), self.ops.eye(1, outputs))
        return MtpRows(outputs, none)

    def _step(
        self,
        blocks: Sequence[MtpBlock],
        rows: MtpRows,
        depth: int,
        tokens: Array,  # (sequences, n) of the target's vocabulary
        parents: Array,  # (sequences, n) rows of the depth before, of each sequence
    ) -> MtpRows:
        """Return the rows of tokens, which follow rows of the depth before."""
        (batch, n), ops, model = tokens.shape, self.ops, self.model
        before, drafted = rows.visible.shape[1:]
        places = (parents + before * ops.arange(batch, parents)[:, None]).reshape(-1)
        states = model.feedback(ops.take(rows.outputs, places))
        y, residual = model.read(self.output.embed(tokens.reshape(-1)), states)
        positions = np.repeat([block.position + depth for block in blocks], n)
        rotation = model.rotation(positions, y)
        q, gate = model.layer.self_attn.queries(y, rotation)
        k, v = model.layer.self_attn.keys_and_values(y, rotation)
        model.write([(block.cache, block.length + drafted, n) for block in blocks], k, v)
        seen = rows.visible.reshape(batch * before, drafted)
        ancestors = ops.take(seen, places).reshape(batch, n, drafted)
        itself = ops.broadcast_to(ops.eye(n, y), (batch, n, n))
        visible = ops.concatenate([ancestors, itself], 2)
        if hidden := hidden_rows(model.config, rows.sizes, depth):
            visible[:, :, :hidden] = False
        caches, lengths = [block.cache for block in blocks], [block.length for block in blocks]
        attended = model.attend(q, caches, lengths, depth, visible)
        return MtpRows(model.finish(attended, gate, residual), visible, (*rows.sizes, n))
