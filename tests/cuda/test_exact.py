"""Exact mode: a sequence's logits are bitwise equal whatever is computed together with them.

And the dtype of models on a CPU where the user names none, which depends on exact mode.
"""

import gc
import os
import subprocess
import sys
import weakref
from contextlib import ExitStack, nullcontext
from inspect import ismethod
from pathlib import Path

import numpy as np
import pytest
from failures import failing
from parts import use_models
from recordings import recording
from stand_ins import stand_in

from treeflash.config import LoadConfig
from treeflash.decoding import probe
from treeflash.decoding.passed_checks import PassedChecks
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import CheckpointError, ConfigError, UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_target

require("torch")

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from treeflash_cuda import exact, exact_attention, linear, target_loading
from treeflash_cuda.backend import CudaBackend, load
from treeflash_cuda.cpu import decoder_attention, decoder_target, default_dtype
from treeflash_cuda.operations import Operations

VOCAB_SIZE = 24
WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def load_exact(folder, dtype="bfloat16", **settings):
    return load(folder, None, LoadConfig(device="cpu", dtype=dtype, exact=True, **settings))


def write(folder, family="llama", **settings):
    write_target(folder, family, seed=1, vocab_size=VOCAB_SIZE)
    edit_config(folder, lambda config: config.update(settings))
    return folder


def tree_of(rng, nodes, spread):
    """A random tree: the larger the spread, the shorter its paths."""
    parents = [-1, *(int(rng.integers(max(0, i - spread), i)) for i in range(1, nodes))]
    tokens = rng.integers(0, VOCAB_SIZE, nodes).astype(np.int32)
    return DraftTree.from_parents(tokens, np.array(parents, np.int32))


def assert_nodes_equal_single_tokens(backend, length, tree, rng, step=1):
    """Compare every `step`-th node of a tree's longest path."""
    prefix = rng.integers(0, VOCAB_SIZE, length).tolist()
    with SequenceSession(backend) as branched, SequenceSession(backend) as plain:
        branched.extend(prefix)
        plain.extend(prefix)
        logits = branched.logits(tree)
        path = np.flatnonzero(tree.ancestor_mask()[np.argmax(tree.depths)])
        for first in range(0, len(path), step):
            if first:
                plain.extend(tree.tokens[path[first - step : first]].tolist())
            (alone,) = plain.logits(DraftTree.root_only(int(tree.tokens[path[first]])))
            np.testing.assert_array_equal(alone, logits[path[first]])


@pytest.mark.parametrize(("dtype", "family"), [("bfloat16", "llama"), ("float16", "qwen3")])
def test_nodes_of_trees_have_the_logits_of_plain_decoding(tmp_path, dtype, family):
    settings = WINDOWS if family == "qwen3" else {}
    backend = load_exact(write(tmp_path, family, **settings), dtype)
    rng = np.random.default_rng(0)
    for length in (1, 126, 300):
        for nodes, spread in ((2, 1), (17, 3), (64, 9)):
            assert_nodes_equal_single_tokens(backend, length, tree_of(rng, nodes, spread), rng, 3)
    # More keys than one product may have, and paths longer than a group.
    assert_nodes_equal_single_tokens(backend, 100, tree_of(rng, 400, 60), rng, 2)
    assert_nodes_equal_single_tokens(backend, 100, tree_of(rng, 300, 2), rng, 50)


class Spoilt(nn.Linear):
    """A product that has other bits for some numbers of rows, and no others on any machine."""

    def __init__(self, is_spoilt):
        super().__init__(16, 8, dtype=torch.bfloat16)
        self.is_spoilt = is_spoilt

    def forward(self, x):
        exact = F.linear(*(part.double() for part in (x, self.weight, self.bias)))
        return exact.to(x.dtype) * (1 + 2.0**-7 * self.is_spoilt(x.shape[-2]))


def bind(model, **limits):
    exact.bound_products(model, torch.bfloat16, ExitStack(), PassedChecks(), **limits)


