"""The PyTorch backend, on a CPU and in float32."""

from dataclasses import asdict, replace

import pytest

from treeflash.testing import DIALECTS, HYBRID_FAMILIES, BackendSuite, require

require("torch")

from laws import BACKEND_SAMPLE, DRAFTING, FAMILIES, LAWS, VARIANT_SAMPLE
from parts import load_with_parts
from treeflash_cuda.backend import load as load_cuda


@BACKEND_SAMPLE
class TestConformance(BackendSuite):
    families = (*BackendSuite.families, "qwen3_sliding")
    hybrids = HYBRID_FAMILIES
    exact_dtypes = ("bfloat16", "float16")
    dialects = tuple(DIALECTS)

    @pytest.fixture
    def load(self):
        return lambda target, drafter, config: load_cuda(
            target, drafter, replace(config, device="cpu")
        )


@VARIANT_SAMPLE
class TestStaticShapes(BackendSuite):
    """What a GPU computes, by plain products: attention in parts, and what graphs capture."""

    laws, families = LAWS | DRAFTING, FAMILIES
    dialects = tuple(DIALECTS)

    @pytest.fixture
    def load(self, monkeypatch):
        return lambda target, drafter, config: load_with_parts(
            monkeypatch, target, drafter, **asdict(replace(config, device="cpu"))
        )
