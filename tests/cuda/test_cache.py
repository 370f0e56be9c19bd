"""Keys and values of texts: written, committed, copied, closed, and computed by a forward pass."""

from contextlib import nullcontext

import numpy as np
import pytest

from treeflash.errors import UnsupportedModelError
from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda.cache import Arena, KVCache, PackedRows, TreeCache
from treeflash_cuda.numerics import upload_all

LAYERS = 2


@pytest.fixture(autouse=True)
def _inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture
def arena():
    return Arena(LAYERS)


def random(n, seed=0, heads=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, LAYERS, 1, heads, n, 4, generator=generator)


def write(text, values):
    """Write a block of n rows in all layers."""
    rows = PackedRows([(text, text.length, values.shape[4])], values[0, 0])
    for layer, (k, v) in enumerate(zip(*values, strict=True)):
        rows.write(layer, k, v)


def expected(values, rows):
    """(layers, 2, kv_heads, n, head_dim) of some rows."""
    return values[:, :, 0, :, rows].transpose(0, 1).numpy()


def test_rows_of_a_path_are_kept_in_its_order(arena):
    text, first, second = KVCache(arena, 20), random(6), random(5, seed=1)
    write(text, first)
    slab, region = text.taken.slab, text.taken
    slab.write(torch.arange(3) + region.first, slab.gather(torch.tensor([0, 2, 5]) + region.first))
    text.commit(3)
    write(text, second)
    text.commit(2)  # its first rows, which are in place
    wanted = np.concatenate([expected(first, [0, 2, 5]), expected(second, [0, 1])], 3)
    np.testing.assert_array_equal(text.read(), wanted)
    assert text.length == 5


def test_a_block_that_is_not_committed_is_overwritten(arena):
    text, first, second = KVCache(arena, 20), random(6), random(4, seed=1)
    write(text, first)
    write(text, second)
    text.commit(4)
    np.testing.assert_array_equal(text.read(), expected(second, range(4)))


@pytest.mark.parametrize("length", [0, 2, 4, 9])
def test_a_copy_shares_no_memory(arena, length):
    text, values = KVCache(arena, 20), random(4)
    write(text, values)
    text.commit(4)
    copy = KVCache(arena, 30)
    copy.copy_from(text, length)
    kept = min(length, 4)
    assert copy.length == kept
    if kept:
        text.taken.storage.zero_()
        np.testing.assert_array_equal(copy.read(), expected(values, range(kept)))
        assert copy.taken.storage.shape[3] == 30


def test_a_text_holds_memory_from_its_first_block_until_it_is_closed(arena):
    text = KVCache(arena, 20)
    assert text.nbytes == 0
    write(text, random(3))
    assert text.nbytes == 20 * arena.column_nbytes == 20 * 2 * LAYERS * 2 * 4 * 4
    text.close()
    text.close()
    assert (text.nbytes, text.length) == (0, 0)
    assert [slab.is_free for slab in arena.slabs] == [True]


def test_a_text_does_not_outgrow_its_capacity(arena):
    text = KVCache(arena, 5)
    other = KVCache(arena, 5)  # the columns behind
    write(other, random(5))
    with pytest.raises(AssertionError, match="outgrown"):
        write(text, random(6))


def test_layers_of_other_shapes_are_refused(arena):
    text = KVCache(arena, 5)
    write(text, random(2))
    with pytest.raises(UnsupportedModelError, match="different shapes"):
        write(text, random(2, heads=3))
    cache = TreeCache([text], [2])
    for heads, refusal in ((2, nullcontext()), (3, pytest.raises(UnsupportedModelError))):
        (k,), (v,) = random(2, heads=heads)[:, :1]
        with refusal:
            cache.update(k, v, heads - 2)


def test_a_forward_pass_writes_each_texts_rows_to_its_own_columns(arena):
    texts, sizes = [KVCache(arena, 20) for _ in range(3)], [2, 4, 1]
    for text, length in zip(texts, (3, 0, 5), strict=True):
        write(text, random(8, seed=9))
        text.commit(length)
    values = random(7)
    cache = TreeCache(texts, sizes)
    for layer in range(LAYERS):
        k, v = cache.update(values[0, layer], values[1, layer], layer)
        assert k is not None
        assert cache.layer == layer
        assert torch.equal(v, values[1, layer])
    first = 0
    for text, size in zip(texts, sizes, strict=True):
        before, start = text.read(), text.length
        text.commit(size)
        np.testing.assert_array_equal(text.read()[:, :, :, :start], before)
        own = expected(values, range(first, first + size))
        np.testing.assert_array_equal(text.read()[:, :, :, start:], own)
        first += size


def test_a_forward_pass_of_one_text_sees_its_columns(arena):
    text, before, values = KVCache(arena, 20), random(3, seed=1), random(4)
    write(text, before)
    text.commit(3)
    k, v = TreeCache([text], [4]).update(values[0, 1], values[1, 1], 1)
    assert torch.equal(k, torch.cat([before[0, 1], values[0, 1]], 2))
    assert torch.equal(v, torch.cat([before[1, 1], values[1, 1]], 2))


def test_arrays_of_any_shape_are_uploaded_together():
    arrays = [np.arange(3), np.ones((2, 2), np.bool_), np.zeros((0, 4), np.int64), np.array([-1])]
    found = upload_all(arrays, torch.device("cpu"))
    for part, array in zip(found, arrays, strict=True):
        assert part.dtype == torch.int32
        np.testing.assert_array_equal(part.numpy(), array.astype(np.int32), strict=True)
    assert upload_all([], torch.device("cpu")) == []
