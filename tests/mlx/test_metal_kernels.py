"""Metal kernels of the backend and of mlx-lm, executed without Metal."""

import re

import mlx_lm.models.gated_delta as gated_delta
import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require
from treeflash.testing.models import write_target

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
import mlx_lm.models.ssm as ssm
from metal_executor import DESCENDING, MetalKernelError, install, require_compiler
from recordings import recording
from stand_ins import stand_in
from treeflash_mlx import backend as backend_module
from treeflash_mlx import hybrid, metal_kernels
from treeflash_mlx.backend import load
from treeflash_mlx.metal_kernels import attention, examination, products

require_compiler()

PROMPT = [5, 17, 3, 22, 8, 1, 19]


def normal(rng, *shape, dtype=mx.float32):
    return mx.array(0.3 * rng.normal(size=shape).astype(np.float32)).astype(dtype)


# ------------------------------------------------------------------------- triangular systems


def solve_both(rng, heads, nodes, width):
    """Solutions of one system by the kernel and by operations, and the exact one."""
    system = np.tril(0.5 * rng.normal(size=(2, heads, nodes, nodes)), -1)
    exact = rng.normal(size=(2, heads, nodes, width))
    targets = mx.array((exact + system @ exact).astype(np.float32))
    system = mx.array(system.astype(np.float32))
    solvers = hybrid.solve_by_substitution, hybrid.solve_by_rounds
    return *(np.array(solve(system, targets, nodes - 1)) for solve in solvers), exact


# One node, one column, several simdgroups, and a last threadgroup that is smaller.
@pytest.mark.parametrize(
    ("heads", "nodes", "width"), [(3, 1, 16), (1, 9, 1), (2, 24, 64), (1, 5, 300)]
)
def test_substitution_equals_rounds(metal, rng, heads, nodes, width):
    kernel, rounds, exact = solve_both(rng, heads, nodes, width)
    np.testing.assert_allclose(kernel, rounds, rtol=1e-4, atol=1e-4 * np.abs(exact).max())
    np.testing.assert_allclose(kernel, exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())
    assert metal.launches == {"treeflash_substitution": 1}


def test_the_substitution_kernel_is_made_once(metal, rng):
    """MLX would look up its source in every layer of every pass."""
    with recording(mx.fast, "metal_kernel") as made:
        for nodes in (3, 4):
            solve_both(rng, 2, nodes, 8)
    assert [name for name, *_ in made] == ["treeflash_substitution"]


def test_substitution_takes_views(metal, rng):
    """Its inputs may be transposed or broadcast; MLX copies them."""
    system = mx.tri(6, k=-1)[None, None] * normal(rng, 1, 2, 6, 6)
    views = mx.broadcast_to(system[:, :1], (1, 2, 6, 6)), normal(rng, 1, 2, 8, 6).swapaxes(2, 3)
    found = hybrid.solve_by_substitution(*views, 5)
    assert mx.allclose(found, hybrid.solve_by_rounds(*views, 5), atol=1e-5)


def test_the_kernel_is_the_solver_where_metal_is(metal, recwarn):
    assert hybrid.choose_solver() is hybrid.solve_by_substitution
    assert not recwarn.list
    assert metal.launches == {"treeflash_substitution": 1}
    assert metal_kernels.VERDICTS == {"recurrent layers, substitution": {"all sizes": "used"}}


def test_later_gpus_run_the_kernels_of_recurrent_layers(metal, see_device):
    """mlx-lm itself runs kernels of this kind there; see `MAX_FAMILY`."""
    see_device(mx.gpu, "applegpu_g17s")
    assert hybrid.choose_solver() is hybrid.solve_by_substitution
    assert hybrid.NodePaths([DraftTree.root_only(1)], hybrid.solve_by_rounds).visits is not None


