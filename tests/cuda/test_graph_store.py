"""Captures: when they are made, how they fail, and that a replay gives what its function would."""

from __future__ import annotations

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Event, current_thread
from types import SimpleNamespace

import numpy as np
import pytest
from parts import load_with_parts
from replayed_graphs import ReplayedGraphs, fix_addresses
from stand_ins import stand_in

from treeflash.decoding.interfaces import Prefill
from treeflash.testing import require
from treeflash.testing.comparisons import random_tokens, random_tree
from treeflash.testing.models import write_drafter, write_target

require("torch")

import torch
from treeflash_cuda.gpu.graphs import (
    MAX_FAILURES,
    MAX_GRAPHS,
    WARM_UP,
    Graphs,
    garbage_collection_disabled,
    synchronising_refused,
)

VOCAB = 40


class FailingGraphs(ReplayedGraphs):
    """Graphs whose captures fail for inputs that a test names.

    Attributes:
        errors: what captures raise, by the number of rows.
    """

    def __init__(self):
        super().__init__()
        self.errors = {}

    def _record(self, function, places, **_):
        if (error := self.errors.get(len(places[0]))) is not None:
            raise error
        return super()._record(function, places)

    def double(self, rows, name="doubling"):
        x = torch.arange(rows)
        (found,) = self.run(name, (), lambda x: (2 * x,), x)
        assert found.tolist() == (2 * x).tolist()


@pytest.fixture
def graphs():
    return FailingGraphs()


def times(factor):
    return lambda x: (x * factor, factor)


def test_what_a_function_depends_on_tells_graphs_apart(graphs):
    """Its name, its settings, and the shapes and dtypes of its inputs."""
    x = torch.tensor([1, 2])
    for _ in range(2):
        for name, factor in (("one", 2), ("one", 3), ("two", 2)):
            scale = factor if name == "one" else -factor
            result, other = graphs.run(name, factor, times(scale), x)
            assert (result.tolist(), other) == ([scale, 2 * scale], scale)
        for y in (x.double(), x[:1], x[None], x.to(torch.int32)):
            result, _ = graphs.run("one", 2, times(2), y)
            assert result.dtype == y.dtype
            torch.testing.assert_close(result, 2 * y)
    assert graphs.captures == 7, "each is captured once"


def test_outputs_belong_to_the_caller(graphs):
    """Another replay, and a change of the inputs, leave them alone."""
    inputs = [torch.full((3,), float(i)) for i in range(5)]
    outputs = [graphs.run("f", None, times(2), x)[0] for x in inputs]
    for i, output in enumerate(outputs):
        assert output.tolist() == [2.0 * i] * 3
    inputs[-1].fill_(9)
    assert outputs[-1].tolist() == [8.0] * 3
    outputs[0].fill_(7)
    assert graphs.run("f", None, times(2), inputs[1])[0].tolist() == [2.0] * 3


def test_a_function_keeps_the_graphs_that_it_used_lately(graphs):
    """Graphs of one function displace none of another, so `torchrun`'s ranks keep equal ones."""
    x = torch.ones(1)
    graphs.run("shared", None, times(2), x)
    for i in range(MAX_GRAPHS + 3):
        graphs.run("f", i, times(i), x)
        graphs.run("f", 0, times(-1), x)
    assert [key[:2] for key in graphs.store if key[0] == "shared"] == [("shared", None)]
    kept = [settings for name, settings, _ in graphs.store if name == "f"]
    assert kept == [*range(4, MAX_GRAPHS + 3), 0]
    assert graphs.captured == {"shared": 1, "f": MAX_GRAPHS + 3}
    assert graphs.run("f", 1, times(1), x)[0].tolist() == [1.0]
    assert graphs.captured["f"] == MAX_GRAPHS + 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [None, TypeError("out of resource: shared memory")])
def test_what_cannot_be_captured_is_called(graphs, error):
    """On this rank, for whatever reason, or on another one, so that both try equally often."""
    x = torch.ones(1)
    if error is None:
        graphs.agreements["shared"] = lambda succeeded: not succeeded
    else:
        graphs.errors[1] = error  # Triton's are no RuntimeErrors
    reason = f"^shared runs without CUDA graphs: {error or 'another rank cannot capture it'}$"
    for i in range(MAX_FAILURES + 2):
        last = i == MAX_FAILURES - 1
        with pytest.warns(UserWarning, match=reason) if last else nullcontext():
            assert graphs.run("shared", None, times(i), x)[0].tolist() == [i]
    assert (len(graphs.tried), graphs.captures, len(graphs.store)) == (MAX_FAILURES, 0, 0)
    graphs.errors.clear()
    graphs.run("own", None, times(1), x)
    assert (graphs.captures, len(graphs.store)) == (1, 1)


