"""What is found block by block is what is found among all."""

import pytest

from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda.numerics import largest, topk


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
