"""Uploads of arrays to a device."""

import numpy as np

from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda.numerics import upload, upload_all


def test_arrays_of_any_shape_are_uploaded_together():
    arrays = [np.arange(3), np.ones((2, 2), np.bool_), np.zeros((0, 4), np.int64), np.array([-1])]
    found = upload_all(arrays, torch.device("cpu"))
    for part, array in zip(found, arrays, strict=True):
        assert part.dtype == torch.int32
        np.testing.assert_array_equal(part.numpy(), array.astype(np.int32), strict=True)
    assert upload_all([], torch.device("cpu")) == []


def test_uploads_that_are_under_way_are_not_overwritten(monkeypatch):
    """The host goes on while copies from pinned memory wait for their turn."""
    queue = []

    def copy_later(tensor, device, non_blocking=False):
        queue.append((torch.empty_like(tensor), tensor if non_blocking else tensor.clone()))
        return queue[-1][0]

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch.Tensor, "to", copy_later)
    arrays = [np.full(6, n, np.int32) for n in range(200)]
    uploaded = [upload(array, torch.device("cuda")) for array in arrays]
    for target, source in queue:
        target.copy_(source)
    np.testing.assert_array_equal([x.numpy() for x in uploaded], arrays)
