"""Files with parts of states: named by what they continue, written whole, checked before use.

A state after n tokens depends on these tokens and their images, the loaded pair and the salt of the
caller, and on nothing else. So a part that ends there is named by a hash of all of it:

    key(0) = hash of the pair, of whether it drafts, and of the salt
    key(n) = hash of key(b) and of the tokens b .. n - 1, with b the last multiple of the block size
             below n; images that begin there are hashed too

Sequences that begin with the same tokens have the same keys, and thereby share files, and who does
not know the salt cannot name the files of another caller. A part is either a *block*, whose
positions all of its continuations share, or the *end* of a state: the positions after its last
complete block and what else the state has at its length.

A file is a checksum and the part's arrays in the safetensors format, which are parsed only if the
checksum is right. It depends on the key too: a part that was torn, exchanged or made up by somebody
who does not know the tokens, the pair and the salt is recognised.

A drafter that pauses leaves positions unread, and what a state has of them depends on when it was
stored. Blocks of such positions are therefore of a kind of their own, *unread*: parts with read
positions can be appended only while the drafter has read everything before them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from treeflash.decoding.images import NO_IMAGES
from treeflash.decoding.interfaces import StateArrays

FORMAT = b"treeflash state 3"
Kind: TypeAlias = Literal["block", "unread", "end"]
NAME = re.compile(r"[0-9a-f]{64}\.(block|unread|end)\.state")
SCRATCH = re.compile(r"\.[0-9a-f]{64}\.(block|unread|end)\.[0-9a-f]+\.tmp")
"""A file that is being written, or that a killed process has left."""
NS_PER_POSITION = 10**5
"""The time in which a position is written or read, at most, nanoseconds; a beginning that took
longer would seem to have been used before its continuation."""
NOT_NOW = (errno.ENOENT, errno.EMFILE, errno.ENFILE)
"""Errors of opening a file that say nothing about it: another process has removed it, or this
process or the machine has too many files open."""
SCRATCH_S = 3600.0
"""Age of a file that no process can be writing any more, seconds."""
CHECKSUM_SIZE = 32
"""Bytes of the checksum, which a file begins with."""
POSITIONS = "positions"
"""The name of `first`, `read` and `stop` of a part, among its arrays."""


class BadFileError(Exception):
    """A file that cannot be what its name says; the message says why."""


def root_key(identity: bytes, *, drafts: bool, salt: str) -> bytes:
    """Return the key of the empty prefix of all sequences whose states can be shared."""
    described = json.dumps([identity.hex(), drafts, salt]).encode()
    return hashlib.sha256(FORMAT + described).digest()


class PrefixKeys:
    """The keys of the prefixes of a sequence."""

    def __init__(
        self,
        root: bytes,
        tokens: Sequence[int],
        block: int,
        digests: Mapping[int, bytes] = NO_IMAGES,  # `PromptImages.digests`
    ) -> None:
        self.tokens = np.array(tokens, "<i4")
        self.block = block
        self._digests = digests
        self._blocks = [root]  # the keys of the multiples of the block size

    def __getitem__(self, length: int) -> bytes:
        """Return the key of the first `length` tokens."""
        while (len(self._blocks) - 1) * self.block < length - length % self.block:
            self._blocks.append(self._hash((len(self._blocks) - 1) * self.block, self.block))
        rest = length % self.block
        return self._hash(length - rest, rest) if rest else self._blocks[length // self.block]

    def _hash(self, first: int, count: int) -> bytes:
        code = hashlib.sha256(self._blocks[first // self.block])
        code.update(self.tokens[first : first + count].tobytes())
        for place, digest in sorted(self._digests.items()):
            if first <= place < first + count:  # a negative number is no token
                code.update((-1 - place).to_bytes(4, "little", signed=True) + digest)
        return code.digest()


@dataclass(frozen=True)
class StoredPart:
    """The positions first .. stop - 1 of a state; `key` hashes the tokens before `stop`.

    The drafter has read the positions before `read`.
    """

    kind: Kind
    key: bytes
    first: int
    read: int
    stop: int

    @property
    def name(self) -> str:
        return file_name(self.kind, self.key)


def file_name(kind: Kind, key: bytes) -> str:
    """Return the name of the part of a kind that ends where the key does."""
    return f"{hashlib.sha256(kind.encode() + key).hexdigest()}.{kind}.state"


def checksum(kind: Kind, key: bytes, arrays: bytes) -> bytes:
    """Return what the file of a part with these encoded arrays begins with."""
    return hashlib.blake2b(
        arrays, digest_size=CHECKSUM_SIZE, key=key, person=kind.encode()
    ).digest()


def encode(part: StoredPart, arrays: StateArrays) -> bytes:
    """Encode the contents of a part's file."""
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    arrays[POSITIONS] = np.array([part.first, part.read, part.stop], np.int64)
    encoded = save(arrays)
    return checksum(part.kind, part.key, encoded) + encoded


