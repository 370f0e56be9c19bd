"""Ctrl-C while a command starts, also where Python drops the KeyboardInterrupt."""

import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from failures import failing

from treeflash import __main__ as process
from treeflash import language_model
from treeflash.__main__ import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals differ on Windows")
LONG_S = 60
"""Longer than a test takes: a load that is not interrupted fails at its end."""


class Interrupted:
    """An object in whose `__del__` the user presses Ctrl-C."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __del__(self) -> None:
        for _ in range(self.times - 1):
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def press_in_del(times: int) -> None:
    """Press Ctrl-C where Python drops it, and go on with a long load."""
    Interrupted(times)
    ends = time.monotonic() + LONG_S
    while time.monotonic() < ends:
        time.sleep(0.01)
    pytest.fail("the load went on")


def press_in_guarded_import() -> None:
    """Press Ctrl-C in code that goes on whatever is raised."""
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        return
    pytest.fail("no interruption")


def press_in_broken_import() -> None:
    """Press Ctrl-C in code that makes another error of it."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ImportError("cannot import name 'x'") from error


PRESSES = {
    "in a __del__": lambda: press_in_del(1),
    "three times in a __del__": lambda: press_in_del(3),
    "swallowed": press_in_guarded_import,
    "replaced": press_in_broken_import,
}


class LoadedPair:
    """What is located by a load that was not interrupted."""

    target = "target"

    def load(self) -> None:
        pytest.fail("the load went on")


@pytest.fixture
def interrupted(monkeypatch):
    """Run a command whose load presses Ctrl-C in some way; it must end as one that was."""

    def interrupted(press):
        monkeypatch.setattr(language_model, "locate", lambda *_, **__: press() or LoadedPair)
        assert main(["generate", "hi"]) == 130

    return interrupted


@pytest.mark.parametrize("press", PRESSES.values(), ids=PRESSES)
def test_ctrl_c_ends_a_load_with_one_line(press, interrupted, capsys):
    interrupted(press)
    assert capsys.readouterr() == ("", "interrupted\n")


def test_other_errors_of_a_del_are_shown_as_python_shows_them(interrupted, monkeypatch):
    class Faulty:
        def __del__(self) -> None:
            raise ValueError("of the destructor")

    def press():
        Faulty()
        raise KeyboardInterrupt

    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: shown.append(found.exc_value))
    interrupted(press)
    assert [str(error) for error in shown] == ["of the destructor"]


def test_ctrl_c_while_the_process_ends_changes_nothing(monkeypatch):
    presses = iter([True, True, False])

    def ignore(number, handler):
        if next(presses):
            raise KeyboardInterrupt

    monkeypatch.setattr(process.signal, "signal", ignore)
    with failing(process, "main", KeyboardInterrupt), pytest.raises(SystemExit, match="130"):
        process.run("generate")
    assert next(presses, None) is None, "interruptions are ignored at last"


@pytest.mark.parametrize("start", [["-m", "treeflash"], ["-m", "treeflash.generate"]])
def test_ctrl_c_during_the_first_imports_shows_one_line(start, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        """
import signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupting:
    def find_spec(self, name, *more):
        if name == "rich":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""
    )
    done = subprocess.run(
        [sys.executable, *start, "hi"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert (done.stderr, done.returncode) == ("interrupted\n", 130)
