"""Fake CUDA tensors raise where real ones would."""

import pytest

from treeflash.testing import require

require("torch")

import torch
from fake_cuda import DEVICE


def test_mixing_devices_raises(cuda):
    with pytest.raises(RuntimeError, match=r"found (at least )?two different devices|device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


def test_mixing_dtypes_raises(cuda):
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ones(3, 3, device=DEVICE) @ torch.ones(3, 3, device=DEVICE).half()


def test_numpy_of_a_device_tensor_raises(cuda):
    with pytest.raises(TypeError, match="cuda:0 tensors cannot be converted"):
        torch.ones(3, device=DEVICE).numpy()
    assert torch.ones(3, device=DEVICE).cpu().numpy().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to(DEVICE),
        lambda x: x[x > 0],
    ],
)
def test_moving_data_during_a_capture_raises(cuda, move):
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(Exception, match=r"during a capture|nonzero"), torch.cuda.graph(None):
        move(x)
