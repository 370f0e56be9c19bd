"""CUDA graphs: when they are captured, how captures fail, and that a replay gives the same.

Trees and drafts are functions of tensors alone; some inputs run without static shapes.
"""

from __future__ import annotations

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from itertools import count, product
from threading import Event, current_thread
from types import SimpleNamespace

import numpy as np
import pytest
from failures import failing
from mtp_pairs import write_mtp_pair, write_peagle_pair
from parts import UncapturedGraphs, load_with_parts
from recordings import recording
from replayed_graphs import ReplayedGraphs, fix_addresses
from stand_ins import stand_in

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Prefill, TableOptions, Verify
from treeflash.decoding.sampling import Noise, SamplingParams
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.comparisons import random_tokens, random_tree, steps_of
from treeflash.testing.models import write_dialect, write_pair, write_target
from treeflash.testing.trees import noise_of_depths

require("torch")

import torch
from treeflash_cuda import backend as backend_module
from treeflash_cuda import drafter as drafter_module
from treeflash_cuda.backend import load
from treeflash_cuda.gpu import row_pass
from treeflash_cuda.gpu.graphs import (
    MAX_FAILURES,
    MAX_GRAPHS,
    MAX_ROWS,
    WARM_UP,
    Graphs,
    garbage_collection_disabled,
    synchronising_refused,
)
from treeflash_cuda.hf import attention_contexts
from treeflash_cuda.memory import STATES_EACH

VOCAB = 40


class FailingGraphs(ReplayedGraphs):
    """Graphs whose captures fail for inputs that a test names.

    Attributes:
        errors: what captures raise, by the number of rows.
    """

    def __init__(self):
        super().__init__()
        self.errors = {}

    def record(self, function, places, **_):
        if (error := self.errors.get(len(places[0]))) is not None:
            raise error
        return super().record(function, places)


@pytest.fixture
def graphs():
    return FailingGraphs()


def times(factor):
    return lambda x: (x * factor, factor)


def double(graphs, rows=3, name="doubling", before=lambda: None):
    """Double numbers in a graph, or without one; `before` is called where the function is."""

    def function(x):
        before()
        return (2 * x,)

    x = torch.arange(rows)
    (found,) = graphs.run(name, (), function, x)
    assert torch.equal(found, 2 * x)


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
    stand_in(
        monkeypatch, torch.cuda, empty_cache=lambda: kept_when_emptied.append(len(graphs.store))
    )
    reason = "CUDA out of memory. Tried to allocate 2 GiB"
    double(graphs, 2)
    graphs.errors[9] = RuntimeError(reason)
    for _ in range(5):
        double(graphs, 9)
    assert kept_when_emptied == [0], "graphs hold the memory"
    assert [(x.name, x.reason) for x in graphs.tried] == [("doubling", ""), ("doubling", reason)]
    assert graphs.verdicts == {"doubling": reason}
    for _ in range(2):
        double(graphs, 3)
    assert graphs.captures == 2
    assert graphs.verdicts == {"doubling": "used (2 graphs)"}


@pytest.mark.filterwarnings("error")
def test_replays_and_failures_are_counted_by_function(graphs):
    """A size that cannot be captured stops no other ones of a function that has graphs."""
    reason = "CUDA error: operation not permitted when stream is capturing"
    graphs.errors[4] = RuntimeError(f"{reason}\nSearch for `cudaErrorStreamCaptureUnsupported'")
    for rows in (4, 4, 2, 2):
        double(graphs, rows)
    double(graphs, 2, name="another")
    assert graphs.replays == {"doubling": 2, "another": 1}
    for _ in range(2):
        double(graphs, 4)
    reason = f"doubling runs without CUDA graphs for some of its inputs: {reason}"
    with pytest.warns(UserWarning, match=reason):
        double(graphs, 4)
    tried = len(graphs.tried)
    for rows in (4, 2, 3):
        double(graphs, rows)
    assert graphs.replays == {"doubling": 4, "another": 1}
    assert len(graphs.tried) == tried + 1
    graphs.errors |= dict.fromkeys((2, 3), RuntimeError("never"))
    double(graphs, 4, name="third")
    double(graphs, 2, name="third")
    with pytest.warns(UserWarning, match="third runs without CUDA graphs: never"):
        double(graphs, 3, name="third")
    tried = len(graphs.tried)
    double(graphs, 5, name="third")
    assert len(graphs.tried) == tried
    assert graphs.verdicts["third"] == "never"


