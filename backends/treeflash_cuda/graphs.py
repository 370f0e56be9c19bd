"""Target forwards of fixed shapes, which a GPU replays as one: CUDA graphs.

A forward is some hundreds of small kernels, and starting them takes a CPU longer than a GPU takes
to run them. Captured once, they start together. That needs shapes and addresses which never
change: trees are filled up to a power of two, a power of two of the columns of keys and values is
looked at, through a mask, and a text that has ended leaves its storage, with what was captured, to
the next.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError, is_out_of_memory
from treeflash_cuda.attention import FoldedMasks, Rule, additive, follow
from treeflash_cuda.cache import FIRST_CAPACITY, TargetCache, upload
from treeflash_cuda.target import Target
from treeflash_cuda.verifier import Verifier

LARGEST = 512
"""Nodes; larger trees run as they are."""
WARM_UP = 3
"""Forwards before a capture, in which libraries allocate what they keep."""


class FixedVisibility:
    """What the nodes of a tree see, as a function of tensors alone.

    Attributes:
        positions: (n,) absolute positions.
        slots: (n,) columns of the storage; those before the first are committed.
        block: (n, n) bool, which of the tree a node sees.
        columns: of the storage that are looked at.
        masks: of the layers.
    """

    is_whole_text = False

    def __init__(self, positions: Tensor, slots: Tensor, block: Tensor, columns: int) -> None:
        """Describe one forward."""
        self.positions = positions
        self.slots = slots
        self.block = block
        self.columns = columns
        self.masks = FoldedMasks()

    def mask(self, rule: Rule, dtype: torch.dtype) -> Tensor:
        """(1, 1, n, columns) additive."""
        columns = torch.arange(self.columns, device=self.slots.device)
        keys = columns.index_copy(0, self.slots, self.positions)
        seen = (columns < self.slots[0]).repeat(len(self.slots), 1)
        seen = seen.index_copy(1, self.slots, self.block)
        seen = seen & follow(rule, self.positions[:, None], keys[None, :])
        return additive(seen, dtype)[None, None]


class FixedCache(TargetCache):
    """Storage that forwards of fixed shapes write where a tensor says.

    Attributes:
        slots: (n,) columns for the next block; None writes it after the committed ones.
        columns: that are looked at with `slots`.
        forwards: by nodes and columns; they belong to the storage that they were made for.
    """

    def __init__(self, layers: int) -> None:
        """Start empty."""
        super().__init__(layers)
        self.slots: Tensor | None = None
        self.columns = 0
        self.forwards: dict[tuple[int, int], Forward] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `TargetCache.update`; with `slots`, the first `columns` are returned."""
        if self.slots is None:
            return super().update(key_states, value_states, layer_idx)
        storage = self.key_values.storage
        assert storage is not None
        keys, values = storage[layer_idx]
        keys.index_copy_(1, self.slots, key_states[0])
        values.index_copy_(1, self.slots, value_states[0])
        return keys[None, :, : self.columns], values[None, :, : self.columns]


