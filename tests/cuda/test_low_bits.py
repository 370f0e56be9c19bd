"""Weights of few bits on a CPU: the bits of products, and targets whose weights keep their bits.

Products have equal bits on every set of instructions. Targets are GGUF files, and checkpoints of
GPTQ, AWQ, compressed-tensors and MLX.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import subprocess
import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import write_adapter
from failures import failing
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from gguf_files import HIDDEN, write_gguf
from low_bit_checkpoints import KINDS, write_low_bits
from parts import use_models
from safetensors.numpy import load_file
from stand_ins import stand_in

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import CheckpointError, ConfigError, UnsupportedModelError
from treeflash.hub.models import resolve_target
from treeflash.low_bits import GROUP, SHARING, LowBitFormat, LowBitWeight, StoredWeight
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import edit_config, save, write_drafter, write_target

require("torch")
require("llvmlite")

import llvmlite.binding as llvm
import torch
from torch import Tensor, nn
from treeflash_cuda.backend import load
from treeflash_cuda.cpu import decoder_target, low_bit_code, low_bit_kernels, low_bit_loading
from treeflash_cuda.cpu.decoder_target import CpuTarget
from treeflash_cuda.cpu.ir_builder import GENERIC, ISAS, Isa
from treeflash_cuda.cpu.low_bit_code import SHARED_NUMBERS, SHARED_PRODUCTS
from treeflash_cuda.cpu.low_bit_kernels import Kernel
from treeflash_cuda.cpu.low_bit_loading import keeps_bits
from treeflash_cuda.cpu.machine_code import optimised
from treeflash_cuda.decoder import plain_config
from treeflash_cuda.hf.model_target import ModelTarget
from treeflash_cuda.linear import PackedLinear
from treeflash_cuda.low_bit_linear import LowBitEmbedding, LowBitLinear
from treeflash_cuda.target import read_model_config
from treeflash_cuda.target_loading import bits_refusal, load_decoder

import treeflash

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
        known["AVX-VNNI"] = Isa(*narrow[:3], wide.needed, narrow.features)
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

    kind = LowBitFormat(bits, scales, has_least, np.dtype(dtype).name)
    count = size // SHARING * kind.factors
    return LowBitWeight(
        rng.integers(0, 1 << bits, (rows, size), np.uint8),
        random(groups * scales),
        random(groups) if has_least else None,
        bits,
        rng.standard_normal((rows, count)).astype(np.float16) if count else None,
    )


def layer_of(weight: LowBitWeight, dtype=torch.float32, isa: Isa | None = None) -> LowBitLinear:
    layer = LowBitLinear.of(weight, "", None, dtype)
    if isa is not None:
        layer.forward = layer.product(Kernel(isa, weight.format))
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


@pytest.mark.usefixtures("own_threads")
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_and_strides_change_no_bit(threads):
    """The weight and the rows are large enough to be shared by threads."""
    weight = random_weight("Q4_1", 16 * 40, 1024)
    layer, x = layer_of(weight), torch.randn(270, 2048)
    assert x.numel() // 2 >= SHARED_NUMBERS
    assert len(x) * weight.numbers.size >= SHARED_PRODUCTS
    expected = reference(x[:, ::2].contiguous(), weight)
    torch.set_num_threads(threads)
    assert torch.equal(layer(x[:, ::2]), expected)
    assert torch.equal(layer(x[:1, ::2]), expected[:1])


def test_no_rows_and_float16():
    weight = random_weight("Q6_K", 32, SHARING)
    layer, x = layer_of(weight, torch.float16), torch.randn(3, SHARING).half()
    assert layer(x[:0]).shape == (0, 32)
    assert torch.equal(layer(x), reference(x.float(), weight).half())


@pytest.mark.parametrize("name", FORMATS)
def test_rows_and_dequantised_layers_have_the_weights(name):
    size = 3 * SIZES[name]
    weight = random_weight(name, 21, size)
    table = LowBitEmbedding.of(weight, name, None, torch.float32)
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
    x = torch.randn(2, 32)
    layer = LowBitLinear.of(weight, "", bias, torch.float32)
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
    stand_in(monkeypatch, low_bit_kernels, build=lambda *_: pytest.fail("compiled again"))
    Kernel(ISAS[0] if ISAS[0] in isas() else GENERIC, kind)
    assert file.suffix == ".o"
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        Kernel(GENERIC, random_weight("Q4_0", 16, 32).format)


def test_a_damaged_file_of_code_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path))
    isa = ISAS[0] if ISAS[0] in isas() else GENERIC
    kind = random_weight("Q8_0", 16, 32).format
    Kernel(isa, kind)
    (file,) = (tmp_path / "kernels").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:2000], bytes(len(whole))):
        file.write_bytes(damaged)
        Kernel(isa, kind)
        assert file.read_bytes() == whole


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
    others = [packed[x].tobytes() if x in packed else b"" for x in ("least", "factors")]
    for rows, dtype in itertools.product((1, 2, 3, 8, 13), (torch.float32, torch.bfloat16)):
        x = (torch.randn(rows, size) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
        x[0, :GROUP] = 0
        sizes = np.array([rows, 48, size // GROUP, 3, dtype == torch.float32])
        stored = x.view(torch.uint8).numpy(), packed["numbers"], packed["scales"]
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
    text = low_bit_code.build(isa, weight.format, threads=False)
    return machine.emit_object(optimised(text, machine))


PROMPT = "the 12 the 12 the"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A tiny Llama with several types, as files named Q4_K_M have: values are not like queries."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    kinds = {"attn_v": Kind.Q5_0, "ffn_down": Kind.Q8_0, "token_embd": Kind.Q8_0}
    write_gguf(path, kind=lambda name: kinds.get(name.rpartition(".")[2], Kind.Q4_1))
    return path


@pytest.fixture(scope="module")
def packed(file) -> Path:
    return resolve_target(str(file), packed=True)


@pytest.fixture(scope="module")
def model(file):
    return treeflash.load(str(file), False, backend="cuda", device="cpu")


def logits_of(folder: Path, **settings) -> torch.Tensor:
    return run(load(folder, None, LoadConfig(device="cpu", **settings)))


@torch.inference_mode()
def run(pair) -> torch.Tensor:
    """Return the logits of 20 tokens."""
    tokens = DraftTree.chain(np.arange(20, dtype=np.int32))
    with closing(pair.open(20, drafts=False)) as state:
        return pair.verifier.forward([(state, tokens)], [True]).logits.parts[0].float()


def test_a_file_is_exact_in_its_own_bits(model):
    target = model.backend.target
    assert model.backend.inexact is None
    assert (model.backend.dtype, target.token_rows) == ("float32", 1)
    found = [type(x) for x in target.model.modules()]
    # The table and its head; four, three and three layers that are alone or joined.
    assert found.count(LowBitLinear) == 1 + 2 * (4 + 2)
    assert found.count(LowBitEmbedding) == 1
    assert PackedLinear not in found
    assert set(model.backend.weights_read["a pass reads"]) >= {"Q4_1", "Q5_0", "Q8_0"}
    assert "KiB of Q4_1" in model.backend.device_report().facts["a pass reads"]


def test_an_output_head_of_its_own_keeps_its_bits(tmp_path):
    def add_head(writer):
        weight = np.random.default_rng(1).standard_normal((265, HIDDEN), dtype=np.float32)
        writer.add_tensor("output.weight", quantize(weight, Kind.Q8_0), raw_dtype=Kind.Q8_0)

    write_gguf(tmp_path / "tiny.gguf", add=add_head)
    folder = resolve_target(str(tmp_path / "tiny.gguf"), packed=True)
    target = load(folder, None, LoadConfig(device="cpu")).target
    assert type(target.lm_head) is LowBitLinear
    assert not torch.equal(target.lm_head.rows(torch.arange(9)), target.embed(torch.arange(9)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_those_of_plain_decoding(model, temperature):
    options = {"temperature": temperature, "max_tokens": 24, "seed": 5}
    prompts = [PROMPT, "12", "the", "1\n\n2"]
    expected = [model.generate(x, method="ar", **options).token_ids for x in prompts]
    for prompt, plain, budget in zip(prompts, expected, (4, 8, 16, 64), strict=True):
        text = model.generate(prompt, method="suffix", budget=budget, **options)
        assert text.token_ids == plain
    many = dict(model.generate_many(prompts * 2, method="suffix", budget=16, parallel=8, **options))
    assert [many[n].token_ids for n in range(8)] == expected * 2


def test_weights_are_mapped_from_the_file(model, packed):
    """Memory of a mapped file is shared, and read when it is needed."""
    ranges = [
        [int(x, 16) for x in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if str(packed / "model.safetensors") in line
    ]
    for module in model.backend.target.model.modules():
        if isinstance(module, LowBitLinear):
            address = module.numbers.data_ptr()
            assert any(first <= address < end for first, end in ranges)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantised_weights_are_the_ones_of_the_file(file, packed, dtype):
    """With `bits` 16 a folder with packed weights is the same model as one in bfloat16."""
    if dtype == "float32":  # bfloat16 would round these weights
        settings = {"dtype": dtype, "bits": 16}
        target = load(packed, None, LoadConfig(device="cpu", **settings)).target
        stored = load(packed, None, LoadConfig(device="cpu", dtype=dtype, exact=True)).target
        assert torch.equal(target.embed(torch.arange(9)), stored.embed(torch.arange(9)))
        return
    plain = resolve_target(str(file))
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    expected = logits_of(plain, dtype=dtype)
    assert torch.equal(logits_of(packed, dtype=dtype, bits=16), expected)


EXCLUDED = {
    "exact": {"exact": False},
    "float32": {"dtype": "float32"},
    "kv_bits": {"kv_bits": 8},
    "bits": {"bits": 16},
}


@pytest.mark.parametrize("settings", EXCLUDED.values(), ids=EXCLUDED)
def test_weights_are_dequantised_without_exact_mode(packed, settings, recwarn):
    """Rounded activations turn differences of float32's rounding into larger ones."""
    config = LoadConfig(device="cpu", **settings)
    assert bits_refusal(config) == ""
    target = load(packed, None, config).target
    assert not any(isinstance(x, LowBitLinear) for x in target.model.modules())
    assert not [x for x in recwarn if "few bits" in str(x.message)]


