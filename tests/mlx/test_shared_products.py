"""Products of long prompts, of whose rows the CPU takes a share; here both halves run on a CPU."""

import pytest

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_pair

require("mlx_lm")

import mlx.core as mx
from metal_executor import DESCENDING, install, require_compiler
from mlx import nn
from recordings import recording
from treeflash_mlx import backend as backend_module
from treeflash_mlx import metal_kernels, shared_products
from treeflash_mlx.backend import MlxBackend, load
from treeflash_mlx.shared_products import choose_shares, gpu_rows, multiply_shared, prompt_layers
from treeflash_mlx.target import Target


def layer(bits, dtype=mx.bfloat16, bias=False):
    linear = nn.Linear(128, 48, bias=bias)
    linear.set_dtype(dtype)
    return linear.to_quantized(64, bits) if bits < 16 else linear


def inputs(*rows, dtype=mx.bfloat16):
    return mx.random.normal((*rows, 128), key=mx.random.key(1)).astype(dtype)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("rows", [(600,), (1, 37), (2, 64)])
def test_both_halves_together_are_the_product(bits, rows):
    module, x = layer(bits), inputs(*rows)
    for share in shared_products.SHARES:
        with recording(mx, "matmul") as calls:
            found = multiply_shared(module, x, share)
        expected = module(x)
        assert found.shape == expected.shape
        assert metal_kernels.relative_error(found, expected) < 2e-2
        ((on_cpu, _),) = calls
        assert len(on_cpu) == x.size // 128 - gpu_rows(x.size // 128, share)


def test_the_gpu_has_whole_tiles():
    assert [gpu_rows(n, 0.25) for n in (1024, 1000, 40, 20)] == [768, 768, 32, 20]


@pytest.fixture
def _few_rows(monkeypatch):
    for name in ("LEAST_ROWS", "TIMED_ROWS"):
        monkeypatch.setattr(shared_products, name, 64)


@pytest.mark.usefixtures("_few_rows")
def test_the_share_that_wins_is_used_for_many_rows(metal):
    seen = []

    def speedup(kernel, plain, start, nbytes):
        assert mx.allclose(kernel(start, 0), plain(start, 0), atol=1e-2)
        seen.append(len(start))
        return (1.1, 1.4, 1.2)[len(seen) - 1]

    metal.speedup = speedup
    module = layer(4, bias=True)
    few, many = inputs(63), inputs(1, 80)
    expected = module(few), module(many)
    choose_shares(prompt_layers(nn.Sequential(module)))
    assert seen == [64] * 3
    with recording(shared_products, "multiply_shared") as calls:
        assert mx.array_equal(module(few), expected[0])
        assert metal_kernels.relative_error(module(many), expected[1]) < 2e-2
    assert [share for _, _, share in calls] == [0.25]
    (verdict,) = metal_kernels.VERDICTS["products of long prompts, 48 x 128 in 4 bits"].values()
    assert verdict == (
        "used, 1.40 times as fast as MLX's operation with 25% of the rows on the CPU"
    )


def test_a_layer_in_float32_stays_on_the_gpu(metal):
    assert prompt_layers(nn.Sequential(layer(16, mx.float32), layer(4, mx.float32))) == {}


def test_the_output_head_is_not_timed(tmp_path):
    """It multiplies the last row of a prompt alone, and more rows take seconds on a small Mac."""
    pair = write_pair(tmp_path, "qwen3", hidden_size=128, vocab_size=96, layers=1)
    with recording(backend_module, "choose_shares") as calls:
        backend = load(pair[0], None, LoadConfig(dtype="bfloat16"))
    ((layers,),) = calls
    timed = [module for modules in layers.values() for module in modules]
    attention = backend.target.layers[0].self_attn
    assert any(module is attention.q_proj for module in timed)
    assert backend.target.lm_head is not None
    assert all(module is not backend.target.lm_head for module in timed)


def test_nothing_is_shared_without_metal():
    module = layer(4)
    choose_shares(prompt_layers(nn.Sequential(module)))
    assert type(module) is nn.QuantizedLinear


# Ten seconds in the executor; the tests above compare the products with whole ones.
@pytest.mark.nightly
@pytest.mark.usefixtures("_few_rows")
def test_texts_after_a_shared_prompt_are_those_of_plain_decoding(executor, tmp_path, monkeypatch):
    """Prompts alone are shared, in half precision."""
    require_compiler()
    executor.schedules = (DESCENDING,)
    pair = write_pair(tmp_path, "qwen3", hidden_size=128, vocab_size=64, layers=3)
    prompt = [3, 4, 5, 6] * 20
    with monkeypatch.context() as patch:
        executor.speedup = lambda *_: 2
        install(executor, patch)
        backend = load(*pair, LoadConfig(dtype="float16"))
        with recording(shared_products, "multiply_shared") as calls:
            config = DecodeConfig(method="treeflash", budget=6, max_tokens=6)
            drafted = generate(backend, prompt, config)
        assert {x.size // x.shape[-1] for _, x, _ in calls} == {79}  # the last token runs alone
        assert len(calls) >= 3 * 7  # layers and products
        assert drafted == generate(backend, prompt, DecodeConfig(method="ar", max_tokens=6))


# Ten seconds in the executor, which runs every check of kernels at load.
@pytest.mark.nightly
def test_exact_mode_shares_nothing(metal, tmp_path, monkeypatch):
    metal.schedules, metal.speedup = (DESCENDING,), lambda *_: 2
    monkeypatch.setattr(Target, "use_exact_kernels", lambda _: None)
    monkeypatch.setattr(MlxBackend, "check_exact", lambda _: None)
    pair = write_pair(tmp_path, "qwen3", hidden_size=128, vocab_size=64, layers=1)
    with recording(backend_module, "choose_shares") as calls:
        load(pair[0], None, LoadConfig(dtype="float16", exact=True))
        load(pair[0], None, LoadConfig(dtype="float16"))
    assert [bool(layers) for (layers,) in calls] == [False, True]