def test_a_product_with_one_row_is_padded_or_refused():
    model = nn.Sequential(Spoilt(lambda rows: rows == 1))
    with torch.inference_mode():
        with pytest.raises(UnsupportedModelError, match="products of 16 x 8 weights depend"):
            exact.check_products(model, torch.bfloat16)
        bind(model)
        exact.check_products(model, torch.bfloat16)


@pytest.mark.parametrize(("limit", "most"), [(17, 17), (32, 32), (40, 33), (300, 256), (600, 512)])
def test_a_product_of_more_rows_than_have_the_same_bits_is_split(limit, most):
    model = nn.Sequential(Spoilt(lambda rows: rows > limit))
    rows = []
    with torch.inference_mode():
        # Sums of small integers are not rounded, in whatever order the kernels add.
        x = torch.randint(-2, 3, (2, 700, 16)).bfloat16()
        model[0].weight.copy_(torch.randint(-2, 3, (8, 16)))
        model[0].bias.copy_(torch.randint(-2, 3, (8,)))
        alone = torch.cat([F.linear(x[:, i : i + 2], model[0].weight, model[0].bias)
                           for i in range(0, 700, 2)], 1)  # fmt: skip
        bind(model)
        model[0].is_spoilt = lambda count: rows.append(count) or count > limit
        assert torch.equal(model(x), alone)
    assert rows == [most] * (700 // most) + [700 % most]


class Reordered(nn.Linear):
    """A product that adds in another order where it has more rows than `limit`."""

    limit = 48

    def forward(self, x):
        order = torch.arange(x.shape[-1])
        if x.shape[-2] > self.limit:
            order = order.flip(0)
        total = torch.zeros(*x.shape[:-1], len(self.weight))
        for i in order.tolist():
            total += x[..., i, None].float() * self.weight[:, i].float()
        return total.to(x.dtype)


def test_products_of_one_shape_are_checked_once():
    with torch.inference_mode(), recording(exact, "_equal_results") as checks:
        bind(nn.Sequential(*(nn.Linear(16, 16, dtype=torch.bfloat16) for _ in range(3))))
    assert len(checks) == 2  # as they are, and with terms that cancel


@pytest.mark.parametrize("width", [16, 17])
def test_another_order_is_seen_where_rounding_hides_it(width):
    """As with oneDNN on a processor with AMX, for some weights of the same shape."""
    layer = Reordered(width, 8, dtype=torch.bfloat16, bias=False)
    with torch.inference_mode():
        layer.weight.copy_(torch.eye(8, width))  # sums of one term
        bind(model := nn.Sequential(layer))
    assert model[0].forward.most == 48


def test_rows_are_padded_to_a_multiple_where_others_have_other_bits(monkeypatch):
    """As with FBGEMM on a processor with AVX2 alone."""
    model = nn.Sequential(Spoilt(lambda rows: rows % 3))
    with torch.inference_mode():
        for alone in (False, True):
            stand_in(monkeypatch, exact, uses_fbgemm=lambda _: True, HAS_AVX2_ALONE=alone)
            with nullcontext() if alone else pytest.raises(UnsupportedModelError, match="depend"):
                bind(model)
        exact.check_products(model, torch.bfloat16)
        assert exact.token_rows(model, torch.bfloat16) == 3
        assert model(torch.randn(1, 7, 16, dtype=torch.bfloat16)).shape == (1, 7, 8)


LIMITS = {
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "AVX-512 alone": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}
"""Variables of the libraries that leave instructions of the processor out."""


# Another process each, for ten seconds. AVX2 alone has other kernels of every library.
@pytest.mark.nightly
@pytest.mark.parametrize("limit", LIMITS)
def test_exact_mode_is_granted_and_exact_with_fewer_instructions(limit):
    """The libraries choose their kernels once, so another process runs the tests."""
    names = "nodes_of_trees or every_number_of_threads or gelu_is_exact"
    tests = [__file__, str(Path(__file__).with_name("test_cpu_threads.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, *tests]
    environ = os.environ | LIMITS[limit]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout, "none is skipped"


def test_a_product_whose_few_rows_differ_is_refused():
    with torch.inference_mode(), pytest.raises(UnsupportedModelError, match="15 rows differ fr"):
        bind(nn.Sequential(Spoilt(lambda rows: rows > 15)))


def test_a_product_of_large_weights_is_checked_with_fewer_rows():
    rows = []
    with torch.inference_mode():
        model = nn.Sequential(Spoilt(lambda count: bool(rows.append(count))))
        bind(model, multiplications=200 * 16 * 8)
    assert max(rows) == 128


def spoil(monkeypatch, is_spoilt):
    """Let products have other bits for some numbers of rows."""
    for layer in (nn.Linear, linear.PackedLinear):

        def forward(self, x, original=layer.forward):
            return original(self, x) * (1 + 2.0**-6 * is_spoilt(x.shape[-2]))

        stand_in(monkeypatch, layer, forward=forward)


def test_a_target_whose_products_of_many_rows_differ_is_exact(tmp_path, monkeypatch):
    """As with oneDNN on a processor with AMX."""
    spoil(monkeypatch, lambda rows: rows > 32)
    backend = load_exact(write(tmp_path))
    rng = np.random.default_rng(0)
    assert_nodes_equal_single_tokens(backend, 100, tree_of(rng, 64, 3), rng)


def test_products_with_one_row_fail_the_check(tmp_path, monkeypatch):
    """Without the padding the check at load finds them."""
    spoil(monkeypatch, lambda rows: rows == 1)
    assert load_exact(write(tmp_path)).inexact is None
    stand_in(monkeypatch, exact, LINEAR_ROWS=1)
    with pytest.raises(UnsupportedModelError, match=r"products of .* weights depend"):
        load_exact(tmp_path)
    stand_in(monkeypatch, exact, _equal_results=lambda *_: 64)
    stand_in(monkeypatch, decoder_target, token_rows=lambda *_: 1)
    with pytest.raises(UnsupportedModelError, match="a prompt in other chunks changes its logits"):
        load_exact(tmp_path)


def test_attention_that_sums_by_column_fails_the_check(tmp_path, monkeypatch):
    def by_column(block, place, visible, columns):
        middle = len(columns) // 2
        sizes = [middle, len(columns) - middle]
        return exact_attention.VisibleRows(0, len(block), place, visible, [], sizes)

    stand_in(monkeypatch, exact_attention, _tree_rows=by_column)
    with pytest.raises(UnsupportedModelError, match="attention over a draft tree or a prompt"):
        load_exact(write(tmp_path))


def is_packed(activation, dtype):
    """Whether an activation reads contiguous numbers where its inputs are not."""
    with recording(activation, "forward") as calls:
        activation(torch.zeros(2, 3, dtype=dtype).T)
    return calls[0][0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_activations_do_not_depend_on_the_place_of_a_number(dtype, name):
    model = nn.Sequential(ACT2FN[name])
    # PyTorch computes the polynomial number by number if it has no vector instructions.
    has_vectors = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    depends = name == "gelu" or (name == "gelu_pytorch_tanh" and has_vectors)
    if depends:
        with pytest.raises(UnsupportedModelError, match="depends on a number"):
            exact.check_activations(model, dtype)
    exact.pack_activations(model, dtype, ExitStack())
    exact.check_activations(model, dtype)
    assert is_packed(model[0], dtype) == depends


def test_gelu_is_exact(tmp_path):
    assert load_exact(write(tmp_path, hidden_act="gelu")).inexact is None


FBGEMM_ROWS = 3 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1
ROWS = {"bfloat16": 2, "float16": FBGEMM_ROWS if linear.uses_fbgemm(torch.float16) else 2}


@pytest.mark.parametrize(
    ("dtype", "cache_nbytes", "count"),
    [*((dtype, exact.CACHE_NBYTES, count) for dtype, count in ROWS.items()), ("bfloat16", 0, 4)],
)
def test_one_token_has_one_column_and_the_rows_that_its_products_need(
    tmp_path, monkeypatch, dtype, cache_nbytes, count
):
    """More of them in a model that is larger than caches."""
    stand_in(monkeypatch, exact, CACHE_NBYTES=cache_nbytes)
    backend = load_exact(write(tmp_path), dtype)  # compares them with trees and prompts
    rows = []
    backend.target.layers[0].register_forward_hook(lambda _, args, __: rows.append(args[0]))
    with SequenceSession(backend, capacity=4) as sequence:
        sequence.extend([3, 4, 5])
        assert len(sequence.logits(DraftTree.root_only(3))) == 1
        sequence.commit(np.zeros(1, np.int32))
        assert sequence.state.kv_cache.length == sequence.state.length == 4
    assert [len(x) for x in rows] == [3, count]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("factor", "of_prompts", "message"),
    [
        (1, 0, None),
        (1, 1e-6, "many rows have other bits"),
        (1.5, 0, "the kernel for products differ by"),
    ],
)
def test_a_kernel_that_is_wrong_or_whose_prompts_have_other_bits_is_refused(
    monkeypatch, factor, of_prompts, message
):
    require("triton")
    from treeflash_cuda.gpu.exact_products import use_kernel_for_products
    from treeflash_cuda.gpu.triton_kernels import products

    devices = []

    def row_by_row(x, weight, bias):
        rows = torch.stack([F.linear(row, weight, bias) for row in x])
        return factor * rows + of_prompts * (len(x) > 64)

    stand_in(monkeypatch, torch.cuda, device_of=lambda x: devices.append(x) or nullcontext())
    stand_in(monkeypatch, products, linear=row_by_row)
    refused = pytest.raises(UnsupportedModelError, match=message) if message else nullcontext()
    with refused:
        use_kernel_for_products(nn.Sequential(nn.Linear(16, 8)))
    assert devices, "Triton launches kernels on the current device"


# The kernels pass in the interpreter, which takes long; each kernel's own tests compare bits, too.
@pytest.mark.parametrize("layers", ["treeflash", "transformers"])
@pytest.mark.parametrize(
    "case", [pytest.param("kernels", marks=pytest.mark.nightly), "PyTorch", "a kernel is missing"]
)
def test_kernels_are_exact(tmp_path, monkeypatch, case, layers):
    """What a GPU runs in exact mode passes the check at load, in Triton's interpreter."""
    require("triton")
    import triton_interpreter  # noqa: F401 - repairs it
    from treeflash_cuda.gpu import exact_products
    from treeflash_cuda.gpu.triton_kernels import attention as kernels_of_attention
    from treeflash_cuda.gpu.triton_kernels import layers

    kernels = Operations(
        kernels_of_attention.tree_attention, layers.rms_norm, layers.rotate_and_store, layers.gated
    )
    fallback = Operations(reasons={"gated": "ptxas is missing"})
    write_target(tmp_path, "llama", seed=1, vocab_size=VOCAB_SIZE, layers=1)
    # The interpreter is slow: trees cross the end of a smaller tile, after a shorter prompt.
    stand_in(monkeypatch, kernels_of_attention, MAX_TILE=16)
    stand_in(monkeypatch, probe, EXACT_PREFIX=12, EXACT_NODES=8)
    stand_in(monkeypatch, exact, CHECKED_ROWS=(1, 2, 17))
    stand_in(monkeypatch, exact_products, CHECKED_REPEATS=17)
    operations, dtype, message = {
        "kernels": (kernels, "bfloat16", None),
        "PyTorch": (Operations(), "float32", r"exact mode is not possible .* changes its logits"),
        "a kernel is missing": (fallback, "bfloat16", "in PyTorch: ptxas is missing"),
    }[case]
    if layers == "transformers":
        use_models(monkeypatch)
    stand_in(monkeypatch, linear, uses_onednn=lambda _: False)
    stand_in(monkeypatch, target_loading, load_target_operations=lambda *_: operations)
    if message is None:
        assert load_exact(tmp_path, dtype).inexact is None
    else:
        with pytest.raises(UnsupportedModelError, match=message):
            load_exact(tmp_path, dtype)


def test_a_rotation_of_prompts_that_differs_from_that_of_trees_is_found(tmp_path, monkeypatch):
    """Equal in all prompts: a cache would give other bits than the tokens that it stands for."""
    plain = decoder_attention.RowStore.store

    def store(self, layer, keys, values):
        is_prompt = self.blocks[0].ancestors is None
        plain(self, layer, keys * 1.01 if is_prompt else keys, values)

    stand_in(monkeypatch, decoder_attention.RowStore, store=store)
    with pytest.raises(UnsupportedModelError, match="a prompt in the place of sampled tokens"):
        load_exact(write(tmp_path))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"kv_bits": 8}, "exact mode does not support kv_bits"),
        ("llama", {"compile": True}, "exact mode does not support compile"),
        ("qwen3_moe", {}, "does not support the products of Qwen3Moe"),
        ("qwen3_5", {}, "does not support recurrent layers"),
    ],
)
def test_what_has_no_exact_mode_is_refused_by_name(tmp_path, family, settings, message):
    with pytest.raises(ConfigError if settings else UnsupportedModelError, match=message):
        load_exact(write(tmp_path, family, hidden_act="gelu"), **settings)


