"""Recurrent states of one text at earlier lengths: it can be forked or truncated to those."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

S = TypeVar("S")

MOST = 4
"""Snapshots that a text keeps: the ends of its latest prompts and answers."""


class Snapshots(Generic[S]):
    """The latest snapshots, by length. States are never changed in place, so nothing is copied."""

    def __init__(self) -> None:
        """Start with none."""
        self._states: dict[int, S] = {}

    def __iter__(self) -> Iterator[S]:
        return iter(self._states.values())

    def take(self, length: int, states: S) -> None:
        """Keep the states at a length, which is at least that of every earlier snapshot."""
        self._states[length] = states
        if len(self._states) > MOST:
            del self._states[min(self._states)]

    def longest(self, length: int) -> int:
        """The longest length up to `length` that has a snapshot; 0 if there is none."""
        return max((n for n in self._states if n <= length), default=0)

    def at(self, length: int) -> S:
        """The states at a length that has a snapshot."""
        return self._states[length]

    def truncate(self, length: int) -> None:
        """Drop the snapshots beyond a length."""
        self._states = {n: states for n, states in self._states.items() if n <= length}

    def until(self, length: int) -> Snapshots[S]:
        """Those up to a length, for a fork."""
        new: Snapshots[S] = Snapshots()
        new._states = dict(self._states)
        new.truncate(length)
        return new
