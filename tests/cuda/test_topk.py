"""What is found block by block is what is found among all."""

import pytest

from treeflash.testing import require

require("torch")

import torch  # noqa: E402
from treeflash_cuda.topk import largest, topk  # noqa: E402


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
    assert torch.equal(largest(x, k), x.topk(k).indices.sort().values)


@pytest.mark.parametrize("k", [1, 64])
def test_largest_counts_nan_as_largest(k):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(k))
    x[[5, 700]] = torch.nan
    assert len(largest(x, k)) == k
    assert {5, 700} & set(largest(x, k).tolist())
    assert largest(torch.full((1000,), torch.nan), k).shape == (k,)
