"""The PyTorch backend, on a CPU and in float32."""

from dataclasses import replace

import pytest

from treeflash.testing import DIALECTS, HYBRID_FAMILIES, BackendSuite, require

require("torch")

from treeflash_cuda.backend import load as load_cuda  # noqa: E402


class TestConformance(BackendSuite):
    hybrids = HYBRID_FAMILIES
    dialects = tuple(DIALECTS)

    @pytest.fixture
    def load(self):
        return lambda target, drafter, config: load_cuda(
            target, drafter, replace(config, device="cpu")
        )


class TestStaticShapes(BackendSuite):
    """The forward passes that a GPU captures as graphs, run without capturing."""

    dialects = tuple(DIALECTS)

    @pytest.fixture
    def load(self):
        return lambda target, drafter, config: load_cuda(
            target, drafter, replace(config, device="cpu", cuda_graphs=True)
        )
