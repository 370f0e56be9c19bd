"""How commands end: one-line errors and exit statuses."""

from __future__ import annotations

import warnings

import pytest

from treeflash.cli.console import guarded
from treeflash.errors import CheckpointError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CheckpointError("x is\n  damaged"), 2, "error: x is damaged"),
        (OSError(28, "No space left", "out"), 2, "error: out: No space left"),
        (MemoryError(), 2, "error: out of memory; try shorter texts"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "error: out of memory; try shorter texts"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            2,
            "error: out of memory; try shorter texts, smaller draft trees (--budget)",
        ),
        (
            RuntimeError("[malloc] Unable to allocate 99 bytes."),
            2,
            "error: out of memory; try shorter texts",
        ),
        (
            RuntimeError(
                "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
                "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
            ),
            1,
            "error: the GPU refuses further work of this process; start again",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_line_and_a_code(capsys, error, code, line):
    @guarded
    def main(argv=None):
        raise error

    assert main([]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [IndexError, RuntimeError])
def test_other_exceptions_are_not_caught(error):
    @guarded
    def main(argv=None):
        raise error

    with pytest.raises(error):
        main([])


def test_success_keeps_its_code(capsys):
    assert guarded(lambda argv=None: 1)([]) == 1
    assert capsys.readouterr().err == ""


def test_warnings_are_notes_of_one_line():
    """Another package's warnings of other kinds keep their place."""
    shown = []

    @guarded
    def main(argv=None):
        for kind in (UserWarning, FutureWarning):
            shown.append(warnings.formatwarning("models are large", kind, "file.py", 7, ""))
        return 0

    plain = warnings.formatwarning
    assert main([]) == 0
    assert shown == ["note: models are large\n", "file.py:7: FutureWarning: models are large\n"]
    assert warnings.formatwarning is plain