@pytest.mark.parametrize("slabs", ["one", "several"])
def test_replays_of_models_are_for_the_present_sequences(windows, monkeypatch, slabs):
    """With other sequences, other numbers of them, and other slabs of the KV cache."""
    replaying = load_with_parts(monkeypatch, *windows)
    plain = load_with_parts(monkeypatch, *windows, cuda_graphs=False)
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
            self.error = "CUDA error: operation failed due to a previous error during capture"

    @contextmanager
    def capture(self, _, *, stream, pool, capture_error_mode="global"):
        if self.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
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
    device.error = "CUDA error: operation not permitted when stream is capturing"
    for _ in range(2):
        double(graphs)
        assert device.stream is before
    assert graphs.verdicts["doubling"] == device.error
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


def test_two_models_are_captured_one_after_the_other(device):
    """One may be loaded while the other answers; PyTorch's captures wait for the whole device."""
    begun, ended = Event(), Event()

    def capture_slowly():
        if device.capturing is not None:
            begun.set()
            assert ended.wait(60)

    graphs = device.graphs(), device.graphs()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(double, graphs[0], before=capture_slowly)
        assert begun.wait(60)
        second = threads.submit(double, graphs[1])
        with suppress(TimeoutError):
            second.result(0.05)
        ended.set()
        first.result()
        second.result()
    assert [x.captures for x in graphs] == [1, 1]


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


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """A pair with windows in target and drafter."""
    folder, drafter = tmp_path_factory.mktemp("pair"), {"sliding_window": 4}
    return write_pair(folder, "mistral", drafter=drafter, vocab_size=VOCAB, layers=3)


@pytest.fixture
def backend(folders, monkeypatch):
    return load_with_parts(monkeypatch, *folders)


def chain(*tokens):
    return DraftTree.chain(np.array(tokens, np.int32), np.zeros(len(tokens)))


def started(backend, prompts, **settings):
    states = [backend.open(100, drafts=True) for _ in prompts]
    backend.verifier.run(
        [Prefill(state, x, None) for state, x in zip(states, prompts, strict=True)]
    )
    return states


@pytest.mark.sample(1)
@pytest.mark.parametrize("dialect", ["deepspec-rnn", "specforge-domino"])
def test_tables_of_recurrent_heads_share_graphs(folders, tmp_path, monkeypatch, dialect):
    """Numbers of sequences and depths are rounded up; shortlists and noise are inputs."""
    target, _ = folders
    write_dialect(tmp_path, target, dialect, seed=2)
    found, keys = [], set()
    for cuda_graphs in (True, False):
        backend = load_with_parts(monkeypatch, target, tmp_path, cuda_graphs=cuda_graphs)
        states, tables = started(backend, [[3, 4, 5], [6], [7, 8]]), []
        for texts, depths, shortlist in product((1, 2, 3), (3, 4, 5), (9, 12)):
            blocks = backend.drafter.draft([(state, 7) for state in states[:texts]], depths)
            for noise in (None, noise_of_depths(backend, 0.8, texts)):
                if noise is not None:
                    rows = np.arange(len(noise.keys)).reshape(texts, -1)[:, :depths].ravel()
                    noise = Noise(noise.keys[rows], noise.scales[rows])
                options = TableOptions(m=4, k=4, shortlist=shortlist, rows=3, noise=noise)
                tables += backend.head.transitions(blocks, options)
        found.append(tables)
        if cuda_graphs:
            keys = {key for key in backend.target.graphs.keys if key[0] == "the AR head"}
    for static, plain in zip(*found, strict=True):
        np.testing.assert_array_equal(static.tokens, plain.tokens)
        np.testing.assert_array_equal(static.next_row, plain.next_row)
        np.testing.assert_allclose(static.log_probs, plain.log_probs, atol=1e-4, rtol=1e-5)
    assert len(keys) == 3 * 2 * 2  # sequences, depths and noise