class Forward:
    """One forward of `nodes` rows over a cache's first columns, captured where there is a GPU."""

    def __init__(self, graphs: Graphs, cache: FixedCache, nodes: int, columns: int) -> None:
        """Make it; it is captured when it is first called."""
        storage, target = cache.key_values.storage, graphs.target
        assert storage is not None
        self.graphs = graphs
        self.target = target
        self.storage = storage
        self.columns = columns
        # Tokens, positions, slots, then the ancestor mask.
        self.inputs = torch.zeros(3 + nodes, nodes, dtype=torch.int32, device=target.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, dict[int, Tensor]]

    def __call__(self, cache: FixedCache, inputs: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits and captured layers; on a GPU valid until the next call."""
        self.inputs.copy_(inputs)
        if self.target.device.type != "cuda":
            return self._run(cache)
        if self.graph is None:
            self._capture(cache)
        assert self.graph is not None
        self.graph.replay()
        return self.outputs

    def _run(self, cache: FixedCache) -> tuple[Tensor, dict[int, Tensor]]:
        tokens, positions, slots = self.inputs[:3].long()
        visibility = FixedVisibility(positions, slots, self.inputs[3:].bool(), self.columns)
        cache.slots, cache.columns = slots, self.columns
        try:
            return self.target.forward(tokens, visibility, cache, last_only=False)
        finally:
            cache.slots = None

    def _capture(self, cache: FixedCache) -> None:
        device, stream = self.target.device, self.graphs.stream
        made = [forward.graph for forward in cache.forwards.values() if forward.graph is not None]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), uncollected():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._run(cache)
            torch.cuda.current_stream().wait_stream(stream)
            try:
                # Forwards over one storage never run side by side, and so share their memory.
                pool = made[0].pool() if made else None
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    self.outputs = self._run(cache)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise UnsupportedModelError(
                    f"{self.target.model.config.model_type} models cannot be captured as a CUDA "
                    f"graph ({str(error).splitlines()[0]}); leave --cuda-graphs out"
                ) from error
        self.graph = graph


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection: destroying an old graph spoils the capture of a new one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graphs:
    """The storages of texts that have ended."""

    def __init__(self, target: Target) -> None:
        """Start with none."""
        self.target = target
        self.spare: list[FixedCache] = []

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """On which graphs are captured: each stream keeps a workspace of its own."""
        return torch.cuda.Stream(self.target.device)

    @torch.inference_mode()
    def verifier(self, layer_ids: tuple[int, ...]) -> FixedVerifier:
        """A verifier for a new text."""
        cache = self.spare.pop() if self.spare else FixedCache(len(self.target.layers))
        cache.key_values.length = 0
        if cache.key_values.storage is not None:
            cache.key_values.storage.zero_()  # what is not a number would be seen through a mask
        verifier = FixedVerifier(self, layer_ids, cache)
        weakref.finalize(verifier, self.spare.append, cache)
        return verifier


class FixedVerifier(Verifier):
    """The same as `Verifier`, with forwards of fixed shapes for trees."""

    def __init__(self, graphs: Graphs, layer_ids: tuple[int, ...], cache: FixedCache) -> None:
        """Start a text in a cache without committed positions."""
        super().__init__(graphs.target, layer_ids)
        self.graphs = graphs
        self.cache: FixedCache = cache

    def _tree_logits(self, tree: DraftTree) -> Tensor:
        n = len(tree)
        nodes = 1 << (n - 1).bit_length()
        if nodes > LARGEST or self.cache.key_values.storage is None:
            return super()._tree_logits(tree)
        inputs = np.zeros((3 + nodes, nodes), np.int32)
        inputs[0, :n] = tree.tokens
        inputs[1] = self.length
        inputs[1, :n] = tree.positions(self.length)
        inputs[2] = np.arange(self.length, self.length + nodes)
        inputs[3:] = np.eye(nodes)  # rows that only fill up see themselves, which is never empty
        inputs[3 : 3 + n, :n] = tree.ancestor_mask()
        given = upload(inputs, self.target.device)
        logits, self.outputs = self._forward_of(nodes)(self.cache, given)
        return logits[:n]

    def _forward_of(self, nodes: int) -> Forward:
        end, forwards = self.length + nodes, self.cache.forwards
        storage = self.cache.key_values.reserve(end)
        for key in [key for key, made in forwards.items() if made.storage is not storage]:
            del forwards[key]  # it writes to a storage that was outgrown
        # No more columns than a text of this length needs: the storage may be of a longer one.
        columns = max(FIRST_CAPACITY, 1 << (end - 1).bit_length())
        if (nodes, columns) not in forwards:
            forwards[nodes, columns] = Forward(self.graphs, self.cache, nodes, columns)
        return forwards[nodes, columns]
