"""Folders of states that are torn, exchanged, oversized or hostile cost a line and a prefill."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save
from stored_states import Process, answered, plain, prompt_of, stored_pair

from treeflash.decoding import state_files

PROMPT = prompt_of(40)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return stored_pair(tmp_path_factory.mktemp("pair"), "qwen3")


@pytest.fixture(scope="module")
def stored(pair, tmp_path_factory):
    """A folder with the state of the prompt."""
    folder = tmp_path_factory.mktemp("stored")
    answered(pair, folder, PROMPT)
    return folder


def block(folder: Path) -> Path:
    """The file of the first block, which every restoration of the prompt reads."""
    keys = Process.keys(PROMPT)
    return folder / state_files.file_name("block", keys[Process.BLOCK])


def second(folder: Path) -> Path:
    keys = Process.keys(PROMPT)
    return folder / state_files.file_name("block", keys[2 * Process.BLOCK])


def contents(make: Callable[[bytes], bytes]):
    """Damage of the bytes of a file."""

    def damage(folder: Path, _: Path) -> None:
        path = block(folder)
        path.write_bytes(make(path.read_bytes()))

    return damage


def forged(make: Callable[[bytes], bytes]):
    """Damage of the arrays by somebody who knows all that the checksum hashes.

    Arrays of another checksum are not parsed.
    """

    def damage(folder: Path, _: Path) -> None:
        path = block(folder)
        new = make(path.read_bytes()[state_files.CHECKSUM_SIZE :])
        key = Process.keys(PROMPT)[Process.BLOCK]
        path.write_bytes(state_files.checksum("block", key, new) + new)

    return damage


def with_positions(positions: list | None):
    """Valid arrays that state other positions, or none."""

    def make(old: bytes) -> bytes:
        changed = load(old)
        del changed["positions"]
        return save(changed if positions is None else {**changed, "positions": np.array(positions)})

    return forged(make)


def header(change: Callable[[dict], object]):
    """Damage of the header of the arrays alone."""

    def make(old: bytes) -> bytes:
        (size,) = struct.unpack("<Q", old[:8])
        fields = json.loads(old[8 : 8 + size])
        changed = change(fields)
        new = json.dumps(fields if changed is None else changed).encode()
        return struct.pack("<Q", len(new)) + new + old[8 + size :]

    return forged(make)


def field(**values: object):
    """Another header of the first array."""
    return header(lambda fields: fields["target.0.k"].update(values))


def replace_by(make: Callable[[Path, Path], None]):
    """Something else in place of a file; it is told of a file outside."""

    def damage(folder: Path, outside: Path) -> None:
        path = block(folder)
        path.unlink()
        make(path, outside)

    return damage


def exchange(folder: Path, _: Path) -> None:
    one, two = block(folder), second(folder)
    old = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(old)


def truncate_all(folder: Path, _: Path) -> None:
    for path in folder.iterdir():
        os.truncate(path, path.stat().st_size // 2)


def all_empty(folder: Path, _: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")


def of_another_user(folder: Path, _: Path) -> None:
    os.chown(block(folder), 12345, 12345)


DAMAGE = {
    "torn in the middle": contents(lambda x: x[: len(x) // 2]),
    "torn in the header": contents(lambda x: x[:20]),
    "without the last byte": contents(lambda x: x[:-1]),
    "empty": contents(lambda _: b""),
    "one byte": contents(lambda _: b"x"),
    "zeros": contents(lambda x: bytes(len(x))),
    "noise": contents(lambda x: np.random.default_rng(0).bytes(len(x))),
    "a pickle": contents(lambda _: b"\x80\x04\x95\x1e\x00\x00\x00cos\nsystem\n(S'false'\ntR."),
    "a flipped bit": contents(lambda x: x[:-5] + bytes([x[-5] ^ 1]) + x[-4:]),
    "bytes behind the end": contents(lambda x: x + b"more"),
    "a shape of 2^63": field(shape=[2**63, 1]),
    "a product of shapes that overflows": field(shape=[2**32, 2**32, 2]),
    "offsets of 2^63": field(data_offsets=[0, 2**63]),
    "negative offsets": field(data_offsets=[-8, 8]),
    "a header that is a list": header(lambda _: [1, 2]),
    "a dtype that NumPy lacks": field(dtype="BF16"),
    "an unknown dtype": field(dtype="Q4"),
    "a header of 2^63 bytes": forged(lambda x: struct.pack("<Q", 2**63) + x[8:]),
    "a header of 2^64 - 1 bytes": forged(lambda x: b"\xff" * 8 + x[8:]),
    "bytes behind the end of arrays": forged(lambda x: x + b"more"),
    "nothing behind the checksum": forged(lambda _: b""),
    "no checksum": contents(lambda x: x[state_files.CHECKSUM_SIZE :]),
    "no positions": with_positions(None),
    "fewer positions": with_positions([0, 8]),
    "positions that are no whole numbers": with_positions([0, np.nan, 8]),
    "infinite positions": with_positions([0, np.inf, 8]),
    "positions that are pairs": with_positions([[0, 8]] * 3),
    "exchanged blocks": exchange,
    "all torn": truncate_all,
    "all empty": all_empty,
    "a link out of the folder": replace_by(lambda path, outside: path.symlink_to(outside)),
    "a link to itself": replace_by(lambda path, _: path.symlink_to(path)),
    "a folder": replace_by(lambda path, _: path.mkdir()),
    "a pipe": replace_by(lambda path, _: os.mkfifo(path)),
    "a sparse file of a terabyte": replace_by(
        lambda path, _: (path.touch(), os.truncate(path, 1 << 40))
    ),
    "a file of another user": pytest.param(
        of_another_user,
        marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away"),
    ),
}


@pytest.mark.sample(16)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_costs_one_line_for_each_file(pair, stored, tmp_path, caplog, damage):
    folder, outside = tmp_path / "states", tmp_path / "outside"
    shutil.copytree(stored, folder)
    outside.write_bytes(block(folder).read_bytes())
    kept = outside.read_bytes()
    damage(folder, outside)
    with Process(pair, folder) as process:
        text, (_, restored) = process.answer(PROMPT)
        assert text == plain(pair, PROMPT)
        # What it computed anew is stored in place of what was removed.
    assert outside.read_bytes() == kept
    lines = [record.message for record in caplog.records]
    assert len(set(lines)) == len(lines)
    assert all("\n" not in line for line in lines)
    named = [line.split(" cannot be used")[0] for line in lines]
    assert len(set(named)) == len(named)
    assert restored == 0
    assert lines
    caplog.clear()
    if not block(folder).is_dir():
        with Process(pair, folder) as process:
            again, (_, restored) = process.answer(PROMPT)
            assert again == text
            assert restored >= 32
    assert not caplog.records


@pytest.mark.sample(1)
@pytest.mark.parametrize("count", [5000, 1_000_000])
def test_many_small_files_cost_one_line_together(pair, stored, tmp_path, caplog, count):
    folder = tmp_path / "states"
    shutil.copytree(stored, folder)
    for n in range(count):
        os.close(os.open(folder / f"{n:064x}.block.state", os.O_CREAT, 0o600))
    for _ in range(2):
        with Process(pair, folder) as process:
            text, (_, restored) = process.answer(PROMPT)
            assert text == plain(pair, PROMPT)
            assert restored >= 32
            process.answer(prompt_of(40, seed=1))  # is written, and the folder scanned
    (line,) = caplog.messages
    assert f"{count} files are not states; removing them" in line
    assert len(list(folder.iterdir())) < 100


def test_a_link_does_not_let_the_time_of_another_file_be_changed(tmp_path):
    """Who may write to the folder could replace a state by a link to another file of its owner."""
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_text("precious")
    link.symlink_to(other)
    before = other.stat().st_mtime_ns
    state_files.touch(link, 10**9)
    assert other.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("a link out of the folder", "cannot be opened"),
        ("a link to itself", "cannot be opened"),
        ("a folder", "cannot be opened"),
        ("a pipe", "not a regular file"),
    ],
)
def test_what_takes_the_place_of_a_listed_file_is_not_read(stored, tmp_path, damage, message):
    folder, outside = tmp_path / "states", tmp_path / "outside"
    shutil.copytree(stored, folder)
    outside.write_bytes(block(folder).read_bytes())
    DAMAGE[damage](folder, outside)
    key = Process.keys(PROMPT)[Process.BLOCK]
    with pytest.raises(state_files.BadFileError, match=message):
        state_files.read(folder, "block", key, 1 << 30)
