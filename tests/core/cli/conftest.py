"""A prompt file and a run over it, in a process that Ctrl-C interrupts, and conversations."""

import io
import json
import os
import signal
import sys

import pytest
from batch_files import ROWS
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from recordings import recording
from rich.console import Console

from treeflash.commands import chat
from treeflash.commands.chat import ChatSession, make_session
from treeflash.commands.generate import main
from treeflash.decoding import SchedulerConfig


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


END_OF_INPUT = "\x04"


@pytest.fixture
def talk(scripted, request):
    """Enter keys in a conversation with a model: the conversation and what it showed."""

    def talk(*keys: str, model=None, color=False, **options):
        file = io.StringIO()
        console = Console(file=file, width=100, force_terminal=color, highlight=False, markup=False)
        model = model or scripted(request.module.TEXT)
        options = {"max_tokens": 100, **options}
        talked = ChatSession(model, options, console, markdown=not color, color=color)
        if model.backend.name == "scripted":  # its states cannot be kept
            config = SchedulerConfig(max_parallel=1, lone_prefill_chunk=talk.prefill_chunk)
            talked.scheduler = model.scheduler(config, None)
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text("".join(keys) + END_OF_INPUT)
            talked.run(make_session(talk.history))
        return talked, file.getvalue()

    talk.history = InMemoryHistory()
    talk.prefill_chunk = 2048
    return talk


@pytest.fixture
def run_chat(stdin, monkeypatch):
    """Run `treeflash chat` in a terminal, and enter keys: the conversation."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    main_end, terminal = os.openpty()

    def run_chat(*options: str, keys: str = "") -> ChatSession:
        with (
            create_pipe_input() as pipe,
            create_app_session(input=pipe, output=DummyOutput()),
            recording(ChatSession, "close") as closed,
        ):
            pipe.send_text(keys + END_OF_INPUT)
            assert chat.main(["--no-history", *options]) == 0
        ((talked,),) = closed
        return talked

    with os.fdopen(terminal) as stream:
        stdin(stream)
        yield run_chat
    os.close(main_end)
