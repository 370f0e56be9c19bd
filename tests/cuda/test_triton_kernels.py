"""The Triton kernels, run by Triton's interpreter on a CPU: against their definitions, with faults.

The check at load finds each fault in their text. Decoding with them has the reference's trees.
"""

import itertools
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from parts import load_with_parts
from stand_ins import stand_in

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding.tree import DraftTree
from treeflash.reference.backend import load as load_reference
from treeflash.testing import HYBRID_FAMILIES, require
from treeflash.testing.comparisons import (
    assert_equal_steps,
    path_to,
    random_tokens,
    random_tree,
    steps_of,
)
from treeflash.testing.models import write_drafter, write_target
from treeflash.testing.pairs import SAMPLINGS, each_value

require("torch")
require("triton")

import torch
import torch.nn.functional as F
import triton
import triton_interpreter  # noqa: F401 - repairs it
from attention_cases import CASES, Case, alone, attention_case, expected_attention
from faulty_kernels import faulty
from treeflash_cuda import operations
from treeflash_cuda.gpu import kernel_loading, triton_kernels
from treeflash_cuda.gpu.kernel_loading import CHECKS, TOLERANCES, RandomInputs, checked
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
from treeflash_cuda.operations import Operations, Shapes, sample_rows
from treeflash_cuda.quantised_weights import BITS, GROUP, quantise_weight
from treeflash_cuda.recurrence import TreeNodes, plan_nodes

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
    current = []

    @contextmanager
    def device_of(x):
        current.append(x)
        yield
        current.pop()

    stand_in(monkeypatch, torch.cuda, device_of=device_of)
    stand_in(monkeypatch, kernel_loading, checked=lambda kernels, *_: kernels)
    found = kernel_loading.load_operations(SMALL, CPU, torch.float32)
    wrapper = kernel_loading.on_its_device(lambda x: current == [x])
    assert wrapper(torch.zeros(1))
    for name in CHECKS:
        assert getattr(found, name).__code__ is wrapper.__code__, name


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
    stand_in(monkeypatch, triton_kernels, driver=SimpleNamespace(active=active))
    stand_in(monkeypatch, triton.knobs.runtime, interpret=interpreted)
    assert triton_kernels.needs_registers(dtype) is needed


def test_kernels_without_tensor_cores_are_right_in_half_precision(monkeypatch):
    for module in (attention, experts, products):
        stand_in(monkeypatch, module, needs_registers=lambda dtype: True)
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
    stand_in(monkeypatch, kernel_loading, SAMPLES=3)
    found = checked(KERNELS, shapes, CPU, dtype)
    names = [] if shapes.experts else ["grouped_linear"]
    names += [] if shapes.draft_bits else ["quantised_linear"]
    names += [] if shapes.recurrent else ["tree_recurrence", "commit_recurrence"]
    names += [] if shapes.convolutions else ["convolve_paths"]
    functions = {name: getattr(operations, name) for name in names}
    assert found == replace(KERNELS, **functions, shapes=shapes)


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
    stand_in(monkeypatch, products, PROGRAMS=0)  # as if the rows filled the GPU
    stand_in(monkeypatch, products, split=lambda *_: split)
    for found, expected in zip(results(x[3:5]), in_parts, strict=True):
        assert torch.equal(found, expected[3:5])


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


