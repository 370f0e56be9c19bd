"""The backend on CUDA devices that hold no values: devices, dtypes, layouts and captures.

What an iteration costs there is counted: graphs, allocations, and operations.
"""

import functools
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from mtp_pairs import write_mtp_pair, write_peagle_pair
from stand_ins import stand_in

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.interfaces import Prefill, TableOptions, Verify, device_report
from treeflash.decoding.sampling import LogitEdits, Noise, SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.testing import HYBRID_FAMILIES, require
from treeflash.testing.models import save, write_dialect, write_drafter, write_pair, write_target
from treeflash.testing.pairs import each_value
from treeflash.testing.trees import noise_of_depths

require("torch")

import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from fake_cuda import DEVICE, SECOND
from torch._subclasses.fake_tensor import unset_fake_temporarily
from treeflash_cuda.attention import grouped_attention
from treeflash_cuda.backend import load
from treeflash_cuda.cache import SCALE_BYTES
from treeflash_cuda.gpu import prompt_attention
from treeflash_cuda.gpu.row_pass import MAX_CHUNK

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


def started(backend, count):
    states = [backend.open(200, drafts=True) for _ in range(count)]
    backend.verifier.run([Prefill(state, PROMPT, None) for state in states])
    return states


def draft(backend, states, *depths):
    return backend.drafter.draft([(state, 1) for state in states], *depths)


def verify(backend, states, sampling=SAMPLINGS[0], **features):
    keys = None if sampling.greedy else np.ones((6, 2), np.uint32)
    given = SamplingParams(sampling, keys, **features)
    return backend.verifier.run([Verify(state, tree(), given) for state in states])


def commit(backend, verified, states):
    backend.verifier.commit(verified, [(state, np.array([0, 2], np.int32)) for state in states])


def test_mixing_devices_raises(cuda):
    with pytest.raises(RuntimeError, match=r"found (at least )?two different devices|device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


def test_mixing_dtypes_raises(cuda):
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ones(3, 3, device=DEVICE) @ torch.ones(3, 3, device=DEVICE).half()


def test_numpy_of_a_device_tensor_raises(cuda):
    with pytest.raises(TypeError, match="cuda:0 tensors cannot be converted"):
        torch.ones(3, device=DEVICE).numpy()
    assert torch.ones(3, device=DEVICE).cpu().numpy().tolist() == [1, 1, 1]


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to(DEVICE),
        lambda x: x[x > 0],
    ],
)
def test_moving_data_during_a_capture_raises(cuda, move):
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(Exception, match=r"during a capture|nonzero"), torch.cuda.graph(None):
        move(x)


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
    blocks = draft(backend, states)
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
    draft(backend, texts)
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
        blocks = draft(backend, texts)
        backend.head.transitions(blocks, OPTIONS)
        backend.drafter.marginals(blocks, OPTIONS)
        for sampling in (SAMPLINGS[0], SAMPLINGS[2]):
            verified = verify(backend, texts, sampling)
            assert [len(x.tokens) for x in verified.sampled] == [6] * len(texts)
        commit(backend, verified, texts)
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
    # Prompts do without it.
    stand_in(monkeypatch, prompt_attention, flash_attention=lambda *_: 1 / 0)
    stand_in(monkeypatch, F, scaled_dot_product_attention=lambda *_, **__: 1 / 0)
    slow = pytest.warns(UserWarning, match="^prompts will be slow: division by zero$")
    with nullcontext() if dtype == "float32" else slow:
        backend = load(*folders[family], LoadConfig(dtype=dtype))
    for tokens in (1, 700, 2100):
        states = [backend.open(3000, drafts=True) for _ in range(2)]
        backend.verifier.run([Prefill(state, [3] * tokens, SamplingParams()) for state in states])
        blocks = draft(backend, states)
        backend.head.transitions(blocks, OPTIONS)
        verify(backend, states)
        for state in states:
            state.close()


