"""Numerics that all devices share: the largest of many numbers, and uploads of arrays."""

import numpy as np
import pytest
from stand_ins import stand_in

from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda.numerics import largest, topk, upload, upload_all


@pytest.mark.parametrize("size", [40, 1000, 49_152, 50_257])
@pytest.mark.parametrize("k", [1, 16, 64, 1000])
def test_topk(size, k):
    # Few different values: many are equal.
    x = torch.randint(-300, 300, (5, size), generator=torch.Generator().manual_seed(size)) / 7
    values, places = topk(x, k)
    assert torch.equal(values, x.topk(min(k, size)).values)
    assert torch.equal(x.gather(1, places), values)
    assert all(len(row.unique()) == len(row) for row in places)


@pytest.mark.parametrize("k", [1, 64, 1000])
def test_largest(k):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(k))
    rows = torch.stack([x, -x])
    assert torch.equal(largest(rows, k), rows.topk(k).indices.sort().values)


@pytest.mark.parametrize("k", [1, 64])
def test_largest_counts_nan_as_largest(k):
    x = torch.randn(1, 1000, generator=torch.Generator().manual_seed(k))
    x[0, [5, 700]] = torch.nan
    (found,) = largest(x, k)
    assert len(found) == k
    assert {5, 700} & set(found.tolist())
    assert largest(torch.full((1, 1000), torch.nan), k).shape == (1, k)


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

    stand_in(monkeypatch, torch.Tensor, pin_memory=lambda tensor: tensor.clone(), to=copy_later)
    arrays = [np.full(6, n, np.int32) for n in range(200)]
    uploaded = [upload(array, torch.device("cuda")) for array in arrays]
    for target, source in queue:
        target.copy_(source)
    np.testing.assert_array_equal([x.numpy() for x in uploaded], arrays)
