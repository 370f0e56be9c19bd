"""States of finished texts, kept for prompts that begin alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.text_state import TextState


@dataclass(eq=False)
class _Entry:
    """A state and the tokens of its committed positions."""

    key: Hashable
    tokens: NDArray[np.int32]
    state: TextState


class PrefixCache:
    """Least recently used states are closed first when the limit is reached.

    Attributes:
        max_bytes: of device memory.
    """

    def __init__(self, max_bytes: int) -> None:
        """Start empty."""
        self.max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the most recently used last

    @property
    def nbytes(self) -> int:
        """Device memory that the cache holds, bytes."""
        return sum(entry.state.nbytes for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Hashable, tokens: Sequence[int]) -> tuple[TextState, int] | None:
        """The state that can be forked at the longest common prefix, and the prefix's length.

        Args:
            key: what a state depends on beside its tokens: the loaded pair, whether it was opened
                for drafting, and a caller's salt.
            tokens: of a prompt.

        Returns:
            None if no state shares a token.
        """
        wanted = np.array(tokens, np.int32)
        best: _Entry | None = None
        longest = 0
        for entry in self._entries:
            if entry.key == key and (length := _shared(entry, wanted)) > longest:
                best, longest = entry, length
        if best is None:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        return best.state, longest

    def put(self, key: Hashable, tokens: Sequence[int], state: TextState) -> None:
        """Take over a state.

        Args:
            key: see `find`.
            tokens: of its committed positions.
            state: is closed when it falls out of the cache, which may be now.
        """
        new = _Entry(key, np.array(tokens, np.int32), state)
        for entry in [entry for entry in self._entries if entry.key == key]:
            if _shared(new, entry.tokens) >= _shared(entry, entry.tokens):
                self._drop(entry)  # the new state can do all that it could
        self._entries.append(new)
        self.shrink(self.max_bytes)

    def shrink(self, nbytes: int) -> None:
        """Close the least recently used states until the others hold at most so many bytes."""
        while self._entries and self.nbytes > nbytes:
            self._drop(self._entries[0])

    def close(self) -> None:
        """Close all states."""
        self.shrink(-1)

    def _drop(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        entry.state.close()


def _shared(entry: _Entry, tokens: NDArray[np.int32]) -> int:
    """The longest prefix of these tokens that the entry can be forked at."""
    return entry.state.restorable(common_prefix(entry.tokens, tokens))


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Length of the common prefix of two texts, tokens."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
