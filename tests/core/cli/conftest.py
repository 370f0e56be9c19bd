"""A prompt file and a run over it, in a process that Ctrl-C interrupts."""

import json
import signal

import pytest
from batch_files import ROWS

from treeflash.commands.generate import main


@pytest.fixture(autouse=True)
def interruptible():
    """Let SIGINT interrupt, which a process in the background of a shell ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def files(tmp_path):
    """The paths of a prompt file and of the output."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return prompts, tmp_path / "out.jsonl"


@pytest.fixture
def paths(files):
    """Options of a batch."""
    return ["--prompts", str(files[0]), "--output", str(files[1])]


@pytest.fixture
def batch(paths, use, capsys):
    """Run the batch with a model: exit status and standard error.

    Unless arguments say otherwise, one conversation at a time, so that the order is known.
    """

    def batch(model, *args: str) -> tuple[int, str]:
        use(model)
        capsys.readouterr()
        code = main([*paths, "--parallel", "1", *args])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return batch
