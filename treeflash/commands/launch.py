"""Start a coding agent on a local model: `treeflash launch`.

A server that answers at the address is used; else one is started, and ended with the agent. The
agent shares the terminal with this process. The server has its own session, because a Ctrl-C
in the terminal is for the agent: it would end the server while the agent still needs it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.text import Text

from treeflash.cli import options as cli
from treeflash.cli.console import EXIT_BAD_INPUT, Parser, guarded
from treeflash.cli.running_server import served_models
from treeflash.commands.serve import (
    add_options,
    model_arguments,
    model_names,
    refuse_missing_packages,
)
from treeflash.errors import ConfigError
from treeflash.hub.published import model_name
from treeflash.serving.agents import AGENTS, MAX_OUTPUT, Agent, Endpoint
from treeflash.serving.settings import read_settings
from treeflash.text.tokenizer import Tokenizer

REACHED_BY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that reach a server that listens on all interfaces."""


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run an agent with a server; the exit status is the agent's, or 2 if it cannot be started."""
    options, own = _split(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse(options)
    if options[0] != args.agent:
        raise ConfigError(f"write the agent first: treeflash launch {args.agent} ...")
    agent = AGENTS[args.agent]
    command = shutil.which(agent.command)
    if command is None:
        raise ConfigError(
            f"{agent.name} is not installed: there is no command {agent.command}; {agent.install}"
        )
    with _ending_on_signals(), _server(args, options[1:]) as endpoint:
        return _run(command, agent, endpoint, own)


def make_parser() -> Parser:
    parser = Parser(
        "launch",
        "Run a coding agent on a local model. Uses the server at the address, or starts a server "
        "and stops it when the agent exits. Arguments after -- are passed to the agent.",
    )
    parser.add_argument("agent", choices=tuple(AGENTS), help="the agent to run")
    add_options(parser)
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line at `--` into options of this command and arguments of the agent."""
    end = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:end]), list(argv[end + 1 :])


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the `with` block as exceptions do, so that nothing is left."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _server(args: argparse.Namespace, options: list[str]) -> Iterator[Endpoint]:
    """Find the server at the address of the options, or start one for the `with` block."""
    keys = read_settings(args).api_keys
    key = keys[0] if keys else "-"
    host = REACHED_BY.get(args.host, args.host)
    if args.port == 0:
        args.port = _free_port(args.host)
        options = [*options, "--port", str(args.port)]
    url = f"http://{f'[{host}]' if ':' in host else host}:{args.port}"
    models = _models(url, key)
    model, *_ = model_arguments(args, options)
    if models is not None:
        named = model.target is not None or model.model_name
        wanted = model_names(model)[0] if named else next(iter(models))
        # The case of a name does not matter to the server either.
        name = next((name for name in models if name.casefold() == wanted.casefold()), None)
        if name is None:
            raise ConfigError(
                f"the server at {url} has {', '.join(models)} and not {wanted}; end it, or choose "
                "another --port"
            )
        print(f"using the server at {url} with {name}, and its options", file=sys.stderr)
        yield Endpoint(url, key, name, models[name])
        return
    # Missing models are fetched here, where a download can show its progress.
    pair = cli.locate_model(model, [cli.decode_options(model).get("method")])
    _refuse_without_tools(pair.target, args.tool_call_parser)
    if "max_tokens" not in cli.decode_options(model):  # Codex asks for no length
        options = [*options, "--max-tokens", str(MAX_OUTPUT)]
    with tempfile.TemporaryDirectory(prefix="treeflash-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "treeflash", "serve", *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            with Console(stderr=True).status(Text(f"loading {model_names(model)[0]}")):
                models = _wait_for_models(process, log, url, key)
            name = next(iter(models))
            print(f"serving {name} at {url}, log in {log}", file=sys.stderr)
            yield Endpoint(url, key, name, models[name])
            if process.poll() is not None:
                warnings.warn(f"before the agent ended, {_ending(process, log)}", stacklevel=2)
        finally:
            end_server(process)


def _refuse_without_tools(target: Path, parser: str | None) -> None:
    """Raise a ConfigError if the server would refuse the tools of every request of an agent."""
    refuse_missing_packages()
    from treeflash.serving.message_parser import ResponseTemplate

    tokenizer, name = Tokenizer.from_folder(target), model_name(target)
    if not tokenizer.knows_tools:
        raise ConfigError(
            f"{name} cannot call tools, which agents need; choose --target with a model whose chat "
            "template has tools, such as Qwen/Qwen3-8B"
        )
    if ResponseTemplate.find(tokenizer, target, parser) is None:
        raise ConfigError(
            f"the form in which {name} calls tools, which agents need, is not known; name it with "
            "--tool-call-parser, or choose another --target"
        )


def _free_port(host: str) -> int:
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listening:
            listening.bind(address)
            port: int = listening.getsockname()[1]
    except OSError as error:
        problem = f"cannot listen on {host} ({error.strerror})"
        raise ConfigError(f"{problem}; choose another --host") from None
    return port


def _models(url: str, key: str) -> dict[str, int] | None:
    """Return the context lengths of a server's models by name; see `served_models`."""
    models = served_models(
        url,
        key,
        if_taken="choose another --port",
        if_unreachable="choose another --host or --port",
    )
    return None if models is None else {x["id"]: x["max_model_len"] for x in models}


def _wait_for_models(
    process: subprocess.Popen[bytes], log: Path, url: str, key: str
) -> dict[str, int]:
    """Wait until a server that was started names its models; a ConfigError if it ended."""
    while process.poll() is None:
        if (models := _models(url, key)) is not None:
            return models
        time.sleep(0.1)
    raise ConfigError(_ending(process, log))


def _ending(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return why a server ended: the last line of its log."""
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    last = last.removeprefix("error: ")
    if process.returncode == EXIT_BAD_INPUT:
        return last
    return f"the server ended with status {process.returncode}: {last}"


def end_server(process: subprocess.Popen[bytes]) -> None:
    """End a server after its running answers; a Ctrl-C ends it at once."""
    process.terminate()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()


def _run(command: str, agent: Agent, endpoint: Endpoint, arguments: Sequence[str]) -> int:
    """Run an agent to its end, and return its exit status as a shell reports it."""
    given = {**_without_proxy(endpoint.url), **agent.environment(endpoint)}
    environment = {k: v for k, v in {**os.environ, **given}.items() if v is not None}
    # The terminal sends Ctrl-C to the agent too, which decides what it means.
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        process = subprocess.Popen(
            [command, *agent.arguments(endpoint), *arguments], env=environment
        )
        try:
            status = process.wait()
        finally:  # SIGTERM ends here too; an agent that has ended is left alone
            process.terminate()
            process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return status if status >= 0 else 128 - status


def _without_proxy(url: str) -> dict[str, str]:
    """Return variables that keep an agent's requests to the server from the user's proxy."""
    host = url.removeprefix("http://").rpartition(":")[0]
    names = ("NO_PROXY", "no_proxy")
    return {name: ",".join(filter(None, (os.environ.get(name), host))) for name in names}
