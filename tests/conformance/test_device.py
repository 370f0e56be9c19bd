"""The suite on real accelerators, CUDA and Metal, in float32; and what half precision meets.

`tox -e device` fails where there is no accelerator, and where one is not used as it should be: by
kernels that fall back to PyTorch, and by functions that do not run from CUDA graphs.
"""

import json
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from accelerators import (
    MetalKernels,
    cuda_problem,
    first_loss,
    load_cuda,
    metal_problem,
    need_cuda,
    need_metal,
)

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.testing import (
    DIALECTS,
    HYBRID_FAMILIES,
    BackendSuite,
    write_dialect,
    write_drafter,
    write_target,
)
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_pair
from treeflash.testing.states import tables

DTYPES = "bfloat16", "float16"
FORMATS = *DTYPES, "float32"
TREE = DraftTree.from_parents(np.arange(6, dtype=np.int32), np.array([-1, 0, 0, 1, 1, 2], np.int32))


def logits_after(backend, tokens):
    sequence = SequenceSession(backend)
    sequence.extend(tokens)
    return sequence.logits(TREE)


def assert_near(actual, expected, share=0.05):
    """Within a share of the standard deviation of the logits."""
    np.testing.assert_allclose(actual, expected, atol=share * float(expected.std()))


@pytest.mark.device
def test_an_accelerator_can_be_used():
    """The other tests are skipped for a device that is not there."""
    problems = {"CUDA": cuda_problem(), "Metal": metal_problem()}
    assert None in problems.values(), problems


@pytest.mark.device
class TestCuda(BackendSuite):
    families = (*BackendSuite.families, "qwen3_sliding")
    dialects = tuple(DIALECTS)
    hybrids = HYBRID_FAMILIES
    exact_dtypes = DTYPES

    @pytest.fixture
    def load(self):
        return lambda target, drafter, config: load_cuda(
            target, drafter, replace(config, cuda_graphs=False)
        )


@pytest.mark.device
class TestCudaGraphs(BackendSuite):
    """In float32 only drafts' heads and the choice of tokens are captured."""

    dialects = tuple(DIALECTS)
    hybrids = HYBRID_FAMILIES
    exact_dtypes = DTYPES

    @pytest.fixture
    def load(self):
        return load_cuda


@pytest.mark.device
@pytest.mark.parametrize("family", ["qwen3", "mistral"])  # the latter has a sliding window
def test_the_operation_computes_what_a_mask_does(tmp_path, family, monkeypatch):
    from parts import use_models  # a Mac need not have PyTorch

    write_target(tmp_path, family, seed=1)
    found = []
    for with_operations in (True, False):
        if not with_operations:
            use_models(monkeypatch)
        backend = load_cuda(tmp_path, None, LoadConfig(dtype="bfloat16"))
        assert backend.target.operations is not None
        if not with_operations:
            monkeypatch.setattr(backend.target, "has_row_pass", False)
            monkeypatch.setattr(backend.target, "prompt_attention", None)
        found.append(logits_after(backend, [3, 4, 5] * 400))
    assert_near(*found)


@pytest.mark.device
@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=0.8, top_p=0.9)])
def test_graphs_in_bfloat16_compute_what_no_graph_does(tmp_path, sampling):
    """This holds beyond the minimum of columns that attention covers, too."""
    folders, found = write_pair(tmp_path, "qwen3"), []
    for with_graphs in (False, True):
        load = LoadConfig(dtype="bfloat16", cuda_graphs=with_graphs)
        backend = load_cuda(*folders, load)
        config = DecodeConfig(budget=16, max_tokens=600, sampling=sampling)
        tokens = generate(backend, [3, 4, 5], config)
        assert len(tokens) == 600
        found.append(logits_after(backend, [3, 4, 5] * 200))
    assert_near(*found)


@pytest.mark.device
class TestMetal(BackendSuite):
    """Targets have shapes that the kernels run, so exact mode must be granted."""

    dialects = tuple(DIALECTS)
    hybrids = HYBRID_FAMILIES
    exact_dtypes = DTYPES
    write_target = staticmethod(partial(write_target, hidden_size=64, key_dim=32))

    @pytest.fixture
    def load(self):
        need_metal()
        from treeflash_mlx.backend import load

        return load


@pytest.mark.device
def test_every_metal_kernel_is_right(module):
    """Shapes of common models are tried. A kernel that is too slow to be used is not a problem."""
    need_metal()
    from treeflash_mlx.backend import examine_device

    report = examine_device(LoadConfig())
    assert list(module("device_parts").kernel_problems(report)) == []


@pytest.fixture
def kernels(monkeypatch):
    """The launches of kernels, which are used even where MLX is faster, as for small layers."""
    need_metal()
    import mlx.core as mx
    from treeflash_mlx import hybrid, metal_kernels
    from treeflash_mlx.metal_kernels import attention

    kernels = MetalKernels()
    monkeypatch.setattr(mx.fast, "metal_kernel", kernels.metal_kernel)
    monkeypatch.setattr(metal_kernels, "speedup", lambda *_: 2.0)
    monkeypatch.setattr(metal_kernels, "kept_verdicts", lambda: metal_kernels.KeptVerdicts(None))
    decisions = attention.winning_columns, hybrid.delta_kernel_wins
    for decided in decisions:
        decided.cache_clear()
    yield kernels
    for decided in decisions:
        decided.cache_clear()


