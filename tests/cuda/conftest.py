"""What tests of the PyTorch backend share."""

import os

import pytest
from stand_ins import stand_in

# Triton's kernels run on the CPU. Triton reads the variable when something imports it.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    """The folder of a target for small training runs."""
    from small_training import TINY_VOCAB

    from treeflash.testing.models import write_target

    folder = tmp_path_factory.mktemp("target")
    write_target(folder, "llama", seed=1, vocab_size=TINY_VOCAB)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folders of a tiny Qwen3 and a drafter for it, which tests only read."""
    from treeflash.testing.models import write_pair

    return write_pair(tmp_path_factory.mktemp("pair"), "qwen3", vocab_size=40)


@pytest.fixture
def own_threads():
    """Give PyTorch's threads back when the test ends."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def see_gpus(monkeypatch):
    """Let PyTorch count this number of GPUs from now on, whatever the machine has."""
    import torch

    def see(count):
        stand_in(
            monkeypatch, torch.cuda, is_available=lambda: count > 0, device_count=lambda: count
        )

    return see


@pytest.fixture
def see_memory(monkeypatch):
    """Let PyTorch see these free and total bytes of a GPU, or of each one, from now on."""
    import torch

    def see(free, total=0):
        find = free if callable(free) else lambda device: free
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (find(device), total))

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
