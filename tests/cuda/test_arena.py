"""Pages of an arena: they never overlap, move or leak, forks share them, and memory has a limit.

Texts do not depend on where pages lie.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mtp_pairs import write_mtp_pair, write_peagle_pair
from parts import load_with_parts
from recordings import recording
from stand_ins import stand_in

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.errors import MemoryInUseError
from treeflash.testing import require
from treeflash.testing.models import write_pair

require("torch")

import torch
from treeflash_cuda.backend import load
from treeflash_cuda.cache import Arena, Slab, WrittenRows
from treeflash_cuda.mtp_head import MtpArena, MtpCache
from treeflash_cuda.state import State
from treeflash_cuda.visible_keys import PAGE

LIKE = torch.zeros(1, 2, 3, 4)  # keys of a layer
LAYERS = 3
COLUMN = 2 * LAYERS * 2 * 4 * 4  # bytes of a column in float32


@pytest.fixture(autouse=True)
def _inference_mode():
    with torch.inference_mode():
        yield


def arena_of(columns, page=1, *, reserved=False, kind=Arena):
    """An arena with slabs of `columns` columns, or one that is set aside."""
    arena = kind(LAYERS) if kind is Arena else kind(LAYERS, 5)
    arena.set_shape(LIKE)
    arena.page = page
    arena.slab_nbytes = columns * arena.column_nbytes
    if reserved:
        arena.reserved_nbytes = arena.slab_nbytes
    return arena


def opened(arena, capacity):
    cache = arena.new_cache(capacity)
    cache.allocate()
    return cache


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6))
def test_columns_in_one_piece_never_overlap_move_or_leak(seed):
    rng, arena = np.random.default_rng(seed), arena_of(100)
    held = []
    for number in range(60):
        if held and rng.random() < 0.5:
            cache, address, value = held.pop(int(rng.integers(len(held))))
            assert cache.parts[0].data_ptr() == address
            assert (cache.parts[0] == value).all()
            cache.close()
        else:
            cache = opened(arena, int(rng.integers(1, 130)))
            cache.parts[0].fill_(number)
            held.append((cache, cache.parts[0].data_ptr(), number))
    for cache, address, value in held:
        assert cache.parts[0].data_ptr() == address
        assert (cache.parts[0] == value).all()
        cache.close()
    # One allocation is kept for what comes.
    (slab,) = arena.slabs
    assert slab.is_free
    assert opened(arena, slab.columns).slab is slab


def test_short_texts_share_an_allocation_and_a_long_one_has_its_own():
    arena = arena_of(100)
    first, second, long = (opened(arena, size) for size in (30, 70, 150))
    assert first.slab is second.slab is not long.slab
    assert (first.nbytes, long.slab.columns) == (30 * COLUMN, 150)
    first.close()
    assert opened(arena, 20).slab is second.slab


def test_a_sequence_that_reserved_memory_can_never_hold_does_not_wait():
    for taken in (0, 10):
        arena = arena_of(300, reserved=True)
        if taken:
            opened(arena, taken)
        with pytest.raises(MemoryError, match=r"301 positions needs .* are set aside") as raised:
            opened(arena, 301)
        assert not isinstance(raised.value, MemoryInUseError)


@pytest.mark.parametrize("page", [1, PAGE])
def test_a_sequence_takes_its_room_when_it_starts(page):
    """It gives the room back if its drafter has none."""
    target, drafter = (arena_of(n * page, page, reserved=True) for n in (100, 50))
    state = State(target, drafter, 40 * page, 10 * page)
    assert target.slabs[0].owners.tolist() == [1] * 40 + [0] * 60
    assert drafter.slabs[0].owners.all()
    with pytest.raises(MemoryInUseError, match=r"no room for another .* until a sequence ends"):
        State(target, drafter, 40 * page, 10 * page)
    with pytest.raises(MemoryInUseError):
        state.fork(0, 40 * page)
    assert target.slabs[0].owners.sum() == 40
    state.close()
    assert target.slabs[0].is_free
    assert drafter.slabs[0].is_free


@pytest.mark.parametrize("kind", [Arena, MtpArena])
def test_what_is_stored_does_not_depend_on_pages(kind):
    """States that were stored before there were pages are read, bit for bit."""
    caches = []
    for page in (1, PAGE):
        arena = arena_of(12 * PAGE, page, reserved=True, kind=kind)
        others = [opened(arena, PAGE) for _ in range(12)]
        for other in others[::2] if page > 1 else others:
            other.close()
        cache = opened(arena, 3 * PAGE)
        columns = cache.columns_at(np.arange(3 * PAGE))
        numbers = torch.randn(3 * PAGE, generator=torch.Generator().manual_seed(0))
        cache.slab.storage[:, :, :, columns] = numbers[:, None]
        if kind is MtpArena:
            cache.slab.hidden[columns] = numbers[:, None]
        cache.commit(3 * PAGE - 5)
        caches.append((cache, opened(arena, 3 * PAGE)))
    assert np.diff(caches[1][0].pages).tolist() == [2, 2]
    ends = (0, 70, 100, 3 * PAGE - 5)
    for first, stop in itertools.pairwise(ends):
        plain, paged = (cache.export(first, stop) for cache, _ in caches)
        assert plain.keys() == paged.keys()
        for name, x in plain.items():
            np.testing.assert_array_equal(paged[name], x)
        for _, restored in caches:
            restored.load(plain, stop)
    for cache, restored in caches:
        np.testing.assert_array_equal(restored.read(), cache.read())


@pytest.mark.parametrize("page", [1, PAGE])
@pytest.mark.parametrize("sizes", [(30, 150, 70), (30, 70), (150,)])
def test_rows_of_a_pass_are_written_to_the_columns_of_their_sequences(page, sizes):
    """Rows of one slab stand among rows of another; rows behind the pass's are dropped."""
    arena = arena_of(100 * page, page)
    caches = [opened(arena, size * page) for size in sizes]
    assert len({cache.slab for cache in caches}) == (2 if len(sizes) == 3 else 1)
    segments = [(cache, 5 + n, 2 + n) for n, cache in enumerate(caches)]
    count = sum(n for *_, n in segments)
    new = torch.randn(LAYERS, 2, 2, count + 3, 4)
    written = WrittenRows(segments, LIKE)
    for layer in range(LAYERS):
        written.write(layer, *new[layer])
    row = 0
    for cache, first, n in segments:
        columns = cache.columns_at(np.arange(first, first + n))
        assert torch.equal(cache.slab.storage[:, :, :, columns], new[:, :, :, row : row + n])
        row += n


