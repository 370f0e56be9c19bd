"""The command `treeflash`, whose subcommands are modules of this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from treeflash.cli.console import Main, Parser, guarded

COMMANDS = {
    "chat": "talk to a model in the terminal",
    "generate": "generate text from a prompt, or from a file of prompts",
    "serve": "serve a model over HTTP",
    "launch": "run a coding agent, such as Claude Code, on a local model",
    "train": "train a drafter on the responses of its target",
    "distill": "generate a target's responses to train a drafter on",
    "adapt": "continue training a drafter, for a fine-tuned target",
    "evaluate": "measure a drafter by depth, method and budget",
    "doctor": "diagnose a target and its drafter",
    "convert": "write a drafter in another published format",
    "models": "list models on this machine, download and remove models",
    "drafters": "list what can draft for a target, the best first",
}
SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand, or print what was asked for, and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        # Only now, because the imports of a command take a second.
        run, _ = _command(argv[0])
        return run(argv[1:])
    parser, _ = _make_parser()
    shell = parser.parse_args(argv).completion
    if shell is None:
        parser.print_help()
    else:
        print(_completion(shell))
    return 0


def _make_parser() -> tuple[Parser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    parser = Parser(None, "Lossless speculative decoding of language models with draft trees.")
    parser.add_argument(
        "--completion",
        choices=SHELLS,
        help="print a script that makes this shell complete commands and options",
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
        command = commands.choices[name] = _command(name)[1]()
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE
    return shtab.complete(parser, shell)


def _command(name: str) -> tuple[Main, Callable[[], Any]]:
    """Import a command's main function, and the function that makes its parser."""
    if name == "drafters":  # its module would have the name of a package
        models = import_module("treeflash.models")
        return models.drafters, models.make_drafters_parser
    module = import_module(f"treeflash.{name}")
    return module.main, module.make_parser


if __name__ == "__main__":
    sys.exit(main())