def test_memory_that_runs_out_during_a_capture_drops_the_other_graphs(graphs, monkeypatch):
    """The function runs without a graph, and is not captured again with the same shapes."""
    kept_when_emptied = []
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: kept_when_emptied.append(len(graphs.store))
    )
    reason = "CUDA out of memory. Tried to allocate 2 GiB"
    graphs.double(2)
    graphs.errors[9] = RuntimeError(reason)
    for _ in range(5):
        graphs.double(9)
    assert kept_when_emptied == [0], "graphs hold the memory"
    assert [(x.name, x.reason) for x in graphs.tried] == [("doubling", ""), ("doubling", reason)]
    assert graphs.verdicts == {"doubling": reason}
    for _ in range(2):
        graphs.double(3)
    assert graphs.captures == 2
    assert graphs.verdicts == {"doubling": "used (2 graphs)"}


@pytest.mark.filterwarnings("error")
def test_replays_and_failures_are_counted_by_function(graphs):
    """A size that cannot be captured stops no other ones of a function that has graphs."""
    graphs.errors[4] = RuntimeError("operation not permitted\nwhen capturing")
    for rows in (4, 4, 2, 2):
        graphs.double(rows)
    graphs.double(2, name="another")
    assert graphs.replays == {"doubling": 2, "another": 1}
    for _ in range(2):
        graphs.double(4)
    reason = "doubling runs without CUDA graphs for some of its inputs: operation not perm"
    with pytest.warns(UserWarning, match=reason):
        graphs.double(4)
    tried = len(graphs.tried)
    for rows in (4, 2, 3):
        graphs.double(rows)
    assert graphs.replays == {"doubling": 4, "another": 1}
    assert len(graphs.tried) == tried + 1
    graphs.errors |= dict.fromkeys((2, 3), RuntimeError("never"))
    graphs.double(4, name="third")
    graphs.double(2, name="third")
    with pytest.warns(UserWarning, match="third runs without CUDA graphs: never"):
        graphs.double(3, name="third")
    tried = len(graphs.tried)
    graphs.double(5, name="third")
    assert len(graphs.tried) == tried
    assert graphs.verdicts["third"] == "never"


@pytest.mark.parametrize("slabs", ["one", "several"])
def test_replays_of_models_are_for_the_present_sequences(tmp_path, monkeypatch, slabs):
    """With other sequences, other numbers of them, and other slabs of the KV cache."""
    folders = tmp_path / "target", tmp_path / "drafter"
    write_target(folders[0], "mistral", seed=1, vocab_size=VOCAB, layers=3)
    write_drafter(folders[1], folders[0], seed=2, sliding_window=4)
    replaying = load_with_parts(monkeypatch, *folders)
    plain = load_with_parts(monkeypatch, *folders, cuda_graphs=False)
    replaying.target.graphs = captured = ReplayedGraphs(with_addresses=slabs == "one")
    fix_addresses(monkeypatch)
    groups = [[0], [1], [0, 1], [2, 3], [1], [2, 0, 3], [0]]
    groups = [group for group in groups if slabs == "one" or len(group) == 1]
    found = []
    for backend in (replaying, plain):
        if slabs == "several":
            backend.target.arena.slab_nbytes = 1
        rng = np.random.default_rng(3)
        states = [backend.open(100, drafts=True) for _ in range(4)]
        prompts = [random_tokens(rng, VOCAB, n) for n in (12, 3, 5, 7)]
        for state, prompt in zip(states, prompts, strict=True):
            backend.verifier.run([Prefill(state, prompt, None)])
        results = []
        for group in groups:
            trees = [(states[i], random_tree(rng, 7, 5, VOCAB)) for i in group]
            verified = backend.verifier.logits(trees)
            results += verified.logits
            path = np.arange(1, dtype=np.int32)
            backend.verifier.commit(verified, [(states[i], path) for i in group])
            blocks = backend.drafter.draft([(states[i], 3) for i in group])
            results += [backend.drafter.log_probs(block) for block in blocks]
        found.append(results)
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    for name in ("the target", "the drafter"):
        assert 0 < captured.captured[name] < captured.replays[name]


class Stream:
    """A queue of work on a device, which runs beside the others unless it waits for them.

    Attributes:
        queued: the number of functions that were called on it.
        seen: how much of other streams' work, by stream, ends before what comes next.
    """

    def __init__(self, device=None):
        self.queued = 0
        self.seen = {}

    def wait_stream(self, other):
        self.seen[other] = other.queued

    def has_waited_for(self, other):
        return self is other or self.seen.get(other, 0) == other.queued


