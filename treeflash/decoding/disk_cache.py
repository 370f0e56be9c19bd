"""The disk tier of the prefix cache: states that survive the process.

A state that enters the prefix cache is copied to the host a few parts at a time, between two
iterations of the scheduler, and what is left of it when it leaves memory or the process ends. A
separate thread writes the parts; if it cannot keep up, parts are left out. `state_files` says
what a part is, and how its file is named and checked. A conversation that has grown shares the
blocks of its beginning, so that only new ones are copied and written.

A prompt is looked up in other threads too: its longest stored beginning is read a few parts ahead
and appended to a new state, while the other sequences are decoded. Blocks that follow one another
from the first one are a beginning; behind them the end of a state may follow. Recurrent layers
need an end, because blocks have no states.

Whatever goes wrong with the folder costs time only: a part that cannot be written is left out, and
one that cannot be used is removed and computed again.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from treeflash.decoding import state_files
from treeflash.decoding.images import NO_IMAGES
from treeflash.decoding.interfaces import Export, SequenceState, StateArrays
from treeflash.decoding.state_files import (
    BadFileError,
    FolderIndex,
    Kind,
    PrefixKeys,
    StoredPart,
    file_name,
    root_key,
)
from treeflash.errors import ConfigError, first_line, is_of_earlier_work, is_out_of_memory

BLOCK_POSITIONS = 256
"""Positions of a block: few enough that little of a prompt that leaves a stored one is computed
again, and enough that a file is large."""
COPIES = 2
"""Parts that are copied to the host between two iterations, which wait for it."""
AHEAD = 4
"""Parts that are read ahead of the part that is appended, each by a thread."""
QUEUE_BYTES = 256 << 20
"""Bytes on the host that may wait to be written."""
SCAN_S = 5.0
"""Seconds after which the folder is listed again: other processes write to it too."""
LEFT_AFTER_EVICTION = 0.95
"""Share of the limit that files may take when the least recently used have been removed."""

logger = logging.getLogger("treeflash.cache")


class CacheKey(NamedTuple):
    """What states depend on besides their tokens."""

    backend: object  # the loaded pair
    drafts: bool  # whether the states were opened for drafting
    salt: str  # the caller's


class Prefix:
    """Tokens from the start of a sequence, and what else the state after them depends on.

    The `digests` are the images', as `PromptImages` has them.
    """

    def __init__(
        self, key: CacheKey, tokens: Sequence[int], digests: Mapping[int, bytes] = NO_IMAGES
    ) -> None:
        self.key, self.tokens, self.digests = key, np.array(tokens, np.int32), digests


Stored: TypeAlias = tuple[Sequence[tuple[Kind, bytes]], tuple[StoredPart, StateArrays] | None]
"""A stored beginning of some tokens: its blocks by kind and key, and its end if it has one."""


class DiskCache:
    """The stored states of one loaded pair in a folder, which other processes may use as well.

    Files of other pairs count towards the limit. Attributes that count are of this process.

    Args:
        folder: is made if it does not exist.
        max_bytes: of all files of states in the folder.
        identity: what all states depend on: the weights, how they are run, and by which versions.
        block: positions of a block.
        scan_s: seconds after which the folder is listed again.

    Attributes:
        written_bytes: bytes of the files that were written.
        skipped: files that could not be used.
        readers: the threads that read parts.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        identity: bytes,
        *,
        block: int = BLOCK_POSITIONS,
        scan_s: float = SCAN_S,
    ) -> None:
        self.folder, self.max_bytes, self.block = folder, max_bytes, block
        self.written_bytes = self.skipped = 0
        self._identity = identity
        self._index = FolderIndex(folder, scan_s)
        # By state in memory, the parts of it that may not be on the disk.
        self._unsaved: dict[SequenceState, deque[StoredPart]] = {}
        self._queue: queue.SimpleQueue[tuple[StoredPart, Export | None] | None] = (
            queue.SimpleQueue()
        )
        self._queued_bytes = 0
        self._room = threading.Condition()
        # Parts that this process has written or checked; no others are trusted after a bad one.
        self._checked: set[str] = set()
        self._found_bad = False
        self._failure: str | None = None  # why the last part could not be written
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise ConfigError(f"{folder} is a file; give a folder for the prefix cache") from None
        except OSError as error:
            logger.warning("%s: states will not be stored: %s", folder, error.strerror)
        self.readers = ThreadPoolExecutor(AHEAD + 1, "treeflash-cache-reader")
        self._writer = threading.Thread(
            target=self._write_queued, name="treeflash-cache-writer", daemon=True
        )
        self._writer.start()

    # These methods move states from memory to the disk.

    @property
    def has_unsaved(self) -> bool:
        """Whether a state waits to be copied."""
        return bool(self._unsaved)

    def add(self, prefix: Prefix, state: SequenceState) -> None:
        """Store the state of a prefix with the next copies.

        States of less than a block are left out: they are computed as fast as they are read.
        """
        keys = self._keys(prefix)

        def part(kind: Kind, first: int, stop: int) -> StoredPart:
            read = max(first, min(state.read_length, stop))
            return StoredPart(kind, keys[stop], first, read, stop)

        parts: deque[StoredPart] = deque()
        for stop in range(self.block, state.length + 1, self.block):
            kind: Kind = "block" if stop <= state.read_length else "unread"
            parts.append(part(kind, stop - self.block, stop))
        lengths = [state.length]
        while state.needs_snapshots and (length := state.restorable(lengths[-1] - 1)):
            lengths.append(length)
        for n in lengths:
            first = n // self.block * self.block
            if n >= self.block and (n > first or state.needs_snapshots):
                parts.append(part("end", first, n))
        if parts:
            self._unsaved[state] = parts

    def copy_next(self) -> None:
        """Copy the next parts to the host, as far as there is room for them."""
        for _ in range(COPIES):
            if not self._unsaved or not self._has_room():
                return
            state, parts = next(iter(self._unsaved.items()))
            self._copy(state, parts)
            if not parts:
                del self._unsaved[state]

    def let_go(self, state: SequenceState, *, save: bool) -> None:
        """Forget a state that leaves memory; `save` copies the rest of it, if there is room."""
        parts = self._unsaved.pop(state, None)
        while save and parts and self._has_room():
            self._copy(state, parts)

    def save_all(self) -> None:
        """Copy all states, and wait until they are written."""
        while self._unsaved:
            with self._room:
                self._room.wait_for(self._has_room)
            self.copy_next()
        with self._room:
            self._room.wait_for(lambda: not self._queued_bytes)

    def close(self) -> None:
        """End the threads when what was copied is written."""
        self._queue.put(None)
        self._writer.join()
        self.readers.shutdown(cancel_futures=True)

    def _keys(self, prefix: Prefix) -> PrefixKeys:
        identity = self._identity + self.block.to_bytes(4, "big")
        root = root_key(identity, drafts=prefix.key.drafts, salt=prefix.key.salt)
        return PrefixKeys(root, prefix.tokens.tolist(), self.block, prefix.digests)

    def _has_room(self) -> bool:
        return self._queued_bytes < QUEUE_BYTES

    def _copy(self, state: SequenceState, parts: deque[StoredPart]) -> None:
        """Hand the next part of a state to the writer, or its name if it is stored already."""
        part = parts.popleft()
        trusted = part.name in self._checked or not self._found_bad
        if trusted and part.name in self._index:
            self._queue.put((part, None))
            return
        try:
            export = state.export(part.first, part.stop, end=part.kind == "end")
        except Exception as error:
            if is_of_earlier_work(error) or not is_out_of_memory(error):
                raise
            parts.clear()
            return
        with self._room:
            self._queued_bytes += export.nbytes
        self._queue.put((part, export))

    # The methods below run in the writer's thread.

    def _write_queued(self) -> None:
        while (item := self._queue.get()) is not None:
            part, export = item
            if export is None:
                self._index.note_use(part)
                continue
            try:
                self._write(part, export.arrays())
                self._failure = None
            except (OSError, MemoryError, RuntimeError) as error:  # a copy's error comes late
                said = first_line(error) if str(error) else "memory ran out"
                reason = getattr(error, "strerror", None) or said
                if reason != self._failure:  # once, not for every part
                    logger.warning("%s: states cannot be written: %s", self.folder, reason)
                self._failure = reason
            finally:
                with self._room:
                    self._queued_bytes -= export.nbytes
                    self._room.notify_all()

    def _write(self, part: StoredPart, arrays: StateArrays) -> None:
        contents = state_files.encode(part, arrays)
        if len(contents) > self.max_bytes:
            return
        self._refresh()
        if self._index.nbytes + len(contents) > self.max_bytes:
            self._index.evict(int(LEFT_AFTER_EVICTION * self.max_bytes) - len(contents))
        state_files.write(self.folder, part, contents)
        self._index.note_use(part, len(contents))
        self._checked.add(part.name)
        self.written_bytes += len(contents)

    def _refresh(self) -> None:
        """List the folder again if that is due; raises an OSError."""
        if useless := self._index.refresh():
            self.skipped += useless
            logger.warning("%s: %d files are not states; removing them", self.folder, useless)

    # These methods find states on the disk and read them.

    def find(self, keys: PrefixKeys, *, needs_end: bool, longer_than: int) -> Stored | None:
        """Find the longest stored beginning of some tokens, if it is `longer_than` some of them.

        With `needs_end` it must have an end.
        """
        try:
            self._refresh()
        except OSError:
            return None
        blocks: list[tuple[Kind, bytes]] = []
        kinds: tuple[Kind, ...] = ("block", "unread")
        for stop in range(self.block, len(keys.tokens) + 1, self.block):
            kind = next((x for x in kinds if file_name(x, keys[stop]) in self._index), None)
            if kind is None:
                break
            kinds = kinds[kinds.index(kind) :]  # behind an unread block, all are
            blocks.append((kind, keys[stop]))
        least = longer_than if needs_end else max(longer_than, len(blocks) * self.block)
        for stop in range(len(keys.tokens), least, -1) if len(self._index) else ():
            first = stop // self.block
            if first > len(blocks) or file_name("end", keys[stop]) not in self._index:
                continue
            if (end := self.read("end", keys[stop])) is not None:
                return blocks[:first], end
        if needs_end or len(blocks) * self.block <= longer_than:
            return None
        return blocks, None

    def read(self, kind: Kind, key: bytes) -> tuple[StoredPart, StateArrays] | None:
        """Read a part; None if it cannot be used. A damaged file is removed."""
        try:
            found = state_files.read(self.folder, kind, key, self.max_bytes)
        except MemoryError:  # the file may be good
            return None
        except (BadFileError, OSError) as error:
            path = self.folder / file_name(kind, key)
            logger.warning("%s cannot be used and is removed: %s", path, error)
            self.skipped += 1
            self._found_bad = True
            self._index.remove(path.name)
            return None
        if found is not None:
            self._index.note_use(found[0])
            self._checked.add(found[0].name)
        return found

    def restore(
        self, prefix: Prefix, open_state: Callable[[], SequenceState], longer_than: int
    ) -> Restoration:
        """Begin to restore the longest stored beginning of a prefix."""
        keys, state = self._keys(prefix), open_state()
        search = self.readers.submit(
            self.find, keys, needs_end=state.needs_snapshots, longer_than=longer_than
        )
        return Restoration(self, prefix.tokens.tolist(), state, longer_than, search)


