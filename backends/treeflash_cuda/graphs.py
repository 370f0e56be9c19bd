"""Functions of tensors that are captured once as CUDA graphs, and then replayed.

An iteration consists of thousands of small kernels, which a CPU launches more slowly than a GPU
runs them. A CUDA graph launches all kernels of a function at once, but with the shapes and
addresses of its capture: everything that differs between calls must be in the inputs, which are
copied to fixed addresses.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, TypeAlias

import torch
from torch import Tensor

from treeflash.errors import first_line, is_out_of_memory

MAX_GRAPHS = 64
"""Graphs of a function that are kept; the graph that was not used for longest is dropped for a new
one. Graphs of other functions do not count: under `torchrun` rank 0 alone has some, but all ranks
must keep the same graphs of the target."""
MAX_FAILURES = 3
"""Captures of a function that may fail; it then runs without graphs."""
MAX_TRIED = 1000
"""Captures that are remembered for reports."""
MIN_LENGTH = 1024
"""Shorter sequences share a graph. The length of the longest sequence fixes the shapes of a graph:
between how many processors its attention is split."""
WARM_UP = 3
"""Calls before a capture, in which libraries allocate workspaces, and NCCL opens connections."""

Outputs: TypeAlias = tuple[Any, ...]
"""Tensors, and other results, which must be equal at every call."""


@dataclass(frozen=True)
class Capture:
    """A capture that was tried."""

    name: str  # the name of the function
    seconds: float
    reason: str  # why it failed; empty if it succeeded


@dataclass(frozen=True, eq=False)
class Graph:
    graph: torch.cuda.CUDAGraph  # the kernels
    inputs: tuple[Tensor, ...]  # the tensors that the kernels read
    outputs: Outputs  # what the kernels write; the next replay of any graph overwrites it


class Graphs:
    """Captures and replays the functions of one target and its drafter."""

    def __init__(self, device: torch.device) -> None:
        self.device = device  # the device of all tensors
        self.enabled = False  # whether functions are captured; only on a CUDA device
        # By the name of a function that all ranks of `torchrun` call: whether its capture succeeded
        # on all of them, from whether it did on this one.
        self.agreements: dict[str, Callable[[bool], bool]] = {}
        self.captures = 0  # graphs captured so far
        self.tried: deque[Capture] = deque(maxlen=MAX_TRIED)  # the latest captures
        self.replays: Counter[str] = Counter()  # by the name of the function
        # By name, settings, and the shapes and dtypes of the inputs; the latest used one last.
        self.store: OrderedDict[tuple[str, Hashable, Hashable], Graph] = OrderedDict()
        self._lock = Lock()
        self._failures: Counter[str] = Counter()
        self._too_large: set[Hashable] = set()  # keys for whose capture there was no memory

    def run(
        self,
        name: str,  # the name of the function, for messages
        settings: Hashable,  # everything that the function depends on besides its inputs
        function: Callable[..., Outputs],  # of the inputs alone, without any read from the device
        *inputs: Tensor,  # tensors on the device
        capture: bool = True,  # False calls the function
    ) -> Outputs:
        """Return the outputs of a function, replayed if that is possible."""
        if not capture or not self.is_capturing or self._failures[name] >= MAX_FAILURES:
            return function(*inputs)
        key = name, settings, tuple((x.shape, x.dtype) for x in inputs)
        with self._lock:
            if key in self._too_large:
                return function(*inputs)
            if key not in self.store:
                failures = self._failures[name]
                captured = self._capture(name, function, inputs)
                if captured is None:
                    if self._failures[name] == failures:
                        self._too_large.add(key)
                    return function(*inputs)
                same = [other for other in self.store if other[0] == name]
                if len(same) >= MAX_GRAPHS:
                    del self.store[same[0]]
                self.store[key] = captured
            self.store.move_to_end(key)
            graph = self.store[key]
            for place, tensor in zip(graph.inputs, inputs, strict=True):
                place.copy_(tensor)
            graph.graph.replay()
            self.replays[name] += 1
            # The next replay, perhaps for another sequence, overwrites the outputs.
            return tuple(x.clone() if isinstance(x, Tensor) else x for x in graph.outputs)

    @property
    def verdicts(self) -> dict[str, str]:
        """Whether each function is captured, by name; the reason if its latest capture failed."""
        return {x.name: x.reason or "captured" for x in self.tried}

    @property
    def is_capturing(self) -> bool:
        """Whether functions are captured, for which shapes are rounded up."""
        return self.enabled and self.device.type == "cuda"

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """The stream of all captures: every additional stream would keep a workspace."""
        return torch.cuda.Stream(self.device)

    @cached_property
    def pool(self) -> Any:
        """The memory of all graphs, which never run side by side."""
        return torch.cuda.graph_pool_handle()

    def clear(self) -> None:
        """Drop all graphs: NCCL waits for graphs that use a communicator before it ends."""
        self.store.clear()

    def _capture(
        self, name: str, function: Callable[..., Outputs], inputs: tuple[Tensor, ...]
    ) -> Graph | None:
        """Capture a function; return None if it cannot be captured.

        A failure counts, and the last one that may happen is a warning. If memory runs out, it does
        not count, but all other graphs are dropped: the function needs memory without a graph, too.
        Ranks of `torchrun`, which must keep the same graphs, do not drop them.
        """
        graph: Graph | None = None
        reason, fits, started = "another rank cannot capture it", True, time.perf_counter()
        try:
            graph = self._record(function, tuple(x.clone() for x in inputs))
        except RuntimeError as error:
            reason = first_line(error)
            fits = not is_out_of_memory(error) or name in self.agreements
        if not fits:
            self.clear()
            torch.cuda.empty_cache()
        succeeded = self.agreements.get(name, bool)(graph is not None)
        seconds = time.perf_counter() - started
        self.tried.append(Capture(name, seconds, "" if succeeded else reason))
        if succeeded:
            self.captures += 1
            return graph
        if not fits:
            return None  # smaller inputs may fit
        self._failures[name] += 1
        if self._failures[name] == MAX_FAILURES:
            warnings.warn(f"{name} runs without CUDA graphs: {reason}", stacklevel=2)
        return None

    def _record(self, function: Callable[..., Outputs], places: tuple[Tensor, ...]) -> Graph:
        """Capture a function whose inputs have these addresses."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), garbage_collection_disabled():
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    function(*places)
            current = torch.cuda.current_stream()
            current.wait_stream(self.stream)
            # PyTorch 2.13 and 2.14 leave the stream of a capture that fails the current one. Other
            # threads may use the device during the capture.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ),
            ):
                outputs = function(*places)
        return Graph(graph, places, outputs)


@contextmanager
def garbage_collection_disabled() -> Iterator[None]:
    """Hold garbage collection: destroying an old graph would spoil a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def power_of_four(n: int) -> int:
    """Return the smallest power of four that is at least n, for what costs little to round up."""
    return 1 << (n - 1).bit_length() + (n - 1).bit_length() % 2
