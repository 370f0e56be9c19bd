"""The command `treeflash`, whose subcommands are modules of this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import treeflash
from treeflash.cli.console import guarded
from treeflash.cli.parser import Parser

COMMANDS = {
    "chat": "talk to a model in the terminal",
    "generate": "generate text from a prompt, or from a file of prompts",
    "serve": "serve a model over HTTP",
    "train": "train a drafter on the responses of its target",
    "distill": "generate a target's responses to train a drafter on",
    "adapt": "train a drafter on for a fine-tuned target",
    "evaluate": "measure a drafter by depth, method and budget",
    "doctor": "diagnose a target and its drafter",
    "convert": "write a drafter in another published format",
    "models": "list drafters and cached models, and download models",
}
SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand, or print what was asked for, and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        # Only now, because the imports of a command take a second.
        return int(_module(argv[0]).main(argv[1:]))
    parser, _ = _make_parser()
    shell = parser.parse_args(argv).completion
    if shell is None:
        parser.print_help()
    else:
        print(_completion(shell))
    return 0


def _make_parser() -> tuple[Parser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    parser = Parser(None, "Lossless speculative decoding of language models with draft trees.")
    version = f"treeflash {treeflash.__version__}"
    parser.add_argument("--version", action="version", version=version)
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
        command = commands.choices[name] = _module(name).make_parser()
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE
    return shtab.complete(parser, shell)


def _module(name: str) -> Any:
    return import_module(f"treeflash.{name}")


if __name__ == "__main__":
    sys.exit(main())
