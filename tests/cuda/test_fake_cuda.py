"""The backend on CUDA devices that hold no values: devices, dtypes, layouts and captures."""

import functools
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from mtp_pairs import write_mtp_pair, write_peagle_pair

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.interfaces import Prefill, TableOptions, Verify, device_report
from treeflash.decoding.sampling import LogitEdits, Noise, SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.testing import HYBRID_FAMILIES, require
from treeflash.testing.models import save, write_dialect, write_drafter, write_target
from treeflash.testing.pairs import combine, each_value
from treeflash.testing.trees import noise_of_depths

require("torch")

import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from fake_cuda import DEVICE, SECOND
from torch._subclasses.fake_tensor import unset_fake_temporarily
from treeflash_cuda.attention import grouped_attention
from treeflash_cuda.backend import load
from treeflash_cuda.gpu import kernels
from treeflash_cuda.gpu.graphs import MAX_GRAPHS, WARM_UP, Graphs

pytestmark = [
    pytest.mark.filterwarnings("error::UserWarning:treeflash_cuda"),
    pytest.mark.sample(1),
]

FAMILIES = ("qwen3", "mistral", "qwen3_moe")
"""Whole attention, windows, and experts."""
DTYPES = ("bfloat16", "float32")
DIALECTS = ("dflash2", "specforge", "deepspec-rnn", "specforge-domino")
SAMPLINGS = (
    SamplingConfig(),
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.8, top_k=5, top_p=0.9, min_p=0.1),
    SamplingConfig(temperature=0.8, top_p=0.9),
)
PROMPT = [3, 4, 5, 6, 7]
OPTIONS = TableOptions(m=4, k=8, temperature=0.7, shortlist=16, rows=7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pairs by family of the target."""
    folder = tmp_path_factory.mktemp("pairs")
    for family in (*FAMILIES, *HYBRID_FAMILIES):
        write_target(folder / family, family, seed=1, vocab_size=40, layers=3)
        window = 4 if family == "mistral" else None
        write_drafter(folder / f"{family}-drafter", folder / family, seed=2, sliding_window=window)
    return {x.name: (x, folder / f"{x.name}-drafter") for x in folder.iterdir()}


@pytest.fixture(params=DTYPES)
def backend(request, folders, cuda):
    return load(*folders["qwen3"], LoadConfig(dtype=request.param))


def tree():
    parents = np.array([-1, 0, 0, 1, 1, 2], np.int32)
    depths = np.array([0, 1, 1, 2, 2, 2], np.int32)
    return DraftTree(np.arange(6, dtype=np.int32), parents, depths, np.zeros(6))


@pytest.mark.sample(1)
@pytest.mark.parametrize(("family", "dtype"), each_value(FAMILIES + HYBRID_FAMILIES, DTYPES))
def test_prefill_verify_commit_and_draft(cuda, folders, family, dtype):
    backend = load(*folders[family], LoadConfig(dtype=dtype))
    assert backend.device == "cuda:0"
    assert (backend.target.prompt_attention is None) == (dtype == "float32")
    text = SequenceSession(backend, drafts=True)
    root = text.extend(PROMPT)
    check_context(text, len(PROMPT))
    for path in ([0, 1, 3], [0, 2], [0]):  # a gather, and rows that are in place
        block = text.draft(root)
        assert (block.hidden.device, block.hidden.dtype) == (DEVICE, backend.target.dtype)
        assert text.verify(tree()).shape == (6,)
        text.commit(np.array(path, np.int32))
        check_context(text, len(path))
    text.draft(root)
    text.draft(root)
    assert text.state.read_kv_cache().shape[3] == text.length == len(PROMPT) + 6
    assert text.state.read_drafter_kv_cache().shape[3] == text.length
    text.close()


@pytest.mark.parametrize(
    ("family", "dtype", "graphs", "bits"), each_value(FAMILIES, DTYPES, (False, True), (None, 8))
)
def test_several_texts_in_one_forward_pass(cuda, folders, family, dtype, graphs, bits):
    config = LoadConfig(dtype=dtype, cuda_graphs=graphs, kv_bits=bits)
    backend = load(*folders[family], config)
    states = [backend.open(200, drafts=True) for _ in range(3)]
    extensions = [Prefill(x, PROMPT[: n + 2], SamplingParams()) for n, x in enumerate(states)]
    assert [sampled.tokens.shape for sampled in backend.verifier.run(extensions).sampled] == [
        (1,)
    ] * 3
    assert [state.length for state in states] == [2, 3, 4]
    blocks = backend.drafter.draft([(state, 1) for state in states])
    assert {(block.hidden.device, block.hidden.dtype) for block in blocks} == {
        (DEVICE, backend.target.dtype)
    }
    assert len(backend.drafter.marginals(blocks, OPTIONS)) == 3
    assert len(backend.head.transitions(blocks, OPTIONS)) == 3
    joined = backend.open(200, drafts=True)
    work = [
        Verify(states[0], tree(), SamplingParams()),
        Prefill(joined, PROMPT, None),
        *(Verify(state, tree(), SamplingParams()) for state in states[1:]),
    ]
    verified = backend.verifier.run(work)
    counts = [None if sampled is None else len(sampled.tokens) for sampled in verified.sampled]
    assert counts == [6, None, 6, 6]
    paths = [[0, 1, 3], [0], [0, 2]]
    backend.verifier.commit(
        verified, [(state, np.array(x, np.int32)) for state, x in zip(states, paths, strict=True)]
    )
    assert [state.length for state in [*states, joined]] == [5, 4, 6, len(PROMPT)]
    fork = states[0].fork(4, 100)
    states[1].truncate(2)
    states[2].close()
    states[2].close()
    texts = [joined, fork, states[0], states[1]]
    backend.drafter.draft([(state, 1) for state in texts])
    logits = backend.verifier.logits([(state, tree()) for state in texts]).logits
    assert [part.shape for part in logits] == [(6, 40)] * 4


@pytest.mark.parametrize(("family", "dtype", "bits"), each_value(FAMILIES, DTYPES, (None, 8)))
def test_layers_on_two_devices(cuda, folders, family, dtype, bits):
    config = LoadConfig(dtype=dtype, device_map="auto", kv_bits=bits)
    backend = load(*folders[family], config)
    target = backend.target
    assert target.spans == [(DEVICE, 2), (SECOND, 1)]
    assert backend.device == "cuda:0"
    assert device_report(backend).facts["kernels are checked on"] == "cuda:0"  # of one kind
    states = started(backend, 3)
    parts = states[0].kv_cache.slab.parts
    assert [(x.device, len(x)) for x in parts] == [(DEVICE, 2), (SECOND, 1)]
    assert states[0].read_kv_cache().shape[:2] == (3, 2)
    for texts in (states, states[:1]):
        blocks = backend.drafter.draft([(state, 1) for state in texts])
        backend.head.transitions(blocks, OPTIONS)
        backend.drafter.marginals(blocks, OPTIONS)
        for sampling in (SAMPLINGS[0], SAMPLINGS[2]):
            work = [Verify(state, tree(), params(sampling)) for state in texts]
            verified = backend.verifier.run(work)
            assert [len(x.tokens) for x in verified.sampled] == [6] * len(texts)
        backend.verifier.commit(verified, [(state, np.array([0, 2], np.int32)) for state in texts])
        assert {x.device for state in texts for x in state.context} == {DEVICE}
        single = DraftTree.root_only(3)
        assert len(backend.verifier.logits([(state, single) for state in texts]).logits) == len(
            texts
        )
        assert states[0].fork(3, 50).read_kv_cache().shape[3] == 3
    text = SequenceSession(backend, drafts=True, capacity=3001)
    text.extend([3] * 3000)
    check_context(text, 3000)


# Three seconds, for speed alone.
@pytest.mark.nightly
@pytest.mark.parametrize(("family", "dtype"), each_value(["qwen3", "mistral"], DTYPES))
def test_nothing_builds_a_plan_for_each_length(cuda, folders, monkeypatch, family, dtype):
    """As cuDNN does, which `scaled_dot_product_attention` prefers on some GPUs."""
    monkeypatch.setattr(kernels, "flash_attention", lambda *_: 1 / 0)  # prompts do without it
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: 1 / 0)
    slow = pytest.warns(UserWarning, match="^prompts will be slow: division by zero$")
    with nullcontext() if dtype == "float32" else slow:
        backend = load(*folders[family], LoadConfig(dtype=dtype))
    for tokens in (1, 700, 2100):
        states = [backend.open(3000, drafts=True) for _ in range(2)]
        backend.verifier.run([Prefill(state, [3] * tokens, SamplingParams()) for state in states])
        blocks = backend.drafter.draft([(state, 1) for state in states])
        backend.head.transitions(blocks, OPTIONS)
        backend.verifier.run([Verify(state, tree(), SamplingParams()) for state in states])
        for state in states:
            state.close()


def test_blocks_that_see_everything_build_no_plan(cuda, monkeypatch):
    """A drafter may have such layers beside others with windows."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: 1 / 0)
    q, k = (torch.empty(1, heads, 3, 8, device=DEVICE) for heads in (4, 2))
    assert grouped_attention(q, [(k, k)], [None], [3], 1.0).shape == (1, 3, 4, 8)


def test_flash_attention_is_asked_for_by_an_argument_that_cudnn_lacks(cuda, folders, monkeypatch):
    """Later versions of PyTorch may choose cuDNN for calls without it."""
    found, plain = [], varlen.varlen_attn

    @functools.wraps(plain)
    def record(*args, **options):
        found.append(options.get("num_splits"))
        return plain(*args, **options)

    monkeypatch.setattr(varlen, "varlen_attn", record)
    backend = load(*folders["qwen3"], LoadConfig(dtype="bfloat16"))
    loaded = len(found)
    # Longer than what runs as rows of the pass of trees.
    SequenceSession(backend, capacity=401).extend([3] * 400)
    assert len(found) - loaded == len(backend.target.layers)
    assert None not in found


# A second; `test_layers_on_two_devices` has a long prompt, too.
@pytest.mark.nightly
def test_a_long_prompt_is_prefilled_in_chunks(backend):
    text = SequenceSession(backend, drafts=True, capacity=4001)
    text.extend([3] * 4000)
    check_context(text, 4000)


# `test_tables_of_other_heads` has tables of both kinds.
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("shortlist", "rows", "scale"), combine((None, 16), (None, 7), (None, 0.8))
)
def test_tables(backend, shortlist, rows, scale):
    states = [SequenceSession(backend, drafts=True).state for _ in range(2)]
    backend.verifier.run([Prefill(state, PROMPT, None) for state in states])
    blocks = backend.drafter.draft([(state, 3) for state in states])
    noise = None if scale is None else noise_of_depths(backend, scale, 2)
    options = replace(OPTIONS, noise=noise, shortlist=shortlist, rows=rows)
    for table in backend.head.transitions(blocks, options):
        assert table.tokens.shape == (5, 4, 8)
    for table in backend.drafter.marginals(blocks, options):
        assert table.tokens.shape == (5, 1, 8)
    assert backend.drafter.log_probs(blocks[1]).shape == (5, 40)
    assert backend.head.log_probs(blocks[1], np.ones(5, np.int32)).shape == (5, 40)


