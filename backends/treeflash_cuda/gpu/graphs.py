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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from threading import Lock, get_ident
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treeflash.errors import first_line, is_device_lost, is_out_of_memory

GRAPH_ROWS = (1, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""The numbers of rows that have graphs. More rows are split between passes: from some hundred rows
on a pass takes the time of its products, so that two passes take as long as one of twice the size,
and half of its memory."""
MAX_ROWS = GRAPH_ROWS[-1]
MAX_GRAPHS = 64
"""Graphs of a function that are kept; the graph that was not used for longest is dropped for a new
one. Graphs of other functions do not count: under `torchrun` rank 0 alone has some, but all ranks
must keep the same graphs of the target."""
MAX_FAILURES = 3
"""Failed captures, for equal settings and shapes or before the first success, after which a
function runs without graphs."""
MAX_TRIED = 1000
"""Captures that are remembered for reports."""
WARM_UP = 3
"""Calls before a capture, in which libraries allocate workspaces, and NCCL opens connections."""
WAITS = "called a synchronizing CUDA operation"
"""PyTorch's words for a host that waits for the device."""
_checking = Lock()  # the mode in which PyTorch says so, and filters of warnings, are the process's
_capturing = Lock()  # a capture begins with a wait for the device, which another one forbids

Key: TypeAlias = tuple[str, Hashable, Hashable]
"""The name of a function, its settings, and the shapes and dtypes of its inputs."""
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
        # A function that all ranks of `torchrun` call has an entry by its name, which turns whether
        # its capture succeeded on this rank into whether it did on all of them.
        self.agreements: dict[str, Callable[[bool], bool]] = {}
        self.captured: Counter[str] = Counter()  # graphs so far, by the name of the function
        self.tried: deque[Capture] = deque(maxlen=MAX_TRIED)  # the latest captures
        self.replays: Counter[str] = Counter()  # replays by the name of the function
        # The latest used one last.
        self.store: OrderedDict[Key, Graph] = OrderedDict()
        self._lock = Lock()
        # Failed captures by key, and by the name of a function that was never captured.
        self._failures: Counter[Key | str] = Counter()

    def run(
        self,
        name: str,  # the name of the function, for messages
        settings: Hashable,  # everything that the function depends on besides its inputs
        function: Callable[..., Outputs],  # depends on the inputs alone; reads nothing back
        *inputs: Tensor,  # tensors on the device
        capture: bool = True,  # False calls the function
    ) -> Outputs:
        """Return the outputs of a function, replayed if that is possible."""
        if not capture or not self.is_capturing:
            return function(*inputs)
        key = name, settings, tuple((x.shape, x.dtype) for x in inputs)
        with self._lock:
            if key in self.store or self._add(key, function, inputs):
                self.store.move_to_end(key)
                graph = self.store[key]
                for place, tensor in zip(graph.inputs, inputs, strict=True):
                    place.copy_(tensor)
                graph.graph.replay()
                self.replays[name] += 1
                # The next replay, perhaps for another sequence, overwrites the outputs.
                return tuple(x.clone() if isinstance(x, Tensor) else x for x in graph.outputs)
        return function(*inputs)

    def _add(self, key: Key, function: Callable[..., Outputs], inputs: tuple[Tensor, ...]) -> bool:
        """Capture a function and store its graph, unless this has failed before; return whether."""
        name = key[0]
        if max(self._failures[key], self._failures[name]) >= MAX_FAILURES:
            return False
        graph = self._capture(key, function, inputs)
        if graph is None:
            return False
        same = [other for other in self.store if other[0] == name]
        if len(same) >= MAX_GRAPHS:
            del self.store[same[0]]
        self.store[key] = graph
        return True

    @property
    def captures(self) -> int:
        """Graphs captured so far."""
        return self.captured.total()

    @property
    def verdicts(self) -> dict[str, str]:
        """Whether each function is captured, by name; the reason if its latest capture failed."""
        return {x.name: x.reason or f"used ({self.captured[x.name]} graphs)" for x in self.tried}

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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Call functions, and capture none."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def clear(self) -> None:
        """Drop all graphs: NCCL waits for graphs that use a communicator before it ends."""
        self.store.clear()

    def _capture(
        self, key: Key, function: Callable[..., Outputs], inputs: tuple[Tensor, ...]
    ) -> Graph | None:
        """Capture a function; return None if it cannot be captured.

        A failure counts, and the last one that may happen is a warning. If memory runs out, all
        other graphs are dropped, as the function needs memory without a graph, too, and it is not
        tried again for inputs of these shapes. Ranks of `torchrun`, which must keep the same
        graphs, do not drop them.
        """
        name, graph, fits = key[0], None, True
        reason, started = "another rank cannot capture it", time.perf_counter()
        try:
            places = tuple(x.clone() for x in inputs)
            graph = self.record(function, places, is_first=not self.captured[name])
        except Exception as error:  # Triton's are no RuntimeErrors
            if is_device_lost(error):
                raise
            reason = first_line(error)
            fits = not is_out_of_memory(error) or name in self.agreements
        if not fits:
            self.clear()
            torch.cuda.empty_cache()
        succeeded = self.agreements.get(name, bool)(graph is not None)
        seconds = time.perf_counter() - started
        self.tried.append(Capture(name, seconds, "" if succeeded else reason))
        if succeeded:
            self.captured[name] += 1
            return graph
        if not fits:
            self._failures[key] = MAX_FAILURES  # smaller inputs may fit
            return None
        counted = key if self.captured[name] else name
        self._failures[counted] += 1
        if self._failures[counted] == MAX_FAILURES:
            which = " for some of its inputs" if counted is key else ""
            warnings.warn(f"{name} runs without CUDA graphs{which}: {reason}", stacklevel=2)
        return None

    def record(
        self,
        function: Callable[..., Outputs],
        places: tuple[Tensor, ...],
        *,
        is_first: bool,  # no function of this name has been captured
    ) -> Graph:
        """Capture a function whose inputs have these addresses."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), garbage_collection_disabled():
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP - 1):
                    function(*places)
                with synchronising_refused() if is_first else nullcontext():
                    function(*places)
            current = torch.cuda.current_stream()
            current.wait_stream(self.stream)
            # A capture that fails in PyTorch 2.13 and 2.14 leaves its stream the current one, and
            # its pool where no other capture can begin. Other threads may use the device during the
            # capture.
            try:
                with (
                    _capturing,
                    torch.cuda.stream(current),
                    torch.cuda.graph(
                        graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                    ),
                ):
                    outputs = function(*places)
            except Exception:
                self.pool = torch.cuda.graph_pool_handle()
                raise
        return Graph(graph, places, outputs)


@contextmanager
def synchronising_refused() -> Iterator[None]:
    """Raise a RuntimeError at the end if this thread waited for the device in the `with` block.

    No capture can wait. So a function that cannot be captured is found before a capture, whose
    failure would leave parts of PyTorch's allocator in disorder; code that waits only where nothing
    is captured is found too. PyTorch tells of all threads of the process: others may wait, such as
    the thread of a model that answers while this one is loaded.
    """
    own = get_ident()
    waits: list[str] = []

    def note(message: Warning | str, *details: Any, **more: Any) -> None:
        if WAITS not in str(message):
            show(message, *details, **more)
        elif get_ident() == own:
            waits.append(str(message))

    with _checking, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        warnings.filterwarnings("always", WAITS)
        show, warnings.showwarning = warnings.showwarning, note
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if waits:
        raise RuntimeError(waits[0])


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


def round_up(rows: int) -> int:
    """Return the least of `GRAPH_ROWS` that is large enough, for at most `MAX_ROWS` rows."""
    return next(size for size in GRAPH_ROWS if size >= rows)


def padded_order(count: int, rows: int) -> NDArray[np.int64]:
    """Return all rows, and copies of the first one, which write the same keys to the same slot."""
    order = np.zeros(rows, np.int64)
    order[:count] = np.arange(count)
    return order


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def power_of_four(n: int) -> int:
    """Return the smallest power of four that is at least n, for what costs little to round up."""
    return 1 << (n - 1).bit_length() + (n - 1).bit_length() % 2