@pytest.mark.parametrize("bits", [None, 16])
def test_rounded_inputs_are_no_wrong_attention(packed, monkeypatch, bits):
    """A model of transformers is compared with its own attention, whose input is rounded too."""
    use_models(monkeypatch)
    config = LoadConfig(device="cpu", dtype="float32", exact=True, bits=bits)
    target = load(packed, None, config).target
    assert isinstance(target, ModelTarget)
    target.lm_head.register_forward_hook(lambda _, __, y: y + 0.03 * y.std() * torch.randn_like(y))
    wrong = pytest.raises(UnsupportedModelError, match="do more than multiply the logits")
    with wrong if bits else nullcontext():
        target.find_scale()


@torch.inference_mode()
def test_an_adapter_is_merged_into_dequantised_weights(packed, tmp_path):
    """They are parts of one packed layer."""
    config = LoadConfig(device="cpu", dtype="float32")
    plain = load(packed, None, replace(config, bits=16)).target
    facts = plain.facts
    keys = facts.kv_heads * facts.head_dim
    first = facts.heads * facts.head_dim
    down, up = torch.randn(2, HIDDEN), torch.randn(keys, 2)
    write_adapter(tmp_path, {"model.layers.0.self_attn.k_proj": (down, up)})
    merged = load(packed, None, replace(config, adapter=str(tmp_path))).target
    x = torch.randn(3, HIDDEN)
    before, after = (
        target.model.layers[0].mixer.qkv(x).tensor_split([first, first + keys], 1)
        for target in (plain, merged)
    )
    torch.testing.assert_close(after[1], before[1] + x @ (up @ down).T, atol=1e-4, rtol=1e-4)
    assert torch.equal(after[0], before[0])


