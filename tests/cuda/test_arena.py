"""Regions of an arena: allocated in the first gap, merged when given back, never moved."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treeflash.errors import MemoryInUseError
from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda import cache as arena_module
from treeflash_cuda.cache import Arena, KVCache
from treeflash_cuda.state import State

LIKE = torch.zeros(1, 2, 3, 4)  # keys of a layer
LAYERS = 3
COLUMN = 2 * LAYERS * 2 * 4 * 4  # bytes of a column in float32


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch):
    monkeypatch.setattr(arena_module, "SLAB_BYTES", 100 * COLUMN)
    with torch.inference_mode():
        yield


def columns(region):
    return range(region.first, region.first + region.storage.shape[3])


def test_short_texts_share_an_allocation():
    arena = Arena(LAYERS)
    first, second = arena.take(30, LIKE), arena.take(70, LIKE)
    assert first.slab is second.slab
    assert (columns(first), columns(second)) == (range(30), range(30, 100))
    assert first.storage.shape == (LAYERS, 2, 2, 30, 4)
    assert first.storage.nbytes == 30 * arena.column_nbytes == 30 * COLUMN
    assert arena.take(1, LIKE).slab is not first.slab


def test_a_text_larger_than_a_slab_has_one_of_its_size():
    arena = Arena(LAYERS)
    region = arena.take(150, LIKE)
    assert region.slab.columns == 150
    assert region.slab.free == []


def test_gaps_beside_each_other_merge():
    arena = Arena(LAYERS)
    regions = [arena.take(25, LIKE) for _ in range(4)]
    slab = regions[0].slab
    for number, free in [
        (0, [(0, 25)]),
        (2, [(0, 25), (50, 25)]),
        (1, [(0, 75)]),
        (3, [(0, 100)]),
    ]:
        arena.give_back(regions[number])
        assert slab.free == free
    assert slab.is_free


def test_the_first_gap_that_is_large_enough_is_taken():
    arena = Arena(LAYERS)
    first, _, third, _ = (arena.take(size, LIKE) for size in (20, 10, 40, 10))
    arena.give_back(first)
    arena.give_back(third)
    assert arena.take(30, LIKE).first == 30
    assert arena.take(15, LIKE).first == 0
    assert arena.take(10, LIKE).first == 60
    assert first.slab.free == [(15, 5), (80, 20)]


def test_slabs_are_given_back_but_for_the_smallest():
    arena = Arena(LAYERS)
    large, small = arena.take(300, LIKE), arena.take(40, LIKE)
    arena.give_back(large)
    assert len(arena.slabs) == 2  # none is left if the other text ends, so one is kept
    arena.give_back(small)
    assert [slab.columns for slab in arena.slabs] == [100]
    assert arena.take(50, LIKE).slab is arena.slabs[0]


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6))
def test_regions_never_overlap_move_or_leak(seed):
    rng = np.random.default_rng(seed)
    arena = Arena(LAYERS)
    held = []
    for number in range(60):
        if held and rng.random() < 0.5:
            region, address, value = held.pop(int(rng.integers(len(held))))
            assert region.storage.data_ptr() == address
            assert (region.storage == value).all()
            arena.give_back(region)
        else:
            region = arena.take(int(rng.integers(1, 130)), LIKE)
            region.storage.fill_(number)
            held.append((region, region.storage.data_ptr(), number))
    for region, address, value in held:
        assert region.storage.data_ptr() == address
        assert (region.storage == value).all()
        arena.give_back(region)
    assert [slab.is_free for slab in arena.slabs] == [True]


def test_keys_in_half_precision_take_half():
    arena = Arena(LAYERS)
    region = arena.take(10, LIKE.bfloat16())
    assert region.storage.dtype == torch.bfloat16
    assert 10 * arena.column_nbytes == region.storage.nbytes == 5 * COLUMN


def reserved_arena(columns):
    arena = Arena(LAYERS)
    arena.set_shape(LIKE)
    arena.reserved_nbytes = columns * COLUMN
    return arena


def test_reserved_memory_is_one_allocation_for_all():
    arena = reserved_arena(300)
    regions = [arena.take(120, LIKE) for _ in range(2)]
    with pytest.raises(MemoryInUseError, match=r"no room for another .* until a sequence ends"):
        arena.take(120, LIKE)
    assert arena.take(60, LIKE).slab is regions[0].slab
    arena.give_back(regions[0])
    assert arena.take(120, LIKE).first == 0
    (slab,) = arena.slabs
    assert slab.columns == 300


def test_a_sequence_that_reserved_memory_can_never_hold_does_not_wait():
    for taken in (0, 10):
        arena = reserved_arena(300)
        if taken:
            arena.take(taken, LIKE)
        with pytest.raises(MemoryError, match=r"301 positions needs .* are set aside") as raised:
            arena.take(301, LIKE)
        assert not isinstance(raised.value, MemoryInUseError)


def test_a_sequence_takes_its_room_when_it_starts():
    """It gives the room back if its drafter has none."""
    target, drafter = reserved_arena(100), reserved_arena(50)
    state = State(target, drafter, 40, 10)
    assert target.slabs[0].free == [(40, 60)]
    assert drafter.slabs[0].is_free is False
    with pytest.raises(MemoryInUseError):
        State(target, drafter, 40, 10)
    assert target.slabs[0].free == [(40, 60)]
    with pytest.raises(MemoryInUseError):
        state.fork(0, 40)
    assert target.slabs[0].free == [(40, 60)]
    state.close()
    assert target.slabs[0].is_free
    assert drafter.slabs[0].is_free


def test_a_copy_uses_the_room_that_it_has():
    arena = reserved_arena(100)
    first, copy = KVCache(arena, 40), KVCache(arena, 60)
    first.allocate().storage.fill_(3)
    first.commit(30)
    copy.allocate()
    copy.copy_from(first, 20)
    assert arena.slabs[0].free == []
    assert (copy.taken.storage[:, :, :, :20] == 3).all()
