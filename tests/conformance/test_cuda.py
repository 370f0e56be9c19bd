"""The PyTorch backend, on the processor and in float32."""

from dataclasses import replace

import pytest

from treeflash.testing import BackendSuite, require

require("torch")

from treeflash_cuda.backend import load as load_cuda  # noqa: E402


class TestConformance(BackendSuite):
    @pytest.fixture
    def load(self):
        return lambda target, drafter, config: load_cuda(
            target, drafter, replace(config, device="cpu")
        )


class TestFixedShapes(BackendSuite):
    """What a GPU captures as graphs, run as it is."""

    @pytest.fixture
    def load(self):
        return lambda target, drafter, config: load_cuda(
            target, drafter, replace(config, device="cpu", cuda_graphs=True)
        )
