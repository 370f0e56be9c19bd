"""Threads take turns: one at a time, in the order in which they asked."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from treeflash.decoding.turns import Turns


def test_one_thread_at_a_time_in_order():
    turns, order, inside = Turns(), [], []

    def take(number: int) -> None:
        with turns:
            inside.append(number)
            assert inside == [number]
            order.append(number)
            inside.remove(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    with turns:
        for number, thread in enumerate(threads):
            thread.start()
            while len(turns.waiting) <= number:
                pass
        assert order == []
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_two_busy_threads_alternate():
    """With a lock of Python, one of them would get nearly all turns."""
    turns, order = Turns(), []

    def work(name: str) -> None:
        for _ in range(200):
            with turns:
                order.append(name)

    with ThreadPoolExecutor(2) as threads:
        with turns:
            done = [threads.submit(work, name) for name in "ab"]
            while len(turns.waiting) < 2:
                pass
        for one in done:
            one.result()
    assert sum(x != y for x, y in pairwise(order)) > 100


def test_an_error_ends_a_turn():
    turns = Turns()
    for _ in range(2):
        with pytest.raises(KeyError), turns:
            raise KeyError