SHAPES = {
    attention: replace(SMALL, hidden_size=8, softcap=1.0, sinks=True),
    experts: replace(SMALL, experts=True),
    products: replace(SMALL, draft_bits=(4,)),
    recurrence: replace(SMALL, recurrent=((2, 8, 6, False),)),
    convolution: replace(SMALL, convolutions=((20, 4),)),
}
"""Shapes of a model that uses the operations of a module, where `SMALL` does not."""
FAULTS = {
    attention: {
        "a sibling instead of an ancestor": ("shared + path", "positions"),
        "a row that does not see itself": ("(positions < end)", "(positions < end - 1)"),
        "a later prompt token": ("positions[None, :] < end[:, None]", "positions[None, :] >= 0"),
        "a wider window over a tree": ("(positions >= start)", "(positions >= start - 1)"),
        "a wider window over a prefix": (">= start[:, None]", ">= start[:, None] - 1"),
        "no mask": (
            "tl.where(visible, scores * LOG2_E",
            "tl.where(visible | True, scores * LOG2_E",
        ),
        "old sums that keep their scale": ("out * share[:, None] + tl", "out + tl"),
        "chunks that keep their scale": (
            "total = total * share + part_total",
            "total += part_total",
        ),
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
    },
    layers: {
        "rms_norm": ("x + residual.to(tl.float32)", "x"),
        "rotate_and_store": ("-sin, sin)", "sin, sin)"),
        "gated": ("result = active.to(dtype)", "result = x.to(dtype)"),
    },
    moves: {
        "the last column first": (
            "load(sources_pointer + i)",
            "load(sources_pointer + end - 1 - i)",
        ),
        "columns of the sequence before": ("mask=sequence > 0", "mask=sequence > 1"),
        "one layer": ("plane * plane_stride", "0 * plane_stride"),
    },
    experts: {
        "rows of the expert before": ("expert - 1", "expert - 2"),
        "no bias": ("    if BIAS:", "    if False:"),
        "other columns": ("columns[None, :] * weight_strides[1]", "columns[None, :] * 0"),
        "only one tile of rows": (
            "range(first, end, ROWS)",
            "range(first, tl.minimum(end, first + 1))",
        ),
        "rows beyond the expert's": ("is_row = rows < end", "is_row = rows < end + 1"),
    },
    products: {
        "numbers in another order": ("numbers & 15, numbers >> 4", "numbers >> 4, numbers & 15"),
        "no least number": (" + least[:, None]", ""),
        "the scales of the first group": ("scales_pointer + group", "scales_pointer + columns"),
        "a part that is left out": ("range(parts)", "range(parts - 1)"),
        "the rows of the first product": (
            "i * ROWS + tl.arange(0, ROWS)\n                mask",
            "tl.arange(0, ROWS)\n                mask",
        ),
        "no bias": ("    if BIAS:", "    if False:"),
    },
    recurrence: {
        "the state of the node before": ("if source == i:", "if source == i + 9:"),
        "a state that is never kept": ("tl.where(target == i,", "tl.where(target == i + 9,"),
        "another slot's state": ("tl.load(slots_pointer + tree)", "tl.load(slots_pointer)"),
        "values that are not corrected": ("    if DELTA:", "    if False:"),
        "another head's gate": ("head * log_g_strides[2]", "0 * log_g_strides[2]"),
        "half of a decay": ("[:, None]\n\n\n", "[:, None] * 0.5\n\n\n"),
        "keys that are not normalised": ("    if NORMALISE:", "    if False:"),
        "a commit of one node too few": (
            "range(tl.load(path + 3))",
            "range(tl.load(path + 3) - 1)",
        ),
        "a commit to the slot it read": ("after.to(tl.int64)", "before.to(tl.int64)"),
    },
    convolution: {
        "the window of another node": ("(tree * n + node) * KERNEL", "tree * n * KERNEL"),
        "another slot's tail": ("tl.load(slots_pointer + tree)", "tl.load(slots_pointer)"),
        "a tail without its first input": (
            "in tl.static_range(KERNEL - 1)",
            "in range(1, KERNEL - 1)",
        ),
        "a row behind the tail": ("row = place - (KERNEL - 1)", "row = place - KERNEL"),
        "no bias": ("if bias_pointer is not None", "if False"),
        "no activation": ("    if SILU:", "    if False:"),
    },
    noise: {
        "no scale": ("first_key, second_key) * scale", "first_key, second_key)"),
        "other rows' tokens": ("row // rows * width", "row * 0"),
        "no temperature": ("tl.div_rn(x, temperature)", "x"),
        "no ids": ("if HAS_IDS else tokens", "if False else tokens"),
        "a part is left out": ("tl.sum(totals * tl.exp", "tl.max(totals * tl.exp"),
        "a block is left out": (
            "for block in range(part, tl",
            "for block in range(part + PARTS, tl",
        ),
    },
    sampling: {
        "no temperature": ("score = (x - best) / divisor", "score = x - best"),
        "top-k keeps one more": (".to(tl.float32) >= top_k", ".to(tl.float32) > top_k"),
        "a digit too low": ("enough.to(tl.int32), 0) - 1", "enough.to(tl.int32), 0) - 2"),
        "no top-p": ("edge = tl.maximum(edge, nucleus)", "edge = edge"),
        "no min-p": ("tl.exp(score) >= least", "tl.exp(score) >= 0"),
        "no second hash": ("^ second_key)", "^ first_key)"),
        "not finite": ("token = tl.where(is_finite,", "token = tl.where(is_finite | True,"),
    },
}
"""Texts and what stands in their places, by module and by what is then wrong."""