def test_blocks_that_see_everything_build_no_plan(cuda, monkeypatch):
    """A drafter may have such layers beside others with windows."""
    stand_in(monkeypatch, F, scaled_dot_product_attention=lambda *_, **__: 1 / 0)
    q, k = (torch.empty(1, heads, 3, 8, device=DEVICE) for heads in (4, 2))
    assert grouped_attention(q, [(k, k)], [None], [3], 1.0).shape == (1, 3, 4, 8)


def test_flash_attention_is_asked_for_by_an_argument_that_cudnn_lacks(cuda, folders, monkeypatch):
    """Later versions of PyTorch may choose cuDNN for calls without it."""
    found, plain = [], varlen.varlen_attn

    @functools.wraps(plain)
    def record(*args, **options):
        found.append(options.get("num_splits"))
        return plain(*args, **options)

    stand_in(monkeypatch, varlen, varlen_attn=record)
    backend = load(*folders["qwen3"], LoadConfig(dtype="bfloat16"))
    loaded = len(found)
    # Longer than what runs as rows of the pass of trees.
    SequenceSession(backend, capacity=401).extend([3] * 400)
    assert len(found) - loaded == len(backend.target.layers)
    assert None not in found


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
    assert backend.drafter.log_probs(blocks[1]).shape == (depths, 40)


# Five seconds for each; `test_graphs.py` has the same drafts, with values.
@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["eagle3", "mtp", "glm", "peagle"])
def test_transfers_and_graphs_of_other_drafts(cuda, tmp_path, kind, dtype):
    """Whatever the number of sequences: depth by depth, and of all depths at once."""
    with unset_fake_temporarily():
        pair = write_peagle_pair(tmp_path) if kind == "peagle" else write_mtp_pair(tmp_path, kind)
    backend, launches = load(*pair, LoadConfig(dtype=dtype)), []
    make = backend.drafter.marginals if kind == "peagle" else backend.head.transitions
    for texts in (1, 4):
        states = started(backend, texts)
        for _ in range(2):  # captured, then replayed
            with cuda.transfers() as of_draft:
                blocks = draft(backend, states, 3)
            assert (of_draft.uploads, of_draft.reads) == (1, 0) or kind != "peagle"
            for noise in (None, noise_of_depths(backend, 0.8, texts)):
                if noise is not None:
                    noise = Noise(noise.keys[: texts * 3], noise.scales[: texts * 3])
                with cuda.transfers() as tables:
                    found = make(blocks, replace(OPTIONS, noise=noise))
                assert [table.tokens.shape[0] for table in found] == [3] * texts
                uploads = (kind != "peagle") + (noise is not None)
                assert (tables.uploads, tables.reads) == (uploads, 1)
            verified = verify(backend, states)
            commit(backend, verified, states)
        before = len(cuda.launches)
        with backend.target.graphs.paused():
            make(draft(backend, states, 3), OPTIONS)
        launches.append(len(cuda.launches) - before)
    names = {name for name, *_ in backend.target.graphs.store}
    tables = "marginals" if kind == "peagle" else "the AR head"
    assert names == {"the target", "the drafter", tables}
    assert launches[1] <= launches[0] + 10


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
    draft(backend, states)
    for _ in range(2):  # captured, then replayed
        verified = verify(backend, states, sampling)
        commit(backend, verified, states)
        blocks = draft(backend, states)
        backend.head.transitions(blocks, OPTIONS)
        backend.drafter.marginals(blocks, OPTIONS)
    names = {name for name, *_ in backend.target.graphs.store}
    assert names == {"the AR head", "marginals", "the target", "the drafter"}


