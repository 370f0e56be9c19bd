"""Faults in the text of Triton kernels: the check at load finds each of them."""

from dataclasses import replace

import pytest

from treeflash.testing import require

require("torch")
require("triton")

import torch
import triton_interpreter  # noqa: F401 - repairs it
from faulty_kernels import faulty
from treeflash_cuda import operations
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
from treeflash_cuda.operations import CHECKS, Operations, Shapes, checked

CPU = torch.device("cpu")
SMALL = Shapes(heads=2, kv_heads=1, head_dim=16, hidden_size=24)
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
def test_a_faulty_kernel_falls_back(module, fault, tmp_path):
    """Alone, unless two operations have the faulty text."""
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
