"""Products of few rows: the Metal kernels, and how they are chosen."""

import warnings
from collections import Counter

import pytest
from recordings import recording

from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from metal_executor import DESCENDING
from metal_executor.installation import MAX_THREADS
from mlx import nn
from stand_ins import stand_in
from treeflash_mlx import metal_kernels
from treeflash_mlx.metal_kernels import products
from treeflash_mlx.metal_kernels import speedup as time_chains
from treeflash_mlx.metal_kernels.products import Geometry

KERNEL, UNQUANTISED = "treeflash_products_quantised", "treeflash_products"
SUMS = KERNEL + "_sums"


@pytest.fixture
def _one_geometry(monkeypatch):
    """Let a single geometry be timed for every layer."""
    stand_in(monkeypatch, products, MANY_OUTPUTS=1, SCALED_SUMS_ROWS=0)


def layer(bits, group, dtype, outputs=40, width=128, bias=False):
    mx.random.seed(0)
    linear = nn.Linear(width, outputs, bias=bias)
    linear.set_dtype(dtype)
    return linear if bits == 16 else nn.QuantizedLinear.from_linear(linear, group, bits)


def inputs(rows, dtype, width=128):
    return mx.random.normal((rows, width), key=mx.random.key(1)).astype(dtype)


def exact(module, x):
    if isinstance(module, nn.Linear):
        return x.astype(mx.float32) @ module.weight.astype(mx.float32).T
    scales, biases = (part.astype(mx.float32) for part in (module.scales, module.biases))
    weight = mx.dequantize(module.weight, scales, biases, module.group_size, module.bits)
    return x.astype(mx.float32) @ weight.T


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("bits", "group", "rows", "dtype"),
    [
        (4, 32, 5, mx.float32),
        (4, 32, 17, mx.bfloat16),
        (4, 64, 9, mx.float16),
        (4, 128, 16, mx.bfloat16),
        (8, 32, 8, mx.bfloat16),
        (8, 64, 12, mx.float32),
        (8, 128, 7, mx.float16),
        (4, 64, 20, mx.bfloat16),
        (8, 64, 27, mx.bfloat16),
        (8, 32, 32, mx.float16),
        (16, 64, 9, mx.bfloat16),
        (16, 64, 16, mx.float16),
        (16, 64, 23, mx.bfloat16),
        (16, 64, 31, mx.float16),
    ],
)
def test_a_product_is_exact_up_to_rounding(runner, bits, group, rows, dtype):
    """The last threadgroup has fewer outputs, and some simdgroups have no group."""
    module, x = layer(bits, group, dtype), inputs(rows, dtype)
    candidates = products.geometries(40, rows)
    assert {each.tiles for each in candidates} == {4, 2, 1}
    for geometry in candidates:
        found = products.multiply(module, x, geometry)
        assert found.dtype == dtype
        error = metal_kernels.relative_error(found, exact(module, x))
        limit = {mx.float32: 1e-6, mx.float16: 5e-4, mx.bfloat16: 4e-3}[dtype]
        assert error < max(limit, runner.rounding[dtype])
    assert runner.launches == {UNQUANTISED if bits == 16 else KERNEL: len(candidates)}


@pytest.mark.parametrize(
    ("group", "rows", "dtype"),
    [(32, 16, mx.bfloat16), (64, 5, mx.float32), (64, 9, mx.bfloat16), (128, 8, mx.bfloat16)],
)
def test_sums_of_groups_are_scaled_up_to_rounding(runner, group, rows, dtype):
    """Inputs of each row have another mean, by which biases count."""
    module = layer(4, group, dtype)
    means = mx.arange(rows)[:, None] / 4
    x = (inputs(rows, mx.float32) + means).astype(dtype)
    (variant,) = [x for x in products.variants(products.shape_of(module), rows) if x.scaled_sums]
    tiles, splits, _ = products.geometries(40, rows)[0]
    assert variant == (tiles, splits, True)
    error = metal_kernels.relative_error(products.multiply(module, x, variant), exact(module, x))
    assert error < max({mx.float32: 2e-6, mx.bfloat16: 4e-3}[dtype], runner.rounding[dtype])
    assert runner.launches == {SUMS: 1}


@pytest.mark.parametrize(
    ("bits", "dtype", "rows"), [(4, mx.float16, 8), (8, mx.bfloat16, 8), (4, mx.bfloat16, 17)]
)
def test_sums_are_not_scaled_where_that_loses_bits_or_gains_nothing(bits, dtype, rows):
    found = products.variants(products.shape_of(layer(bits, 64, dtype)), rows)
    assert found == products.geometries(40, rows)