@pytest.fixture
def loaded(monkeypatch):
    """References to all targets whose weights were read."""
    found, read = [], target_loading.read_target

    def remember(*args, **kwargs):
        gc.collect()
        assert not any(reference() for reference in found), "two targets are in memory"
        target = read(*args, **kwargs)
        found.append(weakref.ref(target))
        return target

    stand_in(monkeypatch, target_loading, read_target=remember)
    return found


def load_on_cpu(folder, **settings):
    return load(folder, None, LoadConfig(device="cpu", **settings))


@pytest.mark.parametrize(
    ("stored", "settings", "dtype", "is_exact"),
    [
        ("bfloat16", {}, "bfloat16", True),
        ("float16", {}, "float16", True),
        ("float32", {}, "float32", False),
        ("bfloat16", {"exact": False}, "float32", False),
        ("bfloat16", {"kv_bits": 8}, "float32", False),
        ("float32", {"dtype": "bfloat16"}, "bfloat16", True),
        ("float32", {"dtype": "float16"}, "float16", True),
        ("bfloat16", {"dtype": "float32"}, "float32", False),
        ("bfloat16", {"dtype": "bfloat16", "exact": False}, "bfloat16", False),
        ("bfloat16", {"dtype": "bfloat16", "kv_bits": 8}, "bfloat16", False),
    ],
)
def test_half_precision_stays_where_it_is_exact(
    tmp_path, recwarn, loaded, stored, settings, dtype, is_exact
):
    """A dtype that is named stays, too; exact mode is the default in half precision."""
    backend = load_on_cpu(write(tmp_path, dtype=stored), **settings)
    assert backend.dtype == dtype
    assert backend.target.is_exact == (backend.inexact is None) == is_exact
    assert dtype != "float32" or "float32 rounding" in backend.inexact
    assert len(loaded) == 1
    assert not recwarn.list


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_processor_without_products_in_half_precision_takes_float32(
    tmp_path, monkeypatch, recwarn, dtype
):
    without = dict.fromkeys(("uses_onednn", "uses_fbgemm"), lambda _: False)
    stand_in(monkeypatch, default_dtype, **without)
    assert load_on_cpu(write(tmp_path, dtype=dtype)).dtype == "float32"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("qwen3_moe", {"hidden_act": "gelu"}, "does not support the products of"),
        ("qwen3_5", {}, "does not support recurrent layers"),
        (
            "llama",
            {"attn_logit_softcapping": 30.0, "hidden_act": "gelu"},
            "does not support soft-capped scores",
        ),
    ],
)
def test_a_target_that_is_known_to_be_inexact_is_read_once(
    tmp_path, loaded, family, settings, reason
):
    folder = write(tmp_path, family, dtype="bfloat16", **settings)
    with pytest.warns(UserWarning, match=f"running in float32, because .*{reason}") as lines:
        backend = load_on_cpu(folder)
    assert backend.dtype == "float32"
    assert (len(loaded), len(lines)) == (1, 1)


