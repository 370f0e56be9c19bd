"""The conformance suite in the memory layout of CUDA's attention kernels."""

from dataclasses import replace

import pytest

from treeflash.testing import BackendSuite, require

require("torch")

import torch
import torch.nn.functional as F
from fake_cuda import use_cuda_strides
from laws import DRAFTING, FAMILIES, LAWS, VARIANT_SAMPLE
from treeflash_cuda.backend import load as load_cuda


@VARIANT_SAMPLE
class TestConformance(BackendSuite):
    laws, families = LAWS | DRAFTING, FAMILIES
    dialects = ("dflash", "deepspec-gemma4", "specforge-domino")  # the others attend like these
    exact_dtypes = ("bfloat16",)

    @pytest.fixture(autouse=True)
    def _strides(self, monkeypatch):
        use_cuda_strides(monkeypatch)

    @pytest.fixture
    def load(self):
        return lambda target, drafter, config: load_cuda(
            target, drafter, replace(config, device="cpu")
        )


def test_values_are_kept_and_strides_are_those_of_cuda(monkeypatch):
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    mask = torch.zeros(5, 7)
    plain = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
    assert plain.is_contiguous()
    use_cuda_strides(monkeypatch)
    moved = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
    assert torch.equal(moved, plain)
    assert moved.transpose(1, 2).is_contiguous()