@pytest.mark.parametrize(
    ("capability", "dtype"),
    each_value([(8, 0), (8, 9), (9, 0), (12, 0)], ["bfloat16", "float16", "float32"]),
)
def test_experts_are_captured_on_every_device(cuda, tmp_path, capability, dtype):
    """PyTorch's own product copies to the host on most devices, which a graph cannot do."""
    cuda.capability = capability
    write_target(tmp_path, "qwen3_moe", seed=1, vocab_size=40)
    backend = load(tmp_path, None, LoadConfig(dtype=dtype))
    state = backend.open(40, drafts=False)
    captures = backend.captures
    # It has as many rows as the tree, so that both replay one graph.
    backend.verifier.run([Prefill(state, [3, 4, 5], None)])
    chain = DraftTree.chain(np.arange(4, dtype=np.int32), np.zeros(4))
    with cuda.transfers() as transfers:
        backend.verifier.run([Verify(state, chain, SamplingParams())])
    assert backend.captures > captures
    assert transfers.reads == 1  # the tokens


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_parts_of_products_are_not_added_in_half_precision(cuda, folders, dtype):
    name = f"allow_{dtype}_reduced_precision_reduction"
    setattr(torch.backends.cuda.matmul, name, True)
    load(*folders["qwen3"], LoadConfig(dtype="bfloat16"))
    assert not getattr(torch.backends.cuda.matmul, name)


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
    with cuda.transfers() as of_draft:
        blocks = draft(backend, states)
    assert (of_draft.uploads, of_draft.reads) == (1, 0)  # the roots
    with cuda.transfers() as tables:
        backend.head.transitions(blocks, OPTIONS)
    assert (tables.uploads, tables.reads) == (1, 1)  # the sizes of the tables; the tables
    with cuda.transfers() as tables:
        backend.drafter.marginals(blocks, OPTIONS)
    assert (tables.uploads, tables.reads) == (0, 1)
    with cuda.transfers() as of_pass:
        verified = verify(backend, states)
    assert (of_pass.uploads, of_pass.reads) == (1, 1)  # the trees; the tokens
    with cuda.transfers() as of_commit:
        commit(backend, verified, states)
    assert (of_commit.uploads, of_commit.reads) == (1, 0)  # which rows to keep
    with cuda.transfers() as extend:
        backend.verifier.run([Prefill(state, PROMPT, None) for state in states])
    assert (extend.uploads, extend.reads) == (2, 0)  # the tokens; the rows for the drafter


def test_transfers_of_choices_with_edits_masks_and_log_probs(cuda, backend):
    states = started(backend, 3)
    rows, tokens, ones = np.array([0, 2, 5]), np.array([3, 39, 3]), np.ones(3, np.float32)
    everything = {
        "edits": LogitEdits(rows, tokens, 1.3 * ones, ones),
        "allowed": np.full((6, 2), 0xFF, np.uint32),
        "log_probs": 3,
    }
    with cuda.transfers() as without:
        verify(backend, states, SAMPLINGS[1])
    with cuda.transfers() as all_kinds:
        (sampled, *_) = verify(backend, states, SAMPLINGS[1], **everything).sampled
    assert sampled.log_probs.tokens.shape == sampled.log_probs.values.shape == (6, 3)
    assert (without.uploads, without.reads) == (2, 1)  # the trees, the random numbers; the tokens
    # Other paths are edits and masks, the tokens again, and log probabilities.
    assert (all_kinds.uploads, all_kinds.reads) == (4, 2)


def check_context(text, positions):
    (context,) = [torch.cat(text.state.context)]
    assert (context.device, context.shape) == (DEVICE, (positions, 32))


VOCAB = 1000
MAX_LAUNCHES = {"layer": 9, "commit": 7, "draft": 52, "head": 58}
"""Operations of a layer of the target, of a commit, of a draft, and of a head."""
MAX_HYBRID_LAUNCHES = {
    "qwen3_5": {"layer": 12, "commit": 12, "verify": 143},
    "granitemoehybrid": {"layer": 41, "commit": 12, "verify": 280},
}
"""The layer is one with attention; the targets have four layers, the second one transformers'."""


@pytest.fixture
def launches(module):
    return module("launches")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return write_pair(folder, "qwen3", vocab_size=VOCAB)


