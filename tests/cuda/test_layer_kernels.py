"""The small operations of a layer on a CPU: against PyTorch, and rows with equal bits."""

from __future__ import annotations

import re

import numpy as np
import pytest

from treeflash.low_bits import LowBitFormat
from treeflash.testing import require

require("torch")
pytest.importorskip("llvmlite")

import llvmlite.binding as llvm
import torch
import torch.nn.functional as F
from treeflash_cuda.cpu import layer_code, low_bit_code
from treeflash_cuda.cpu.ir_builder import GENERIC, ISAS
from treeflash_cuda.cpu.layer_code import WIDE, LayerKind
from treeflash_cuda.cpu.layer_kernels import LayerKernels, SequencesTable, layer_kernels
from treeflash_cuda.cpu.machine_code import best_isa, optimised
from treeflash_cuda.decoder.operations import capped, gated

HEADS, KV_HEADS, D = 6, 2, 32
FLOAT, HALF = torch.float32, torch.bfloat16
TOLERANCES = {FLOAT: 2e-6, HALF: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "bfloat16"])
PARENTS = [-1, 0, 0, 1, 1, 2, 3]
EPS = 1e-5
SCALE, CAP = 0.3, 1.5


@pytest.fixture(scope="module")
def kernels():
    """Compiled functions, by instructions and dtype."""
    return compiled(LayerKind(D))


@pytest.fixture(scope="module")
def capping():
    """Compiled functions whose attention bounds its scores."""
    return compiled(LayerKind(D, caps_scores=True))


def compiled(kind):
    avx2 = next(isa for isa in ISAS if isa.name == "AVX2")
    isas = [isa for isa in (best_isa(), avx2, GENERIC) if isa is not None]
    return {
        (isa.name, dtype): LayerKernels(isa, dtype, FLOAT, kind)
        for isa in dict.fromkeys(isas)
        for dtype in (FLOAT, HALF)
    }


def of_dtype(kernels, dtype):
    return [found for (_, own), found in kernels.items() if own is dtype]


def random(*shape, dtype=FLOAT, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, dtype):
    return torch.allclose(found.float(), expected.float(), TOLERANCES[dtype], TOLERANCES[dtype])


def same(results):
    """Whether all tensors have the bits of the first one."""
    first, *others = results
    return all(torch.equal(first, other) for other in others)


@DTYPES
def test_norms(kernels, dtype):
    x, residual = random(5, 96, dtype=dtype), random(5, 96, dtype=dtype, seed=1)
    weight = random(96, seed=2)
    results = [found.rms_norm(x, weight, EPS, residual) for found in of_dtype(kernels, dtype)]
    total = x + residual
    expected = F.rms_norm(total.float(), (96,), weight, EPS)
    for normed, summed in results:
        assert torch.equal(summed, total)
        assert close(normed, expected, dtype)
    assert same([normed for normed, _ in results])
    alone, kept = of_dtype(kernels, dtype)[0].rms_norm(total, weight, EPS)
    assert kept is total
    assert torch.equal(alone, results[0][0])


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gates(kernels, dtype, activation):
    x = random(3, 128, dtype=dtype).mul_(30)
    x[0, 0], x[1, 0] = float("nan"), 200
    results = [found.gated(x, activation) for found in of_dtype(kernels, dtype)]
    expected = gated(x.double(), activation).float()
    for result in results:
        assert result[0, 0].isnan()
        assert close(result.nan_to_num(0), expected.nan_to_num(0), dtype)
    assert same([result.nan_to_num(0) for result in results])


@DTYPES
def test_bounds_of_logits(kernels, dtype):
    x = random(3, 64, dtype=dtype).mul_(20)
    x[0, :3] = torch.tensor([float("nan"), 1e9, -1e9])
    results = [found.capped(x.clone(), 30.0) for found in of_dtype(kernels, dtype)]
    expected = capped(x.float(), 30.0)
    for result in results:
        assert result[0, 0].isnan()
        assert close(result.nan_to_num(0), expected.nan_to_num(0), dtype)
    assert same([result.nan_to_num(0) for result in results])