class Texts:
    """Sequences whose every position holds a number of its own, beside what they should hold."""

    def __init__(self, arena, rng):
        self.arena, self.rng, self.held, self.number = arena, rng, [], 0

    def add(self, cache, expected):
        self.held.append(SimpleNamespace(cache=cache, expected=expected))
        return self.held[-1]

    def open(self, capacity):
        return self.add(opened(self.arena, capacity), torch.empty(0))

    def fork(self, text, length, capacity, **token):
        cache = self.arena.new_cache(capacity)
        cache.copy_from(text.cache, length, **token)
        fork = self.add(cache, text.expected[:length].clone())
        fork.following = text.expected[length : length + 1]
        return fork

    def keep(self, text):
        """Commit the token whose key the last shared page of a fork has."""
        text.cache.commit(1)
        text.expected = torch.cat([text.expected, text.following])

    def write(self, text, count):
        """Commit new positions behind the ones of a text, after rows that are not committed."""
        cache = text.cache
        first, end = cache.length, min(cache.length + count, cache.capacity)
        rewritten = max(first - cache.rewritten, 0)
        slab = cache.reserve_rows(rewritten, cache.capacity)
        self.number += 1
        values = self.number * 1000.0 + torch.arange(rewritten, end)
        columns = cache.columns_at(np.arange(rewritten, end))
        slab.storage[:, :, :, columns] = values[:, None]
        if isinstance(cache, MtpCache):
            slab.hidden[columns] = values[:, None]
        text.expected = torch.cat([text.expected[:rewritten], values])
        cache.commit(end - first)

    def check(self):
        for text in self.held:
            cache = text.cache
            found = cache.read()[0, 0, 0, :, 0]
            np.testing.assert_array_equal(found, text.expected[: len(found)])
            assert len(found) == max(cache.length - cache.rewritten, 0)
            if isinstance(cache, MtpCache):
                states = cache.slab.hidden[cache.columns_at(np.arange(cache.length)), 0]
                np.testing.assert_array_equal(states, text.expected[: cache.length])
        owned = [page for text in self.held for page in text.cache.pages.tolist()]
        for slab in self.arena.slabs:
            spares = [page for pages in slab.spares.values() for page in pages]
            counts = np.bincount(owned + spares, minlength=len(slab.owners))
            np.testing.assert_array_equal(slab.owners, counts)
            assert not set(spares) & set(owned)
            assert sum(text.cache.nbytes for text in self.held) == pytest.approx(
                len(set(owned + spares)) * PAGE * self.arena.column_nbytes, abs=len(self.held)
            )

    def needed(self, capacity, length=0):
        """Pages that no other sequence has."""
        kept = (length - self.arena.new_cache(1).rewritten) // PAGE if length else 0
        return -(-capacity // PAGE) - kept

    @property
    def free(self):
        (slab,) = self.arena.slabs
        return int((slab.owners == 0).sum())


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), kind=st.sampled_from([Arena, MtpArena]))
def test_memory_is_exhausted_only_when_all_pages_are_owned(seed, kind):
    """At random: sequences start, fork, write, keep a shared page, and end."""
    rng = np.random.default_rng(seed)
    texts = Texts(arena_of(24 * PAGE, PAGE, reserved=True, kind=kind), rng)
    opened(texts.arena, 1).close()
    refused = 0
    for _ in range(120):
        action, capacity = rng.random(), int(rng.integers(1, 6 * PAGE))
        text = texts.held[int(rng.integers(len(texts.held)))] if texts.held else None
        if text is None or action < 0.25:
            fits = texts.needed(capacity) <= texts.free
            try:
                text = texts.open(capacity)
                assert fits
                texts.write(text, int(rng.integers(1, capacity + 1)))
            except MemoryInUseError:
                assert not fits
                refused += 1
        elif action < 0.5:
            length = int(rng.integers(0, text.cache.length + 1))
            if rng.random() < 0.5:  # the key behind ends a page
                length = max(length // PAGE * PAGE - 1, 0)
            token = {"token": 3} if kind is Arena and length < text.cache.length else {}
            capacity += length
            fits = texts.needed(capacity, length) <= texts.free
            try:
                texts.fork(text, length, capacity, **token)
                assert fits
            except MemoryInUseError:
                assert not fits
                refused += 1
        elif action < 0.8 and text.cache.shared_token is not None and rng.random() < 0.5:
            texts.keep(text)
        elif action < 0.8:
            texts.write(text, int(rng.integers(1, PAGE)))  # needs no page that it has not
        else:
            text.cache.close()
            texts.held.remove(text)
        texts.check()
    assert refused
    for text in texts.held:
        text.cache.close()
    assert texts.arena.slabs[0].is_free


def test_what_is_written_before_the_position_of_a_fork_is_copied_first():
    """If memory has a page for it."""
    texts = Texts(arena_of(5 * PAGE, PAGE, reserved=True), None)
    first = texts.open(2 * PAGE)
    texts.write(first, 2 * PAGE)
    fork = texts.fork(first, 2 * PAGE, 2 * PAGE)
    assert fork.cache.pages.tolist() == first.cache.pages.tolist() == [0, 1]
    fork.cache.truncate(PAGE // 2)
    texts.write(fork, 2 * PAGE)
    texts.check()
    assert not set(fork.cache.pages) & set(first.cache.pages)
    again = texts.arena.new_cache(2 * PAGE)
    again.copy_from(first.cache, 2 * PAGE)
    opened(texts.arena, PAGE)
    again.truncate(3)
    with pytest.raises(MemoryInUseError, match="no page left for a copy"):
        again.reserve_rows(3, 9)


def test_a_fork_copies_nothing_until_both_sequences_write_to_one_page():
    """Eight texts with 8,000 tokens in common hold little more than one."""
    texts = Texts(arena_of(10_000, PAGE, reserved=True), None)
    first = texts.open(8_000 + PAGE)
    with recording(Slab, "copy") as copies:
        texts.write(first, 8_000)  # which are 125 pages
        one = first.cache.nbytes
        for _ in range(7):
            texts.fork(first, 8_000, 8_000 + PAGE)
        for text in texts.held:
            texts.write(text, PAGE)
        assert sum(text.cache.nbytes for text in texts.held) <= 1.1 * one
        inside = [texts.fork(first, 7_999, 8_000) for _ in range(2)]
        assert not copies
        texts.check()
        for text in inside:
            texts.write(text, 1)
        assert len(copies) == 2  # of one page each
    texts.check()


def test_a_fork_copies_its_full_page_for_another_token_than_the_page_has():
    texts = Texts(arena_of(9 * PAGE, PAGE, reserved=True), None)
    first = texts.open(2 * PAGE)
    texts.write(first, PAGE)
    for tokens in ([4], [3, 3], [3]):
        fork = texts.fork(first, PAGE - 1, 2 * PAGE, token=3)
        is_shared = tokens == [3]
        expected = PAGE - 1 + is_shared + np.arange(len(tokens))
        np.testing.assert_array_equal(fork.cache.next_offsets(np.array(tokens)), expected)
        if is_shared:
            fork.cache.commit(1)
            fork.expected = first.expected
        else:
            texts.write(fork, len(tokens))
        assert (fork.cache.pages[0] == first.cache.pages[0]) == is_shared
        texts.check()
    assert texts.arena.slabs[0].spares == {}
    for spoilt in ([4], [3, 3]):  # a pass over them has failed, and left its keys
        fork = texts.fork(first, PAGE - 1, 2 * PAGE, token=3)
        offsets = fork.cache.next_offsets(np.array(spoilt))
        fork.cache.reserve_rows(int(offsets[0]), int(offsets[-1]) + 1)
        assert fork.cache.next_offsets(np.array([3])) == PAGE - 1
        texts.write(fork, 1)
        texts.check()
        texts.held.remove(fork)
        fork.cache.close()
    cut = texts.arena.new_cache(2 * PAGE)
    cut.copy_from(first.cache, PAGE - 1, token=3)
    cut.truncate(7)
    assert cut.next_offsets(np.array([3])) == 7


def test_a_fork_that_keeps_a_full_page_leaves_the_page_s_copy_to_another_one():
    """The sequence that they were forked from has ended, so that one copy is enough for both."""
    texts = Texts(arena_of(5 * PAGE, PAGE, reserved=True), None)
    first = texts.open(PAGE)
    texts.write(first, PAGE)
    keeps, writes = (texts.fork(first, PAGE - 1, 2 * PAGE, token=3) for _ in range(2))
    first.cache.close()
    texts.held.remove(first)
    assert (texts.held, texts.free) == ([keeps, writes], 1)
    opened(texts.arena, PAGE)
    keeps.cache.commit(1)
    keeps.expected = first.expected
    with pytest.raises(MemoryInUseError):
        opened(texts.arena, PAGE)
    texts.write(writes, 1)
    assert texts.arena.slabs[0].spares == {}
    np.testing.assert_array_equal(writes.cache.read()[0, 0, 0, :, 0], writes.expected)


PROMPT = [3 + n * n % 20 for n in range(80)]
"""More than a page of 64 columns."""


def decoded(backend, method):
    """The tokens of prompts that share beginnings, of which some come from the prefix cache."""
    scheduler, found = Scheduler(backend, prefix_cache=PrefixCache(1 << 24)), []
    config = DecodeConfig(method=method, budget=8, max_tokens=4)
    full_page = PROMPT[:64]
    for prompts in ([PROMPT], [[*PROMPT[:70], 5, 6], [*PROMPT, 7]], [PROMPT, PROMPT, full_page]):
        requests = [Request(prompt_ids=prompt, config=config) for prompt in prompts]
        texts = {request: [] for request in requests}
        for request, step in scheduler.decode(requests):
            texts[request] += map(int, step.tokens)
        found += [texts[request] for request in requests]
    return found


WRITERS = {
    "a drafter": (write_pair, "qwen3"),
    "an EAGLE-3 head": (write_mtp_pair, "eagle3"),
    "P-EAGLE": (write_peagle_pair,),
}


@pytest.mark.parametrize(
    ("kind", "in_rows"),
    [("a drafter", True), ("a drafter", False), ("an EAGLE-3 head", True), ("P-EAGLE", True)],
)
def test_tokens_do_not_depend_on_pages(tmp_path, monkeypatch, kind, in_rows):
    """With masks, as long prompts run, and without."""
    write, *args = WRITERS[kind]
    pair, method = write(tmp_path, *args), "ddtree" if kind == "P-EAGLE" else "treeflash"
    expected = decoded(load(*pair, LoadConfig(device="cpu", dtype="float32")), method)
    backend = load_with_parts(monkeypatch, *pair, models=not in_rows)
    take = Slab.take

    def take_backwards(slab, count):
        pages = take(slab, count)
        return None if pages is None else pages[::-1].copy()

    stand_in(monkeypatch, Slab, take=take_backwards)
    if not in_rows:
        backend.target.has_row_pass = False
    with recording(Slab, "copy") as copies:
        assert decoded(backend, method) == expected
    assert copies  # the beginnings end inside of pages