@pytest.mark.device
@pytest.mark.parametrize("bits", [4, 8, None])
def test_metal_kernels_write_the_text_of_plain_decoding_after_a_long_prompt(
    kernels, tmp_path, bits
):
    """Beyond 1,024 positions also the one of attention, for trees and for chains."""
    from mlx_lm.utils import load_model, quantize_model, save_model
    from treeflash_mlx.backend import load

    target, drafter = write_pair(tmp_path, "qwen3", hidden_size=256)
    if bits is not None:
        model, config = quantize_model(*load_model(target), 64, bits)
        save_model(target, model)
        (target / "config.json").write_text(json.dumps(config))
    backend = load(target, drafter, LoadConfig(dtype="float32"))
    texts, launches = [], []
    for method in ("ar", "treeflash", "dflash"):
        kernels.launches.clear()
        config = DecodeConfig(method=method, budget=12, max_tokens=80)
        texts.append(generate(backend, [3, 4, 5, 6] * 275, config))
        launches.append(set(kernels.launches))
    assert texts[0] == texts[1] == texts[2]
    expected = {"treeflash_attention_parts", "treeflash_attention_merge"}
    if bits is not None:  # weights in float32 have no kernel
        expected |= {"treeflash_products_quantised"}
    for found in launches[1:]:
        assert found >= expected


@pytest.mark.device
def test_metal_kernels_of_recurrent_layers_write_the_text_of_plain_decoding(kernels, tmp_path):
    from treeflash_mlx.backend import load

    backend = load(*write_pair(tmp_path, "qwen3_5", key_dim=32), LoadConfig(dtype="float32"))
    texts = []
    for method in ("ar", "treeflash"):
        kernels.launches.clear()
        config = DecodeConfig(method=method, budget=12, max_tokens=80)
        texts.append(generate(backend, [3, 4, 5, 6] * 20, config))
    assert texts[0] == texts[1]
    names = {name.rpartition("_by_")[0] for name in kernels.launches}
    assert names >= {"treeflash_gated_delta_nodes", "treeflash_gated_delta_replay"}


@pytest.mark.device
@pytest.mark.parametrize(
    ("dtype", "head_dim", "kv_bits"),
    [("bfloat16", 128, 8), *((dtype, dim, None) for dtype in FORMATS for dim in (128, 64, 256))],
)
def test_no_kernel_falls_back(module, device, dtype, head_dim, kv_bits):
    import torch
    from treeflash_cuda.gpu.kernel_loading import CHECKS, examined_shapes, load_operations
    from treeflash_cuda.gpu.prompt_attention import load_flash_attention

    shapes = replace(examined_shapes(head_dim), quantised=kv_bits is not None)
    operations = load_operations(shapes, device, getattr(torch, dtype))
    where = f"{dtype} and heads of {head_dim}"
    problems = list(module("cuda_parts").kernel_problems(operations.verdicts, where))
    assert problems == [], operations.errors
    assert operations.verdicts.keys() == CHECKS.keys() - {"quantised_linear"}
    if dtype in DTYPES and kv_bits is None:
        found, reason = load_flash_attention(device, getattr(torch, dtype), shapes)
        assert found is not None, reason


@pytest.fixture
def device():
    """The GPU."""
    return need_cuda()


@pytest.mark.device
def test_uploads_of_one_size_keep_their_numbers(device):
    """They are copied while the GPU is busy, after the host has gone on."""
    import torch
    from treeflash_cuda.numerics import upload

    x = torch.ones(4096, 4096, device=device)
    for _ in range(30):
        x = x @ x / 4096
    found = [upload(np.full(4096, n, np.int32), device) for n in range(200)]
    assert [set(part.tolist()) for part in found] == [{n} for n in range(200)]


@pytest.mark.device
def test_keys_are_moved_beyond_two_billion_elements(device):
    """As in the cache of a GPU with 80 GB; it takes 3.3 GB, in 8 bits."""
    import torch
    from treeflash_cuda.gpu.triton_kernels.moves import move_columns

    columns = (1 << 22) + 8
    storage = torch.zeros(3, 2, 1, columns, 132, dtype=torch.int8, device=device)
    assert storage.numel() > 1 << 31
    storage[:, :, :, columns - 1] = 7
    moves = torch.tensor([[columns - 1], [columns - 3], [1]], dtype=torch.int32, device=device)
    move_columns(storage, *moves)
    assert (storage[:, :, :, columns - 3] == 7).all()
    assert int((storage != 0).sum()) == 2 * 3 * 2 * 132


