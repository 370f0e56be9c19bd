"""Products with weights of 4 and 8 bits on a CPU: their bits, on every set of instructions."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from treeflash.low_bits import GROUP, SHARING, LowBitWeight, StoredWeight
from treeflash.testing import require

require("torch")
require("llvmlite")

import llvmlite.binding as llvm
import torch
from torch import Tensor
from treeflash_cuda.cpu import low_bit_code, low_bit_kernels
from treeflash_cuda.cpu.ir_builder import GENERIC, ISAS, Isa
from treeflash_cuda.cpu.low_bit_code import SHARED_NUMBERS, SHARED_PRODUCTS
from treeflash_cuda.cpu.low_bit_kernels import Kernel
from treeflash_cuda.low_bit_linear import LowBitEmbedding, LowBitLinear

pytestmark = pytest.mark.usefixtures("own_cache")

FORMATS = {
    "Q4_0": (4, 1, False, np.float16),
    "Q4_1": (4, 1, True, np.float16),
    "Q4_K": (4, 1, True, np.int8),
    "Q8_0": (8, 1, False, np.float16),
    "Q5_0": (5, 1, False, np.float16),
    "Q5_K": (5, 1, True, np.int8),
    "Q6_K": (6, 2, False, np.int8),
    "MLX": (8, 1, True, np.float32),
    "IQ4_XS": (8, 1, False, np.int8),
}
"""Bits, scales of a group, whether it has a least number, and the scales' dtype."""
SIZES = {name: SHARING if kind[-1] is np.int8 else GROUP for name, kind in FORMATS.items()}
"""Least numbers of a row."""


def isas() -> list[Isa]:
    """The instructions of this machine; AVX-512 has the ones of AVX-VNNI, too, in longer words."""
    has = llvm.get_host_cpu_features()
    known = {isa.name: isa for isa in ISAS}
    wide, narrow = known["AVX-512 VNNI"], known["AVX-VNNI"]
    if not has.get("avxvnni"):
        known["AVX-VNNI"] = narrow._replace(needed=wide.needed)
    return [*(isa for isa in known.values() if all(has.get(x) for x in isa.needed)), GENERIC]


def quickly_compiled() -> list[Any]:
    """Return the instructions; `GENERIC`, which takes six seconds to compile, is nightly."""
    marks = pytest.mark.nightly if len(isas()) > 1 else ()
    return [pytest.param(x, id=x.name, marks=marks if x is GENERIC else ()) for x in isas()]


def random_weight(name: str, rows: int, size: int) -> LowBitWeight:
    bits, scales, has_least, dtype = FORMATS[name]
    rng, groups = np.random.default_rng(rows + size), size // GROUP

    def random(count: int) -> np.ndarray:
        if dtype is np.int8:
            return rng.integers(-128, 128, (rows, count), np.int8)
        return rng.standard_normal((rows, count)).astype(dtype)

    weight = LowBitWeight(
        rng.integers(0, 1 << bits, (rows, size), np.uint8),
        random(groups * scales),
        random(groups) if has_least else None,
        bits,
    )
    count = size // SHARING * weight.format.factors
    factors = rng.standard_normal((rows, count)).astype(np.float16)
    return weight._replace(factors=factors) if count else weight


def layer_of(weight: LowBitWeight, dtype=torch.float32, isa: Isa | None = None) -> LowBitLinear:
    stored = StoredWeight(name="", format=weight.format, shape=weight.numbers.shape)
    layer = LowBitLinear.from_packed(stored, weight.pack(), None, dtype)
    if isa is not None:
        layer._product = layer.product(Kernel(isa, weight.format))
    return layer