@pytest.mark.parametrize(("dialect", "dtype"), each_value(DIALECTS, DTYPES))
def test_tables_of_other_heads(cuda, folders, tmp_path, dialect, dtype):
    target, _ = folders["qwen3"]
    with unset_fake_temporarily():
        write_dialect(tmp_path, target, dialect, seed=2)
        tensors = read_tensors(tmp_path)
        if "d2t" not in tensors:
            for name in ("embed_tokens.weight", "lm_head.weight"):  # the target's will do
                tensors.pop(name, None)
        save(tmp_path, read_config(tmp_path), tensors)
    backend = load(target, tmp_path, LoadConfig(dtype=dtype))
    states = [SequenceSession(backend, drafts=True).state for _ in range(2)]
    backend.verifier.run([Prefill(state, PROMPT, None) for state in states])
    blocks = backend.drafter.draft([(state, 3) for state in states])
    depths = backend.drafter_config.depths
    for shortlist, noise in product((None, 16), (None, noise_of_depths(backend, 0.8, 2))):
        options = replace(OPTIONS, k=4, noise=noise, shortlist=shortlist)
        with cuda.transfers() as count:
            tables = backend.head.transitions(blocks, options)
        assert [table.tokens.shape for table in tables] == [(depths, 4, 4)] * 2
        # The sizes of tables are an input of a graph.
        assert count.uploads == 1 + (noise is not None)
        assert count.reads == 1
    assert {name for name, *_ in backend.target.graphs.store} == {
        "the drafter",
        "the AR head",
        "the target",
    }
    assert backend.head.log_probs(blocks[1], np.ones(depths, np.int32)).shape == (depths, 40)