# The other two differ in what the graphs leave as it is.
@pytest.mark.parametrize(
    "kind",
    ["eagle3", "mtp"]
    + [pytest.param(x, marks=pytest.mark.nightly) for x in ("eagle3-flags", "eagle3-all")],
)
def test_drafts_depth_by_depth_share_graphs(tmp_path, monkeypatch, see_memory, kind):
    """Drafts and rows of caches equal the ones of caches that attend one by one with masks."""
    # With this seed no two paths are so equally probable that rounding decides their order.
    pair = write_mtp_pair(tmp_path, kind, seed=1)
    static = load_with_parts(monkeypatch, *pair)
    plain = load(*pair, LoadConfig(device="cpu", dtype="float32"))
    found = []
    for backend in (static, plain):
        states, results = started(backend, [[3, 4, 5], [6], [7, 8]]), []
        for texts, depths, (k, m) in product((1, 2, 3), (1, 3, 4), ((2, 1), (5, 4))):
            members = states[:texts]
            blocks = backend.drafter.draft([(state, 7) for state in members], depths)
            after = np.arange(1, depths + 1, dtype=np.int32)
            samplings = [SamplingConfig(temperature=0.7, seed=n) for n in range(texts)]
            noise = Noise.from_positions([(sampling, after) for sampling in samplings])
            for added in (None, noise):
                options = TableOptions(m=m, k=k, noise=added)
                results += backend.head.transitions(blocks, options)
            verified = backend.verifier.run(
                [Verify(x, chain(7, 8), SamplingParams()) for x in members]
            )
            backend.verifier.commit(
                verified, [(state, np.arange(1, dtype=np.int32)) for state in members]
            )
        found.append((results, [state.read_drafter_kv_cache() for state in states]))
        rows = states[0].drafter
        assert rows.nbytes == backend.columns(rows.capacity) * backend.drafter_arena.column_nbytes
    for static_table, table in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_array_equal(static_table.tokens, table.tokens)
        np.testing.assert_array_equal(static_table.next_row, table.next_row)
        np.testing.assert_allclose(static_table.log_probs, table.log_probs, atol=1e-4)
    for rows, expected in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(rows, expected, atol=1e-4)
    keys = [name for name, *_ in static.target.graphs.keys]
    assert keys.count("the AR head") == 3 * 3 * 2 * 2  # sequences, depths, sizes and noise
    assert keys.count("the drafter") <= 8
    static.target.graphs.keys.clear()
    see_memory(1 << 30)
    static.warm_up(4)
    warm = [name for name, *_ in static.target.graphs.keys]
    assert warm.count("the AR head") == 3 * 2  # default tables of 1, 2 and 4 texts; noise


def test_drafts_of_all_depths_at_once_share_graphs(tmp_path, monkeypatch):
    """Drafts and caches of P-EAGLE equal the ones that attend sequence by sequence with masks."""
    pair = write_peagle_pair(tmp_path)
    static = load_with_parts(monkeypatch, *pair)
    plain = load(*pair, LoadConfig(device="cpu", dtype="float32"))
    found = []
    for backend in (static, plain):
        backend.drafter.chunk = 4
        states, results = started(backend, [[3, 4, 5] * 4, [6], [7, 8]]), []
        for texts, nodes in product((1, 2, 3), (1, 2, 3)):
            blocks = backend.drafter.draft([(state, 7) for state in states[:texts]], nodes)
            results += [block.hidden.numpy() for block in blocks]
            work = [Verify(x, chain(7, 8, 9), SamplingParams()) for x in states[:texts]]
            verified = backend.verifier.run(work)
            path = np.arange(nodes, dtype=np.int32)
            backend.verifier.commit(verified, [(state, path) for state in states[:texts]])
        found.append(results + [state.read_drafter_kv_cache() for state in states])
    for drafts, expected in zip(*found, strict=True):
        np.testing.assert_allclose(drafts, expected, atol=1e-4)
    keys = [key for key in static.target.graphs.keys if key[0] == "the drafter"]
    assert len(keys) <= 6  # by rows, with new states and without