@pytest.mark.parametrize("rows", [8, 16, 24, 32])
def test_sums_leave_threadgroup_memory_for_another_threadgroup(rows):
    for outputs in (1024, products.MANY_OUTPUTS):
        for tiles, splits, _ in products.geometries(outputs, rows):
            assert 4 * splits * rows * 8 * tiles <= 16 << 10
            assert 32 * splits <= MAX_THREADS


FAULTS = {
    "no barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    "outputs beyond the last": (" && first + n < outputs", ""),
    "rows beyond the last": ("min(8 * c + column + i, rows - 1)", "8 * c + column + i"),
    "weights beyond the last": ("min(first + 8 * t + row, outputs - 1)", "first + 8 * t + row"),
    "a transposed matrix": (
        "[8 * c + column + i][8 * t + row]",
        "[8 * c + row][8 * t + column + i]",
    ),
    "another order of inputs": ("4 * (row % 2)", "4 * (1 - row % 2)"),
    "inputs of another quarter": ("STEP / 4 * (row / 2) +", "STEP / 4 * (row / 2 ^ 1) +"),
    "the same inputs for both words": ("start + 8 * w", "start"),
    "weights of another quarter": ("+ (k + quarter)", "+ (k + STEP / 4 * (row / 2))"),
    "the first word twice": ("BITS == 4 ? w : 0", "0"),
    "one word of two": ("*(const device uint2*)from", "uint2(*from)"),
    "weights of other outputs": ("size_t(place[t])", "size_t(place[0])"),
    "no biases": ("* factor + bias[t]", "* factor"),
    "the factor of another place": ("/ (1u << (BITS * j))", ""),
    "every group in every simdgroup": ("g += SPLITS", "++g"),
    "the neighbour's scale": ("scales[place[t] * groups + g]", "scales[place[t] * groups]"),
    "a bit less": ("(1u << BITS) - 1)", "(1u << BITS) - 2)"),
}
UNQUANTISED_FAULTS = {
    "weights of the same four inputs": ("quarter + 4 * i", "quarter"),
    "weights of another lane": ("quarter + 4 * i", "4 * (lane % 7) + 4 * i"),
    "inputs of the second matrix twice": ("weights[t][i][j]", "weights[t][i][j | 1]"),
    "inputs of the first tile in all": (
        "weight + size_t(place[t]) * words",
        "weight + size_t(place[0]) * words",
    ),
    "the sums of another column": ("right[c], total[t][c]", "right[0], total[t][c]"),
}
SUMS_FAULTS = {
    "inputs that are not summed": ("inputs[c][i] +=", "inputs[c][i] ="),
    "inputs of fewer lanes": ("n < 4", "n < 3"),
    "inputs of other lanes": ("n == 3 ? 16", "n == 3 ? 8"),
    "sums of the group before": ("inputs[c][0] = inputs[c][1] = 0.0f;", ""),
    "the product of the group before": (
        "part[t][c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);",
        "if (g == split) part[t][c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);",
    ),
    "no scale of a sum": ("scale[t] * part", "part"),
    "no bias of a sum": ("bias[t] * inputs", "inputs"),
    "inputs for the first place": (" / (1u << (BITS * j)))", ")"),
    "a group in place of the sum": ("[i] +=\n                        scale", "[i] = scale"),
}
CASES = [
    *((*fault, 4, 5, mx.float32) for fault in FAULTS.values()),
    *((*fault, 16, 27, mx.bfloat16) for fault in UNQUANTISED_FAULTS.values()),
]


@pytest.mark.usefixtures("_one_geometry")
@pytest.mark.parametrize(
    ("right", "wrong", "bits", "rows", "dtype"), CASES, ids=[*FAULTS, *UNQUANTISED_FAULTS]
)
def test_a_fault_in_the_kernel_is_noticed(finds_fault, right, wrong, bits, rows, dtype):
    assert finds_fault(
        "treeflash_products",
        *(right, wrong, lambda: products.fastest([layer(bits, 64, dtype)], rows) is None),
        "few rows run without their Metal kernel: its rel",
    )


@pytest.mark.parametrize(("right", "wrong"), SUMS_FAULTS.values(), ids=SUMS_FAULTS)
def test_a_fault_in_scaled_sums_is_noticed(metal, finds_fault, right, wrong):
    """The variant is left out, and others are used. Some simdgroups have two groups."""
    metal.speedup = lambda *_: 2

    def leaves_it_out():
        found = products.fastest([layer(4, 64, mx.float32, width=640)], 9)
        return found is not None and not found.scaled_sums

    says = "never run with 32 outputs, 8 simdgroups, scaled sums: its rel"
    assert finds_fault(SUMS, right, wrong, leaves_it_out, says)