@pytest.mark.device
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_graphs_follow_the_states_when_their_arena_grows(tmp_path, family):
    """A replayed graph that read the old tensors would read freed memory."""
    write_target(tmp_path, family, seed=1)
    backend = load_cuda(tmp_path, None, LoadConfig(dtype="bfloat16"))
    text = SequenceSession(backend)
    text.extend([3, 4, 5] * 20)
    before, slots = text.logits(TREE), backend.target.state_arena.slots
    others = []
    while backend.target.state_arena.slots == slots:
        others.append(SequenceSession(backend))
        others[-1].extend([6, 7])
    assert_near(text.logits(TREE), before)


@pytest.mark.device
def test_a_step_of_training_has_the_loss_of_a_processor(device, tmp_path):
    """The losses in half precision differ by less than with a wrong mask or position."""
    pytest.importorskip("accelerate")
    write_target(tmp_path / "target", "qwen3", seed=1)
    found = []
    context = multiprocessing.get_context("spawn")  # accelerate has one device in a process
    for load in (LoadConfig(device="cpu", dtype="float32"), LoadConfig(dtype="bfloat16")):
        with ProcessPoolExecutor(1, context) as pool:
            folders = tmp_path / "target", tmp_path / load.dtype
            found.append(pool.submit(first_loss, *folders, load).result())
    assert found[1] == pytest.approx(found[0], rel=0.05)


@pytest.mark.device
def test_decoding_goes_on_after_memory_ran_out(device, tmp_path):
    """Also after captures of graphs without memory."""
    import torch

    backend = load_cuda(*write_pair(tmp_path, "qwen3"), LoadConfig(dtype="bfloat16"))
    config = DecodeConfig(budget=16, max_tokens=40)
    expected = generate(backend, [3, 4, 5] * 40, config)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 46, dtype=torch.uint8, device=device)
    assert generate(backend, [3, 4, 5] * 40, config) == expected
    left = 200 << 20
    free = torch.cuda.mem_get_info(device)[0]
    filler = torch.empty(max(0, free - left), dtype=torch.uint8, device=device)
    generate(backend, [3, 4, 5] * 40, replace(config, budget=64))  # needs graphs of other sizes
    del filler
    assert generate(backend, [3, 4, 5] * 40, config) == expected


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Writes the pair of a family or a format of drafters, once."""
    root = tmp_path_factory.mktemp("half")

    def write(name):
        family = "qwen3" if name in DIALECTS else name
        folders = root / name / "target", root / name / "drafter"
        if not folders[0].exists():
            write_target(folders[0], family, seed=1)
            if name in DIALECTS:
                write_dialect(folders[1], folders[0], name, seed=2)
            else:
                write_drafter(folders[1], folders[0], seed=2)
        return folders

    return write


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES)
class TestCudaHalfPrecision:
    """What the suite in float32 does not reach: it runs targets without graphs."""

    @pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=0.8)])
    def test_functions_run_from_graphs(self, module, pairs, dtype, sampling):
        backend = load_cuda(*pairs("qwen3"), LoadConfig(dtype=dtype))
        config = DecodeConfig(budget=16, max_tokens=60, sampling=sampling)
        assert len(generate(backend, [3, 4, 5], config)) == 60
        report, graphs = module("cuda_parts"), backend.target.graphs
        problems = report.graph_problems(graphs.tried, graphs.replays, report.CAPTURED)
        assert list(problems) == []

    @pytest.mark.parametrize("family", [*BackendSuite.families, *HYBRID_FAMILIES])
    def test_graphs_compute_what_no_graph_does(self, pairs, dtype, family):
        found = []
        for with_graphs in (True, False):
            load = LoadConfig(dtype=dtype, cuda_graphs=with_graphs)
            backend = load_cuda(pairs(family)[0], None, load)
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                found.append(logits_after(backend, [3, 4, 5] * 20))
        assert_near(*found)

    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_every_format_drafts_the_same_from_graphs(self, pairs, dtype, dialect):
        found = []
        for with_graphs in (True, False):
            load = LoadConfig(dtype=dtype, cuda_graphs=with_graphs)
            backend = load_cuda(*pairs(dialect), load)
            text = SequenceSession(backend, drafts=True)
            block = text.draft(text.extend([3, 4, 5] * 4))
            table = tables(backend, block, TableOptions(m=4, k=4, shortlist=16, rows=8))
            found.append(table.log_probs[0, 0])
        np.testing.assert_allclose(*found, atol=0.1)

    @pytest.mark.parametrize("method", ["treeflash", "ddtree", "suffix"])
    def test_exact_mode_writes_the_text_of_plain_decoding(self, pairs, dtype, method):
        backend = load_cuda(*pairs("qwen3"), LoadConfig(dtype=dtype, exact=True))
        texts = []
        for each in ("ar", method):
            config = DecodeConfig(method=each, budget=12, max_tokens=80)
            texts.append(generate(backend, [3, 4, 5] * 5, config))
        assert texts[0] == texts[1]

    def test_keys_in_8_bits_change_little(self, pairs, dtype):
        found = []
        for kv_bits in (None, 8):
            backend = load_cuda(pairs("qwen3")[0], None, LoadConfig(dtype=dtype, kv_bits=kv_bits))
            found.append(logits_after(backend, [3, 4, 5] * 20))
        assert_near(*found, share=0.3)
