"""Forward passes with static shapes, which a GPU captures and replays as CUDA graphs.

A forward pass consists of hundreds of small kernels, which a CPU launches more slowly than a GPU
runs them. A CUDA graph launches them all at once, but needs shapes and addresses that never change.
So trees are padded to a power of two, attention covers a power of two of the text's columns through
a mask, and a text that ends leaves its region, with the graphs captured for it, to the next.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError, is_out_of_memory
from treeflash_cuda.attention import BlockContext, MaskFunction, additive_mask, evaluate
from treeflash_cuda.cache import KeyValues, TreeCache, upload
from treeflash_cuda.state import State
from treeflash_cuda.target import Target

MAX_NODES = 512
"""Larger trees run without static shapes."""
LEAST_COLUMNS = 512
"""That attention covers."""
WARM_UP = 3
"""Forward passes before a capture, in which libraries allocate their workspaces."""


class StaticContext(BlockContext):
    """What the nodes of a tree see, as a function of tensors alone.

    Attributes:
        positions: (n,) absolute positions.
        slots: (n,) columns of the cache; those before the first slot are committed.
        ancestors: (n, n) bool, which nodes of the tree each node sees.
        columns: of the cache that attention covers.
    """

    def __init__(self, positions: Tensor, slots: Tensor, ancestors: Tensor, columns: int) -> None:
        """Describe one forward pass."""
        super().__init__()
        self.positions = positions
        self.slots = slots
        self.ancestors = ancestors
        self.columns = columns

    def mask(self, function: MaskFunction, dtype: torch.dtype, window: int | None) -> Tensor:
        """(1, 1, n, columns) additive."""
        columns = torch.arange(self.columns, device=self.slots.device)
        keys = columns.index_copy(0, self.slots, self.positions)
        visible = (columns < self.slots[0]).repeat(len(self.slots), 1)
        visible = visible.index_copy(1, self.slots, self.ancestors)
        visible = visible & evaluate(function, self.positions[:, None], keys[None, :])
        return additive_mask(visible, dtype)[None, None]


class StaticCache(TreeCache):
    """A text's columns, written where a tensor says.

    Attributes:
        slots: (n,) columns for the block.
        columns: how many are returned.
    """

    def __init__(self, text: KeyValues, slots: Tensor, columns: int) -> None:
        """Describe one forward pass."""
        super().__init__([text], [len(slots)])
        self.storage = text.storage
        self.slots = slots
        self.columns = columns

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `TreeCache.update`; the first `columns` are returned."""
        keys, values = self.storage[layer_idx]
        keys.index_copy_(1, self.slots, key_states[0])
        values.index_copy_(1, self.slots, value_states[0])
        return keys[None, :, : self.columns], values[None, :, : self.columns]


class StaticForwards:
    """Runs single trees with static shapes."""

    def __init__(self, target: Target) -> None:
        """Take the target; its texts must have regions of a `StaticArena`."""
        self.target = target
        self.capture_lock = Lock()

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """The stream of all captures: every stream that is used keeps a workspace."""
        return torch.cuda.Stream(self.target.device)

    def run(self, state: State, tree: DraftTree) -> tuple[Tensor, dict[int, Tensor]] | None:
        """Logits and captured layers' outputs; None for a tree that must run without."""
        region = state.key_values.region
        n, start = len(tree), state.length
        nodes = 1 << (n - 1).bit_length()
        end = start + nodes
        if region is None or nodes > MAX_NODES or end > region.storage.shape[3]:
            return None
        inputs = np.zeros((3 + nodes, nodes), np.int32)
        inputs[0, :n] = tree.tokens
        inputs[1] = start
        inputs[1, :n] = tree.positions(start)
        inputs[2] = np.arange(start, end)
        inputs[3:] = np.eye(nodes)  # padding sees itself: softmax over no key would give NaN
        inputs[3 : 3 + n, :n] = tree.ancestor_mask()
        # The region may be a longer text's: cover only the columns that this text needs.
        columns = max(LEAST_COLUMNS, 1 << (end - 1).bit_length())
        columns = min(columns, region.storage.shape[3])
        forwards = region.static_forwards
        if (nodes, columns) not in forwards:
            forwards[nodes, columns] = StaticForward(self, state.key_values, nodes, columns)
        logits, outputs = forwards[nodes, columns](upload(inputs, self.target.device))
        return logits[:n], outputs


class StaticForward:
    """A forward pass of `nodes` rows over a region's first columns; on a GPU a CUDA graph."""

    def __init__(self, static: StaticForwards, text: KeyValues, nodes: int, columns: int) -> None:
        """Prepare; the graph is captured at the first call."""
        assert text.region is not None
        self.static = static
        self.target = static.target
        self.text = KeyValues(text.arena, text.capacity)
        self.text.region = text.region  # it belongs to whichever text has the region
        self.columns = columns
        # Tokens, positions, slots, then the ancestor mask.
        device = static.target.device
        self.inputs = torch.zeros(3 + nodes, nodes, dtype=torch.int32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, dict[int, Tensor]]

    def __call__(self, inputs: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits and captured layers' outputs; on a GPU valid until the next call."""
        self.inputs.copy_(inputs)
        if self.target.device.type != "cuda":
            return self.run()
        if self.graph is None:
            with self.static.capture_lock:
                self._capture()
        assert self.graph is not None
        self.graph.replay()
        return self.outputs

    def run(self) -> tuple[Tensor, dict[int, Tensor]]:
        """The forward pass itself, of what lies in `inputs`."""
        tokens, positions, slots = self.inputs[:3].long()
        context = StaticContext(positions, slots, self.inputs[3:].bool(), self.columns)
        return self.target.forward(
            tokens, context, StaticCache(self.text, slots, self.columns), logits_to_keep=0
        )

    def _capture(self) -> None:
        device, stream = self.target.device, self.static.stream
        assert self.text.region is not None
        forwards = self.text.region.static_forwards.values()
        captured = [forward.graph for forward in forwards if forward.graph is not None]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), garbage_collection_disabled():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.run()
            torch.cuda.current_stream().wait_stream(stream)
            try:
                # The forward passes over one region never run side by side, so they share memory.
                memory = captured[0].pool() if captured else None
                # Other threads may go on working meanwhile.
                with torch.cuda.graph(
                    graph, pool=memory, stream=stream, capture_error_mode="thread_local"
                ):
                    self.outputs = self.run()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise UnsupportedModelError(
                    f"{self.target.model.config.model_type} models cannot be captured as a CUDA "
                    f"graph ({str(error).splitlines()[0]}); leave --cuda-graphs out"
                ) from error
        self.graph = graph


@contextmanager
def garbage_collection_disabled() -> Iterator[None]:
    """Destroying an old graph would spoil the capture of a new one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
