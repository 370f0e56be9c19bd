"""Commands on a console: the parser of options, one-line errors, exit statuses, progress bars."""

from __future__ import annotations

import argparse
import errno
import functools
import io
import json
import os
import sys
import tomllib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

import treeflash
from treeflash.errors import (
    ConfigError,
    DeviceError,
    TreeflashError,
    is_device_lost,
    is_of_earlier_work,
    is_out_of_memory,
)
from treeflash.interruption import repeated_if_dropped, say_interrupted
from treeflash.option import did_you_mean
from treeflash.text.input_file import read_text

Arguments = ParamSpec("Arguments")
EXIT_DEVICE_LOST = 1
EXIT_BAD_INPUT = 2
EXIT_SIGNAL = 128  # shells add the number of the signal that ended a program
EXIT_READER_GONE = 141  # the exit status that shells report for SIGPIPE
LONG_PROMPT = 512
"""Tokens of a prompt that take long enough to show how many of them have run."""
DEVICE_LOST_ADVICE = (
    "the GPU refuses further work of this process; start again, with smaller draft trees "
    "(--budget) or without other programs on the GPU"
)


def guarded(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Make the main function of a command end with an exit status, whatever the user does.

    Invalid input prints a one-line error and exits with status 2, a GPU that refuses further work
    with 1, and an interruption with 130. Other exceptions, faults of the program, are not caught.
    """

    @functools.wraps(main)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
        _open_closed_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
        try:
            with notes(), repeated_if_dropped():
                code = main(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return say_interrupted()
        except BrokenPipeError:
            # Python flushes standard output again at exit, which must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_READER_GONE
        except TreeflashError as error:
            return _fail(str(error))
        except OSError as error:
            # Files that are written by their names are in the message; the output has none.
            full = error.errno == errno.ENOSPC
            name = error.filename or ("the output cannot be written" if full else None)
            return _fail(str(error) if name is None else f"{name}: {error.strerror}")
        except (MemoryError, RuntimeError) as error:
            if is_device_lost(error):
                return _fail(f"{DEVICE_LOST_ADVICE} ({error})", EXIT_DEVICE_LOST)
            if not is_out_of_memory(error):
                if is_of_earlier_work(error):
                    return _fail(str(DeviceError(error)))
                raise
            return _fail(
                "out of memory; try shorter texts, smaller draft trees (--budget) or batches, "
                "--dtype bfloat16, or a smaller model"
            )
        return code

    return run


@contextmanager
def notes() -> Iterator[None]:
    """Show what treeflash warns of as one line, without the place in its code."""
    plain = warnings.formatwarning

    def format_warning(
        message: Warning | str, category: type[Warning], *place: Any, **line: Any
    ) -> str:
        if category is UserWarning:
            return f"note: {message}\n"
        return plain(message, category, *place, **line)

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = plain


def _open_closed_streams() -> None:
    """Discard the output of streams that a shell closed (`>&-`); in Python they are None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


def _fail(message: str, status: int = EXIT_BAD_INPUT) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


class NotesConsole(Console):
    """A console that becomes quiet when its reader is gone.

    rich would end the command, and drop the rest of standard output, whose reader may be there.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True


def plain_console(*, soft_wrap: bool = True, quiet: bool = False) -> Console:
    """Create a console on standard error that prints texts as they are, with brackets in names."""
    return NotesConsole(
        stderr=True, markup=False, highlight=False, soft_wrap=soft_wrap, quiet=quiet
    )


def progress(console: Console, *more: ProgressColumn) -> Progress:
    """Create a progress bar with a description, a count and the remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, *more, TimeRemainingColumn(), console=console)


def reading(done: int, total: int) -> str:
    """Say how much of a prompt has run; worth it from `LONG_PROMPT` tokens on."""
    return f"reading the prompt: {done:,} of {total:,} tokens"


