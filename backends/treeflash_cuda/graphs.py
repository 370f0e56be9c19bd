"""Functions of tensors, which a GPU captures once and then replays as CUDA graphs.

An iteration consists of thousands of small kernels, which a CPU launches more slowly than a GPU
runs them. A CUDA graph launches all kernels of a function at once, but with the shapes and
addresses of its capture: what differs between calls must be in the inputs, which are copied to
fixed places.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, TypeAlias

import torch
from torch import Tensor

from treeflash.errors import is_out_of_memory

MAX_GRAPHS = 64
"""In one store; the oldest is dropped for a new one."""
WARM_UP = 3
"""Calls before a capture, in which libraries allocate their workspaces."""

Outputs: TypeAlias = tuple[Any, ...]
"""Tensors, and what else a function returns, which must be the same at every call."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured function.

    Attributes:
        graph: its kernels.
        inputs: where they read.
        outputs: where they write, until the next replay of any graph.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: Outputs


Store: TypeAlias = dict[Hashable, Graph]
"""Graphs by what they depend on besides the inputs."""


class Graphs:
    """Captures and replays the functions of one target and its drafter.

    Attributes:
        device: of all tensors.
        enabled: whether functions are captured; only on a CUDA device.
        store: of functions that depend on nothing but the models.
    """

    def __init__(self, device: torch.device) -> None:
        """Start without graphs, and disabled."""
        self.device = device
        self.enabled = False
        self.store: Store = {}
        self._lock = Lock()
        self._failed: set[str] = set()

    def run(
        self,
        name: str,
        settings: Hashable,
        function: Callable[..., Outputs],
        *inputs: Tensor,
        store: Store | None = None,
    ) -> Outputs:
        """The outputs of a function, replayed if that is possible.

        Args:
            name: of the function, for messages.
            settings: everything that the function depends on besides its inputs.
            function: of the inputs alone, without any read from the device.
            inputs: tensors on the device.
            store: belongs to what the function reads or writes besides; it must end with it.
        """
        if not self.enabled or self.device.type != "cuda" or name in self._failed:
            return function(*inputs)
        store = self.store if store is None else store
        key = name, settings, tuple((x.shape, x.dtype) for x in inputs)
        with self._lock:
            if key not in store:
                captured = self._capture(name, function, inputs)
                if captured is None:
                    return function(*inputs)
                if len(store) >= MAX_GRAPHS:
                    del store[next(iter(store))]
                store[key] = captured
            graph = store[key]
            for kept, given in zip(graph.inputs, inputs, strict=True):
                kept.copy_(given)
            graph.graph.replay()
            # The next replay overwrites them, and may belong to another text.
            return tuple(x.clone() if isinstance(x, Tensor) else x for x in graph.outputs)

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """The stream of all captures: every stream that is used keeps a workspace."""
        return torch.cuda.Stream(self.device)

    @cached_property
    def pool(self) -> Any:
        """The memory of all graphs, which never run side by side."""
        return torch.cuda.graph_pool_handle()

    def _capture(
        self, name: str, function: Callable[..., Outputs], inputs: tuple[Tensor, ...]
    ) -> Graph | None:
        """Capture a function; None, and a warning, if it cannot be captured."""
        kept = tuple(x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), garbage_collection_disabled():
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    for _ in range(WARM_UP):
                        function(*kept)
                torch.cuda.current_stream().wait_stream(self.stream)
                # Other threads may go on working meanwhile.
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    outputs = function(*kept)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._failed.add(name)
            reason = str(error).partition("\n")[0]
            warnings.warn(f"{name} runs without CUDA graphs: {reason}", stacklevel=2)
            return None
        return Graph(graph, kept, outputs)


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


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()