@pytest.mark.parametrize(
    "place", [(decoder_target, "check_attention"), (CudaBackend, "check_exact")]
)
def test_a_machine_that_is_inexact_takes_float32_with_one_line(
    tmp_path, monkeypatch, loaded, place
):
    """The weights in half precision are freed before the others are read."""

    def refuse(*_):
        raise UnsupportedModelError("exact mode is not possible for this target: a test")

    stand_in(monkeypatch, place[0], **{place[1]: refuse})
    with pytest.warns(UserWarning, match="running in float32, because .*: a test$") as lines:
        backend = load_on_cpu(write(tmp_path, dtype="bfloat16"))
    assert (backend.dtype, len(loaded), len(lines)) == ("float32", 2, 1)


def test_exact_mode_that_half_precision_refuses_is_tried_in_float32(tmp_path, monkeypatch):
    check, tried = exact.check_gates, []

    def only_float32(gated, size, dtype):
        tried.append(dtype.itemsize)
        if dtype.itemsize == 2:
            raise UnsupportedModelError("a test")
        check(gated, size, dtype)

    stand_in(monkeypatch, decoder_target, check_gates=only_float32)
    with pytest.warns(UserWarning, match="running in float32"):
        backend = load_on_cpu(write(tmp_path, dtype="bfloat16"), exact=True)
    assert (backend.dtype, backend.inexact, tried) == ("float32", None, [2, 4])


