"""The numbers of keys and values in 8 bits, and what cannot be stored so."""

from dataclasses import replace

import pytest

from treeflash.config import LoadConfig
from treeflash.errors import ConfigError
from treeflash.testing import require
from treeflash.testing.models import write_target

require("torch")

import torch
from treeflash_cuda.backend import load
from treeflash_cuda.cache import dequantise, quantise

ROUNDED = LoadConfig(device="cpu", dtype="float32", kv_bits=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_by_half_a_step(dtype):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0], x[0, 1] = 0, 1000 * x[0, 1]
    stored = quantise(x)
    assert (stored.dtype, stored.shape) == (torch.int8, (3, 5, 20))
    y = dequantise(stored, dtype)
    assert y.dtype == dtype
    step = x.abs().amax(-1, keepdim=True).float() / 127
    # The scale and the product are rounded to the dtype.
    bound = step / 2 + 2 * torch.finfo(dtype).eps * x.abs().amax(-1, keepdim=True).float()
    assert ((x.float() - y.float()).abs() <= bound).all()
    assert (y[0, 0] == 0).all()


def test_what_is_not_a_number_stays_so():
    x = torch.ones(2, 8)
    x[0, 3] = torch.nan
    y = dequantise(quantise(x), torch.float32)
    assert y[0].isnan().all()
    assert (y[1] == 1).all()


def test_other_bits_and_widths_are_refused(tmp_path):
    write_target(tmp_path, "llama", seed=1)
    with pytest.raises(ConfigError, match="kv_bits must be 8 on the cuda backend, got 4"):
        load(tmp_path, None, replace(ROUNDED, kv_bits=4))
    write_target(tmp_path / "narrow", "llama", seed=1, hidden_size=24)
    with pytest.raises(ConfigError, match="multiple of 4, but llama has heads of width 6"):
        load(tmp_path / "narrow", None, ROUNDED)
