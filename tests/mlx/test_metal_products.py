"""Products of few rows with quantised weights: the Metal kernel, and how it is chosen."""

import pytest

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, decode
from treeflash.diagnosis import check_device
from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from metal_executor import DESCENDING, MetalKernelError, install, require_compiler
from mlx import nn
from treeflash_mlx import metal_kernels
from treeflash_mlx.backend import load
from treeflash_mlx.metal_kernels import products
from treeflash_mlx.metal_kernels import speedup as run_race

require_compiler()

KERNEL = "treeflash_products"


def layer(bits, group, dtype, outputs=40, width=128, bias=False):
    mx.random.seed(0)
    linear = nn.Linear(width, outputs, bias=bias)
    linear.set_dtype(dtype)
    return nn.QuantizedLinear.from_linear(linear, group, bits)


def inputs(rows, dtype, width=128):
    return mx.random.normal((rows, width), key=mx.random.key(1)).astype(dtype)


def exact(module, x):
    scales, biases = (part.astype(mx.float32) for part in (module.scales, module.biases))
    weight = mx.dequantize(module.weight, scales, biases, module.group_size, module.bits)
    return x.astype(mx.float32) @ weight.T


@pytest.mark.parametrize(
    ("bits", "group", "rows", "dtype"),
    [
        (4, 32, 5, mx.float32),
        (4, 64, 9, mx.float16),
        (4, 128, 16, mx.bfloat16),
        (8, 32, 8, mx.bfloat16),
        (8, 64, 12, mx.float32),
        (8, 128, 7, mx.float16),
    ],
)
def test_a_product_is_exact_up_to_rounding(metal, bits, group, rows, dtype):
    """The last threadgroup has fewer outputs, and some simdgroups have no group."""
    module, x = layer(bits, group, dtype), inputs(rows, dtype)
    found = products.multiply(module, x)
    assert found.dtype == dtype
    error = metal_kernels.relative_error(found, exact(module, x))
    assert error < {mx.float32: 1e-6, mx.float16: 5e-4, mx.bfloat16: 4e-3}[dtype]
    assert metal.launches == {KERNEL: 1}


