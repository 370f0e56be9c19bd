"""Every Metal kernel compiles with Metal's address spaces, and keeps its numbers in registers."""

import re

import pytest

from treeflash.testing import require

require("mlx.core")
require("mlx_lm")
require("clang.cindex")
require("ziglang")

from metal_clang import errors, registers

# A compiler takes seconds for all kernels, and an optimiser finds what is slow, not what is wrong;
# the tests of kernels compile what they run.
pytestmark = pytest.mark.nightly

PRAGMA = '_Pragma("clang loop unroll(full)")'


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Texts of all kernels by name, as `python -m benchmarks.metal_sources` writes them."""
    from benchmarks.metal_sources import main

    folder = tmp_path_factory.mktemp("kernels")
    assert main([str(folder)]) == 0
    return {path.stem: path.read_text() for path in sorted(folder.iterdir())}


@pytest.fixture
def left(tmp_path):
    """`registers` with a folder."""
    return lambda source: registers(source, tmp_path)


def one(sources, name):
    """The first source whose name begins like this."""
    return next(text for key, text in sources.items() if key.startswith(f"treeflash_{name}"))


def test_every_kernel_compiles(sources):
    found = {name: errors(text) for name, text in sources.items()}
    assert {name: x for name, x in found.items() if x} == {}


def test_no_kernel_keeps_an_array_in_memory(sources, left):
    """One dtype, and one size of groups of weights: the loops are the same for all."""
    other = re.compile(r"products_quantised__bfloat16_t_(?!64_)")
    kinds = {x: text for x, text in sources.items() if "bfloat16" in x and not other.search(x)}
    assert len(kinds) > 30
    found = {name: left(text) for name, text in kinds.items()}
    assert {name: x for name, x in found.items() if x.arrays or x.picked} == {}
    products = {name: x.products for name, x in found.items()}
    assert all(products[x] > 0 for x in products if "attention_parts" in x or "products" in x)


@pytest.mark.parametrize(
    "kernel",
    [
        "attention_parts__bfloat16_t_128",
        "attention_parts_shared__bfloat16_t_256",
        "products__bfloat16_t_64_4_4",
        "products_quantised__bfloat16_t_64_4_3_4",
        "products_quantised__bfloat16_t_64_8_4_4",
    ],
)
def test_loops_that_are_not_unrolled_are_noticed(sources, left, kernel):
    source = one(sources, kernel)
    assert PRAGMA in source
    rolled = left(source.replace(PRAGMA, ""))
    assert rolled.arrays or rolled.picked
    assert rolled.products < left(source).products


ATTENTION, WIDE = (f"attention_parts{x}" for x in ("__bfloat16_t_128", "_shared__bfloat16_t_256"))
PRODUCTS, QUANTISED = "products__bfloat16_t_64_4_4", "products_quantised__bfloat16_t_64_4_3"


@pytest.mark.parametrize(
    ("kernel", "correct", "wrong"),
    [
        pytest.param(ATTENTION, "const device T* from", "const thread T* from", id="pointer"),
        pytest.param(ATTENTION, "max(first, max(offset", "max(1.0f, max(offset", id="types"),
        pytest.param(ATTENTION, "    while (true)", "    whil (true)", id="syntax"),
        pytest.param(WIDE, "threadgroup float shared", "device float shared", id="variable"),
        pytest.param(PRODUCTS, "column + i, rows - 1)", "column + i, 1.0f)", id="rows"),
        pytest.param(PRODUCTS, "simdgroup_matrix<T, 8, 8> left", "T left", id="an operand"),
        pytest.param(QUANTISED, "8 * t + row, outputs", "1.0f, outputs", id="outputs"),
        pytest.param(QUANTISED, "const device uint* from", "const thread uint* from", id="words"),
    ],
)
def test_errors_of_the_language_are_noticed(sources, kernel, correct, wrong):
    source = one(sources, kernel)
    assert correct in source
    assert errors(source.replace(correct, wrong))