def reference(x: Tensor, weight: LowBitWeight) -> Tensor:
    """The rule of `low_bit_code` in PyTorch; float64 rounds once where it says fma."""
    kind, (n, size) = weight.format, weight.numbers.shape
    groups = x.float().view(len(x), -1, GROUP)
    top = groups.abs().amax(-1)
    factor = torch.where(top >= 2.0**-100, torch.full_like(top, 127) / top, 0)
    q = (groups * factor[..., None]).round()
    d = top / 127
    numbers = torch.from_numpy(weight.numbers.astype(np.float64) - kind.half)
    numbers = numbers.view(n, -1, kind.scales, GROUP // kind.scales)
    q_parts = q.double().view(len(x), -1, kind.scales, GROUP // kind.scales)

    def float32(stored: np.ndarray, factor: int) -> Tensor:
        values = torch.from_numpy(stored.astype(np.float32))
        if weight.factors is None:
            return values
        factors = torch.from_numpy(weight.factors.astype(np.float32))[:, factor :: kind.factors]
        return (values.view(n, factors.shape[1], -1) * factors[..., None]).view(n, -1)

    scales = float32(weight.scales, 0).view(n, -1, kind.scales)
    y = torch.zeros(len(x), n)
    for group, part in itertools.product(range(size // GROUP), range(kind.scales)):
        sums = q_parts[:, group, part] @ numbers[:, group, part].T
        steps = scales[None, :, group, part] * d[:, group, None]
        y = (sums * steps.double() + y.double()).float()
        if weight.least is not None:
            least = float32(weight.least, 1)[None, :, group]
            total = d[:, group, None] * q[:, group].sum(-1, keepdim=True)
            y = (least.double() * total.double() + y.double()).float()
    return y.to(x.dtype)


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("name", "isa"),
    [
        pytest.param(
            *(name, isa),
            id=f"{name}-{isa.name}",
            # Its code is longer, and takes five seconds to compile.
            marks=pytest.mark.nightly if isa is GENERIC and name != "Q4_1" else (),
        )
        for name in FORMATS
        for isa in isas()
        # Compiling takes a second each; these have every part of the code.
        if isa in isas()[:1] or name in ("Q4_1", "Q5_K", "Q6_K", "Q8_0", "MLX")
    ],
)
def test_bits_are_those_of_the_rule(name, isa):
    """For every number of rows that a pass has, odd widths, and a last block with missing rows."""
    torch.manual_seed(0)
    for rows, size in ((48, 3 * SIZES[name]), (21, SIZES[name])):
        weight = random_weight(name, rows, size)
        layer = layer_of(weight, isa=isa)
        x = torch.randn(70, size) * torch.logspace(-3, 3, 70)[:, None]
        x[3] = 0
        x[5, :GROUP] = 0
        x[7] *= 1e-36  # below the least number that counts
        for dtype in (torch.float32, torch.bfloat16):
            given = x.to(dtype)
            expected = reference(given, weight)
            assert torch.equal(layer(given), expected)
            for m in (*range(1, 18), 33):
                assert torch.equal(layer(given[:m]), expected[:m])
                assert torch.equal(layer(given[-m:][None])[0], expected[-m:])


@pytest.mark.sample(1)
@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
def test_ties_round_to_even(isa):
    weight = random_weight("Q8_0", 16, GROUP)
    x = torch.zeros(1, GROUP)
    x[0, :8] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127])
    rounded = torch.zeros(1, GROUP)
    rounded[0, :8] = torch.tensor([127.0, 0, 2, 2, 0, -2, 126, -127])
    layer = layer_of(weight, isa=isa)
    assert torch.equal(layer(x), layer(rounded))


@pytest.mark.parametrize("isa", quickly_compiled())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_reach_every_output_of_their_row_alone(value, dtype, isa):
    weight = random_weight("Q4_1", 32, 2 * GROUP)
    layer, x = layer_of(weight, isa=isa), torch.randn(9, 2 * GROUP).to(dtype)
    expected = layer(x)
    x[4, 40] = value
    actual = layer(x)
    assert actual[4].isnan().all()
    kept = torch.arange(9) != 4
    assert torch.equal(actual[kept], expected[kept])


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_and_strides_change_no_bit(threads):
    """The weight and the rows are large enough to be shared by threads."""
    before = torch.get_num_threads()
    weight = random_weight("Q4_1", 16 * 40, 1024)
    layer, x = layer_of(weight), torch.randn(270, 2048)
    assert x.numel() // 2 >= SHARED_NUMBERS
    assert len(x) * weight.numbers.size >= SHARED_PRODUCTS
    expected = reference(x[:, ::2].contiguous(), weight)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(layer(x[:, ::2]), expected)
        assert torch.equal(layer(x[:1, ::2]), expected[:1])
    finally:
        torch.set_num_threads(before)


def test_no_rows_and_float16():
    weight = random_weight("Q6_K", 32, SHARING)
    layer, x = layer_of(weight, torch.float16), torch.randn(3, SHARING).half()
    assert layer(x[:0]).shape == (0, 32)
    assert torch.equal(layer(x), reference(x.float(), weight).half())


@pytest.mark.parametrize("name", FORMATS)
def test_rows_and_dequantised_layers_have_the_weights(name):
    size = 3 * SIZES[name]
    weight = random_weight(name, 21, size)
    stored = StoredWeight(name=name, format=weight.format, shape=(21, size))
    table = LowBitEmbedding.from_packed(stored, weight.pack(), None, torch.float32)
    expected = torch.from_numpy(weight.dequantised())
    ids = torch.tensor([[0, 20, 16], [15, 3, 3]])
    assert torch.equal(table(ids), expected[ids])
    assert torch.equal(table.rows(torch.arange(21)), expected)
    x = torch.randn(2, size)
    products = reference(x, weight)
    assert torch.equal(table.output_head()(x), products)
    assert torch.equal(table.select(ids.flatten())(x), products[:, ids.flatten()])


def test_a_bias_is_added():
    weight, bias = random_weight("Q4_0", 16, 32), torch.randn(16)
    stored = StoredWeight(name="", format=weight.format, shape=(16, 32), bias=True)
    x = torch.randn(2, 32)
    layer = LowBitLinear.from_packed(stored, weight.pack(), bias, torch.float32)
    assert torch.equal(layer(x), reference(x, weight) + bias)
    assert torch.equal(layer.bias, bias)


def test_layers_that_a_file_has_joined_are_split():
    """Whole blocks of rows stay where they are; the layer after a part of one is a copy."""
    weight, bias = random_weight("Q4_1", 57, 64), torch.randn(57)
    parts = {"q_proj": 32, "k_proj": 9, "v_proj": 16}
    stored = StoredWeight(name="", format=weight.format, shape=(57, 64), bias=True, parts=parts)
    joined = LowBitLinear.from_packed(stored, weight.pack(), bias, torch.float32)
    x = torch.randn(3, 64)
    layers = joined.split()
    for layer, expected in zip(layers.values(), joined(x).split([32, 9, 16], 1), strict=True):
        assert torch.equal(layer(x), expected)
    assert list(layers) == list(parts)
    shared = joined.numbers.untyped_storage().data_ptr()
    found = [layer.numbers.untyped_storage().data_ptr() == shared for layer in layers.values()]
    assert found == [True, True, False]


def test_code_is_compiled_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path))
    kind = random_weight("Q8_0", 16, 32).format
    Kernel(ISAS[0] if ISAS[0] in isas() else GENERIC, kind)
    (file,) = (tmp_path / "kernels").iterdir()
    monkeypatch.setattr(low_bit_kernels, "build", lambda *_: pytest.fail("compiled again"))
    Kernel(ISAS[0] if ISAS[0] in isas() else GENERIC, kind)
    assert file.suffix == ".o"
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        Kernel(GENERIC, kind._replace(scale_dtype="float32"))