# Five seconds for each; `test_graphs.py` captures the same drafts, with values.
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "dtype"), [*each_value(("eagle3", "mtp"), DTYPES), ("glm", "bfloat16")]
)
def test_drafts_depth_by_depth_are_captured(cuda, tmp_path, kind, dtype):
    """Their operations do not depend on the number of sequences, and neither do the copies."""
    with unset_fake_temporarily():
        pair = write_mtp_pair(tmp_path, kind)
    backend = load(*pair, LoadConfig(dtype=dtype))
    found = []
    for texts in (1, 4):
        states = started(backend, texts)
        for depths in (4, 1, 4):  # captured, then replayed
            blocks = backend.drafter.draft([(state, 1) for state in states], depths)
            for noise in (None, noise_of_depths(backend, 0.8, texts)):
                if noise is not None:
                    noise = Noise(noise.keys[: texts * depths], noise.scales[: texts * depths])
                with cuda.transfers() as count:
                    tables = backend.head.transitions(blocks, replace(OPTIONS, noise=noise))
                assert [table.tokens.shape[0] for table in tables] == [depths] * texts
                assert (count.uploads, count.reads) == (1 + (noise is not None), 1)
            work = [Verify(state, tree(), SamplingParams()) for state in states]
            verified = backend.verifier.run(work)
            backend.verifier.commit(
                verified, [(state, np.array([0, 2], np.int32)) for state in states]
            )
        assert backend.head.log_probs(blocks[0], np.ones(3, np.int32)).shape == (3, 24)
        backend.target.graphs.enabled, before = False, len(cuda.launches)
        backend.head.transitions(backend.drafter.draft([(x, 1) for x in states], 4), OPTIONS)
        backend.target.graphs.enabled = True
        found.append(len(cuda.launches) - before)
    names = [name for name, *_ in backend.target.graphs.store]
    assert set(names) == {"the target", "the drafter", "the AR head"}
    assert names.count("the AR head") == 8  # by sequences, depths and noise
    assert found[1] <= found[0] + 10


