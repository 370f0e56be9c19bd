"""Serve models over HTTP: `treeflash serve`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from treeflash.cli import options as cli
from treeflash.cli.console import Parser, guarded, read_toml
from treeflash.errors import ConfigError
from treeflash.language_model import LanguageModel
from treeflash.serving.settings import ANSWER_TOKENS, add_server_options, read_settings

REQUIRED_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


FOR_ALL = (
    *("host", "port", "log_level", "models", "config", "help", "version"),
    *("api_key_file", "cors_origin", "max_models", "max_body_mb", "body_timeout"),
)
"""The options of the whole server, which no model has for itself."""
OF_ONE = {"target": "--target", "drafter": "--drafter", "model_name": "--model-name"}
"""The options that say what one model is, with their flags."""


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, load the models, and serve until a signal ends the server.

    The exit status is 0 after a signal and the end of the running answers, 2 if the input is
    invalid or the port is taken.
    """
    given, parser = sys.argv[1:] if argv is None else argv, make_parser()
    args = parser.parse(given)
    settings, models = read_settings(args), model_arguments(args, given)
    checked = [(model, read_settings(model), cli.decode_options(model)) for model in models]
    refuse_missing_packages()
    from treeflash.serving.application import serve
    from treeflash.serving.models import ModelSpec

    specs = []
    for model, own, options in checked:
        methods = [options.get("method")]
        spec = ModelSpec(
            names=model_names(model),
            load=partial(_load, model, methods),  # the log tells what happens
            settings=own,
            defaults=options,
        )
        if len(models) > 1:
            pair = cli.locate_model(model, methods)
            spec = replace(spec, load=pair.load, folder=pair.target, images=pair.config.images)
        specs.append(spec)
    return serve(specs, settings, host=args.host, port=args.port, log_level=args.log_level)


def _load(args: argparse.Namespace, methods: Sequence[str | None]) -> LanguageModel:
    return cli.locate_model(args, methods).load()


def model_arguments(args: argparse.Namespace, argv: Sequence[str]) -> list[argparse.Namespace]:
    """Return the options of each model: of the command line and, for one of a file, of its table.

    Raises a ConfigError if a table has an option that is unknown, invalid or the whole server's, or
    the command line says something of one model where there are several.
    """
    given = [name for name in OF_ONE if getattr(args, name) is not None]
    if args.models is None:
        targets = args.target or [None]
        if len(targets) > 1 and given != ["target"]:
            raise ConfigError(
                f"{OF_ONE[given[1]]} would be for all of several targets; write the models into a "
                "file for --models"
            )
        return [_with(args, target=target) for target in targets]
    if given:
        raise ConfigError(f"{OF_ONE[given[0]]} is set by the file of --models; remove one of them")
    tables = read_toml(args.models)
    models = tables.pop("model", None)
    is_list = isinstance(models, list) and all(isinstance(table, dict) for table in models)
    if tables or not is_list or not models:
        raise ConfigError(f"{args.models} must have a table [[model]] for each model, and no more")
    found = []
    for table in models:
        own = {"model_name" if name == "name" else name: x for name, x in table.items()}
        parser = make_parser()
        arguments = parser.arguments_of(own, args.models, FOR_ALL)
        model = parser.parse([*argv, *arguments])
        if model.target is not None and len(model.target) > 1:
            raise ConfigError(f"{args.models}: a model has one target, not {len(model.target)}")
        found.append(_with(model, target=model.target and model.target[0]))
    return found


def _with(args: argparse.Namespace, **changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changes})


def refuse_missing_packages() -> None:
    """Raise a ConfigError if a package that the server needs is not installed."""
    if missing := [name for name in REQUIRED_PACKAGES if find_spec(name) is None]:
        raise ConfigError(
            f"the server needs {missing[0]}; pip install '.[serve]' in a clone of treeflash"
        )


def make_parser() -> Parser:
    parser = Parser("serve", "Serve models over HTTP, with lossless speculative decoding.")
    add_options(parser)
    return parser


def add_options(parser: Parser) -> None:
    """Add all options of a server and its models."""
    parser.add_config_option()
    parser.add_argument(
        "--models",
        type=Path,
        metavar="FILE.toml",
        help="serve the models of this file: a table [[model]] for each, with its name, its target "
        "and any other options; they are loaded when requests name them",
    )
    add_server_options(parser)
    note = {"seed": "random", "max_tokens": str(ANSWER_TOKENS)}
    cli.add_decode_options(parser, cli.SERVER_OPTIONS, note)
    cli.add_model_options(parser, several=True)


def model_names(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the names by which clients may call one model; responses have the first."""
    if args.model_name:
        return tuple(args.model_name)
    if args.target is None:
        return ("SmolLM2-135M-Instruct",)
    path = Path(args.target)
    if path.is_file():  # GGUF
        return (path.stem,)
    return (path.resolve().name,) if path.is_dir() else (args.target,)