# A kernel for no processor in particular takes seconds to compile.
@pytest.mark.nightly
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path / "file"))
    Kernel(GENERIC, random_weight("Q8_0", 16, 32).format)


PROGRAM = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
void low_bit_linear(void *, void *, void *, void *, void *, void *, void *, void *, void *, void *,
                    void *, int64_t, int64_t, int64_t, int64_t, int, int);
static void *part(void) {
  int64_t size;
  fread(&size, 8, 1, stdin);
  void *data = malloc(size + 1);
  fread(data, 1, size, stdin);
  return data;
}
int main(void) {
  int64_t *s = part(), blocks = s[3], numbers = s[0] * s[2] * 32;
  void *x = part(), *weight = part(), *scales = part(), *least = part();
  void *factors = part();
  void *y = malloc(s[0] * s[1] * 4);
  void *q = malloc(numbers), *d = malloc(numbers);
  low_bit_linear(x, weight, scales, least, factors, 0, y, q, d, malloc(numbers), malloc(numbers),
                 s[0], s[1], s[2], blocks, s[4], 1);
  fwrite(y, s[4] ? 4 : 2, s[0] * s[1], stdout);
}
"""
"""Multiplies what it reads from standard input, each part after its number of bytes."""
EMULATED = {
    "NEON": ("aarch64", ["qemu-aarch64", "-cpu", "cortex-a76"]),
    "AVX2": ("x86_64", ["qemu-x86_64", "-cpu", "Haswell"]),
}
"""Processors without the instructions of newer ones, by name of a set."""


# Another compiler and QEMU are needed; the code is the one that the tests above run.
@pytest.mark.nightly
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", EMULATED)
def test_bits_on_processors_that_this_machine_is_not(tmp_path, isa, name):
    pytest.importorskip("ziglang")
    processor, command = EMULATED[isa]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    torch.manual_seed(0)
    size = 3 * SIZES[name]
    weight = random_weight(name, 48, size)
    found = next(x for x in ISAS if x.name == isa)
    (tmp_path / "kernel.o").write_bytes(object_code(found, weight, f"{processor}-linux-gnu"))
    (tmp_path / "main.c").write_text(PROGRAM)
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", f"{processor}-linux-musl"]
    subprocess.run(
        [*compiler, "-O1", "-o", "program", "main.c", "kernel.o"], cwd=tmp_path, check=True
    )
    packed = weight.pack()
    others = [b"" if x is None else x.tobytes() for x in (packed.least, packed.factors)]
    for rows, dtype in itertools.product((1, 2, 3, 8, 13), (torch.float32, torch.bfloat16)):
        x = (torch.randn(rows, size) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
        x[0, :GROUP] = 0
        sizes = np.array([rows, 48, size // GROUP, 3, dtype == torch.float32])
        stored = x.view(torch.uint8).numpy(), packed.numbers, packed.scales
        parts = [sizes.tobytes(), *(part.tobytes() for part in stored), *others]
        given = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        run = subprocess.run(
            [*command, "program"], cwd=tmp_path, input=given, stdout=subprocess.PIPE, check=True
        )
        y = torch.frombuffer(bytearray(run.stdout), dtype=dtype).view(rows, 48)
        assert torch.equal(y, reference(x, weight))


def object_code(isa: Isa, weight: LowBitWeight, triple: str) -> bytes:
    """Compile a kernel for one thread of another processor."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    features = ",".join([*(f"+{x}" for x in isa.needed), *filter(None, [isa.features])])
    target = llvm.Target.from_triple(triple)
    machine = target.create_target_machine(features=features, opt=3, reloc="pic")
    module = llvm.parse_assembly(low_bit_code.build(isa, weight.format, threads=False))
    return machine.emit_object(module)
