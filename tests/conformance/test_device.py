"""The suite on real accelerators: CUDA and Metal, in float32."""

import pytest

from treeflash.testing import BackendSuite, require


@pytest.mark.device
class TestCuda(BackendSuite):
    @pytest.fixture
    def load(self):
        require("torch")
        import torch
        from treeflash_cuda.backend import load

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return load


@pytest.mark.device
class TestMetal(BackendSuite):
    @pytest.fixture
    def load(self):
        require("mlx.core")
        import mlx.core as mx
        from treeflash_mlx.backend import load

        if not mx.metal.is_available():
            pytest.skip("needs Metal")
        return load