@pytest.mark.parametrize("sequences", [8, 32])
def test_all_sequences_lie_in_one_allocation(cuda, pair, sequences):
    cuda.free_bytes = 80 << 30
    backend = load(*pair, LoadConfig(dtype="bfloat16"))
    arenas = backend.target.arena, backend.drafter_arena
    for arena in arenas:
        arena.slab_nbytes = 1 << 16  # the pair is tiny
    states = [backend.open(2000, drafts=True) for _ in range(sequences)]
    backend.verifier.run([Prefill(state, [3, 4, 5], None) for state in states])
    backend.drafter.draft([(state, 1) for state in states])
    assert [len(arena.slabs) for arena in arenas] == [1, 1]


@pytest.mark.parametrize("sequences", [1, 8])
def test_operations_of_an_iteration(cuda, launches, pair, sequences):
    """They do not depend on the number of sequences."""
    backend = load(*pair, LoadConfig(dtype="bfloat16"))
    found = launches.count_operations(cuda, backend, sequences)
    for part, limit in MAX_LAUNCHES.items():
        assert 0 < found[part].operations <= limit, found
    assert {part: cost.syncs for part, cost in found.items() if cost.syncs} == {
        "verify": 1,
        "head": 1,
    }


# The other tests count with the same functions.
@pytest.mark.nightly
def test_the_command_counts_operations_and_bytes(cuda, launches):
    """The bytes of a pass are at least the weights' bytes, and grow with the context."""
    backend, found = launches.load_without_weights(launches.SHAPES["tiny"], "treeflash"), []
    for settings in ("--sequences 1,8 --context 16", "--sequences 8 --context 64"):
        args = launches.parser().parse_args(["--nodes", "8", *settings.split()])
        rows = launches.rows(cuda, backend, args)
        found.append({(row["sequences"], row["part"]): row for row in rows})
    one, eight = (found[0][n, "iteration"] for n in (1, 8))
    assert eight["operations"] < one["operations"] + 10
    weights = 2 * (4 * 64 * (64 * 4 + 3 * 128) + 64 * 2048)
    for part in ("verify", "layer"):
        sizes = [rows[8, part]["megabytes"] for rows in found]
        assert sizes[0] < sizes[1], part
        assert found[0][1, part]["megabytes"] < sizes[0], part
    assert found[0][1, "verify"]["megabytes"] > weights / 1e6
    assert 4 <= launches.count_graphs(backend, 40) <= 20


# Three seconds; `test_hybrid_trees.py` shows that sequences run together.
@pytest.mark.nightly
@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_operations_of_a_hybrid_target(cuda, launches, tmp_path, family, sequences):
    """They hardly depend on the number of sequences."""
    backend = load(*write_pair(tmp_path, family, vocab_size=VOCAB), LoadConfig(dtype="bfloat16"))
    found = launches.count_operations(cuda, backend, sequences)
    for part, limit in MAX_HYBRID_LAUNCHES[family].items():
        assert 0 < found[part].operations <= limit, found


# Three seconds, for speed alone.
@pytest.mark.nightly
@pytest.mark.parametrize("window", [None, 100])
def test_keys_in_8_bits_are_converted_for_long_prompts_alone(cuda, tmp_path, window):
    """Short prompts, trees, drafts and commits read and write the 8 bits as they are."""
    family, settings = ("mistral", {"sliding_window": window}) if window else ("qwen3", {})
    backend = load(
        *write_pair(tmp_path, family, vocab_size=VOCAB, **settings),
        LoadConfig(dtype="bfloat16", kv_bits=8),
    )
    state = backend.open(2000, drafts=True)
    shape = np.array(backend.target.arena.like.shape)
    column = 2 * len(backend.target.layers) * shape[1] * (shape[3] - SCALE_BYTES)
    for tokens in (700, 300, MAX_CHUNK, 1):
        before, first = cuda.converted, state.length
        backend.verifier.run([Prefill(state, [3] * tokens, None)])
        seen = state.length - (max(first + 1 - window, 0) if window else 0)
        assert cuda.converted - before == (seen * column if tokens > MAX_CHUNK else 0)
    before = cuda.converted
    backend.drafter.draft([(state, 1)])
    verified = backend.verifier.run([Verify(state, tree(), SamplingParams())])
    backend.verifier.commit(verified, [(state, np.array([0, 2], np.int32))])
    assert cuda.converted == before
