"""The Triton kernels, run by Triton's interpreter on a CPU, against their definitions."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from treeflash.testing import require

require("torch")
require("triton")

import torch
import torch.nn.functional as F
import triton
import triton_interpreter  # noqa: F401 - repairs it
from attention_cases import Case, alone, attention_case, expected_attention
from faulty_kernels import faulty
from treeflash_cuda import operations
from treeflash_cuda.gpu import triton_kernels
from treeflash_cuda.gpu.triton_kernels import (
    attention,
    convolution,
    experts,
    layers,
    moves,
    noise,
    products,
    recurrence,
    sampling,
)
from treeflash_cuda.operations import TOLERANCES, Operations, RandomInputs, Shapes, checked
from treeflash_cuda.quantised_weights import BITS, GROUP, quantise_weight
from treeflash_cuda.recurrence import TreeNodes, plan_nodes

from treeflash.decoding.tree import DraftTree
from treeflash.testing.comparisons import path_to, random_tree
from treeflash.testing.pairs import each_value

CPU = torch.device("cpu")
KERNELS = Operations(
    *(attention.tree_attention, layers.rms_norm, layers.rotate_and_store, layers.gated),
    *(experts.grouped_linear, sampling.sample_rows),
    *(recurrence.tree_recurrence, recurrence.commit_recurrence),
    convolve_paths=convolution.convolve_paths,
    move_columns=moves.move_columns,
    quantised_linear=products.quantised_linear,
)
SMALL = Shapes(heads=2, kv_heads=1, head_dim=16, hidden_size=24)
CASES = {
    "trees": Case(lengths=(5, 0, 70), nodes=7),
    "trees that cross tiles and chunks": Case(lengths=(60, 505), nodes=12, heads=2, kv_heads=1),
    "trees of different sizes": Case(lengths=(600, 3, 511, 0), nodes=(1, 19, 40, 2)),
    "a tree of 256 nodes": Case(lengths=(9,), nodes=256, heads=1, kv_heads=1),
    "single tokens": Case(lengths=(3, 64, 1100), nodes=1),
    "prompt tokens": Case(lengths=(0, 60), nodes=9, chunk=True),
    "a window": Case(lengths=(600, 2), nodes=6, window=90),
    "a window inside a tree": Case(lengths=(600, 2), nodes=9, window=2),
    "the first positions and a window": Case(lengths=(600, 2), nodes=4, window=9, sink=3),
    "soft-capping": Case(lengths=(5, 30), nodes=4, softcap=2.0),
    "attention sinks": Case(lengths=(5, 30), nodes=4, sinks=True),
    "blocks that see all of themselves": Case(lengths=(5, 63), nodes=4, block=True),
    "narrow heads": Case(lengths=(5,), nodes=4, head_dim=6),
    "heads whose width is no power of two": Case(lengths=(70,), nodes=4, head_dim=24),
    "many heads for one key head": Case(lengths=(70,), nodes=2, heads=40, kv_heads=2),
}
DTYPES = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def unwritten_memory_is_wrong():
    """Fill new tensors with NaN: what a kernel does not write must not be right by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def all_in_float32(cases, in_each=None):
    """Cases in float32, one of them in each type if one is named; the others are nightly."""
    return [
        pytest.param(
            case,
            dtype,
            id=f"{name}-{dtype}",
            marks=[] if dtype == torch.float32 or name == in_each else pytest.mark.nightly,
        )
        for (name, case), dtype in itertools.product(cases.items(), DTYPES)
    ]


def worst_row(actual, expected):
    error = (actual.double() - expected.double()).square().flatten(1).mean(1).amax().sqrt()
    return float(error / expected.double().std())


def test_kernels_are_launched_on_the_device_of_their_inputs(monkeypatch):
    """Triton launches them on the current device, wherever the inputs are."""
    launches, current = [], []

    class DeviceOf:
        def __init__(self, x):
            self.x = x

        def __enter__(self):
            current.append(self.x)

        def __exit__(self, *_):
            current.pop()

    def launcher(name):
        return lambda x: launches.append((name, [y is x for y in current]))

    modules = (
        *(attention, convolution, experts, layers, moves),
        *(noise, products, recurrence, sampling),
    )
    for module, name in itertools.product(modules, operations.CHECKS):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, launcher(name))
    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(operations, "checked", lambda kernels, *_: kernels)
    found = operations.load_operations(SMALL, CPU, torch.float32)
    for name in operations.CHECKS:
        getattr(found, name)(torch.zeros(1))
    assert launches == [(name, [True]) for name in operations.CHECKS]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("case", "dtype"), all_in_float32(CASES, "trees"))
