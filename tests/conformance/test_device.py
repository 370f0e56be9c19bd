"""The suite on real accelerators: CUDA and Metal, in float32."""

from dataclasses import replace

import pytest

from treeflash.testing import BackendSuite, require


def load_cuda(target, drafter, config):
    require("torch")
    import torch
    from treeflash_cuda.backend import load

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return load(target, drafter, config)


@pytest.mark.device
class TestCuda(BackendSuite):
    @pytest.fixture
    def load(self):
        return load_cuda


@pytest.mark.device
class TestCudaGraphs(BackendSuite):
    @pytest.fixture
    def load(self):
        return lambda target, drafter, config: load_cuda(
            target, drafter, replace(config, compile=True)
        )


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