def test_a_target_that_cannot_be_exact_is_dequantised_with_a_line(packed):
    refusal = UnsupportedModelError("exact mode: it is a test")
    line = "weights of few bits are dequantised, because exact mode: it is a test"
    with failing(decoder_target, "bound_products", refusal), pytest.warns(UserWarning, match=line):
        pair = load(packed, None, LoadConfig(device="cpu"))
    assert pair.dtype == "float32"


def test_without_llvmlite_a_file_becomes_bfloat16_with_a_line(file, monkeypatch, caplog):
    stand_in(monkeypatch, low_bit_loading, find_spec=lambda name: None)
    with caplog.at_level(logging.WARNING):
        model = treeflash.load(str(file), False, backend="cuda", device="cpu")
    lines = [x.message for x in caplog.records if "take 16 bits" in x.message]
    assert lines == [
        "the weights of tiny take 16 bits, because llvmlite is not installed (pip install llvmlite)"
    ]
    assert not any(isinstance(x, LowBitLinear) for x in model.backend.target.model.modules())


@pytest.mark.parametrize(
    ("asked", "of_target", "bits"),
    [(None, None, "Q8_0"), (4, None, "Q4_1"), (16, None, None), (None, 16, None)],
)
def test_a_drafter_has_8_bits_beside_it_unless_others_are_asked_for(
    packed, tmp_path, asked, of_target, bits
):
    """Beside dequantised weights it stays as it is."""
    write_drafter(tmp_path, packed, seed=2, target_layer_ids=(0, 1))
    pair = load(packed, tmp_path, LoadConfig(device="cpu", draft_bits=asked, bits=of_target))
    layers = pair.drafter_model.fc, pair.drafter_model.layers[0].mlp.down_proj
    assert {getattr(x, "name", None) for x in (*layers, pair.head.module.d)} == {bits}
    assert pair.drafter_model.own.quantised_lm_head is None  # the target's has few bits already
    texts = [
        generate(pair, [5, 6, 7], DecodeConfig(method=method, max_tokens=24, budget=8))
        for method in ("ar", "treeflash")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_other_checkpoints_are_rounded_where_it_is_asked_for(tmp_path, bits):
    folder = tmp_path / "target"
    write_target(folder, "llama", seed=0)
    pair = load(folder, None, LoadConfig(device="cpu", bits=bits))
    assert pair.inexact is None
    name = {4: "Q4_1", 8: "Q8_0"}[bits]
    assert name in pair.weights_read["a pass reads"]
    layers = [x for x in pair.target.model.modules() if isinstance(x, LowBitLinear)]
    rounded = layers[0].rows(torch.arange(layers[0].shape[0]))
    assert len(rounded[0].unique()) <= 1 << bits


def test_rounding_is_refused_where_it_cannot_be_exact(tmp_path):
    for settings, bits in product(({"exact": False}, {"kv_bits": 8}), (4, 8)):
        with pytest.raises(ConfigError, match=rf"cannot be rounded to {bits} bits: they need"):
            load(tmp_path, None, LoadConfig(device="cpu", bits=bits, **settings))


def test_shortlists_read_rows_of_the_packed_head(model):
    target, tokens = model.backend.target, torch.tensor([3, 200, 264])
    hidden = torch.randn(2, 32).bfloat16()
    with torch.inference_mode():
        expected = target.lm_head(hidden)[:, tokens]
        assert torch.equal(target.shortlist_logits(hidden, tokens), expected)
        each = target.shortlist_logits(hidden, torch.stack([tokens, tokens + 0]))
    assert torch.equal(each, expected)


CPU = LoadConfig(device="cpu")
FLOAT32 = LoadConfig(device="cpu", dtype="float32", exact=True)
UNPACKED = LoadConfig(device="cpu", dtype="float32", bits=16)


def lack_layers(monkeypatch):
    """Let no target have layers of our own."""
    for module in (low_bit_loading, plain_config):
        stand_in(monkeypatch, module, decoder_facts=lambda _: "it is a test")


def write(root: Path, kind) -> tuple[Path, Path]:
    """Write a target in a format, and one with the same weights in float32."""
    write_target(root / "plain", "qwen2", seed=0, hidden_size=64, layers=2, tied=kind.table)
    write_low_bits(root / "stored", root / "plain", kind)
    return root / "stored", root / "plain"


def rows_of(layer: nn.Module) -> Tensor:
    """Dequantise a layer, or several that read the same input."""
    parts = [x for x in layer.modules() if isinstance(x, LowBitLinear)]
    return torch.cat([x.rows(torch.arange(x.shape[0])) for x in parts])


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_checkpoint_keeps_its_bits(tmp_path, kind):
    stored, plain = write(tmp_path, kind)
    weights = {x: torch.from_numpy(y) for x, y in read_tensors(plain).items()}
    pair = load(stored, None, FLOAT32)
    assert pair.inexact is None
    assert isinstance(pair.target, CpuTarget)
    for number, layer in enumerate(pair.target.model.layers):
        place = f"model.layers.{number}"
        found = {
            ("self_attn", "q_proj", "k_proj", "v_proj"): layer.mixer.qkv,
            ("self_attn", "o_proj"): layer.mixer.o_proj,
            ("mlp", "gate_proj", "up_proj"): layer.network.gate_up,
            ("mlp", "down_proj"): layer.network.down,
        }
        for (part, *names), own in found.items():
            expected = [weights[f"{place}.{part}.{name}.weight"] for name in names]
            assert torch.equal(rows_of(own), torch.cat(expected))
    assert isinstance(pair.target.embeddings, LowBitEmbedding) == kind.table
    # The same weights in float32 differ by what the rounding of inputs changes.
    expected = run(load(plain, None, UNPACKED)).log_softmax(-1)
    actual = run(pair).log_softmax(-1)
    assert (expected.exp() * (expected - actual)).sum(-1).mean() < 0.01


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_bits_of_16_are_the_weights_in_float32(tmp_path, kind):
    stored, plain = write(tmp_path, kind)
    pair = load(stored, None, UNPACKED)
    assert not any(isinstance(x, LowBitLinear) for x in pair.target.model.modules())
    assert torch.equal(run(pair), run(load(plain, None, UNPACKED)))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "part"), [("GPTQ", "scales"), ("AWQ", "qzeros"), ("W4A16", "weight_scale")]
)
def test_tensors_that_do_not_fit_each_other_are_refused(tmp_path, name, part):
    stored, _ = write(tmp_path, KINDS[name])
    tensors = load_file(stored / "model.safetensors")
    damaged = f"model.layers.1.mlp.down_proj.{part}"
    tensors[damaged] = tensors[damaged][:-1].copy()
    save(stored, read_config(stored), tensors)
    with pytest.raises(CheckpointError, match=r"damaged: the tensors of .*down_proj do not fit"):
        load(stored, None, CPU)