class Sequences:
    """Sequences with random caches of `committed` columns, and trees or chains of rows."""

    def __init__(self, *members, window=None):
        self.members, self.window = members, window
        self.keys, self.values = [], []
        lines, rows, units, self.masks = [], 0, 0, []
        for n, (committed, parents, is_tree) in enumerate(members):
            columns = committed + len(parents) + 3
            self.keys.append(random(KV_HEADS, columns, D, seed=10 + n))
            self.values.append(random(KV_HEADS, columns, D, seed=20 + n))
            count = len(parents)
            rows, units = rows + count, units + KV_HEADS * -(-count * HEADS // KV_HEADS // 16)
            mask = ancestors(parents).to(torch.uint8)
            self.masks.append(mask)
            addresses = self.keys[-1].data_ptr(), self.values[-1].data_ptr()
            pointer = mask.data_ptr() if is_tree else 0
            lines.append((*addresses, columns * D, committed, count, rows, units, pointer))
        self.rows = rows
        longest = max(committed + len(parents) for committed, parents, _ in members)
        self.table = SequencesTable(np.array([lines], np.int64), KV_HEADS, D, longest)
        places = [
            committed + depth
            for committed, parents, _ in members
            for depth in ancestors(parents).sum(1).sub(1).tolist()
        ]
        firsts = [0 if window is None else max(0, place - window + 1) for place in places]
        lasts = [
            committed + row for committed, parents, _ in members for row in range(len(parents))
        ]
        self.bounds = torch.tensor([*zip(firsts, lasts, strict=True)], dtype=torch.int32)

    def expected(self, queries, cap=None):
        outputs, first = [], 0
        for n, (committed, parents, _) in enumerate(self.members):
            count = len(parents)
            own = queries[first : first + count].float().transpose(0, 1)[None]
            seen = torch.cat(
                [torch.ones(count, committed, dtype=torch.bool), ancestors(parents)], 1
            )
            seen &= torch.arange(committed + count) >= self.bounds[first : first + count, :1]
            keys, values = (x[n][None, :, : committed + count] for x in (self.keys, self.values))
            keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
            scores = own @ keys.transpose(2, 3) * SCALE
            if cap is not None:
                scores = capped(scores, cap)
            output = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values
            outputs.append(output[0].transpose(0, 1).reshape(count, -1))
            first += count
        return torch.cat(outputs)


def ancestors(parents):
    """(n, n) bool: which nodes are ancestors of a node, or itself."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def chain(n):
    return [*range(-1, n - 1)]


@DTYPES
@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("window", [None, 7])
def test_attention(kernels, capping, dtype, window, cap):
    # A window sees the new columns by the mask, so all sequences have one.
    members = (21, PARENTS, True), (0, chain(40), True), (5, chain(1), True)
    pass_ = Sequences(*members, window=window)
    if window is not None:
        first = 0
        for mask, (committed, parents, _) in zip(pass_.masks, members, strict=True):
            own = pass_.bounds[first : first + len(parents), :1]
            mask &= (torch.arange(committed, committed + len(parents)) >= own).to(torch.uint8)
            first += len(parents)
    queries = random(pass_.rows, HEADS, D, dtype=dtype, seed=3)
    functions = of_dtype(kernels if cap is None else capping, dtype)
    results = [
        found.attend(queries, pass_.bounds, pass_.table, 0, SCALE, cap) for found in functions
    ]
    assert same(results)
    assert close(results[0], pass_.expected(queries, cap), dtype)


@DTYPES
def test_a_row_has_equal_bits_in_a_tree_in_a_chain_and_alone(kernels, dtype):
    found = of_dtype(kernels, dtype)[0]
    tree = Sequences((30, PARENTS, True))
    queries = random(7, HEADS, D, dtype=dtype, seed=3)
    in_tree = found.attend(queries, tree.bounds, tree.table, 0, SCALE)
    path = [0, 1, 3, 6]
    columns = [*range(30), *(30 + node for node in path)]
    alone = Sequences((33, chain(1), False))
    committed = Sequences((30, chain(4), False))
    for other in (alone, committed):
        for mine, theirs in ((other.keys, tree.keys), (other.values, tree.values)):
            mine[0][:, : len(columns)] = theirs[0][:, columns]
    in_chain = found.attend(queries[path].contiguous(), committed.bounds, committed.table, 0, SCALE)
    assert torch.equal(in_chain, in_tree[path])
    assert torch.equal(
        found.attend(queries[[6]], alone.bounds, alone.table, 0, SCALE)[0], in_tree[6]
    )


@DTYPES
@pytest.mark.parametrize("is_rotated", [False, True])
@pytest.mark.parametrize("is_normed", [False, True])
def test_queries_and_keys_turn_and_are_stored(kernels, dtype, is_rotated, is_normed):
    angles = random(9, D // 2, seed=4).mul_(3)
    rotation = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    rotation = tuple(x.to(dtype) for x in rotation)
    norms = random(HEADS + KV_HEADS, D, seed=5)
    heads = random(9, HEADS + 2 * KV_HEADS, D, dtype=dtype, seed=6)
    turned, values = heads.split([HEADS + KV_HEADS, KV_HEADS], 1)
    expected = turned.float()
    if is_normed:
        expected = F.rms_norm(expected, (D,), None, EPS) * norms
    if is_rotated:
        cos, sin = (x.float()[:, None] for x in rotation)
        expected = expected * cos + expected.roll(D // 2, -1) * sin
    results = []
    for found in of_dtype(kernels, dtype):
        # The last row repeats a lone token's, and has no column.
        pass_ = Sequences((4, PARENTS, True), (11, chain(1), False))
        own = heads.clone()
        given = rotation if is_rotated else None, norms if is_normed else None
        found.turn(own, *given, EPS, pass_.table, 0)
        assert close(own[:, : HEADS + KV_HEADS], expected, dtype)
        assert torch.equal(own[:, HEADS + KV_HEADS :], values)
        stored = [
            torch.cat([x[0][:, 4:11], x[1][:, 11:12]], 1).transpose(0, 1)
            for x in (pass_.keys, pass_.values)
        ]
        assert torch.equal(stored[0], own[:8, HEADS : HEADS + KV_HEADS].float())
        assert torch.equal(stored[1], values[:8].float())
        results.append(own)
    assert same(results)


@pytest.mark.usefixtures("own_threads")
def test_threads_change_no_bit(kernels):
    found = of_dtype(kernels, HALF)[0]
    pass_ = Sequences((200, chain(64), False))
    queries = random(64, HEADS, D, dtype=HALF, seed=3)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(found.attend(queries, pass_.bounds, pass_.table, 0, SCALE))
    assert same(results)


def test_counters_that_threads_share_are_in_one_line_of_the_cache():
    """An addition to a counter that crosses two lines would stop all processors."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("x86_64-pc-linux-gnu").create_target_machine()
    for text in (
        layer_code.build(WIDE, WIDE, LayerKind(D), threads=True),
        low_bit_code.build(GENERIC, LowBitFormat(4, 1, False, "float16"), threads=True),
    ):
        assembly = machine.emit_assembly(optimised(text, machine))
        places = re.findall(r"lock\s+\w+\s.*?(-?\d*)\(%r\w+\)", assembly)
        assert places
        assert {int(place or 0) % 8 for place in places} == {0}


@pytest.mark.parametrize(
    ("dtype", "head_dim", "size"), [(torch.float16, D, 96), (HALF, 48, 96), (HALF, D, 100)]
)
def test_what_does_not_fit_is_left_to_pytorch(dtype, head_dim, size):
    assert layer_kernels(dtype, FLOAT, LayerKind(head_dim), (size,)) is None
