"""The prefix cache: states of finished sequences, kept for prompts with the same beginning.

`disk_cache` is its second tier, which survives the process.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.disk_cache import CacheKey, DiskCache
from treeflash.decoding.images import NO_IMAGES
from treeflash.decoding.interfaces import SequenceState


@dataclass(eq=False)
class _Entry:
    """A state, the tokens of its committed positions, and the digests of their images."""

    key: Hashable
    tokens: NDArray[np.int32]
    digests: Mapping[int, bytes]
    state: SequenceState

    def shared_length(self, tokens: NDArray[np.int32], digests: Mapping[int, bytes]) -> int:
        """Return the longest prefix of a prompt at which the state can be forked.

        It ends before the first image that only one of them has, or that differs.
        """
        n = min(len(self.tokens), len(tokens))
        different = np.flatnonzero(self.tokens[:n] != tokens[:n])
        ends = [first for first, _ in self.digests.items() ^ digests.items()]
        return self.state.restorable(min([n, *different[:1].tolist(), *ends]))

    def replaces(self, other: _Entry) -> bool:
        """Return whether the state serves all prompts that another one serves."""
        both = other.tokens, other.digests
        return self.key == other.key and self.shared_length(*both) >= other.shared_length(*both)


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

    def find(
        self, key: Hashable, tokens: Sequence[int], digests: Mapping[int, bytes] = NO_IMAGES
    ) -> tuple[SequenceState, int] | None:
        """Find the state to fork at a prompt's longest common prefix, and that length, or None.

        `key` has the dependencies of a state besides its tokens and images: the loaded pair,
        whether the state was opened for drafting, and the caller's salt. `digests` are the
        images', as `PromptImages` has them.
        """
        prompt = np.array(tokens, np.int32)
        best: _Entry | None = None
        longest = 0
        for entry in self._entries:
            if entry.key == key and (length := entry.shared_length(prompt, digests)) > longest:
                best, longest = entry, length
        if best is None:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        return best.state, longest

    def put(
        self,
        key: Hashable,
        tokens: Sequence[int],
        state: SequenceState,
        digests: Mapping[int, bytes] = NO_IMAGES,
    ) -> None:
        """Take over a state with the tokens of its committed positions, and their images' digests.

        It is closed when it leaves the cache: at once if it alone is above the limit.
        """
        if state.nbytes > self.max_bytes:
            state.close()
            return
        new = _Entry(key, np.array(tokens, np.int32), digests, state)
        for entry in [entry for entry in self._entries if new.replaces(entry)]:
            self._drop(entry, save=False)
        self._entries.append(new)
        if self.disk is not None:
            assert isinstance(key, CacheKey)
            self.disk.add(key, tokens, state, digests)
        self.shrink(self.max_bytes)

    def retire(
        self,
        key: Hashable,
        tokens: Sequence[int],
        state: SequenceState,
        digests: Mapping[int, bytes] = NO_IMAGES,
    ) -> None:
        """Let the states that a fork of this one will replace be the first to leave."""
        new = _Entry(key, np.array(tokens, np.int32), digests, state)
        self._entries.sort(key=lambda entry: not new.replaces(entry))

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