def test_attention(case, dtype):
    case = replace(case, dtype=dtype)
    inputs = attention_case(case)
    found = attention.tree_attention(**inputs)
    assert found.dtype == dtype
    assert worst_row(found, expected_attention(case, inputs)) < TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("capability", "interpreted", "dtype", "needed"),
    [
        *((75, False, torch.float16, True), (80, False, torch.float16, False)),
        *((90, False, torch.float32, True), (75, True, torch.float16, False)),
    ],
)
def test_products_need_registers_where_triton_uses_no_tensor_cores(
    monkeypatch, capability, interpreted, dtype, needed
):
    """Those of a T4 are older than the ones that it knows."""
    target = SimpleNamespace(backend="cuda", arch=capability)
    active = SimpleNamespace(
        get_current_device=lambda: -capability, get_current_target=lambda: target
    )
    monkeypatch.setattr(triton_kernels, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
    assert triton_kernels.needs_registers(dtype) is needed


def test_kernels_without_tensor_cores_are_right_in_half_precision(monkeypatch):
    for module in (attention, experts, products):
        monkeypatch.setattr(module, "needs_registers", lambda dtype: True)
    kernels = Operations(
        tree_attention=attention.tree_attention,
        grouped_linear=experts.grouped_linear,
        quantised_linear=products.quantised_linear,
    )
    shapes = replace(SMALL, experts=True, draft_bits=BITS)
    found = checked(kernels, shapes, CPU, torch.float16)
    assert set(found.verdicts.values()) == {operations.KERNEL}
    assert len(found.verdicts) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_reads_quantised_columns(dtype):
    inputs = attention_case(Case(lengths=(5, 70), nodes=4, head_dim=16, dtype=dtype))
    stored = {name: operations.quantise(inputs[name].nan_to_num()) for name in "kv"}
    found = attention.tree_attention(**inputs | stored)
    expected = operations.tree_attention(**inputs | stored)
    assert worst_row(found, expected) < TOLERANCES[dtype]


LOADED = {
    "soft-capped, with sinks, in 8 bits, with experts, recurrent, quantised drafters": Shapes(
        heads=6,
        kv_heads=2,
        head_dim=12,
        hidden_size=40,
        softcap=5.0,
        sinks=True,
        quantised=True,
        experts=True,
        draft_bits=BITS,
        recurrent=((2, 8, 6, False),),
        convolutions=((20, 4), (6, 3)),
    ),
    "plain": SMALL,
}


@pytest.mark.sample(1)
@pytest.mark.parametrize(("shapes", "dtype"), all_in_float32(LOADED))
def test_all_kernels_pass_the_check_at_load(shapes, dtype, monkeypatch):
    monkeypatch.setattr(operations, "SAMPLES", 3)
    found = checked(KERNELS, shapes, CPU, dtype)
    names = [] if shapes.experts else ["grouped_linear"]
    names += [] if shapes.draft_bits else ["quantised_linear"]
    names += [] if shapes.recurrent else ["tree_recurrence", "commit_recurrence"]
    names += [] if shapes.convolutions else ["convolve_paths"]
    assert found == replace(KERNELS, **{name: getattr(operations, name) for name in names})


EXACT = {
    "trees of different sizes": Case(lengths=(3, 510, 520), nodes=(5, 1, 9)),
    "trees": Case(lengths=(62, 510), nodes=7, heads=12, head_dim=64),
    "prompt tokens": Case(lengths=(4, 55), nodes=12, chunk=True),
    "several chunks": Case(lengths=(1100,), nodes=2, heads=2, kv_heads=1),
    "a window": Case(lengths=(600,), nodes=6, window=90),
    "soft-capping and sinks": Case(lengths=(509,), nodes=16, softcap=3.0, sinks=True),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize(("case", "dtype"), all_in_float32(EXACT, "prompt tokens"))
def test_a_row_of_attention_equals_plain_decoding_bit_for_bit(case, dtype):
    """Whatever rows, trees and sequences are beside it, and wherever its keys are."""
    case = replace(case, dtype=dtype)
    inputs = attention_case(case)
    found = attention.tree_attention(**inputs)
    for row in range(len(found)):
        expected = attention.tree_attention(**alone(case, inputs, row))
        assert torch.equal(found[row], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_the_other_kernels_does_not_depend_on_their_number(dtype):
    numbers = RandomInputs(CPU, dtype)
    x, residual = numbers.draw(2, 6, 40)
    weight, gate = numbers.draw(40), numbers.draw(6, 40)
    many = [*layers.rms_norm(x, weight, 1e-6, residual), layers.gated(x, gate)]
    for row in range(6):
        one = slice(row, row + 1)
        alone_ = [*layers.rms_norm(x[one], weight, 1e-6, residual[one])]
        alone_.append(layers.gated(x[one], gate[one]))
        assert all(torch.equal(a[one], b) for a, b in zip(many, alone_, strict=True))
    q, k, v = numbers.draw(6, 8, 16).split([4, 2, 2], 1)
    cos, sin = numbers.draw(2, 6, 16)
    slots, norms = torch.tensor([3, 1, 7, 0, 2, 6]), (x[0, :16], x[1, :16])

    def rotate(rows):
        caches = torch.zeros(2, 2, 9, 16, dtype=dtype)
        inputs = (x[rows] for x in (q, k, v, cos, sin))
        rotated = layers.rotate_and_store(*inputs, *caches, slots[rows], norms=norms, eps=1e-6)
        return rotated, caches[:, :, slots[rows]]

    rotated, columns = rotate(slice(0, 6))
    for row in range(6):
        found = rotate(slice(row, row + 1))
        assert torch.equal(found[0][0], rotated[row])
        assert torch.equal(found[1][:, :, 0], columns[:, :, row])


PARTS = 2 * products.MIN_STEPS * products.DEPTH, 100
"""Terms of a sum: in several parts, and in one whose last terms are fewer than the others."""


@pytest.mark.sample(1)
@pytest.mark.parametrize(("size", "dtype"), each_value(PARTS, DTYPES), ids=str)
def test_products(size, dtype):
    """Rows do not depend on their number or place, and PyTorch computes the same numbers."""
    numbers = RandomInputs(CPU, dtype)
    x, weight, bias = numbers.draw(35, size), numbers.draw(90, size), numbers.draw(90)
    for shift in (None, bias):
        found = products.linear(x, weight, shift)
        assert worst_row(found, F.linear(x, weight, shift)) < TOLERANCES[dtype]
        for first, end in ((0, 1), (34, 35), (3, 20), (17, 19)):
            assert torch.equal(products.linear(x[first:end], weight, shift), found[first:end])
    strided = numbers.draw(2, 3, 2 * size)[..., :size]
    assert torch.equal(
        products.linear(strided, weight)[1, 2], products.linear(strided[1, 2], weight)
    )


@pytest.mark.parametrize("bits", BITS)
def test_rows_have_the_same_bits_where_a_program_has_one_part_and_where_it_has_all(
    bits, monkeypatch
):
    numbers = RandomInputs(CPU, torch.bfloat16)
    x, weight = numbers.draw(20, PARTS[0]), numbers.draw(90, PARTS[0])
    quantised = quantise_weight(weight, bits)
    split = products.split(90, PARTS[0], GROUP)
    assert split[0] > 1

    def results(rows):
        return products.linear(rows, weight), products.quantised_linear(rows, quantised)

    in_parts = results(x)
    monkeypatch.setattr(products, "PROGRAMS", 0)  # as if the rows filled the GPU
    monkeypatch.setattr(products, "split", lambda *_: split)
    for found, expected in zip(results(x[3:5]), in_parts, strict=True):
        assert torch.equal(found, expected[3:5])


FAULTS = {
    "a sibling instead of an ancestor": ("shared + path", "positions"),
    "a row that does not see itself": ("(positions < end)", "(positions < end - 1)"),
    "a later prompt token": ("positions[None, :] < end[:, None]", "positions[None, :] >= 0"),
    "a wider window over a tree": ("(positions >= start)", "(positions >= start - 1)"),
    "a wider window over a prefix": (">= start[:, None]", ">= start[:, None] - 1"),
    "no mask": ("tl.where(visible, scores * LOG2_E", "tl.where(visible | True, scores * LOG2_E"),
    "old sums that keep their scale": ("out * share[:, None] + tl", "out + tl"),
    "chunks that keep their scale": ("total = total * share + part_total", "total += part_total"),
    "another sequence's pages": ("tl.load(table_pointer + row)", "tl.load(table_pointer)"),
    "the first page alone": ("table + tile // PAGE", "table"),
    "the page of another node": ("table + offsets // PAGE", "table + positions // PAGE"),
    "another key head": ("k_head = k_pointer + kv_head", "k_head = k_pointer + 0 * kv_head"),
    "the queries of another product": ("more_q, more_bounds, k", "q, more_bounds, k"),
    "a chunk that is left out": (
        "tl.range(begin // CHUNK, whole",
        "tl.range(begin // CHUNK + 1, whole",
    ),
    "no soft-capping": ("    if SOFTCAP:", "    if False:"),
    "no attention sinks": ("    if SINKS:", "    if False:"),
}


@pytest.mark.parametrize(("right", "wrong"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_attention_fails_the_check_at_load(right, wrong, tmp_path):
    broken = faulty(attention, tmp_path, right, wrong)
    heads = 2 if wrong.endswith("0 * kv_head") else 1
    shapes = Shapes(heads=2, kv_heads=heads, head_dim=16, hidden_size=8, softcap=1.0, sinks=True)
    kernels = Operations(tree_attention=broken.tree_attention)
    found = checked(kernels, shapes, CPU, torch.float16)
    assert found.tree_attention is operations.tree_attention
    (line,) = found.fallbacks
    assert line.startswith("tree_attention runs in PyTorch: the kernel's results differ by ")


LAYER_FAULTS = {
    "rms_norm": ("x + residual.to(tl.float32)", "x"),
    "rotate_and_store": ("-sin, sin)", "sin, sin)"),
    "gated": ("result = active.to(dtype)", "result = x.to(dtype)"),
}


@pytest.mark.parametrize("name", LAYER_FAULTS)
def test_a_faulty_kernel_falls_back_alone(name, tmp_path):
    broken = faulty(layers, tmp_path, *LAYER_FAULTS[name])
    kernels = Operations(**{key: getattr(broken, key) for key in LAYER_FAULTS})
    found = checked(kernels, SMALL, CPU, torch.float32)
    assert getattr(found, name) is getattr(operations, name)
    assert all(getattr(found, key) is getattr(broken, key) for key in LAYER_FAULTS if key != name)
    assert len(found.fallbacks) == 1


MOVE_FAULTS = {
    "the last column first": ("load(sources_pointer + i)", "load(sources_pointer + end - 1 - i)"),
    "columns of the sequence before": ("mask=sequence > 0", "mask=sequence > 1"),
    "one layer": ("plane * plane_stride", "0 * plane_stride"),
}


@pytest.mark.parametrize(("right", "wrong"), MOVE_FAULTS.values(), ids=MOVE_FAULTS)
def test_a_faulty_move_falls_back(right, wrong, tmp_path):
    broken = faulty(moves, tmp_path, right, wrong)
    kernels = Operations(move_columns=broken.move_columns)
    found = checked(kernels, SMALL, CPU, torch.float32)
    assert found.move_columns is operations.move_columns


def test_columns_beyond_four_gigabytes_are_moved():
    """The check at load cannot tell: its cache is tiny. Only the moved columns are in memory."""
    width, columns = 64, (1 << 25) - 1
    spare = 2 * width  # 32 bits would have a plane's offset this much too small
    memory = torch.from_numpy(np.zeros(spare + 3 * width * columns, np.int8))
    storage = memory[spare:].view(3, 1, columns, width)
    storage[2, 0, 5] = 7
    indices = (torch.tensor([x], dtype=torch.int32) for x in (5, 2, 1))
    moves.move_columns(storage, *indices)
    assert storage[2, 0, 2].eq(7).all()


EXPERT_FAULTS = {
    "rows of the expert before": ("expert - 1", "expert - 2"),
    "no bias": ("    if BIAS:", "    if False:"),
    "other columns": ("columns[None, :] * weight_strides[1]", "columns[None, :] * 0"),
    "only one tile of rows": (
        "range(first, end, ROWS)",
        "range(first, tl.minimum(end, first + 1))",
    ),
    "rows beyond the expert's": ("is_row = rows < end", "is_row = rows < end + 1"),
}


QUANTISED_FAULTS = {
    "numbers in another order": ("numbers & 15, numbers >> 4", "numbers >> 4, numbers & 15"),
    "no least number": (" + least[:, None]", ""),
    "the scales of the first group": ("scales_pointer + group", "scales_pointer + columns"),
    "a part that is left out": ("range(parts)", "range(parts - 1)"),
    "the rows of the first product": (
        "i * ROWS + tl.arange(0, ROWS)\n                mask",
        "tl.arange(0, ROWS)\n                mask",
    ),
    "no bias": ("    if BIAS:", "    if False:"),
}


@pytest.mark.parametrize(("right", "wrong"), QUANTISED_FAULTS.values(), ids=QUANTISED_FAULTS)
def test_a_faulty_product_of_quantised_weights_falls_back(right, wrong, tmp_path):
    broken = faulty(products, tmp_path, right, wrong)
    kernels = Operations(quantised_linear=broken.quantised_linear)
    found = checked(kernels, replace(SMALL, draft_bits=(4,)), CPU, torch.float32)
    assert found.quantised_linear is operations.quantised_linear


@pytest.mark.parametrize(("right", "wrong"), EXPERT_FAULTS.values(), ids=EXPERT_FAULTS)
def test_a_faulty_product_of_experts_falls_back(right, wrong, tmp_path):
    broken = faulty(experts, tmp_path, right, wrong)
    kernels = Operations(grouped_linear=broken.grouped_linear)
    found = checked(kernels, replace(SMALL, experts=True), CPU, torch.float32)
    assert found.grouped_linear is operations.grouped_linear


def recurrence_inputs(n, heads=2, key_dim=8, value_dim=6):
    """Random arguments of `tree_recurrence` for the nodes of one tree, and 4 states."""
    numbers = RandomInputs(CPU, torch.float32)
    q, k = numbers.draw(2, 1, n, 1, key_dim)
    log_g, beta = -numbers.draw(1, n, heads, 1).abs(), numbers.draw(1, n, heads).sigmoid()
    return (q, k, numbers.draw(1, n, heads, value_dim), log_g, beta), numbers.draw(
        4, heads, key_dim, value_dim
    )


def run_recurrence(module, tree, rows, states, slot, nodes=None):
    """The result of `tree_recurrence` for a tree on the state in a slot."""
    arrays = plan_nodes([tree], 1, nodes or len(tree))
    planned = TreeNodes.of(*(torch.from_numpy(x) for x in arrays))
    slots = torch.tensor([slot], dtype=torch.int32)
    return module.tree_recurrence(*rows, states, slots, planned, normalise=True, scale=0.5)


def recurrence_is_row_independent(module):
    """Whether nodes have the bits of their paths alone, before and after a part is committed."""
    tree = random_tree(np.random.default_rng(3), 0, 12, 9)
    rows, states = recurrence_inputs(16)
    found = run_recurrence(module, tree, rows, states, 1, nodes=16)
    if not torch.equal(found[0][0, 12:], found[0][0, :1].expand(4, -1, -1)):
        return False  # copies of the root
    for node in range(1, 12):
        path = path_to(tree, node)
        alone = [x[:, path.tolist()] for x in rows]
        first, last = [[x[:, part] for x in alone] for part in (slice(-1), slice(-1, None))]
        chain = DraftTree.chain(np.zeros(len(path) - 1, np.int32))
        committed = run_recurrence(module, chain, first, states, 1)
        log_g = first[3].transpose(1, 2)
        line = [0, 1, 3, len(chain), *range(len(chain))]
        module.commit_recurrence(
            *(x[None] for x in (*committed[1:], log_g)),
            states[:, None],
            torch.tensor([line], dtype=torch.int32),
        )
        step = run_recurrence(module, DraftTree.root_only(0), last, states, 3)
        if not torch.equal(step[0][0, 0], found[0][0, node]):
            return False
    return True


def test_a_node_has_the_bits_of_plain_decoding_in_a_recurrent_layer():
    assert recurrence_is_row_independent(recurrence)


RECURRENCE_FAULTS = {
    "the state of the node before": ("if source == i:", "if source == i + 9:"),
    "a state that is never kept": ("tl.where(target == i,", "tl.where(target == i + 9,"),
    "another slot's state": ("tl.load(slots_pointer + tree)", "tl.load(slots_pointer)"),
    "values that are not corrected": ("    if DELTA:", "    if False:"),
    "another head's gate": ("head * log_g_strides[2]", "0 * log_g_strides[2]"),
    "half of a decay": ("[:, None]\n\n\n", "[:, None] * 0.5\n\n\n"),
    "keys that are not normalised": ("    if NORMALISE:", "    if False:"),
    "a commit of one node too few": ("range(tl.load(path + 3))", "range(tl.load(path + 3) - 1)"),
    "a commit to the slot it read": ("after.to(tl.int64)", "before.to(tl.int64)"),
}


@pytest.mark.parametrize(("right", "wrong"), RECURRENCE_FAULTS.values(), ids=RECURRENCE_FAULTS)
def test_a_faulty_recurrence_falls_back(right, wrong, tmp_path):
    broken = faulty(recurrence, tmp_path, right, wrong)
    kernels = Operations(
        tree_recurrence=broken.tree_recurrence, commit_recurrence=broken.commit_recurrence
    )
    found = checked(kernels, replace(SMALL, recurrent=((2, 8, 6, False),)), CPU, torch.float32)
    assert found.reasons
    assert all("differ by" in reason for reason in found.reasons.values())


CONVOLUTION_FAULTS = {
    "the window of another node": ("(tree * n + node) * KERNEL", "tree * n * KERNEL"),
    "another slot's tail": ("tl.load(slots_pointer + tree)", "tl.load(slots_pointer)"),
    "a tail without its first input": ("in tl.static_range(KERNEL - 1)", "in range(1, KERNEL - 1)"),
    "a row behind the tail": ("row = place - (KERNEL - 1)", "row = place - KERNEL"),
    "no bias": ("if bias_pointer is not None", "if False"),
    "no activation": ("    if SILU:", "    if False:"),
}


@pytest.mark.parametrize(("right", "wrong"), CONVOLUTION_FAULTS.values(), ids=CONVOLUTION_FAULTS)
def test_a_faulty_convolution_falls_back(right, wrong, tmp_path):
    kernels = Operations(convolve_paths=faulty(convolution, tmp_path, right, wrong).convolve_paths)
    found = checked(kernels, replace(SMALL, convolutions=((20, 4),)), CPU, torch.float32)
    assert found.convolve_paths is operations.convolve_paths
    assert "differ by" in found.reasons["convolve_paths"]


def test_a_walk_that_rounds_otherwise_than_a_commit_is_noticed(tmp_path):
    """It is right otherwise, so only the test of bits can tell."""
    line = "k[:, None] * written[None, :]\n        out"
    broken = faulty(recurrence, tmp_path, line, "3 * " + line.replace("written", "(written / 3)"))
    assert not recurrence_is_row_independent(broken)


def test_a_kernel_that_cannot_be_compiled_falls_back_with_its_error():
    def broken(*_, **__):
        raise RuntimeError("ptxas is missing\nTraceback")

    found = checked(Operations(gated=broken), SMALL, CPU, torch.float32)
    assert found.gated is operations.gated
    assert found.fallbacks == ("gated runs in PyTorch: ptxas is missing",)


def test_sums_in_another_order_are_not_equal_bit_for_bit(tmp_path):
    """They are right otherwise, so only the test of bits can tell."""
    case = EXACT["trees"]
    inputs = attention_case(case)
    line = "positions = tile + tl.arange(0, TILE)\n            visible"
    broken = faulty(attention, tmp_path, line, line.replace("+ tl.", "+ TILE - 1 - tl."))
    found = broken.tree_attention(**inputs)
    assert worst_row(found, expected_attention(case, inputs)) < TOLERANCES[case.dtype]
    assert not all(
        torch.equal(found[row], broken.tree_attention(**alone(case, inputs, row))[0])
        for row in range(len(found))
    )
