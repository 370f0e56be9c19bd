"""Trees and drafts as functions of tensors alone, and when they run without static shapes.

`test_graph_store.py` has the graphs of these functions.
"""

from itertools import count, product

import numpy as np
import pytest
from failures import failing
from mtp_pairs import write_mtp_pair, write_peagle_pair
from parts import UncapturedGraphs, load_with_parts
from recordings import recording

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Prefill, TableOptions, Verify
from treeflash.decoding.sampling import Noise, SamplingParams
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.comparisons import steps_of
from treeflash.testing.models import write_dialect, write_drafter, write_target
from treeflash.testing.trees import noise_of_depths

require("torch")

import torch
from treeflash_cuda import backend as backend_module
from treeflash_cuda import drafter as drafter_module
from treeflash_cuda.backend import load
from treeflash_cuda.gpu import row_pass
from treeflash_cuda.gpu.graphs import MAX_ROWS
from treeflash_cuda.hf import attention_contexts
from treeflash_cuda.memory import STATES_EACH

pytestmark = pytest.mark.sample(1)

VOCAB = 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pairs; the second one has windows in target and drafter."""
    found = []
    for family, window in (("qwen3", None), ("mistral", 4)):
        folder = tmp_path_factory.mktemp(family)
        write_target(folder / "target", family, seed=1, vocab_size=VOCAB, layers=3)
        write_drafter(folder / "drafter", folder / "target", seed=2, sliding_window=window)
        found.append((folder / "target", folder / "drafter"))
    return found


@pytest.fixture
def backend(folders, monkeypatch):
    return load_with_parts(monkeypatch, *folders[0])


def chain(*tokens):
    return DraftTree.chain(np.array(tokens, np.int32), np.zeros(len(tokens)))


def started(backend, prompts, **settings):
    states = [backend.open(100, drafts=True) for _ in prompts]
    backend.verifier.run(
        [Prefill(state, x, None) for state, x in zip(states, prompts, strict=True)]
    )
    return states


@pytest.mark.parametrize("dialect", ["deepspec-rnn", "specforge-domino"])
def test_tables_of_recurrent_heads_share_graphs(folders, tmp_path, monkeypatch, dialect):
    """Numbers of sequences and depths are rounded up; shortlists and noise are inputs."""
    target, _ = folders[0]
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
        for texts, depths, k, m in product((1, 2, 3), (1, 3, 4), (2, 5), (1, 4)):
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
    assert keys.count("the AR head") == 3 * 3 * 4 * 2  # sequences, depths, sizes and noise
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
    monkeypatch.setattr(backend.verifier, "forward", lambda *_: None)
    assert backend.warm_up(4) == 0
    assert backend.target.state_arena.slots == 1 + 4 * STATES_EACH


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (row_pass, "MAX_ROWS", 4),
        (drafter_module, "MAX_CONTEXT", 0),
        (attention_contexts, "is_window", lambda *_: False),
    ],
)
@pytest.mark.filterwarnings("ignore:draft trees run without CUDA graphs")
def test_what_does_not_fit_runs_without_static_shapes(folders, monkeypatch, module, name, value):
    monkeypatch.setattr(module, name, value)
    backend = load_with_parts(monkeypatch, *folders[1], models=True)
    states = started(backend, [[3, 4, 5], [6]])
    trees = [(state, chain(*range(6))) for state in states]
    assert backend.target.passes.has_row_pass == (name != "is_window")  # found out at load
    if name == "is_window":  # a pass of another kind would give other bits
        backend.target.is_exact = backend.target.passes.has_row_pass = True
        with pytest.raises(UnsupportedModelError, match="neither causal nor a sliding window"):
            backend.verifier.logits(trees)
        backend.target.is_exact = backend.target.passes.has_row_pass = False
    together = backend.verifier.logits(trees).logits
    for (state, tree), logits in zip(trees, together, strict=True):
        np.testing.assert_allclose(
            backend.verifier.logits([(state, tree)]).logits[0], logits, atol=1e-4
        )


def test_sequences_of_several_slabs_run_one_after_another(folders, monkeypatch):
    backend = load_with_parts(monkeypatch, *folders[1])
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