class Device:
    """Stands for the parts of `torch.cuda` that captures use.

    Attributes:
        stream: the current stream.
        pools: the pools of captures that began.
        mode: what PyTorch does when a thread waits for the device.
        capturing: the thread of the capture that is under way, and its mode.
        error: the message of the error with which all captures end; None if they succeed.
    """

    def __init__(self, monkeypatch):
        self.stream = Stream()
        self.pools = []
        self.mode = "default"
        self.capturing = None
        self.error = None
        stand_in(
            monkeypatch,
            torch.cuda,
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
            Stream=Stream,
            current_stream=lambda: self.stream,
            device=lambda _: nullcontext(),
            get_sync_debug_mode=lambda: self.mode,
            graph=self.capture,
            graph_pool_handle=object,
            set_sync_debug_mode=lambda mode: vars(self).update(mode=mode),
            stream=self.enter,
        )

    def graphs(self):
        """Graphs of a target on the device."""
        graphs = Graphs(torch.device("cuda"))
        graphs.enabled = True
        return graphs

    def wait(self):
        """Wait for the device, from any thread."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    def allocate(self):
        """Take memory from the driver, which spoils captures: in some modes of any thread."""
        thread, mode = self.capturing or (None, "relaxed")
        if mode == "global" or (mode == "thread_local" and thread is current_thread()):
            self.error = "operation failed due to a previous error during capture"

    @contextmanager
    def capture(self, _, *, stream, pool, capture_error_mode="global"):
        before, self.stream = self.stream, stream
        self.pools.append(pool)
        self.capturing = current_thread(), capture_error_mode
        yield
        self.capturing = None
        if self.error is not None:
            raise RuntimeError(self.error)
        self.stream = before

    @contextmanager
    def enter(self, new):
        before, self.stream = self.stream, new
        try:
            yield
        finally:
            self.stream = before


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def double(graphs, before=lambda: None, name="doubling"):
    """Double numbers in a graph, or without one; `before` is called where the function is."""

    def function(x):
        before()
        return (2 * x,)

    assert graphs.run(name, (), function, torch.arange(3))[0].tolist() == [0, 2, 4]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_again_if_it_was(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with garbage_collection_disabled():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_the_stream_and_the_pool_of_a_failed_capture_are_left(device):
    """PyTorch before 2.15 does not leave them itself."""
    before, graphs = device.stream, device.graphs()
    device.error = "operation not permitted when capturing"
    for _ in range(2):
        double(graphs)
        assert device.stream is before
    assert graphs.verdicts["doubling"] == "operation not permitted when capturing"
    assert len(set(device.pools)) == 2


def test_what_waits_for_the_device_is_found_before_its_capture(device):
    graphs = device.graphs()
    double(graphs, before=device.wait)
    assert graphs.verdicts["doubling"] == "called a synchronizing CUDA operation"
    assert not device.pools
    assert device.mode == "default"


@pytest.mark.filterwarnings("error")
def test_other_threads_may_wait_for_the_device_while_a_function_is_checked(device):
    """A server answers with one model, and reads its tokens, while it loads another one."""
    checked = []

    def wait_elsewhere():
        if device.mode != "default":
            checked.append(device.mode)
            with ThreadPoolExecutor(1) as other:
                other.submit(device.wait).result()

    for graphs in (device.graphs(), device.graphs()):
        double(graphs, before=wait_elsewhere)
        assert graphs.verdicts == {"doubling": "used (1 graphs)"}
    assert checked
    assert device.mode == "default"


def test_two_models_are_checked_one_after_the_other(device):
    """Else the second would take the first one's mode for the user's, and leave it for ever."""
    begun, ended = [Event(), Event()], [Event(), Event()]

    def check(n):
        with synchronising_refused():
            begun[n].set()
            assert ended[n].wait(60)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(check, 0)
        assert begun[0].wait(60)
        second = threads.submit(check, 1)
        overlap = begun[1].wait(0.05)
        ended[0].set()
        first.result()
        ended[1].set()
        second.result()
    assert not overlap
    assert device.mode == "default"


def test_a_capture_runs_between_what_was_queued_and_what_follows(device):
    """Its warm-up reads what earlier work wrote, and writes keys that a replay reads.

    Libraries allocate workspaces and open connections in the warm-up, which no graph can have.
    """
    own, graphs, used = device.stream, device.graphs(), []
    own.queued = 5

    def queue():
        if device.capturing is None:
            assert device.stream.has_waited_for(own)
            device.stream.queued += 1
            used.append(device.stream)

    double(graphs, before=queue)
    assert (graphs.captures, len(used)) == (1, WARM_UP)
    assert device.stream is own
    assert all(own.has_waited_for(stream) for stream in used)


def test_other_threads_may_use_the_device_during_a_capture(device):
    """NCCL's watchdog does, and a thread that reads a model; the capture's own thread may not."""
    graphs = device.graphs()

    def allocate_elsewhere():
        with ThreadPoolExecutor(1) as threads:
            threads.submit(device.allocate).result()

    double(graphs, before=allocate_elsewhere)
    assert graphs.captures == 1
    double(graphs, before=device.allocate, name="spoilt")
    assert graphs.captures == 1