@dataclass(eq=False)
class Restoration:
    """A state that is being restored; `advance` it until it is done.

    Then `state` has more positions than `longer_than`, or it is None.
    """

    cache: DiskCache
    tokens: list[int]
    state: SequenceState | None
    longer_than: int
    search: Future[Stored | None]
    _blocks: deque[tuple[Kind, bytes]] | None = None  # blocks not read yet; None during the search
    _reads: deque[Future[tuple[StoredPart, StateArrays] | None]] = field(default_factory=deque)
    _end: tuple[StoredPart, StateArrays] | None = None

    def advance(self, *, wait: bool) -> bool:
        """Append the parts that have been read; whether all are. `wait` waits for the next one."""
        if self._blocks is None:
            if not (self.search.done() or wait):
                return False
            stored = self.search.result()
            if stored is None:
                self.close()
                return True
            blocks, self._end = stored
            self._blocks = deque(blocks)
        self._read_ahead()
        while self._reads:
            if not (self._reads[0].done() or wait):
                return False
            wait = False
            if not self._append(self._reads.popleft().result()):
                return True
            self._read_ahead()
        if self._end is not None and not self._append(self._end):
            return True
        assert self.state is not None
        self.state.snapshot()
        return True

    def close(self) -> None:
        for read in self._reads:
            read.cancel()
        self._reads.clear()
        assert self.state is not None
        self.state.close()
        self.state, self._blocks = None, deque()

    def _read_ahead(self) -> None:
        assert self._blocks is not None
        while self._blocks and len(self._reads) < AHEAD:
            read = self.cache.readers.submit(self.cache.read, *self._blocks.popleft())
            self._reads.append(read)

    def _append(self, found: tuple[StoredPart, StateArrays] | None) -> bool:
        """Append a part; if it cannot be, end with the positions before it, if they are a state."""
        state = self.state
        assert state is not None
        if found is not None:
            part, arrays = found
            all_read = state.read_length == state.length
            if part.first == state.length and (all_read or part.read == part.first):
                state.append(self.tokens[part.first : part.stop], arrays)
                return True
        if state.needs_snapshots or state.length <= self.longer_than:
            self.close()
        self._reads.clear()
        return False
