"""Output files: locked for one process, regular, named when they cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from treeflash.errors import ConfigError
from treeflash.text.output_file import OutputFile, locked

HOLD = """
import sys
from pathlib import Path
from treeflash.text.output_file import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_holds_until_its_process_ends_even_if_it_is_killed(tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", HOLD, str(output)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"locked\n"
        monkeypatch.chdir(tmp_path)
        for path in (output, Path("out.jsonl")):
            with pytest.raises(ConfigError, match=r"out\.jsonl is being written by another"):
                locked(path).__enter__()
    finally:
        process.kill()
        process.communicate()
    with locked(output):
        pass
    with locked(output):
        pass


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
        locked(path).__enter__()


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"no/out\.jsonl cannot be written: No such file"):
        locked(tmp_path / "no" / "out.jsonl").__enter__()


def test_lines_follow_what_is_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("kept\ntorn")
    with OutputFile(path, 5) as file:
        file.append("é")
        assert path.read_text(encoding="utf-8") == "kept\né\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "out.jsonl"
    path.symlink_to("/dev/full")
    file = OutputFile.__new__(OutputFile)
    file.path, file._file = path, path.open("wb", buffering=0)
    with file, pytest.raises(ConfigError, match=r"out\.jsonl cannot be written: No space left"):
        file.append("x")