def decode(kind: Kind, key: bytes, contents: bytes) -> tuple[StoredPart, StateArrays]:
    """Read the part that ends where the key does; a BadFileError if it is another's."""
    encoded = contents[CHECKSUM_SIZE:]
    if contents[:CHECKSUM_SIZE] != checksum(kind, key, encoded):
        raise BadFileError("its contents are not what was written under this name")
    try:
        arrays = load(encoded)
        first, read, stop = map(int, arrays.pop(POSITIONS))
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise BadFileError("it is damaged") from error
    return StoredPart(kind, key, first, read, stop), arrays


def read(
    folder: Path, kind: Kind, key: bytes, max_bytes: int
) -> tuple[StoredPart, StateArrays] | None:
    """Read and check a part; a BadFileError or an OSError if it cannot be used.

    None is returned if the file was removed, or cannot be opened now and may be good.
    """
    path = folder / file_name(kind, key)
    # A link would lead out of the folder, and a pipe would not end.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = open(path, "rb", opener=lambda name, _: os.open(name, flags))  # noqa: SIM115
    except OSError as error:
        if error.errno in NOT_NOW:
            return None
        raise BadFileError(f"it cannot be opened ({error.strerror})") from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadFileError("it is not a regular file")
        if not is_own(status):
            raise BadFileError("it belongs to another user")
        if status.st_size > max_bytes:
            raise BadFileError(f"it is larger than the cache ({status.st_size} bytes)")
        return decode(kind, key, file.read(status.st_size))


def is_own(status: os.stat_result) -> bool:
    """Return whether a file belongs to the user of this process."""
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def write(folder: Path, part: StoredPart, contents: bytes) -> None:
    """Write a part's file whole, readable by its owner only; raises an OSError."""
    path = folder / part.name
    stem = part.name.removesuffix(".state")
    scratch = folder / f".{stem}.{os.getpid():x}{time.monotonic_ns():x}.tmp"
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def touch(path: Path, stop: int) -> int:
    """Mark a part that ends at a position as used now, unless the folder is read-only.

    Returns the time that it got, in nanoseconds. Without its beginning a sequence cannot be
    restored, so later parts are to go first and have earlier times.
    """
    now = time.time_ns() - NS_PER_POSITION * stop
    with suppress(OSError):
        os.utime(path, ns=(now, now), follow_symlinks=os.utime not in os.supports_follow_symlinks)
    return now


class FolderIndex:
    """The files of states in a folder, as this process knows them; any thread may call it.

    Other processes may use the folder too, so it is listed again when `scan_s` seconds have passed.
    """

    def __init__(self, folder: Path, scan_s: float) -> None:
        self.folder, self.scan_s = folder, scan_s
        # By name, when each was used, in nanoseconds, and its size in bytes.
        self._files: dict[str, tuple[int, int]] = {}
        self._scanned = float("-inf")
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(size for _, size in self._files.values())

    def refresh(self) -> int:
        """List the folder if that is due; raises an OSError.

        Returns how many files were removed because they cannot be states.
        """
        with self._lock:
            if time.monotonic() - self._scanned < self.scan_s:
                return 0
            files, useless, now = dict[str, tuple[int, int]](), 0, time.time()
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    scratch = SCRATCH.fullmatch(entry.name)
                    if not scratch and not NAME.fullmatch(entry.name):
                        continue  # a stranger's, who may have chosen the wrong folder
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # another process has removed it
                        continue
                    is_useless = not stat.S_ISREG(status.st_mode) or not status.st_size
                    if scratch:  # another process may just have begun it
                        is_useless = now - status.st_mtime > SCRATCH_S
                    if is_useless and _remove(Path(entry.path)):
                        useless += 1
                    elif not scratch:
                        files[entry.name] = status.st_mtime_ns, status.st_size
            self._files, self._scanned = files, time.monotonic()
        return useless

    def note_use(self, part: StoredPart, nbytes: int | None = None) -> None:
        """Note that a part is used now, or written with a number of bytes."""
        used = touch(self.folder / part.name, part.stop)
        with self._lock:
            if nbytes is None and part.name in self._files:
                _, nbytes = self._files[part.name]
            if nbytes is not None:
                self._files[part.name] = used, nbytes

    def evict(self, nbytes: int) -> None:
        """Remove the least recently used files until the others have at most `nbytes` bytes."""
        with self._lock:
            left = sum(size for _, size in self._files.values())
            for name, (_, size) in sorted(self._files.items(), key=lambda item: item[1]):
                if left <= nbytes:
                    break
                if _remove(self.folder / name):
                    del self._files[name]
                    left -= size

    def remove(self, name: str) -> None:
        """Remove a file."""
        with self._lock:
            _remove(self.folder / name)
            self._files.pop(name, None)


def _remove(path: Path) -> bool:
    """Remove a file; whether that was possible."""
    try:
        path.unlink()
    except OSError:
        return False
    return True
