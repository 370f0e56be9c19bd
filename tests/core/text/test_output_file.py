"""Output files: locked for one process, regular, named when they cannot be written."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from failures import full_disk

from treeflash.errors import ConfigError
from treeflash.text.output_file import OutputFile, has_fields

HOLD = """
import sys
from pathlib import Path
from treeflash.text.output_file import OutputFile
with OutputFile(Path(sys.argv[1]), bool):
    print("locked", flush=True)
    sys.stdin.read()
"""


def opened(path, **settings):
    """A file of records with an id and a turn."""
    return OutputFile(path, lambda record: has_fields(record, id=str | int, turn=int), **settings)


def test_a_lock_holds_until_its_process_ends_even_if_it_is_killed(tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", HOLD, str(output)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"locked\n"
        monkeypatch.chdir(tmp_path)
        for path in (output, Path("out.jsonl")):
            with pytest.raises(ConfigError, match=r"out\.jsonl is being written by another"):
                opened(path).__enter__()
    finally:
        process.kill()
        process.communicate()
    for _ in range(2):
        with opened(output):
            assert len(list(tmp_path.iterdir())) == 2
        assert list(tmp_path.iterdir()) == [output]


def test_removing_the_lock_file_never_lets_two_writers_in(tmp_path):
    output = tmp_path / "out.jsonl"

    def append(count):
        while count:
            with suppress(ConfigError), opened(output) as file:
                number = len(file.records)
                time.sleep(0.001)  # another writer would now read the same number
                file.append({"id": number, "turn": 0})
                count -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, [25] * 4))
    with opened(output) as file:
        assert list(file.records) == [(number, 0) for number in range(100)]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_only_a_regular_file_can_be_an_output(tmp_path, kind):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path("/dev/null")
    with pytest.raises(ConfigError, match="cannot be written: it is not a regular file"):
        opened(path).__enter__()


def test_a_folder_that_is_removed_meanwhile_is_one_line(tmp_path):
    path = tmp_path / "answers" / "out.jsonl"
    path.parent.mkdir()
    with opened(path) as file:
        shutil.rmtree(path.parent)
        with pytest.raises(ConfigError, match=r"out\.jsonl cannot be written: No such file"):
            file.append(FIRST)


FIRST, SECOND = {"id": "a", "turn": 0}, {"id": "b", "turn": 1}
LINE = b'{"id": "a", "turn": 0}\n'


def test_lines_follow_what_is_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    for content in (b"", LINE, LINE + b'{"id": "t', LINE + b'{"'):
        path.write_bytes(content)
        with opened(path) as file:
            assert path.read_bytes() == content
            assert list(file.records.values()) == [FIRST][: len(content)]
            file.append({"id": "é", "turn": 0})
            assert file.records["é", 0] == {"id": "é", "turn": 0}
            added = '{"id": "é", "turn": 0}\n'
            assert path.read_text(encoding="utf-8") == (LINE.decode() if content else "") + added


def test_compact_lines_are_kept_and_torn_ones_removed(tmp_path):
    path = tmp_path / "out.jsonl"
    with opened(path, compact=True) as file:
        file.append(FIRST)
        file.append(SECOND)
    kept = b'{"id":"a","turn":0}\n{"id":"b","turn":1}\n'
    assert path.read_bytes() == kept
    path.write_bytes(kept[:-1])
    with opened(path, compact=True) as file:
        assert list(file.records.values()) == [FIRST]
        file.resume()
        assert path.read_bytes() == kept[:20]


def test_of_two_records_with_one_key_the_later_counts(tmp_path):
    path = tmp_path / "out.jsonl"
    with opened(path) as file:
        file.append(FIRST)
        file.append(FIRST | {"more": 1})
        assert file.records == {("a", 0): FIRST | {"more": 1}}
    with opened(path) as file:
        assert file.records == {("a", 0): FIRST | {"more": 1}}


def test_interrupted_records_at_the_end_do_not_count(tmp_path):
    path = tmp_path / "out.jsonl"
    with opened(path) as file:
        file.append(FIRST)
        file.append(SECOND | {"finish_reason": "interrupted"})
        assert file.records == {("a", 0): FIRST}
    with opened(path) as file:
        assert file.records == {("a", 0): FIRST}
        assert path.read_bytes() != LINE
        file.resume()
        assert path.read_bytes() == LINE


@pytest.mark.parametrize("content", ["notes", "{}\n", '{"id": 1}\n', "[]\n", "null\n"])
def test_nothing_is_left_beside_a_refused_file(content, tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"out\.jsonl:1 was not written by a run like this one"):
        opened(path).__enter__()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == content


def test_other_settings_are_named(tmp_path):
    file = opened(tmp_path / "out.jsonl")
    file.check_settings(FIRST, {"turn": 0, "unknown": 3})
    with pytest.raises(ConfigError, match=r"has lines generated with turn 0, not 1; use the same"):
        file.check_settings(FIRST, {"turn": 1})


def test_a_full_disk_names_the_file(tmp_path):
    with opened(tmp_path / "out.jsonl") as file, full_disk():
        with pytest.raises(ConfigError, match=r"out\.jsonl cannot be written: File too large"):
            file.append(FIRST)
        assert not file.records