def test_another_error_is_no_reason_to_load_again(tmp_path, loaded):
    folder = write(tmp_path / "target", dtype="bfloat16")
    with pytest.raises(CheckpointError):
        load(folder, tmp_path / "missing", LoadConfig(device="cpu"))
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("family", "fault", "reason"),
    [
        ("qwen3_moe", None, "it does not support the products of Qwen3Moe"),
        ("llama", (exact, "_equal_rows"), "products of 3 x 4 weights"),
        ("llama", (CudaBackend, "check_exact"), "a fork changes its logits"),
        ("qwen3", (CudaBackend, "check_exact"), "a fork changes its logits"),
    ],
)
def test_a_target_that_is_not_exact_is_loaded_as_without_the_default(
    tmp_path, family, fault, reason
):
    write(tmp_path, family, **({} if family == "qwen3" else {"hidden_act": "gelu"}))
    plain = load(tmp_path, None, LoadConfig(device="cpu", dtype="bfloat16", exact=False))
    with failing(*fault, UnsupportedModelError(reason)) if fault else nullcontext():
        backend = load(tmp_path, None, LoadConfig(device="cpu", dtype="bfloat16"))
    assert backend.inexact.startswith(f"{plain.inexact}; ")
    assert reason in backend.inexact
    modules = list(backend.target.model.modules())
    assert all(ismethod(module.forward) for module in modules)
    assert not any(is_packed(x, torch.bfloat16) for x in exact.activations(backend.target.model))
    assert backend.target.column_nbytes == plain.target.column_nbytes
    logits = []
    for pair in (plain, backend):
        with SequenceSession(pair) as sequence:
            sequence.extend([3, 4, 5])
            logits.append(sequence.logits(DraftTree.root_only(6)))
    np.testing.assert_array_equal(*logits)
