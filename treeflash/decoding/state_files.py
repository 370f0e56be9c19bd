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

A file is in the safetensors format, and has a code (MAC) of its contents under a secret that only
the key gives: a part that was torn, exchanged or made up by somebody who does not know the tokens,
the pair and the salt is recognised. Nothing else in a file is trusted before that.

A drafter that pauses leaves positions unread, and what a state has of them depends on when it was
stored. Blocks of such positions are therefore of a kind of their own, *unread*: parts with read
positions can be appended only while the drafter has read everything before them.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import re
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from treeflash.decoding.images import NO_IMAGES
from treeflash.decoding.interfaces import StateArrays

FORMAT = b"treeflash state 1"
Kind: TypeAlias = Literal["block", "unread", "end"]
NAME = re.compile(r"[0-9a-f]{64}\.(block|unread|end)\.safetensors")
SCRATCH = re.compile(r"\.[0-9a-f]{64}\.(block|unread|end)\.[0-9a-f]+\.tmp")
"""A file that is being written, or that a killed process has left."""
NS_PER_POSITION = 10**5
"""The time in which a position is written or read, at most, nanoseconds; a beginning that took
longer would seem to have been used before its continuation."""
NOT_NOW = (errno.ENOENT, errno.EMFILE, errno.ENFILE)
"""Errors of opening a file that say nothing about it: another process has removed it, or this
process or the machine has too many files open."""
MAC, POSITIONS = "mac", "positions"
"""The names of the code and of `first`, `read` and `stop` of a part, among its arrays."""


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
        digests: Mapping[int, bytes] = NO_IMAGES,  # of `PromptImages`
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
class Part:
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
    return f"{hashlib.sha256(kind.encode() + key).hexdigest()}.{kind}.safetensors"


def _mac(kind: Kind, key: bytes, arrays: StateArrays) -> NDArray[np.uint8]:
    """Return the (32,) code of arrays, which are contiguous."""
    code = hashlib.sha256(b"mac" + kind.encode() + key)
    shapes = {name: (x.dtype.str, x.shape) for name, x in sorted(arrays.items())}
    code.update(json.dumps(shapes).encode())
    for name in shapes:
        code.update(arrays[name].data if arrays[name].size else b"")
    return np.frombuffer(hmac.digest(key, code.digest(), "sha256"), np.uint8)


def encode(part: Part, arrays: StateArrays) -> bytes:
    """Encode the contents of a part's file."""
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    arrays[POSITIONS] = np.array([part.first, part.read, part.stop], np.int64)
    return save({**arrays, MAC: _mac(part.kind, part.key, arrays)})


def decode(kind: Kind, key: bytes, contents: bytes) -> tuple[Part, StateArrays]:
    """Read the part that ends where the key does; a BadFileError if it is another's."""
    try:
        arrays = load(contents)
        code, positions = arrays.pop(MAC), arrays[POSITIONS]
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise BadFileError("it is damaged") from error
    if not hmac.compare_digest(code.tobytes(), _mac(kind, key, arrays).tobytes()):
        raise BadFileError("its contents are not what was written under this name")
    first, read, stop = map(int, positions)
    del arrays[POSITIONS]
    return Part(kind, key, first, read, stop), arrays


def read(folder: Path, kind: Kind, key: bytes, max_bytes: int) -> tuple[Part, StateArrays] | None:
    """Read and check a part; a BadFileError or an OSError if it cannot be used.

    It counts as used: of two parts of a sequence, the later one is the less recently used. None is
    returned if the file was removed, or cannot be opened now and may be good.
    """
    path = folder / file_name(kind, key)
    # A link would lead out of the folder, and a pipe would not end.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in NOT_NOW:
            return None
        raise BadFileError(f"it cannot be opened ({error.strerror})") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadFileError("it is not a regular file")
        if not is_own(status):
            raise BadFileError("it belongs to another user")
        if status.st_size > max_bytes:
            raise BadFileError(f"it is larger than the cache ({status.st_size} bytes)")
        part, arrays = decode(kind, key, file.read(status.st_size))
    touch(path, part.stop)
    return part, arrays


def is_own(status: os.stat_result) -> bool:
    """Return whether a file belongs to the user of this process."""
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def write(folder: Path, part: Part, contents: bytes) -> None:
    """Write a part's file whole, readable by its owner only; raises an OSError."""
    path = folder / part.name
    stem = part.name.removesuffix(".safetensors")
    scratch = folder / f".{stem}.{os.getpid():x}{time.monotonic_ns():x}.tmp"
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    touch(path, part.stop)


def touch(path: Path, stop: int) -> None:
    """Mark a part that ends at a position as used now; nothing happens in a read-only folder.

    Without its beginning a sequence cannot be restored, so that later parts are to go first.
    """
    now = time.time_ns() - NS_PER_POSITION * stop
    with suppress(OSError):
        os.utime(path, ns=(now, now), follow_symlinks=os.utime not in os.supports_follow_symlinks)