@pytest.mark.usefixtures("_one_geometry")
def test_layers_use_the_kernel_for_the_rows_where_it_wins(metal):
    timed = []

    def speedup(kernel, plain, start, *_):
        timed.append(len(start))
        return 1.2 if len(start) >= 7 else 1.1

    metal.speedup = speedup
    model = nn.Sequential(layer(4, 64, mx.float32, bias=True), nn.Linear(40, 40))
    table = nn.QuantizedEmbedding.from_embedding(nn.Embedding(40, 64), 32, 8)
    other = layer(4, 64, mx.float32, bias=True)
    x, y = inputs(33, mx.float32), inputs(33, mx.float32, 64)
    plain = [(model.layers[0](x[:n]), table.as_linear(y[:n])) for n in range(1, 34)]
    products.choose_products(model, table, None)
    assert timed == [5, 7, 9, 12, 17, 5, 7, 9, 12, 17, 25]
    for n in range(1, 34):
        metal.launches.clear()
        found = model.layers[0](x[None, :n]), table.as_linear(y[:n])
        assert mx.allclose(found[0][0], plain[n - 1][0], atol=1e-5)
        assert mx.allclose(found[1], plain[n - 1][1], atol=1e-5)
        used = (7 <= n <= 24) + (7 <= n <= 32)  # 4 bits, and 8
        assert metal.launches.get(KERNEL, 0) == used
    metal.launches.clear()
    other(x[:8])
    model.layers[0](x[:8].astype(mx.float16))
    table(mx.array([1, 2, 3, 4, 5, 6, 7]))
    assert not metal.launches


# Seconds, to compile kernels of other dtypes; the products above have them.
@pytest.mark.nightly
def test_layers_in_half_precision_use_the_kernel(metal):
    """Where MLX's kernel for one row ends, and not for few rows or in float32."""
    metal.speedup = lambda *_: 2
    model = nn.Sequential(layer(16, 0, mx.bfloat16, bias=True), layer(16, 0, mx.float32))
    table = nn.Embedding(40, 128)
    table.set_dtype(mx.bfloat16)

    class Doubled(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    other = Doubled(128, 40)
    other.set_dtype(mx.bfloat16)
    x = inputs(33, mx.bfloat16)
    plain = [(model.layers[0](x[:n]), table.as_linear(x[:n])) for n in range(1, 34)]
    products.choose_products(model, table, other, nn.Linear(100, 40), nn.Conv1d(4, 4, 1))
    assert type(other) is Doubled
    for n in range(1, 34):
        metal.launches.clear()
        found = model.layers[0](x[None, :n])[0], table.as_linear(x[:n])
        model.layers[1](x[:n].astype(mx.float32))
        for mine, theirs in zip(found, plain[n - 1], strict=True):
            assert metal_kernels.relative_error(mine, theirs) < 4e-3
        assert metal.launches.get(UNQUANTISED, 0) == (2 if 9 <= n <= 32 else 0)


def test_sums_are_scaled_where_that_is_the_fastest(metal):
    gains = iter([1.3, 1.4, 1.2, 1.7])
    metal.speedup = lambda *_: next(gains)
    assert products.fastest([layer(4, 64, mx.bfloat16)], 5) == Geometry(4, 8, scaled_sums=True)
    (verdicts,) = metal_kernels.VERDICTS.values()
    expected = "1.70 times as fast as MLX's operation with 32 outputs, 8 simdgroups, scaled sums"
    assert verdicts == {"5 rows": f"used, {expected}"}


def test_the_fastest_geometry_is_used(metal):
    """Few outputs make few threadgroups, so those with fewer outputs are timed too."""
    gains = iter([1.3, 1.6, 1.4])
    metal.speedup = lambda *_: next(gains)
    module = layer(16, 0, mx.bfloat16)
    assert products.fastest([module], 17) == Geometry(2, 8)
    (verdicts,) = metal_kernels.VERDICTS.values()
    assert verdicts == {
        "17 rows": "used, 1.60 times as fast as MLX's operation with 16 outputs, 8 simdgroups"
    }


def test_a_kernel_that_fails_is_left_out_with_one_line(metal, monkeypatch):
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda *_, **__: _fail)
    with pytest.warns(UserWarning, match="few rows run without their Metal kernel: no such type"):
        assert products.fastest([layer(4, 64, mx.float32)], 5) is None
    (verdicts,) = metal_kernels.VERDICTS.values()
    assert verdicts == {"5 rows": "not used, no such type with 32 outputs, 8 simdgroups"}


