"""The prefix cache: states of finished sequences, kept for prompts that begin alike.

`disk_cache` is its second tier, which survives the process.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.disk_cache import CacheKey, DiskCache
from treeflash.decoding.interfaces import SequenceState


@dataclass(eq=False)
class _Entry:
    """A state and the tokens of its committed positions."""

    key: Hashable
    tokens: NDArray[np.int32]
    state: SequenceState

    def shared_length(self, tokens: NDArray[np.int32]) -> int:
        """Return the longest prefix of the tokens at which the state can be forked."""
        n = min(len(self.tokens), len(tokens))
        different = np.flatnonzero(self.tokens[:n] != tokens[:n])
        return self.state.restorable(int(different[0]) if len(different) else n)


class PrefixCache:
    """A cache of states; at `max_bytes` of device memory the least recently used are closed.

    With a `disk`, which it closes, the states are stored there too; their keys are `CacheKey`s.
    """

    def __init__(self, max_bytes: int, disk: DiskCache | None = None) -> None:
        self.max_bytes = max_bytes
        self.disk = disk
        self._entries: list[_Entry] = []  # the most recently used last

    @property
    def nbytes(self) -> int:
        """Device memory that the cache holds, bytes."""
        return sum(entry.state.nbytes for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Hashable, tokens: Sequence[int]) -> tuple[SequenceState, int] | None:
        """Find the state to fork at a prompt's longest common prefix, and that length, or None.

        `key` has the dependencies of a state besides its tokens: the loaded pair, whether the state
        was opened for drafting, and the caller's salt.
        """
        prompt = np.array(tokens, np.int32)
        best: _Entry | None = None
        longest = 0
        for entry in self._entries:
            if entry.key == key and (length := entry.shared_length(prompt)) > longest:
                best, longest = entry, length
        if best is None:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        return best.state, longest

    def put(self, key: Hashable, tokens: Sequence[int], state: SequenceState) -> None:
        """Take over a state with the tokens of its committed positions.

        It is closed when it leaves the cache: at once if it alone is above the limit.
        """
        if state.nbytes > self.max_bytes:
            state.close()
            return
        new = _Entry(key, np.array(tokens, np.int32), state)
        for entry in [entry for entry in self._entries if entry.key == key]:
            if new.shared_length(entry.tokens) >= entry.shared_length(entry.tokens):
                # The new state serves all prompts that this one served.
                self._drop(entry, save=False)
        self._entries.append(new)
        if self.disk is not None:
            assert isinstance(key, CacheKey)
            self.disk.add(key, tokens, state)
        self.shrink(self.max_bytes)

    def shrink(self, nbytes: int) -> None:
        """Close the least recently used states until the others hold at most `nbytes` bytes."""
        while self._entries and self.nbytes > nbytes:
            self._drop(self._entries[0], save=True)

    def close(self) -> None:
        """Close all states, when they have been copied to the disk if there is one."""
        if self.disk is not None:
            self.disk.save_all()
        self.shrink(-1)
        if self.disk is not None:
            self.disk.close()

    def _drop(self, entry: _Entry, *, save: bool) -> None:
        self._entries.remove(entry)
        if self.disk is not None:
            self.disk.let_go(entry.state, save=save)
        entry.state.close()