# Likewise in `test_graphs.py`, with values.
@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
def test_drafts_of_all_depths_at_once_are_captured(cuda, tmp_path, dtype):
    """Whatever the number of sequences, with one upload; the rows of prompts too."""
    with unset_fake_temporarily():
        pair = write_peagle_pair(tmp_path)
    backend = load(*pair, LoadConfig(dtype=dtype))
    for texts in (1, 4):
        states = started(backend, texts)
        for _ in range(2):  # captured, then replayed
            with cuda.transfers() as count:
                blocks = backend.drafter.draft([(state, 1) for state in states], 3)
            assert (count.uploads, count.reads) == (1, 0)
            assert [block.hidden.shape[0] for block in blocks] == [3] * texts
            assert len(backend.drafter.marginals(blocks, OPTIONS)) == texts
            work = [Verify(state, tree(), SamplingParams()) for state in states]
            verified = backend.verifier.run(work)
            backend.verifier.commit(
                verified, [(state, np.array([0, 2], np.int32)) for state in states]
            )
        before = backend.target.graphs.replays["the drafter"]
        backend.drafter.draft([(state, 1) for state in states])
        assert backend.target.graphs.replays["the drafter"] == before + 1
    names = {name for name, *_ in backend.target.graphs.store}
    assert names == {"the target", "the drafter", "marginals"}


