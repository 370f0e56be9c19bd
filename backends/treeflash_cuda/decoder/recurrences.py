"""The recurrences of a decoder's pass over sequences, which run one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treeflash_cuda.numerics import concatenate
from treeflash_cuda.operations import GATES
from treeflash_cuda.recurrence import by_heads, convolve_rows, delta_rule, delta_rule_of_tokens
from treeflash_cuda.recurrent_states import MATRIX, TAIL, SequenceRows, Writes, plan_windows


class SequenceRecurrences:
    """`Recurrences` over the rows of sequences: draft trees, and next tokens."""

    def __init__(self, parts: Sequence[SequenceRows]) -> None:
        self.parts = parts  # the rows of each sequence
        self._windows: dict[int, Tensor | None] = {}  # made once for all layers

    def convolve(self, layer: int, rows: Tensor, filters: Tensor, activation: str) -> Tensor:
        key, kernel, joined = (TAIL, layer, 0), filters.shape[1], []
        for part in self.parts:
            tail = part.states.committed.get(key)
            before = rows.new_zeros(kernel - 1, rows.shape[1]) if tail is None else tail[0].mT
            inputs = torch.cat([before, part.select(rows, 0)])
            joined.append(inputs)
            # Only the end is kept of next tokens, as a copy, so that the others can be freed.
            kept = inputs if part.tree is not None else inputs[part.count :].clone()
            part.writes.inputs[key] = kept.mT[None], kernel - 1
        out = convolve_rows(concatenate(joined), self._input_rows(kernel, rows), filters)
        return GATES[activation](out)

    def _input_rows(self, kernel: int, rows: Tensor) -> Tensor | None:
        """Return the inputs that each row's convolution reads; None if they follow each other."""
        if kernel not in self._windows:
            follow = len(self.parts) == 1 and (self.parts[0].tree is None or len(rows) == 1)
            planned = None if follow else plan_windows(self.parts, kernel, rows.device)
            self._windows[kernel] = planned
        return self._windows[kernel]

    def delta_rule(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor
    ) -> Tensor:
        key, outputs = (MATRIX, layer, 0), []
        q, k, values, gates = by_heads(
            *(x[None] for x in (q, k, v, log_g[..., None])),
            normalise=True,
            scale=k.shape[2] ** -0.5,
        )
        factors = beta.mT[None, :, :, None].float()
        for part in self.parts:
            state = part.states.committed.get(key)
            if state is None:
                state = q.new_zeros(1, q.shape[1], k.shape[3], values.shape[3])
            queries, keys, new, decays, corrections = (
                part.select(x, 2) for x in (q, k, values, gates, factors)
            )
            rows = queries, keys, new, decays, corrections, state
            if part.tree is None:
                output, part.writes.matrices[key] = delta_rule_of_tokens(*rows)
            else:
                output, u = delta_rule(*rows, part.nodes)
                part.writes.matrices[key] = Writes(state, u, keys, decays)
            outputs.append(output)
        return concatenate(outputs, 2)[0].transpose(0, 1).to(v.dtype)
