"""The argument parser of all commands: errors in one line, and options from TOML files."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from treeflash.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations for a subcommand, or for `treeflash` itself."""

    def __init__(self, name: str | None, description: str, *, add_help: bool = True) -> None:
        prog = "treeflash" if name is None else f"treeflash {name}"
        super().__init__(prog=prog, description=description, allow_abbrev=False, add_help=add_help)

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError instead of printing the usage, so that the error is a single line."""
        raise ConfigError(f"{message}; see --help")

    def add_config_option(self) -> None:
        """Add `--config`, which `parse` obeys."""
        self.add_argument(
            "--config",
            type=Path,
            metavar="FILE.toml",
            help="read options from a TOML file; the command line has priority",
        )

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line, by default the process's, and the file of its `--config`.

        Raises:
            ConfigError: an option is unknown or invalid, or the file is not TOML.
            PromptError: the file cannot be read.
        """
        argv = sys.argv[1:] if argv is None else argv
        return self.parse_args([*self._configured(argv), *argv])

    def _configured(self, argv: Sequence[str]) -> list[str]:
        """The options of the file of `--config`, in the form of the command line."""
        if "--config" not in self._option_string_actions:
            return []
        finder = Parser(None, "", add_help=False)
        finder.add_config_option()
        path: Path | None = finder.parse_known_args(argv)[0].config
        if path is None:
            return []
        from treeflash.text.prompt import read_text  # its imports would slow down `--help`

        try:
            options = tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not a valid TOML file: {error}") from None
        arguments: list[str] = []
        for key, value in options.items():
            action = self._option_string_actions.get(flag := f"--{key.replace('_', '-')}")
            if action is None:
                raise ConfigError(f"{path}: unknown option {key!r}; see --help for the options")
            if flag in ("--config", "--help"):
                raise ConfigError(f"{path} cannot set {key}; remove it from the file")
            checker = Parser(None, "", add_help=False)
            checker._add_action(action)
            try:
                option = _as_arguments(flag, action, value)
                checker.parse_args(option)
            except ConfigError as error:
                shown = json.dumps(value, default=str)
                raise ConfigError(f"{path}: {key} cannot be {shown}: {error}") from None
            arguments += option
        return arguments


def _as_arguments(flag: str, action: argparse.Action, value: object) -> list[str]:
    """An option of a file in the form of the command line."""
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError("it must be true or false")
        if value:
            return [flag]
        has_opposite = isinstance(action, argparse.BooleanOptionalAction)
        return [f"--no-{flag.removeprefix('--')}"] if has_opposite else []
    if isinstance(value, bool):
        raise ConfigError("it is neither true nor false")
    if isinstance(value, list):
        if action.nargs in ("+", "*"):
            return [flag, *map(str, value)]
        if not isinstance(action, argparse._AppendAction):
            raise ConfigError("it has one value")
        return [f"{flag}={item}" for item in value]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]