FAULTS = {
    "one node too many": ("i < n", "i <= n", "out of bounds|two threadgroups"),
    "one ancestor too many": ("j < i", "j <= i", "nothing has written"),
    "a column of another thread": ("j) * width + column", "j) * width + (column ^ 1)", "written"),
    "all nodes in one row": ("[(matrix * n + i) * width + column] = u", "[column] = u", "written"),
    "a loop that does not end": ("++j", "j += 0", "does not end"),
    "one ancestor too few": ("j < i", "j + 1 < i", None),
    "the wrong sign": ("u -=", "u +=", None),
    "a transposed system": ("(matrix * n + i) * n + j", "(matrix * n + j) * n + i", None),
}


@pytest.mark.parametrize(("right", "wrong", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_fault_in_the_substitution_is_noticed(metal, right, wrong, reason):
    """By the executor, or by the check of the solver at load."""
    metal.max_seconds = 0.3
    metal.faults.append(("treeflash_substitution", right, wrong))
    if reason:
        with pytest.raises(MetalKernelError, match=reason):
            hybrid.choose_solver()
    else:
        with pytest.warns(UserWarning, match="without their Metal kernel"):
            assert hybrid.choose_solver() is hybrid.solve_by_rounds
    assert metal.planted


# --------------------------------------------------------------------------- kernels of mlx-lm


def delta_inputs(rng, dtype, key_dim, by_channel):
    """q, k, v, g, beta, state of two sequences of five tokens; a key head has two value heads."""
    batch, length, heads, value_dim = 2, 5, 4, 16
    gates = length, heads, *([key_dim] if by_channel else [])
    return (
        *(normal(rng, batch, length, heads // 2, key_dim, dtype=dtype) for _ in range(2)),
        normal(rng, batch, length, heads, value_dim, dtype=dtype),
        mx.exp(-mx.abs(normal(rng, batch, *gates))),
        mx.sigmoid(normal(rng, batch, length, heads)).astype(dtype),
        normal(rng, batch, heads, value_dim, key_dim),
    )


@pytest.mark.sample(4)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize(
    ("dtype", "key_dim"), [(mx.float32, 64), (mx.bfloat16, 128), (mx.float16, 32)]
)
def test_gated_delta_kernels_equal_operations(metal, rng, dtype, key_dim, by_channel, masked):
    inputs = delta_inputs(rng, dtype, key_dim, by_channel)
    mask = mx.array(rng.random((2, 5)) < 0.7) if masked else None
    outputs, state = gated_delta.gated_delta_kernel(*inputs, mask)
    expected, expected_state = gated_delta.gated_delta_ops(*inputs, mask)
    if masked:  # of a token that is masked, the operations have an output
        expected = expected * mask[..., None, None]
    assert outputs.dtype == expected.dtype == dtype
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}[dtype]
    assert mx.allclose(outputs.astype(mx.float32), expected.astype(mx.float32), tolerance, 1e-5)
    assert mx.allclose(state, expected_state, 1e-5, 1e-5)
    assert len(metal.launches) == 1


def test_the_packed_kernel_has_the_bits_of_the_plain_ones(metal, rng):
    """mlx-lm says so of its butterfly, and of `simd_sum` on Apple's GPUs."""
    inputs = delta_inputs(rng, mx.bfloat16, 128, by_channel=False)
    packed = gated_delta.gated_delta_kernel(*inputs)
    for other in (gated_delta.gated_delta_kernel_xtree, gated_delta.gated_delta_kernel_unpacked):
        for x, y in zip(packed, other(*inputs), strict=True):
            assert mx.array_equal(x, y)
    assert len(metal.launches) == 3


def test_the_ssm_kernel_equals_operations(metal, rng):
    heads, head_dim, size = 4, 16, 32
    x, state = normal(rng, 2, 1, heads, head_dim), normal(rng, 2, heads, head_dim, size)
    b, c = (normal(rng, 2, 1, heads // 2, size) for _ in range(2))
    a_log, d, dt_bias = (normal(rng, heads) for _ in range(3))
    arguments = x, a_log, b, c, d, normal(rng, 2, 1, heads), dt_bias, state, (0.001, 100.0)
    found = ssm.ssm_update_kernel(*arguments)
    expected = ssm.ssm_attn(*arguments)
    for mine, theirs in zip(found, expected, strict=True):
        assert mx.allclose(mine, theirs, 1e-4, 1e-5)
    assert metal.launches == {"ssm_kernel": 1}


# ---------------------------------------------------------------- whole models, as on a Mac


def test_tiny_targets_with_mamba_2_run_mlx_lms_kernel(executor, tmp_path, monkeypatch):
    """It leaves states of other widths than a multiple of 32 unwritten."""
    executor.schedules = (DESCENDING,)
    write_target(tmp_path, "granitemoehybrid", seed=1, layers=2, hidden_size=64, key_dim=32)
    found = []
    for on_a_mac in (False, True):
        if on_a_mac:
            install(executor, monkeypatch)
        with SequenceSession(load(tmp_path, None, LoadConfig(dtype="float32"))) as text:
            text.extend(PROMPT)
            for token in PROMPT[:2]:
                text.verify(DraftTree.root_only(token))
                text.commit(np.zeros(1, np.int32))
            found.append(text.logits(DraftTree.root_only(1)))
    np.testing.assert_allclose(*found, atol=1e-4)
    assert executor.launches["ssm_kernel"] >= 2


# ---------------------------------------------------------------------------- the device alone


# Every kernel is compiled for it; `test_metal_compilation.py` compiles them, too.
@pytest.mark.nightly
def test_every_kernel_is_checked_without_a_model(metal, monkeypatch):
    """A wrong kernel is named, with its error."""
    metal.schedules = (DESCENDING,)
    metal.speedup = lambda *_: 2
    stand_in(monkeypatch, attention, TIMED_COLUMNS=(attention.TIMED_NODES + 1,))
    stand_in(monkeypatch, products, MANY_OUTPUTS=1)  # one geometry
    stand_in(
        monkeypatch,
        examination,
        LAYERS=((64, 64),),
        WEIGHTS=examination.WEIGHTS[:3],
        HEADS=(attention.Shape(4, 2, 32, mx.bfloat16),),
        DELTA_NET=(1, 2, 8, 32, mx.bfloat16, False),
    )
    metal.faults.append(("treeflash_attention_merge", "factor =", "factor = 1.0f +"))
    with pytest.warns(UserWarning, match="attention of draft trees run without"):
        kernels = backend_module.examine_device(LoadConfig()).kernels
    used = {name: [x.startswith("used") for x in kernels[name].values()] for name in kernels}
    layers = [f"64 x 64 in {bits} bits" for bits in (4, 8, 16)]
    assert used == {
        **dict(zip([f"products of few rows, {x}" for x in layers], NUMBERS, strict=True)),
        **{f"products in exact mode, {x}": [True] for x in layers},
        "attention of draft trees, 4 heads of 32": [False] * 2,
        "attention in exact mode, 4 heads of 32": [False],
        "recurrent layers, substitution": [True],
        "gated delta nets on trees, 2 heads of 8 x 32": [True],
    }
    for verdict in kernels["attention of draft trees, 4 heads of 32"].values():
        assert re.match(r"not used, its relative error is \S+ \(.* columns", verdict)


NUMBERS = [True] * 5, [True] * 6, [True] * 5
"""Numbers of rows that are timed with weights of 4, 8 and 16 bits."""


def test_common_shapes_have_every_tile_count_and_kind_of_keys():
    rows = max(map(max, products.TIMED_ROWS.values()))
    tiles = {g.tiles for n, _ in examination.LAYERS for g in products.geometries(n, rows)}
    assert tiles == {4, 2, 1}
    assert {bits for bits, _ in examination.WEIGHTS} == set(products.TIMED_ROWS)
    assert {group for _, group in examination.WEIGHTS} == set(products.GROUP_SIZES)
    assert {shape.bits for shape in examination.HEAD_SHAPES} == {0, *attention.BITS}
    assert all(attention.runs_shape(shape.head_dim) for shape in examination.HEAD_SHAPES)


def test_a_pass_is_submitted_soon_and_then_in_longer_parts():
    assert backend_module.submitted_layers(36) == [0, 2, 6, 14, 23, 32]
    assert backend_module.submitted_layers(28) == [0, 2, 6, 13, 20, 27]
    assert backend_module.submitted_layers(1) == [0]