@pytest.mark.parametrize("most", [256, 192, 128])
def test_geometries_with_more_threads_than_the_device_gives_are_left_out(metal, most):
    """M1 and M2 give some kernels fewer than others; all kernels run with 128."""
    metal.max_threads, metal.speedup = most, lambda *_: 2
    names = {str(each) for each in products.geometries(40, 25) if 32 * each.splits <= most}
    left = {str(each) for each in products.geometries(40, 25)} - names
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = products.fastest([layer(4, 64, mx.float32)], 25)
    assert str(found) in names
    assert {name for name in left if any(name in str(x.message) for x in caught)} == left


def test_threadgroups_are_as_small_as_m1_needs(metal):
    """Where metal is installed, the executor refuses more threads."""
    most = MAX_THREADS // 32
    products.multiply(layer(4, 64, mx.float32), inputs(5, mx.float32), Geometry(4, most))
    with pytest.raises(ValueError, match="greater than 448"):
        products.multiply(layer(4, 64, mx.float32), inputs(5, mx.float32), Geometry(4, most + 1))


def _fail(**_):
    raise RuntimeError("no such type\nand more")


@pytest.mark.parametrize("chip", ["applegpu_g17s", "unknown", None])
def test_no_kernel_is_tried_on_m5_or_without_metal(metal, see_device, chip, recwarn):
    see_device(mx.gpu if chip else mx.cpu, chip)
    products.choose_products(layer(4, 64, mx.float32))
    assert not metal.launches
    assert not recwarn.list


@pytest.mark.usefixtures("_one_geometry")
def test_a_layer_prepares_a_launch_once_for_each_shape_of_inputs(metal, monkeypatch):
    """The inputs of a pass may have a batch; their products have its shape."""
    metal.schedules, metal.speedup = (DESCENDING,), lambda *_: 2
    module = layer(4, 64, mx.float32)
    x = inputs(6, mx.float32)
    expected = module(x)
    products.choose_products(module)
    with recording(products, "prepare") as prepared:
        for shape in ((6,), (6,), (2, 3), (1, 6), (6,)):
            found = module(x.reshape(*shape, -1))
            assert found.shape == (*shape, 40)
            assert mx.allclose(found.reshape(6, -1), expected, atol=1e-5)
    assert len(prepared) == 3


# It changes with the kernels of M5 alone.
@pytest.mark.nightly
def test_volunteers_try_kernels_on_m5(metal, see_device, monkeypatch):
    see_device(mx.gpu, "applegpu_g17s")
    monkeypatch.setenv(metal_kernels.UNTRIED, "1")
    metal.speedup = lambda *_: 2
    products.choose_products(layer(4, 64, mx.float32))
    assert metal.launches
    monkeypatch.setenv(metal_kernels.UNTRIED, "0")
    assert not metal_kernels.runs_matrix_kernels()


def test_chains_of_calls_are_compared():
    """Each call waits for the one before; the fastest of several chains counts."""
    times = iter([0, 9, 0, 9, *[0, 8, 0, 3] * 2, 0, 6, 0, 2])
    seen = []

    def link(x, call):
        seen.append((x.item(), call))
        return x + 1

    start = mx.array(0)
    assert time_chains(link, lambda x, _: x, start, clock=lambda: next(times)) == 3
    assert seen[: metal_kernels.CALLS] == [(n, n) for n in range(metal_kernels.CALLS)]


@pytest.mark.usefixtures("_one_geometry")
def test_few_calls_are_timed_for_an_output_head(metal):
    """Its calls are so long that more of them would take seconds."""
    timed, module = [], layer(4, 64, mx.float32)
    metal.speedup = lambda *given: timed.append(given) or 1.0
    products.fastest([module], 5)
    assert timed[0][3:] == (module.weight.nbytes,)
    calls = []
    for nbytes in (0, metal_kernels.LONG_BYTES):
        time_chains(
            lambda x, _, of=nbytes: calls.append(of) or x, lambda x, _: x, mx.array(0), nbytes
        )
    assert Counter(calls) == {
        0: metal_kernels.CALLS * (1 + metal_kernels.ROUNDS),
        metal_kernels.LONG_BYTES: metal_kernels.LONG_CALLS * (1 + metal_kernels.LONG_ROUNDS),
    }
