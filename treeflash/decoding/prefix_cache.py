"""The prefix cache: states of sequences that ended, kept for prompts with the same beginning.

`disk_cache` is its second tier, which survives the process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from treeflash.decoding.disk_cache import DiskCache, Prefix
from treeflash.decoding.interfaces import SequenceState
from treeflash.errors import is_of_earlier_work


@dataclass(eq=False)
class _Entry:
    """A state, and the prefix that is committed in it."""

    prefix: Prefix
    state: SequenceState

    def shared_length(self, prompt: Prefix) -> int:
        """Return how much of a prompt the state has in common, up to where it can be forked.

        It ends before the first image that only one of them has, or that differs.
        """
        own, tokens = self.prefix.tokens, prompt.tokens
        n = min(len(own), len(tokens))
        different = np.flatnonzero(own[:n] != tokens[:n])
        ends = [first for first, _ in self.prefix.digests.items() ^ prompt.digests.items()]
        return self.state.restorable(min([n, *different[:1].tolist(), *ends]))

    def replaces(self, other: _Entry) -> bool:
        """Return whether the state serves all prompts that another one serves."""
        if self.prefix.key != other.prefix.key:
            return False
        return self.shared_length(other.prefix) >= other.shared_length(other.prefix)


class PrefixCache:
    """A cache of states; at `max_bytes` of device memory the least recently used are closed.

    With a `disk`, which it closes, the states are stored there too.
    """

    def __init__(self, max_bytes: int, disk: DiskCache | None = None) -> None:
        self.max_bytes = max_bytes
        self.disk = disk
        self.entries: list[_Entry] = []  # the most recently used last

    @property
    def nbytes(self) -> int:
        """Device memory that the cache holds, bytes."""
        return sum(entry.state.nbytes for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, prompt: Prefix) -> tuple[SequenceState, int] | None:
        """Find the state to fork at a prompt's longest common prefix, and that length, or None."""
        best: _Entry | None = None
        longest = 0
        for entry in self.entries:
            if entry.prefix.key == prompt.key and (length := entry.shared_length(prompt)) > longest:
                best, longest = entry, length
        if best is None:
            return None
        self.entries.remove(best)
        self.entries.append(best)
        return best.state, longest

    def put(self, prefix: Prefix, state: SequenceState) -> None:
        """Take over a state, in which the prefix is committed.

        It is closed when it leaves the cache: at once if it alone is above the limit.
        """
        if state.nbytes > self.max_bytes:
            state.close()
            return
        new = _Entry(prefix, state)
        for entry in [entry for entry in self.entries if new.replaces(entry)]:
            self._drop(entry, save=False)
        self.entries.append(new)
        if self.disk is not None:
            self.disk.add(prefix, state)
        self.shrink(self.max_bytes)

    def retire(self, prefix: Prefix, state: SequenceState) -> None:
        """Let the states that a fork of this one will replace be the first to leave."""
        new = _Entry(prefix, state)
        self.entries.sort(key=lambda entry: not new.replaces(entry))

    def shrink(self, nbytes: int) -> None:
        """Close the least recently used states until the others hold at most `nbytes` bytes."""
        while self.entries and self.nbytes > nbytes:
            self._drop(self.entries[0], save=True)

    def clear(self) -> None:
        """Close all states; nothing of them is stored any more."""
        while self.entries:
            self._drop(self.entries[0], save=False)

    def close(self) -> None:
        """Close all states, when they have been copied to the disk if there is one."""
        try:
            if self.disk is not None:
                self.disk.save_all()
        except Exception as error:
            if not is_of_earlier_work(error):
                raise
        self.clear()
        if self.disk is not None:
            self.disk.close()

    def _drop(self, entry: _Entry, *, save: bool) -> None:
        self.entries.remove(entry)
        try:
            if self.disk is not None:
                self.disk.let_go(entry.state, save=save)
        finally:
            entry.state.close()
