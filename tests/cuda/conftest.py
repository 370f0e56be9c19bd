"""What tests of the PyTorch backend share."""

import os
import sys

import pytest

# Triton's kernels run on the CPU. Triton reads the variable when something imports it.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def frequent_switches():
    """Threads that give way far more often than by default."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def see_gpus(monkeypatch):
    """Let PyTorch count this number of GPUs from now on, whatever the machine has."""
    import torch

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.fixture
def cuda(monkeypatch):
    """CUDA devices whose tensors hold no values."""
    import torch
    from fake_cuda import FakeCuda

    if not torch.backends.cuda.is_built():
        pytest.skip("needs a build of PyTorch with CUDA, as PyPI has it for Linux, but no GPU")
    with FakeCuda(monkeypatch) as mode:
        yield mode