def test_adapters_are_left_to_transformers(tmp_path):
    """It has no layers for them, either, and says so."""
    stored, _ = write(tmp_path, KINDS["GPTQ"])
    settings, given = LoadConfig(adapter="adapter"), (torch.device("cpu"), torch.float32)
    config = read_model_config(stored)
    reason = load_decoder(stored, config, settings, *given, pack=True, processes=1)
    assert reason == "adapters are not merged into weights of few bits"


def test_layers_with_the_same_input_are_one_module_where_their_formats_agree(tmp_path):
    for name, parts in {"GPTQ": 1, "GPTQ, act-order": 3}.items():
        stored, _ = write(tmp_path / name, KINDS[name])
        layer = load(stored, None, CPU).target.model.layers[0]
        assert sum(isinstance(x, LowBitLinear) for x in layer.mixer.qkv.modules()) == parts


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["GPTQ, act-order", "AWQ", "W4A16", "W8A8"])
def test_models_of_transformers_keep_their_bits(tmp_path, monkeypatch, name):
    stored, plain = write(tmp_path, KINDS[name])
    expected = run(load(plain, None, UNPACKED)).log_softmax(-1)
    use_models(monkeypatch)
    lack_layers(monkeypatch)
    pair = load(stored, None, FLOAT32)
    assert isinstance(pair.target, ModelTarget)
    assert pair.inexact is None
    layers = [x for x in pair.target.model.modules() if isinstance(x, LowBitLinear)]
    assert len(layers) == 2 * 7
    actual = run(pair).log_softmax(-1)
    assert (expected.exp() * (expected - actual)).sum(-1).mean() < 0.01


def test_models_of_transformers_lack_some_layers(tmp_path, monkeypatch):
    stored, _ = write(tmp_path / "mlx", KINDS["MLX, 4 bits"])
    other, _ = write(tmp_path / "gptq", KINDS["GPTQ"])
    assert keeps_bits(stored, on_cpu=True)
    assert not keeps_bits(stored, on_cpu=False)
    lack_layers(monkeypatch)
    assert not keeps_bits(stored, on_cpu=True)
    assert keeps_bits(other, on_cpu=True)
    edit_config(other, lambda c: c.update(num_hidden_layers=1))
    assert not keeps_bits(other, on_cpu=True)


def test_formats_that_are_not_read_run_as_before(tmp_path):
    """Here without the package that they need."""
    stored, _ = write(tmp_path, KINDS["AWQ"])
    edit_config(stored, lambda c: c["quantization_config"].update(version="gemv"))
    with pytest.raises(Exception, match="a package that is not installed"):
        load(stored, None, CPU)
