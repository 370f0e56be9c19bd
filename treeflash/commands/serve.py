"""Serve a model over HTTP: `treeflash serve`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from treeflash.cli import options as cli
from treeflash.cli.console import Parser, guarded
from treeflash.errors import ConfigError
from treeflash.serving.settings import ANSWER_TOKENS, add_server_options, read_settings

REQUIRED_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, load the models, and serve until a signal ends the server.

    The exit status is 0 after a signal and the end of the running answers, 2 if the input is
    invalid or the port is taken.
    """
    args = make_parser().parse(argv)
    settings = read_settings(args)
    options = cli.decode_options(args)
    refuse_missing_packages()
    from treeflash.serving.application import serve

    return serve(
        # The log tells what happens.
        lambda: cli.locate_model(args, [options.get("method")]).load(),
        settings,
        options,
        model_names(args),
        host=args.host,
        port=args.port,
        log_level=args.log_level,
    )


def refuse_missing_packages() -> None:
    """Raise a ConfigError if a package that the server needs is not installed."""
    if missing := [name for name in REQUIRED_PACKAGES if find_spec(name) is None]:
        raise ConfigError(
            f"the server needs {missing[0]}; pip install '.[serve]' in a clone of treeflash"
        )


def make_parser() -> Parser:
    parser = Parser("serve", "Serve a model over HTTP, with lossless speculative decoding.")
    add_options(parser)
    return parser


def add_options(parser: Parser) -> None:
    """Add all options of a server and its models."""
    parser.add_config_option()
    add_server_options(parser)
    note = {"seed": "random", "max_tokens": str(ANSWER_TOKENS)}
    cli.add_decode_options(parser, cli.SERVER_OPTIONS, note)
    cli.add_model_options(parser)


def model_names(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the names by which clients may call the model; responses have the first."""
    if args.model_name:
        return tuple(args.model_name)
    if args.target is None:
        return ("SmolLM2-135M-Instruct",)
    path = Path(args.target)
    if path.is_file():  # GGUF
        return (path.stem,)
    return (path.resolve().name,) if path.is_dir() else (args.target,)