def print_columns(rows: Iterable[Sequence[str]]) -> None:
    """Print rows of equally many cells in columns."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"  {line.rstrip()}")


class _ShowVersion(argparse.Action):
    """Print the version, which is looked up only now: a source tree may have none."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS)
        self.help = "print the version"

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"treeflash {treeflash.__version__}")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations for a subcommand, or for `treeflash` itself."""

    def __init__(self, name: str | None, description: str, *, add_help: bool = True) -> None:
        prog = "treeflash" if name is None else f"treeflash {name}"
        super().__init__(prog=prog, description=description, allow_abbrev=False, add_help=add_help)
        if add_help:
            self.add_argument("--version", action=_ShowVersion)

    @property
    def actions(self) -> Sequence[argparse.Action]:
        """The options and arguments that it takes."""
        return self._actions

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a command line; a ConfigError says what its unknown arguments may have meant."""
        args = sys.argv[1:] if args is None else list(args)
        try:
            found, unknown = self.parse_known_args(args, namespace)
        except ConfigError:
            # The value of an unknown option counts as an argument, which may be one too many.
            own = args[: args.index("--")] if "--" in args else args
            flags = [x.partition("=")[0] for x in own if x.startswith("--") and " " not in x]
            unknown = [flag for flag in flags if flag not in self._option_string_actions]
            if not unknown:
                raise
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._advice(unknown)}")
        return found

    def _advice(self, unknown: Sequence[str]) -> str:
        flags = [text.partition("=")[0] for text in unknown if text.startswith("-")]
        if flags:
            return did_you_mean(flags[0], self._option_string_actions)
        return " (a text with spaces needs quotes)" if self._get_positional_actions() else ""

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError instead of printing the usage, so that the error is a single line."""
        raise ConfigError(f"{message}; see --help")

    def add_config_option(self) -> None:
        """Add `--config`, which `parse` obeys."""
        self.add_argument(
            "--config",
            type=Path,
            metavar="FILE.toml",
            help="read options from a TOML file; options on the command line take precedence, and "
            "those that may be repeated are added",
        )

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line, by default the process's, and the file of its `--config`.

        A ConfigError is raised if an option is unknown or invalid, or the file is not TOML, a
        PromptError if the file cannot be read.
        """
        argv = sys.argv[1:] if argv is None else argv
        return self.parse_args([*self._configured(argv), *argv])

    def _configured(self, argv: Sequence[str]) -> list[str]:
        """Read the options of the file of `--config`, in the form of the command line."""
        if "--config" not in self._option_string_actions:
            return []
        finder = Parser(None, "", add_help=False)
        finder.add_config_option()
        path: Path | None = finder.parse_known_args(argv)[0].config
        if path is None:
            return []
        return self.arguments_of(read_toml(path), path, ("config", "help", "version"))

    def arguments_of(
        self, options: Mapping[str, object], path: Path, refused: Collection[str]
    ) -> list[str]:
        """Return the options of a file, or of a part of it, in the form of the command line.

        Raises a ConfigError that names the file for options that are unknown, invalid or `refused`.
        """
        arguments: list[str] = []
        for key, value in options.items():
            action = self._option_string_actions.get(flag := f"--{key.replace('_', '-')}")
            if action is None:
                flags = (option.removeprefix("--") for option in self._option_string_actions)
                meant = did_you_mean(key, [flag.replace("-", "_") for flag in flags])
                raise ConfigError(
                    f"{path}: unknown option {key!r}{meant}; see --help for the options"
                )
            if flag.removeprefix("--").replace("-", "_") in refused:
                raise ConfigError(f"{path} cannot set {key}; remove it from the file")
            checker = Parser(None, "", add_help=False)
            checker._add_action(action)
            shown = json.dumps(value, default=str)
            option = _as_arguments(flag, action, value)
            if isinstance(option, str):
                raise ConfigError(f"{path}: {key} must be {option}, not {shown}")
            try:
                checker.parse_args(option)
            except ConfigError as error:
                raise ConfigError(f"{path}: {key} cannot be {shown}: {error}") from None
            arguments += option
        return arguments


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; a ConfigError if it is none, a PromptError if it cannot be read."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not a valid TOML file: {error}") from None


def _as_arguments(flag: str, action: argparse.Action, value: object) -> list[str] | str:
    """Return an option of a file in the form of the command line, or what it must be instead."""
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            return "true or false"
        if value:
            return [flag]
        has_opposite = isinstance(action, argparse.BooleanOptionalAction)
        return [f"--no-{flag.removeprefix('--')}"] if has_opposite else []
    if isinstance(value, bool):
        is_number = action.type in (int, float) or isinstance(action.default, int | float)
        return "a number" if is_number else "a text" if action.type is None else "a value"
    if isinstance(value, list):
        if action.nargs in ("+", "*"):
            return [flag, *map(str, value)]
        if not isinstance(action, argparse._AppendAction):
            return "a single value"
        return [f"{flag}={item}" for item in value]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]
