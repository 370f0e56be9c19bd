"""The command `treeflash`, whose subcommands are the modules of `treeflash.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from treeflash.cli.console import Parser, guarded
from treeflash.interruption import never_swallowed

COMMANDS = {
    "chat": "talk to a model in the terminal",
    "generate": "generate text from a prompt, or from a file of prompts",
    "serve": "serve a model over HTTP",
    "launch": "run a coding agent, such as Claude Code, on a local model",
    "train": "train a drafter on the responses of its target",
    "distill": "generate a target's responses to train a drafter on",
    "adapt": "continue training a drafter for a fine-tuned target",
    "evaluate": "measure a drafter by depth, method and budget",
    "doctor": "diagnose a target and its drafter",
    "convert": "convert a drafter to another published format",
    "models": "list the models on this machine, download and remove models",
    "drafters": "list what can draft for a target, the best first",
}
SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand, or print what was asked for, and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        with never_swallowed():
            # The command is imported only now, because its imports take a second.
            module = _module(argv[0])
        status: int = module.main(argv[1:])
        return status
    parser, _ = _make_parser()
    shell = parser.parse_args(argv).completion
    if shell is None:
        parser.print_help()
    else:
        print(_completion(shell))
    return 0


def _module(command: str) -> ModuleType:
    return import_module(f"treeflash.commands.{command}")


def _make_parser() -> tuple[Parser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    parser = Parser(None, "Lossless speculative decoding of language models with draft trees.")
    parser.add_argument(
        "--completion",
        choices=SHELLS,
        help="print a script that lets this shell complete commands and options",
    )
    commands = parser.add_subparsers(
        metavar="COMMAND", title="commands", parser_class=argparse.ArgumentParser
    )
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser, commands


def _completion(shell: str) -> str:
    import shtab  # takes long

    parser, commands = _make_parser()
    for name in COMMANDS:
        command = commands.choices[name] = _module(name).make_parser()
        for action in command.actions:
            if action.type is Path:
                action.complete = shtab.FILE
    return shtab.complete(parser, shell)