def test_the_rows_of_a_pass_alone_fix_its_shapes(backend):
    """Not their division between sequences, nor lengths, and few numbers of rows occur."""
    states = started(backend, [[3, 4], [5], [6] * 50])
    backend.target.graphs.keys.clear()
    rows = []
    backend.target.layers[0].register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    for sizes in ((1,), (3,), (9,), (5, 5, 5), (1, 14, 1), (7, 2), (40, 4, 3), (46,)):
        trees = [(state, chain(*[3] * n)) for state, n in zip(states, sizes, strict=False)]
        backend.verifier.logits(trees)
    assert rows == [1, 4, 16, 16, 16, 16, 48, 48]
    assert len(backend.target.graphs.keys) == len(set(rows))


def test_what_is_warm_captures_nothing_later(backend):
    """Whatever the trees, prompts and lengths of up to the sequences that were said."""
    graphs = backend.target.graphs
    backend.warm_up(4)
    warm = set(graphs.keys)
    assert [name for name, *_ in warm].count("the AR head") == 3 * 2  # 1, 2 and 4 texts; noise
    states = started(backend, [[3] * n for n in (60, 5, 1)])
    for sizes in ((1, 1, 1), (5, 1, 20), (30, 64, 64)):
        backend.drafter.draft([(state, 1) for state in states])
        trees = [chain(*[3] * n) for n in sizes]
        verified = backend.verifier.run(
            [Verify(x, tree, SamplingParams()) for x, tree in zip(states, trees, strict=True)]
        )
        backend.verifier.commit(
            verified, [(state, np.arange(1, dtype=np.int32)) for state in states]
        )
    backend.drafter.draft([(states[0], 1)])
    assert {x for x in graphs.keys if x[0] == "the target"} <= warm
    assert len(graphs.keys - warm) <= 1  # a draft after long prompts


def test_tables_of_a_drafter_without_a_head_are_warm_too(tmp_path, monkeypatch):
    pair = write_pair(tmp_path, "qwen3", drafter={"format": "dflash"})
    backend = load_with_parts(monkeypatch, *pair)
    backend.warm_up(4)
    names = [name for name, *_ in backend.target.graphs.keys]
    assert names.count("marginals") == 3 * 2  # 1, 2 and 4 texts; noise
    before = set(backend.target.graphs.keys)
    config = DecodeConfig(
        method="ddtree", budget=8, max_tokens=6, sampling=SamplingConfig(temperature=0.7)
    )
    steps_of(backend, [3, 4, 5], config)
    assert not [key for key in backend.target.graphs.keys - before if key[0] == "marginals"]


def test_iterations_that_capture_a_graph_are_not_measured(backend):
    numbers, config = count(), DecodeConfig(budget="auto", max_tokens=6)

    class Capturing(UncapturedGraphs):
        captures = property(lambda _: next(numbers))

    with recording(AdaptiveBudget, "observe") as measured:
        steps_of(backend, [3, 4, 5], config)
    assert measured
    backend.target.graphs = Capturing(backend.target.device)
    with recording(AdaptiveBudget, "observe") as measured:
        steps_of(backend, [3, 4, 5], config)
    assert not measured


def test_a_warm_up_of_more_sequences_than_memory_has_room_for_goes_on(backend):
    """It gives the memory back, and prepares drafts for fewer sequences."""
    arena, drafter_arena = backend.target.arena, backend.drafter_arena
    positions = MAX_ROWS + 30
    for part in (arena, drafter_arena):
        part.reserved_nbytes = positions * part.column_nbytes
    backend.warm_up(64)
    assert [slab.is_free for part in (arena, drafter_arena) for slab in part.slabs] == [True, True]
    names = [name for name, *_ in backend.target.graphs.keys]
    assert names.count("the drafter") >= 2 * len(backend_module.NEW_TOKENS)


