"""The cache of a hybrid model in one forward pass: keys, values and recurrent states of its texts.

Rows of several texts follow one another; recurrent layers run text by text. A pass changes nothing:
what it leaves behind is committed later, or forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from treeflash.decoding.recurrence import convolution_windows
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.cache import KeyValues, TreeCache, upload
from treeflash_cuda.recurrence import Writes
from treeflash_cuda.recurrent_states import Key, RecurrentStates


@dataclass(frozen=True, eq=False)
class Block:
    """The rows of one text in a pass.

    Attributes:
        states: of the text.
        first: row.
        rows: how many.
        tree: that they are; None for the next tokens of the text, all of which will be committed.
        ancestors: (rows, rows) bool of the tree.
    """

    states: RecurrentStates
    first: int
    rows: int
    tree: DraftTree | None
    ancestors: Tensor | None

    def of(self, x: Tensor, axis: int = 1) -> Tensor:
        """The block's rows of a tensor."""
        return x.narrow(axis, self.first, self.rows)


class HybridCache(TreeCache):
    """`TreeCache` with recurrent states, under the names by which transformers' models use them.

    Attributes:
        blocks: of the texts.
        is_step: whether the pass is one row, for which models have functions of their own.
    """

    def __init__(
        self,
        texts: Sequence[KeyValues],
        states: Sequence[RecurrentStates],
        trees: Sequence[DraftTree | None],
        ancestors: Sequence[Tensor | None],
        rows: Sequence[int],
        slots: dict[int, int],
        device: torch.device,
    ) -> None:
        """Describe one forward pass; `slots` numbers attention layers, and learns new ones."""
        super().__init__(texts, rows)
        self.slots = slots
        self.device = device
        self.blocks: list[Block] = []
        first = 0
        for state, tree, mask, count in zip(states, trees, ancestors, rows, strict=True):
            state.begin()
            self.blocks.append(Block(state, first, count, tree, mask))
            first += count
        self.is_step = first == 1
        self._windows: dict[int, Tensor] = {}
        self._unread: list[Tensor] = []
        self._kept: set[Key] = set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """The hooks of recurrent layers use this cache in the model calls inside."""
        token = _RUNNING.set(self)
        try:
            yield
        finally:
            _RUNNING.reset(token)
        if self._unread:
            raise UnsupportedModelError("a convolution was run by a function that is not known")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `TreeCache.update`; recurrent layers take no room among keys and values."""
        slot = self.slots.setdefault(layer_idx, len(self.slots))
        return super().update(key_states, value_states, slot, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None: a model that sees a state may shift it in place."""

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether `update_conv_state` is to return earlier inputs too."""
        return True

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        """(1, channels, ...) for each text, the last kernel - 1 inputs and those of its rows."""
        if conv_kernel_size is None:
            raise UnsupportedModelError("a convolution does not tell its width")
        key, width = (layer_idx, state_idx), conv_kernel_size - 1
        parts = []
        for block in self.blocks:
            tail = block.states.committed.tails.get(key)
            if tail is None:
                tail = conv_states.new_zeros(1, conv_states.shape[1], width)
            inputs = torch.cat([tail, block.of(conv_states, 2)], 2)
            # Of the next tokens the end is enough: a copy, so that the rest is not kept for it.
            end = inputs[:, :, inputs.shape[2] - width :]
            kept = end.clone() if block.tree is None else inputs
            block.states.inputs[key] = kept, width
            parts.append(inputs)
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        self._unread.append(joined)
        return joined

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """For a pass of one row a copy, which the model may change in place; else None."""
        if not self.is_step:
            return None
        states = self.blocks[0].states
        state = states.committed.matrices.get((layer_idx, state_idx))
        if state is None:
            return None
        states.pending[layer_idx, state_idx] = state = state.clone()
        return state

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Take the state after a single row; `recur` has kept what is needed after more."""
        key = layer_idx, state_idx
        if key not in self._kept:
            if not self.is_step:
                raise UnsupportedModelError(f"the recurrence of layer {layer_idx} is not known")
            self.blocks[0].states.pending[key] = recurrent_states
        return recurrent_states

    def convolve(
        self,
        original: Callable[..., Tensor],
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(1, channels, rows) of a depthwise convolution.

        Args:
            original: the model's own.
            inputs: what `update_conv_state` returned.
            weight: (channels, kernel).
            bias: (channels,).
            activation: a name of transformers.
            kwargs: of the model's own.
        """
        self._unread = [x for x in self._unread if x is not inputs]
        if len(self.blocks) == 1 and (self.is_step or self.blocks[0].tree is None):
            out = original(inputs, weight, bias, activation=activation, **kwargs)
            return out[..., -self.blocks[0].rows :]
        windows = inputs[0][:, self._rows(weight.shape[1])]  # (channels, rows, kernel)
        out = (windows.float() * weight[:, None].float()).sum(-1)  # kernels sum in float32
        if bias is not None:
            out = out + bias[:, None].float()
        out = out.to(weight.dtype)
        return (out if activation is None else ACT2FN[activation](out))[None].to(inputs.dtype)

    def recur(
        self,
        layer: int,
        rows: Sequence[Tensor],
        next_tokens: Callable[..., tuple[Tensor, Tensor]],
        tree: Callable[..., tuple[Tensor, Writes]],
    ) -> Tensor:
        """Run a recurrence text by text.

        Args:
            layer: index.
            rows: (1, rows, ...) its inputs.
            next_tokens: from rows and a state (or None) to outputs and the state after them.
            tree: from a `Block`, rows and a state (or None) to outputs and what the nodes write.

        Returns:
            (1, rows, ...) outputs.
        """
        self._kept.add((layer, 0))
        outs = []
        for block in self.blocks:
            state = block.states.committed.matrices.get((layer, 0))
            parts = [block.of(x) for x in rows]
            after: Tensor | Writes
            if block.tree is None:
                out, after = next_tokens(*parts, state)
            else:
                out, after = tree(block, *parts, state)
            block.states.pending[layer, 0] = after
            outs.append(out)
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def _rows(self, kernel: int) -> Tensor:
        """(rows, kernel) which inputs each row's convolution reads; made once for all layers."""
        if kernel not in self._windows:
            windows, first = [], 0
            for block in self.blocks:
                tree = block.tree or DraftTree.chain(np.zeros(block.rows, np.int32))
                windows.append(first + convolution_windows(tree.parents, kernel))
                first += kernel - 1 + block.rows
            self._windows[kernel] = upload(np.concatenate(windows), self.device).long()
        return self._windows[kernel]


_RUNNING: ContextVar[HybridCache | None] = ContextVar("hybrid_cache", default=None)


def running_cache() -> HybridCache | None:
    """The cache of the current forward pass; None outside of one."""
    return _RUNNING.get()