FAULTS = {
    "no barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    "outputs beyond the last": (" && first + n < outputs", ""),
    "rows beyond the last": ("min(8 * c + column + i, rows - 1)", "8 * c + column + i"),
    "weights beyond the last": ("min(first + 8 * t + row, outputs - 1)", "first + 8 * t + row"),
    "a transposed matrix": (
        "[8 * c + column + i][8 * t + row]",
        "[8 * c + row][8 * t + column + i]",
    ),
    "another order of inputs": ("k + 4 * row)", "k + 4 * (row ^ 1))"),
    "half of the sum of inputs": ("inputs[c][i] += simd_shuffle_xor(inputs[c][i], 16);", ""),
    "no biases": ("+ bias * inputs[c][i]", ""),
    "every group in every simdgroup": ("g += SPLITS", "++g"),
    "the neighbour's scale": ("scales[place[t] * groups + g]", "scales[place[t] * groups]"),
    "a bit less": ("float(high & ((1 << BITS) - 1))", "float(high & 7)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_noticed(metal, monkeypatch, recwarn, fault):
    """By the executor, or by the check at load."""
    right, wrong = FAULTS[fault]
    assert right in products.SOURCE
    monkeypatch.setattr(products, "SOURCE", products.SOURCE.replace(right, wrong))
    module = layer(4, 32, mx.float32)
    try:
        assert not products.wins([module], 5)
    except MetalKernelError:
        return
    assert "few rows run without their Metal kernel: its rel" in str(recwarn.pop().message)


def test_layers_use_the_kernel_for_the_rows_where_it_wins(metal, monkeypatch):
    raced = []

    def speedup(kernel, plain, start, *_):
        raced.append(len(start))
        return 1.2 if len(start) >= 7 else 1.1

    monkeypatch.setattr(metal_kernels, "speedup", speedup)
    model = nn.Sequential(layer(4, 64, mx.float32, bias=True), nn.Linear(40, 40))
    table = nn.QuantizedEmbedding.from_embedding(nn.Embedding(40, 64), 32, 8)
    other = layer(4, 64, mx.float32, bias=True)
    x, y = inputs(17, mx.float32), inputs(17, mx.float32, 64)
    plain = [(model.layers[0](x[:n]), table.as_linear(y[:n])) for n in range(1, 18)]
    products.choose_products(model, table, None)
    assert raced == [5, 7, 9, 12] * 2
    for n in range(1, 18):
        metal.launches.clear()
        found = model.layers[0](x[None, :n]), table.as_linear(y[:n])
        assert mx.allclose(found[0][0], plain[n - 1][0], atol=1e-5)
        assert mx.allclose(found[1], plain[n - 1][1], atol=1e-5)
        assert metal.launches.get(KERNEL, 0) == (2 if 7 <= n <= 16 else 0)
    metal.launches.clear()
    other(x[:8])
    model.layers[0](x[:8].astype(mx.float16))
    table(mx.array([1, 2, 3, 4, 5, 6, 7]))
    assert not metal.launches


def test_a_kernel_that_fails_is_left_out_with_one_line(metal, monkeypatch):
    monkeypatch.setattr(metal, "metal_kernel", lambda *_, **__: _fail)
    monkeypatch.setattr(mx.fast, "metal_kernel", metal.metal_kernel)
    with pytest.warns(UserWarning, match=r"few rows run without their Metal kernel: no such type$"):
        assert not products.wins([layer(4, 64, mx.float32)], 5)
    (verdicts,) = metal_kernels.VERDICTS.values()
    assert verdicts == {"5 rows": "not used, no such type"}


def test_threadgroups_are_as_small_as_m1_needs(metal, monkeypatch):
    """Where metal is installed, the executor refuses more threads."""
    monkeypatch.setattr(products, "SPLITS", metal_kernels.MAX_THREADS // 32)
    products.multiply(layer(4, 64, mx.float32), inputs(5, mx.float32))
    monkeypatch.setattr(products, "SPLITS", metal_kernels.MAX_THREADS // 32 + 1)
    with pytest.raises(ValueError, match="greater than 448"):
        products.multiply(layer(4, 64, mx.float32), inputs(5, mx.float32))


def _fail(**_):
    raise RuntimeError("no such type\nand more")


@pytest.mark.parametrize("chip", ["applegpu_g17s", "unknown", None])
def test_no_kernel_is_tried_on_m5_or_without_metal(metal, monkeypatch, chip, recwarn):
    if chip is None:
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    else:
        monkeypatch.setattr(mx, "device_info", lambda *_: {"architecture": chip})
    products.choose_products(layer(4, 64, mx.float32))
    assert not metal.launches
    assert not recwarn.list


def test_a_race_compares_chains_of_calls(monkeypatch):
    """Each call waits for the one before; the fastest of several chains counts."""
    clock = iter([0, 9, 0, 9, *[0, 8, 0, 3] * 2, 0, 6, 0, 2])
    monkeypatch.setattr(metal_kernels.time, "perf_counter", lambda: next(clock))
    seen = []

    def link(x, call):
        seen.append((x.item(), call))
        return x + 1

    start = mx.array(0)
    assert run_race(link, lambda x, _: x, start) == 3
    assert seen[: metal_kernels.CALLS] == [(n, n) for n in range(metal_kernels.CALLS)]


def test_few_calls_race_for_an_output_head(metal, monkeypatch):
    """Whose calls are so long that the others would take seconds."""
    monkeypatch.setattr(metal_kernels, "speedup", run_race)
    calls = []
    monkeypatch.setattr(products, "multiply", lambda _, x: calls.append(0) or plain(_, x))
    plain, small = products.multiply_plainly, layer(4, 64, mx.float32)
    products.wins([small], 5)
    many = len(calls)
    monkeypatch.setattr(metal_kernels, "LONG_BYTES", small.weight.nbytes)
    products.wins([small], 5)
    assert many == 1 + metal_kernels.CALLS * (1 + metal_kernels.ROUNDS)  # one shows the error
    assert len(calls) - many == 1 + metal_kernels.LONG_CALLS * (1 + metal_kernels.LONG_ROUNDS)


@pytest.mark.filterwarnings("ignore:MLX was imported before treeflash_mlx")  # of TF32, on GPUs
def test_decoding_with_the_kernel_equals_decoding_without(executor, quantised_pair, monkeypatch):
    """In the target, its output head and the drafter."""
    settings, executor.schedules = LoadConfig(draft_bits=4), (DESCENDING,)

    def tokens(backend, **options):
        config = DecodeConfig(max_tokens=8, **options)
        return [
            token
            for step in decode(backend, Request(prompt_ids=[5, 17, 3], config=config))
            for token in step.tokens
        ]

    expected = tokens(load(*quantised_pair, settings), method="ar")
    with monkeypatch.context() as patch:
        install(executor, patch, speedup=2)
        backend = load(*quantised_pair, settings)
        told = [x.message for x in check_device(backend) if x.check == "kernel"]
        assert [message.partition(",")[0] for message in told] == [
            *["products of few rows"] * 4, "attention of draft trees"
        ]  # fmt: skip
        assert "products of few rows, 64 x 128 in 4 bits: 5 rows used, 2.00 times as" in told[0]
        executor.launches.clear()
        assert tokens(backend, method="treeflash", budget=8) == expected
        assert executor.launches[KERNEL] > 20