@pytest.mark.parametrize(
    ("module", "fault"),
    [
        pytest.param(module, fault, id=f"{module.__name__.rpartition('.')[2]}: {fault}")
        for module, faults in FAULTS.items()
        for fault in faults
    ],
)
def test_a_faulty_kernel_falls_back(module, fault, tmp_path, monkeypatch):
    """Alone, unless two operations have the faulty text."""
    stand_in(monkeypatch, kernel_loading, SAMPLES=3)
    broken = faulty(module, tmp_path, *FAULTS[module][fault])
    kernels = {name: getattr(broken, name) for name in CHECKS if hasattr(broken, name)}
    shapes = SHAPES.get(module, SMALL)
    if fault == "another key head":
        shapes = replace(shapes, kv_heads=2)
    dtype = torch.float16 if module is attention else torch.float32
    found = checked(Operations(**kernels), shapes, CPU, dtype)
    wrong = [name for name in kernels if not found.has_kernel(name)]
    assert list(found.reasons) == wrong
    assert len(wrong) in ((1, 2) if module in (noise, recurrence) else (1,))
    assert all(getattr(found, name) is getattr(operations, name) for name in wrong)
    assert all("the kernel's results differ by " in line for line in found.fallbacks)


VOCAB = 24


@pytest.mark.sample(1)
@pytest.mark.parametrize("sampling", ["greedy", "all"])
@pytest.mark.parametrize("method", ["treeflash", "ar"])
@pytest.mark.parametrize("family", ["mistral", "qwen3", *HYBRID_FAMILIES])
def test_trees_and_tokens_equal_the_references(family, method, sampling, tmp_path, monkeypatch):
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    # Few layers, because the interpreter takes a second for a prompt's layer.
    write_target(target, family, seed=1, vocab_size=VOCAB, layers=2)
    window = 4 if family == "mistral" else None
    write_drafter(drafter, target, seed=2, layers=1, target_layer_ids=(0, 1), sliding_window=window)
    backend = load_with_parts(monkeypatch, target, drafter)
    counted = Mock(wraps=attention.tree_attention), Mock(wraps=layers.rotate_and_store)
    recurrences = Mock(wraps=recurrence.tree_recurrence), Mock(wraps=recurrence.commit_recurrence)
    recurrences += (Mock(wraps=convolution.convolve_paths),)
    samplings = Mock(wraps=sample_rows)
    backend.target.operations = Operations(
        *(counted[0], layers.rms_norm, counted[1], layers.gated),
        tree_recurrence=recurrences[0],
        commit_recurrence=recurrences[1],
        convolve_paths=recurrences[2],
        move_columns=moves.move_columns,
        sample_rows=samplings,
    )
    reference = load_reference(target, drafter, LoadConfig())
    stand_in(monkeypatch, attention, MAX_TILE=16)
    length, tokens = 15, 3  # together more than a tile
    if family in HYBRID_FAMILIES:  # the interpreter takes seconds for every step
        length, tokens = 5, 3
    prompt = random_tokens(np.random.default_rng(3), VOCAB, length)
    config = DecodeConfig(method=method, budget=6, max_tokens=tokens, sampling=SAMPLINGS[sampling])
    found, expected = (steps_of(x, prompt, config) for x in (backend, reference))
    assert_equal_steps(found, expected)
    assert counted[0].called
    assert counted[1].called == (family != "granitemoehybrid")  # its layers are transformers'
    assert sampling == "greedy" or samplings.called
    assert all(x.called == (family in HYBRID_FAMILIES) for x in recurrences)
