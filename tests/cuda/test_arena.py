"""Regions of an arena: they never overlap, move or leak, and reserved memory has a limit."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treeflash.errors import MemoryInUseError
from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda.cache import Arena
from treeflash_cuda.state import State

LIKE = torch.zeros(1, 2, 3, 4)  # keys of a layer
LAYERS = 3
COLUMN = 2 * LAYERS * 2 * 4 * 4  # bytes of a column in float32


@pytest.fixture(autouse=True)
def _inference_mode():
    with torch.inference_mode():
        yield


def arena_of_slabs(columns):
    arena = Arena(LAYERS)
    arena.slab_nbytes = columns * COLUMN
    return arena


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6))
def test_regions_never_overlap_move_or_leak(seed):
    rng, arena = np.random.default_rng(seed), arena_of_slabs(100)
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
    # Gaps beside each other are one, and one allocation is kept for what comes.
    (slab,) = arena.slabs
    assert slab.is_free
    assert arena.take(slab.columns, LIKE).slab is slab


def test_short_texts_share_an_allocation_and_a_long_one_has_its_own():
    arena = arena_of_slabs(100)
    first, second, long = (arena.take(size, LIKE) for size in (30, 70, 150))
    assert first.slab is second.slab is not long.slab
    assert (first.storage.nbytes, long.slab.columns) == (30 * COLUMN, 150)
    arena.give_back(first)
    assert arena.take(20, LIKE).slab is second.slab


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
