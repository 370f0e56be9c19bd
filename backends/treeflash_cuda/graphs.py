"""Forward passes with static shapes, which a GPU captures and replays as CUDA graphs.

A forward pass consists of hundreds of small kernels, which a CPU launches more slowly than a GPU
runs them. A CUDA graph launches them all at once, but needs shapes and addresses that never change.
So trees are padded to a power of two, attention covers a power of two of the cache's columns
through a mask, and a text that ends leaves its cache, with the graphs captured for it, to the next.
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
from treeflash_cuda.cache import INITIAL_CAPACITY, TreeCache, upload
from treeflash_cuda.drafter import DrafterModel
from treeflash_cuda.target import Target
from treeflash_cuda.verifier import Verifier

MAX_NODES = 512
"""Larger trees run without static shapes."""
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

    def mask(self, function: MaskFunction, dtype: torch.dtype) -> Tensor:
        """(1, 1, n, columns) additive."""
        columns = torch.arange(self.columns, device=self.slots.device)
        keys = columns.index_copy(0, self.slots, self.positions)
        visible = (columns < self.slots[0]).repeat(len(self.slots), 1)
        visible = visible.index_copy(1, self.slots, self.ancestors)
        visible = visible & evaluate(function, self.positions[:, None], keys[None, :])
        return additive_mask(visible, dtype)[None, None]


class StaticCache(TreeCache):
    """A cache that static forward passes write where a tensor says.

    Attributes:
        slots: (n,) columns for the next block; None writes it after the committed positions.
        columns: how many are returned with `slots`.
        forwards: by nodes and columns; they are bound to the current storage.
    """

    def __init__(self, layers: int) -> None:
        """Start empty."""
        super().__init__(layers)
        self.slots: Tensor | None = None
        self.columns = 0
        self.forwards: dict[tuple[int, int], StaticForward] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `TreeCache.update`; with `slots`, the first `columns` are returned."""
        if self.slots is None:
            return super().update(key_states, value_states, layer_idx)
        storage = self.key_values.storage
        assert storage is not None
        keys, values = storage[layer_idx]
        keys.index_copy_(1, self.slots, key_states[0])
        values.index_copy_(1, self.slots, value_states[0])
        return keys[None, :, : self.columns], values[None, :, : self.columns]


class CachePool:
    """The caches of texts that have ended, with the graphs captured for them."""

    def __init__(self, target: Target) -> None:
        """Start empty."""
        self.target = target
        self.spare: list[StaticCache] = []
        self.capture_lock = Lock()

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """The stream of all captures: every stream that is used keeps a workspace."""
        return torch.cuda.Stream(self.target.device)

    @torch.inference_mode()
    def take(self) -> StaticCache:
        """A cache without committed positions."""
        try:
            cache = self.spare.pop()
        except IndexError:
            return StaticCache(len(self.target.layers))
        cache.key_values.length = 0
        assert cache.key_values.storage is not None
        cache.key_values.storage.zero_()  # masked columns take part too, and must not be NaN
        return cache

    def give_back(self, cache: StaticCache) -> None:
        """Keep the cache of a text that has ended."""
        if cache.key_values.storage is not None:
            self.spare.append(cache)


class StaticForward:
    """A forward pass of `nodes` rows over a cache's first columns; on a GPU a CUDA graph."""

    def __init__(self, pool: CachePool, cache: StaticCache, nodes: int, columns: int) -> None:
        """Prepare; the graph is captured at the first call."""
        storage, target = cache.key_values.storage, pool.target
        assert storage is not None
        self.pool = pool
        self.target = target
        self.storage = storage
        self.columns = columns
        # Tokens, positions, slots, then the ancestor mask.
        self.inputs = torch.zeros(3 + nodes, nodes, dtype=torch.int32, device=target.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, dict[int, Tensor]]

    def __call__(self, cache: StaticCache, inputs: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits and captured layers' outputs; on a GPU valid until the next call."""
        self.inputs.copy_(inputs)
        if self.target.device.type != "cuda":
            return self.run(cache)
        if self.graph is None:
            with self.pool.capture_lock:
                self._capture(cache)
        assert self.graph is not None
        self.graph.replay()
        return self.outputs

    def run(self, cache: StaticCache) -> tuple[Tensor, dict[int, Tensor]]:
        """The forward pass itself, of what lies in `inputs`."""
        tokens, positions, slots = self.inputs[:3].long()
        context = StaticContext(positions, slots, self.inputs[3:].bool(), self.columns)
        cache.slots, cache.columns = slots, self.columns
        try:
            return self.target.forward(tokens, context, cache, last_only=False)
        finally:
            cache.slots = None

    def _capture(self, cache: StaticCache) -> None:
        device, stream = self.target.device, self.pool.stream
        captured = [f.graph for f in cache.forwards.values() if f.graph is not None]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), garbage_collection_disabled():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.run(cache)
            torch.cuda.current_stream().wait_stream(stream)
            try:
                # The forward passes over one cache never run side by side, so they share memory.
                memory = captured[0].pool() if captured else None
                # Other threads may go on working meanwhile.
                with torch.cuda.graph(
                    graph, pool=memory, stream=stream, capture_error_mode="thread_local"
                ):
                    self.outputs = self.run(cache)
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


class StaticVerifier(Verifier):
    """`Verifier` with static forward passes for trees."""

    cache: StaticCache

    def __init__(self, pool: CachePool, drafter: DrafterModel | None) -> None:
        """Start a text; see `Verifier`."""
        super().__init__(pool.target, drafter, pool.take())
        self.pool = pool

    def close(self) -> None:
        """See `TreeVerifier.close`; the next text takes over the cache."""
        self.pool.give_back(self.cache)
        self.cache, self.outputs = StaticCache(len(self.target.layers)), {}

    def _tree_logits(self, tree: DraftTree) -> Tensor:
        n = len(tree)
        nodes = 1 << (n - 1).bit_length()
        if nodes > MAX_NODES or self.cache.key_values.storage is None:
            return super()._tree_logits(tree)
        inputs = np.zeros((3 + nodes, nodes), np.int32)
        inputs[0, :n] = tree.tokens
        inputs[1] = self.length
        inputs[1, :n] = tree.positions(self.length)
        inputs[2] = np.arange(self.length, self.length + nodes)
        inputs[3:] = np.eye(nodes)  # padding sees itself: softmax over no key would give NaN
        inputs[3 : 3 + n, :n] = tree.ancestor_mask()
        uploaded = upload(inputs, self.target.device)
        logits, self.outputs = self._static_forward(nodes)(self.cache, uploaded)
        return logits[:n]

    def _static_forward(self, nodes: int) -> StaticForward:
        end, forwards = self.length + nodes, self.cache.forwards
        storage = self.cache.key_values.reserve(end)
        for key in [key for key, forward in forwards.items() if forward.storage is not storage]:
            del forwards[key]  # it is bound to a storage that has been outgrown
        # The storage may be a longer text's: cover only the columns that this text needs.
        columns = max(INITIAL_CAPACITY, 1 << (end - 1).bit_length())
        if (nodes, columns) not in forwards:
            forwards[nodes, columns] = StaticForward(self.pool, self.cache, nodes, columns)
        return forwards[nodes, columns]
