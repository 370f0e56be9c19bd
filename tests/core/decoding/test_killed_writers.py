"""What a process loses that is killed while it writes states: time, and neither a request nor text.

The moments are random, so that the test waits for a random time before each signal.
"""

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))  # also in the child

from stored_states import Process, plain, prompt_of, stored_pair

from treeflash.decoding import state_files

CONVERSATIONS, TURNS = 4, 5


def turn(conversation: int, number: int) -> list[int]:
    """The prompt of a turn; each begins with the one before."""
    return [conversation + 1, *prompt_of(30 + 20 * number, seed=conversation)]


class PiecewiseFile(io.FileIO):
    """Waits for the disk after every piece, so that a signal often finds an incomplete file."""

    def write(self, contents: Any) -> int:
        piece = -(-len(contents) // 4)
        for first in range(0, len(contents), piece):
            super().write(contents[first : first + piece])
            os.fsync(self.fileno())
        return len(contents)


def write_for_ever(pair_folder: Path, states: Path) -> None:
    """Answer the turns of all conversations again and again, in a folder that forgets them."""
    pair = stored_pair(pair_folder, "qwen3_5")
    state_files.os.fdopen = PiecewiseFile
    with Process(pair, states, nbytes=1 << 18) as process:
        process.answer(turn(0, TURNS - 1))
    print("ready", flush=True)  # with something in the folder
    while True:
        # So few bytes that each conversation removes files of another.
        with Process(pair, states, nbytes=1 << 18) as process:
            for conversation in range(CONVERSATIONS):
                for number in range(TURNS):
                    process.answer(turn(conversation, number))
        if process.disk.skipped:
            print("a file was damaged", flush=True)


# Processes are killed at random moments; `test_hostile_states.py` has the files that they leave.
@pytest.mark.nightly
def test_no_request_fails_and_no_text_differs_after_kills(tmp_path, caplog):
    folder, states = tmp_path / "pair", tmp_path / "states"
    pair = stored_pair(folder, "qwen3_5")
    prompts = [turn(n, TURNS - 1) for n in range(CONVERSATIONS)]
    texts = [plain(pair, prompt) for prompt in prompts]
    rng, kills = random.Random(50), 50
    command = [sys.executable, __file__, str(folder), str(states)]
    restored, left = 0, set[str]()
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.6))
            child.send_signal(signal.SIGKILL)
            assert child.stdout.read() == ""
        left |= {path.name for path in states.glob(".*.tmp")}
        with Process(pair, states) as process:
            process.disk.add = lambda *_: None  # the killed process wrote the states
            for prompt, text in zip(prompts, texts, strict=True):
                again, (_, from_disk) = process.answer(prompt)
                assert again == text
                restored += from_disk
        assert process.disk.skipped == 0
    assert not caplog.records
    assert restored > 0
    assert left, "no signal found a file that was being written"
    print(f"{kills} kills, {len(left)} unfinished files, {restored} tokens restored")


if __name__ == "__main__":
    write_for_ever(*map(Path, sys.argv[1:]))
