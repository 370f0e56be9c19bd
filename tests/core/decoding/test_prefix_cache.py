"""States that are kept: which one is found, and which one falls out."""

from dataclasses import dataclass

import pytest

from treeflash.decoding.disk_cache import Prefix
from treeflash.decoding.prefix_cache import PrefixCache


@dataclass(eq=False)
class State:
    nbytes: int = 10
    closed: bool = False
    snapshots: tuple[int, ...] | None = None

    def restorable(self, length):
        if self.snapshots is None:
            return length
        return max((n for n in self.snapshots if n <= length), default=0)

    def close(self):
        self.closed = True


@pytest.fixture
def cache():
    return PrefixCache(30)


def test_the_longest_common_prefix_is_found(cache):
    short, long = State(), State()
    cache.put(Prefix("pair", [1, 2, 9]), short)
    cache.put(Prefix("pair", [1, 2, 3, 4]), long)
    assert cache.find(Prefix("pair", [1, 2, 3, 7, 8])) == (long, 3)
    assert cache.find(Prefix("pair", [1, 2, 9, 9])) == (short, 3)
    assert cache.find(Prefix("pair", [1, 2, 3])) == (long, 3)
    assert cache.find(Prefix("pair", [2, 1])) is None
    assert cache.find(Prefix("pair", [])) is None


def test_the_least_recently_used_falls_out(cache):
    states = [State() for _ in range(4)]
    for n, state in enumerate(states[:3]):
        cache.put(Prefix("pair", [n, n]), state)
    cache.find(Prefix("pair", [0, 5]))
    cache.put(Prefix("pair", [3, 3]), states[3])
    assert [state.closed for state in states] == [False, True, False, False]
    assert (len(cache), cache.nbytes) == (3, 30)


def test_a_state_that_is_larger_than_the_cache_is_closed_at_once_and_displaces_no_other(cache):
    kept, prefix, large = State(), State(), State(nbytes=31)
    cache.put(Prefix("pair", [2]), kept)
    cache.put(Prefix("pair", [1]), prefix)
    cache.put(Prefix("pair", [1, 3]), large)
    assert large.closed
    assert (kept.closed, prefix.closed) == (False, False)
    assert cache.find(Prefix("pair", [1, 3])) == (prefix, 1)


def test_a_state_of_just_the_caches_size_is_kept(cache):
    state = State(nbytes=30)
    cache.put(Prefix("pair", [1]), state)
    assert (state.closed, cache.nbytes) == (False, 30)


def test_of_equal_prefixes_the_older_state_is_forked_and_counts_as_used(cache):
    states = [State() for _ in range(3)]
    cache.put(Prefix("pair", [1, 2]), states[0])
    cache.put(Prefix("pair", [1, 3]), states[1])
    cache.put(Prefix("pair", [2]), states[2])
    assert cache.find(Prefix("pair", [1])) == (states[0], 1)
    cache.shrink(20)
    assert [state.closed for state in states] == [False, True, False]


def test_a_longer_state_replaces_its_prefixes(cache):
    old, other, new = State(), State(), State()
    cache.put(Prefix("pair", [1, 2]), old)
    cache.put(Prefix("other", [1, 2]), other)
    cache.put(Prefix("pair", [1, 2, 3]), new)
    assert old.closed
    assert not other.closed
    assert cache.find(Prefix("pair", [1, 2])) == (new, 2)


def test_a_state_with_snapshots_is_found_where_it_can_be_forked(cache):
    state = State(snapshots=(2, 5))
    cache.put(Prefix("pair", [1, 2, 3, 4, 5]), state)
    assert cache.find(Prefix("pair", [1, 2, 3, 4, 5, 6])) == (state, 5)
    assert cache.find(Prefix("pair", [1, 2, 3, 4, 9])) == (state, 2)
    assert cache.find(Prefix("pair", [1, 9])) is None


def test_a_longer_state_without_a_snapshot_keeps_its_prefixes(cache):
    old, new, other = State(snapshots=(2,)), State(snapshots=(4,)), State(snapshots=(2, 4))
    cache.put(Prefix("pair", [1, 2]), old)
    cache.put(Prefix("pair", [1, 2, 3, 4]), new)
    assert not old.closed
    cache.put(Prefix("pair", [1, 2, 3, 4]), other)
    assert old.closed
    assert new.closed