def test_a_warm_up_begins_with_the_states_and_ends_where_memory_does(
    tmp_path, monkeypatch, see_memory
):
    """Graphs of a smaller arena of recurrent states would be of no use later."""
    write_target(tmp_path, "qwen3_5", seed=1, layers=2)
    backend = load_with_parts(monkeypatch, tmp_path)
    see_memory(1 << 30, 1 << 30)
    for error, outcome in (
        (RuntimeError("CUDA out of memory"), pytest.warns(match="captured when needed: CUDA out")),
        (RuntimeError("a kernel failed"), pytest.raises(RuntimeError, match="a kernel failed")),
    ):
        with failing(backend.verifier, "forward", error), outcome:
            backend.warm_up(4)
    stand_in(monkeypatch, backend.verifier, forward=lambda *_: None)
    assert backend.warm_up(4) == 0
    assert backend.target.state_arena.slots == 1 + 4 * STATES_EACH


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (row_pass, "MAX_ROWS", 4),
        (drafter_module, "MAX_CONTEXT", 0),
        (attention_contexts, "is_window", lambda *_: False),
    ],
)
@pytest.mark.filterwarnings("ignore:draft trees run without CUDA graphs")
def test_what_does_not_fit_runs_without_static_shapes(windows, monkeypatch, module, name, value):
    monkeypatch.setattr(module, name, value)
    backend = load_with_parts(monkeypatch, *windows, models=True)
    states = started(backend, [[3, 4, 5], [6]])
    trees = [(state, chain(*range(6))) for state in states]
    assert backend.target.has_row_pass == (name != "is_window")  # found out at load
    if name == "is_window":  # a pass of another kind would give other bits
        backend.target.is_exact = backend.target.has_row_pass = True
        with pytest.raises(UnsupportedModelError, match="neither causal nor a sliding window"):
            backend.verifier.logits(trees)
        with pytest.raises(UnsupportedModelError, match="neither causal nor a sliding window"):
            backend.target.choose_passes()
        backend.target.is_exact = backend.target.has_row_pass = False
    together = backend.verifier.logits(trees).logits
    for (state, tree), logits in zip(trees, together, strict=True):
        np.testing.assert_allclose(
            backend.verifier.logits([(state, tree)]).logits[0], logits, atol=1e-4
        )


def test_sequences_of_several_slabs_run_one_after_another(windows, monkeypatch):
    backend = load_with_parts(monkeypatch, *windows)
    backend.target.arena.slab_nbytes = 1
    trees = [(state, chain(*range(6))) for state in started(backend, [[3, 4, 5], [6]])]
    for tree, logits in zip(trees, backend.verifier.logits(trees).logits, strict=True):
        np.testing.assert_allclose(backend.verifier.logits([tree]).logits[0], logits, atol=1e-4)


def test_trees_beyond_the_capacity_of_a_sequence_are_not_written(backend):
    state = backend.open(5, drafts=False)
    backend.verifier.run([Prefill(state, [3, 4, 5], None)])
    with pytest.raises(AssertionError, match="outgrown"):
        backend.verifier.run([Verify(state, chain(6, 7, 8), SamplingParams())])
    assert state.length == 3


def test_what_earlier_texts_left_is_not_seen(backend):
    (state,), tree = started(backend, [[3, 4, 5]]), chain(6, 7, 8)
    (expected,) = backend.verifier.logits([(state, tree)]).logits
    cache = state.kv_cache
    with torch.inference_mode():
        cache.slab.storage[:, :, :, cache.columns_at(np.arange(state.length, 100))] = torch.nan
    np.testing.assert_array_equal(backend.verifier.logits([(state, tree)]).logits[0], expected)