# `test_transfers_of_choices_with_edits_masks_and_log_probs` has one of them every time.
@pytest.mark.nightly
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: repr(s)[15:-1])
def test_choices_with_edits_masks_and_log_probs(backend, sampling):
    states = started(backend, 4)
    everything = params(sampling, edits=edits(), allowed=allowed(), log_probs=3)
    all_params = [everything, params(sampling, log_probs=0), params(sampling), everything]
    work = [Verify(state, tree(), x) for state, x in zip(states, all_params, strict=True)]
    for sampled, x in zip(backend.verifier.run(work).sampled, all_params, strict=True):
        assert sampled.tokens.dtype == np.int32
        assert (sampled.log_probs is None) == (x.log_probs is None)
        if x.log_probs is not None:
            assert sampled.log_probs.sampled.shape == (6,)
            assert sampled.log_probs.tokens.shape == (6, x.log_probs)
            assert sampled.log_probs.values.dtype == np.float32


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("family", "dtype", "is_sampled"),
    each_value((*FAMILIES, *HYBRID_FAMILIES, "mistral in 8 bits"), DTYPES, (False, True)),
)
def test_an_iteration_is_captured(cuda, folders, family, dtype, is_sampled):
    family, _, bits = family.partition(" in ")
    backend = load(*folders[family], LoadConfig(dtype=dtype, kv_bits=8 if bits else None))
    sampling = SAMPLINGS[3 * is_sampled]
    states = started(backend, 3)
    backend.drafter.draft([(state, 1) for state in states])
    for _ in range(2):  # captured, then replayed
        work = [Verify(state, tree(), params(sampling)) for state in states]
        verified = backend.verifier.run(work)
        backend.verifier.commit(verified, [(state, np.array([0, 2], np.int32)) for state in states])
        blocks = backend.drafter.draft([(state, 1) for state in states])
        backend.head.transitions(blocks, OPTIONS)
        backend.drafter.marginals(blocks, OPTIONS)
    names = {name for name, *_ in backend.target.graphs.store}
    assert names == {"the AR head", "marginals", "the target", "the drafter"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_parts_of_products_are_not_added_in_half_precision(cuda, folders, dtype):
    name = f"allow_{dtype}_reduced_precision_reduction"
    setattr(torch.backends.cuda.matmul, name, True)
    load(*folders["qwen3"], LoadConfig(dtype="bfloat16"))
    assert not getattr(torch.backends.cuda.matmul, name)


def test_a_graph_that_was_used_lately_is_kept(cuda):
    graphs, double = Graphs(DEVICE), lambda x: (2 * x,)
    graphs.enabled = True
    for n in range(MAX_GRAPHS + 10):
        graphs.run("double", None, double, torch.ones(1 + n % MAX_GRAPHS, device=DEVICE))
        graphs.run("double", None, double, torch.ones(1, device=DEVICE))
        graphs.run("double", n, double, torch.ones(1, device=DEVICE))
    assert ("double", None, ((torch.Size([1]), torch.float32),)) in graphs.store
    assert len(graphs.store) == MAX_GRAPHS


def test_one_failed_capture_disables_no_function(cuda):
    graphs, runs = Graphs(DEVICE), []
    graphs.enabled = True

    def fail_once(x):
        runs.append(x)
        if len(runs) == 1:
            raise RuntimeError("the first call fails")
        return (x,)

    graphs.run("it", None, fail_once, torch.ones(1, device=DEVICE))
    graphs.run("it", None, fail_once, torch.ones(1, device=DEVICE))
    assert graphs.captures == 1


def test_functions_are_called_before_they_are_captured(cuda):
    """Libraries allocate workspaces and open connections then, which no graph can have."""
    graphs, captures = Graphs(DEVICE), []
    graphs.enabled = True

    def watched(x):
        captures.append(cuda.capturing)
        return (x,)

    graphs.run("it", None, watched, torch.ones(1, device=DEVICE))
    assert captures == [False] * WARM_UP + [True]


def test_an_iteration_waits_for_the_device_twice(cuda, backend):
    """For the children, from which the tree is built; and for the chosen tokens."""
    steps = decode(
        backend, Request(prompt_ids=PROMPT, config=DecodeConfig(budget=6, max_tokens=30))
    )
    next(steps)
    next(steps)
    with cuda.transfers() as iteration:
        next(steps)
    assert iteration.reads == 2


@pytest.mark.sample(1)
@pytest.mark.parametrize("texts", [1, 3])
def test_transfers_of_an_iteration(cuda, backend, texts):
    """Uploads and reads wait for the device, so an iteration has few, whatever its texts."""
    states = started(backend, texts)
    with cuda.transfers() as draft:
        blocks = backend.drafter.draft([(state, 1) for state in states])
    assert (draft.uploads, draft.reads) == (1, 0)  # the roots
    with cuda.transfers() as tables:
        backend.head.transitions(blocks, OPTIONS)
    assert (tables.uploads, tables.reads) == (1, 1)  # the sizes of the tables; the tables
    with cuda.transfers() as tables:
        backend.drafter.marginals(blocks, OPTIONS)
    assert (tables.uploads, tables.reads) == (0, 1)
    with cuda.transfers() as verify:
        verified = backend.verifier.run(
            [Verify(state, tree(), SamplingParams()) for state in states]
        )
    assert (verify.uploads, verify.reads) == (1, 1)  # the trees; the tokens
    with cuda.transfers() as commit:
        backend.verifier.commit(verified, [(state, np.array([0, 2], np.int32)) for state in states])
    assert (commit.uploads, commit.reads) == (1, 0)  # which rows to keep
    with cuda.transfers() as extend:
        backend.verifier.run([Prefill(state, PROMPT, None) for state in states])
    assert (extend.uploads, extend.reads) == (2, 0)  # the tokens; the rows for the drafter


def test_transfers_of_choices_with_edits_masks_and_log_probs(cuda, backend):
    states = started(backend, 3)
    plain = [Verify(state, tree(), params(SAMPLINGS[1])) for state in states]
    everything = params(SAMPLINGS[1], edits=edits(), allowed=allowed(), log_probs=3)
    edited = [Verify(state, tree(), everything) for state in states]
    with cuda.transfers() as without:
        backend.verifier.run(plain)
    with cuda.transfers() as all_kinds:
        backend.verifier.run(edited)
    assert (without.uploads, without.reads) == (2, 1)  # the trees, the random numbers; the tokens
    # Other paths are edits and masks, the tokens again, and log probabilities.
    assert (all_kinds.uploads, all_kinds.reads) == (4, 2)


def check_context(text, positions):
    (context,) = [torch.cat(text.state.context)]
    assert (context.device, context.shape) == (DEVICE, (positions, 32))


def started(backend, count):
    states = [backend.open(200, drafts=True) for _ in range(count)]
    backend.verifier.run([Prefill(state, PROMPT, None) for state in states])
    return states


def params(sampling, **features):
    keys = None if sampling.greedy else np.ones((6, 2), np.uint32)
    return SamplingParams(sampling, keys, **features)


def edits():
    rows, tokens = np.array([0, 2, 5]), np.array([3, 39, 3])
    return LogitEdits(rows, tokens, np.full(3, 1.3, np.float32), np.ones(3, np.float32))


def allowed():
    return np.full((6, 2), 0xFF, np.uint32)
