"""The server's options, from the command line and a TOML file."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from treeflash.errors import ConfigError
from treeflash.serving.settings import Settings


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only a server has."""
    group = parser.add_argument_group("server")

    def add(flag: str, help: str, default: object = None, **settings: Any) -> None:
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, help=help + shown, default=default, **settings)

    add("--config", "read options from a TOML file; the command line has priority", metavar="FILE")
    add("--host", "address to listen on", "127.0.0.1")
    add("--port", "port to listen on; 0 chooses a free one", 8000, type=_port)
    add(
        "--model-name",
        "what clients call the model; may be repeated (default: the target's)",
        action="append",
        metavar="NAME",
    )
    add("--log-level", "what to log", "info", choices=("error", "warning", "info", "debug"))
    add("--max-parallel", "texts to decode at once", Settings.max_parallel, type=int, metavar="N")
    add(
        "--max-queue",
        "texts that may wait beyond those; further requests get status 429",
        Settings.max_queue,
        type=int,
        metavar="N",
    )
    add(
        "--max-memory-gb",
        "GiB of device memory for keys and values",
        Settings.max_memory_gb,
        type=float,
        metavar="GB",
    )
    add(
        "--prefix-cache-gb",
        "GiB of it that finished texts may keep for prompts that begin alike; 0 keeps none",
        Settings.prefix_cache_gb,
        type=float,
        metavar="GB",
    )
    add("--max-body-mb", "MiB of a request", Settings.max_body_mb, type=float, metavar="MB")
    add(
        "--body-timeout",
        "seconds in which a request must arrive",
        Settings.body_timeout,
        type=float,
        metavar="S",
    )
    add(
        "--timeout",
        "seconds in which a request must be answered, waiting included",
        Settings.timeout,
        type=float,
        metavar="S",
    )
    add(
        "--keep-alive",
        "seconds after which a silent stream sends a comment",
        Settings.keep_alive,
        type=float,
        metavar="S",
    )
    add(
        "--max-choices",
        "answers to one request (n)",
        Settings.max_choices,
        type=int,
        metavar="N",
    )
    add(
        "--api-key-file",
        "file with one API key per line; every request must send one of them",
        type=Path,
        metavar="FILE",
    )
    add(
        "--cors-origin",
        "origin whose web pages may use the server, or *; may be repeated",
        action="append",
        metavar="ORIGIN",
    )


def read_settings(args: argparse.Namespace) -> Settings:
    """The settings that were given.

    Raises:
        ConfigError: one is invalid.
        OSError: the file of API keys cannot be read.
    """
    names = {field.name for field in fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return Settings(
        **given,
        api_keys=() if args.api_key_file is None else _api_keys(args.api_key_file),
        cors_origins=tuple(args.cors_origin or ()),
    )


def with_config_file(argv: Sequence[str]) -> list[str]:
    """The command line, after the options of the file that it names, if any.

    Raises:
        ConfigError: the file cannot be read, or is not TOML.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        path = parser.parse_known_args(argv)[0].config
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see --help") from None
    if path is None:
        return list(argv)
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a configuration file: {error}") from None
    found = [part for key, value in options.items() for part in _as_arguments(path, key, value)]
    return [*found, *argv]


def _as_arguments(path: Path, key: str, value: object) -> list[str]:
    """An option of a file as on the command line."""
    flag = f"--{key.replace('_', '-')}"
    if flag == "--config":
        raise ConfigError(f"{path} cannot name another configuration file")
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, list):
        return [f"{flag}={item}" for item in value]
    if isinstance(value, dict):
        return [f"{flag}={json.dumps(value)}"]
    return [f"{flag}={value}"]


def _api_keys(path: Path) -> tuple[str, ...]:
    lines = path.read_text(encoding="utf-8").split("\n")
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"{path} has no API key; write one per line")
    return keys


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"not a port: {text}")
    return int(text)
