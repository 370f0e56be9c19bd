"""The settings of a server, from the command line and a TOML file."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from treeflash.cli.options import add_option
from treeflash.config import GIB, check_writable
from treeflash.errors import ConfigError, MemoryShortError
from treeflash.option import check, option, options_of
from treeflash.serving.response_templates import TOOL_CALL_PARSERS
from treeflash.text.input_file import read_text

MAX_MEMORY_GB = 4
MAX_BODY_MB, MAX_IMAGES_BODY_MB = 8, 32
ANSWER_TOKENS = 2048
"""New tokens of an answer if nobody sets a limit, also in `treeflash chat`."""

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#]+")
"""What browsers send as an origin: pages', and extensions'."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and access. Each limit is also an option of the command line."""

    max_parallel: int = option(16, "answers to decode at the same time", 1)
    max_queue: int = option(
        128,
        "answers that may wait in the queue; if it is full, requests get status 429",
        0,
    )
    max_memory_gb: float | None = option(
        None,
        "GiB of device memory for the KV cache",
        shown=f"on a GPU the memory that the models leave free, on a CPU {MAX_MEMORY_GB}",
        above=0,
        metavar="GiB",
    )
    prefix_cache_gb: float | None = option(
        None,
        "GiB of --max-memory-gb for the prefix cache: finished sequences, kept for prompts that "
        "begin in the same way; 0 turns it off",
        0,
        shown="half of --max-memory-gb",
        metavar="GiB",
    )
    prefix_cache_dir: str | None = option(
        None,
        "folder that keeps the states of conversations, so that they continue after a restart "
        "without a new prefill",
        rule="the path of a folder",
        shown="in memory only",
        metavar="FOLDER",
    )
    prefix_cache_disk_gb: float = option(
        10.0, "maximum size of --prefix-cache-dir in GiB", above=0, metavar="GiB"
    )
    suffix_cache_gb: float = option(
        0.0,
        "GiB of memory for finished answers, from which later answers to the same API key may "
        "draft copies; this makes them faster without changing them; 0 drafts copies only from the "
        "answer itself",
        0,
        metavar="GiB",
    )
    max_body_mb: float | None = option(
        None,
        "maximum size of a request's body in MiB",
        above=0,
        shown=f"{MAX_BODY_MB}, or {MAX_IMAGES_BODY_MB} if the target takes images",
        metavar="MiB",
    )
    body_timeout: float = option(
        30.0, "seconds within which the body of a request must arrive", above=0, metavar="S"
    )
    timeout: float = option(
        600.0,
        "seconds within which a request must be answered, including the time in the queue",
        above=0,
        metavar="S",
    )
    keep_alive: float = option(
        10.0,
        "seconds without output after which a stream sends a comment, to keep the connection open",
        above=0,
        metavar="S",
    )
    max_choices: int = option(16, "maximum number of answers to one request (n)", 1)
    max_models: int | None = option(
        None,
        "models in memory at once; the least recently used one is put away for another",
        1,
        shown="as many as the memory of the device holds",
    )
    unload_after: float | None = option(
        None,
        "seconds without a request after which a model is put out of memory",
        above=0,
        shown="never",
        metavar="S",
    )
    api_keys: tuple[str, ...] = ()  # every request must have one; if empty, none is needed
    cors_origins: tuple[str, ...] = ()  # whose pages may read answers; `*` is every origin
    # This is a name of `TOOL_CALL_PARSERS`; None is the model's own form of calls.
    tool_call_parser: str | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.prefix_cache_dir is not None:
            if self.prefix_cache_gb is not None and not int(self.prefix_cache_gb * GIB):
                raise ConfigError("prefix_cache_dir needs a prefix cache; raise prefix_cache_gb")
            check_writable(Path(self.prefix_cache_dir), folder=True)
        for name in ("api_keys", "cors_origins"):
            values = getattr(self, name)
            if isinstance(values, str) or not all(values):  # each character would be a key
                raise ConfigError(f"{name} must be a list of texts that are not empty")

    def body_bytes(self, *, takes_images: bool) -> int:
        default = MAX_IMAGES_BODY_MB if takes_images else MAX_BODY_MB
        return int((self.max_body_mb or default) * 2**20)

    def memory(self, free: int | None, reserved: int | None = None) -> tuple[int, int]:
        """Return the bytes of all KV caches, and of the prefix cache among them.

        Args:
            free: bytes that the loaded models leave on the device; None if unknown.
            reserved: bytes that the backend has set aside, beyond which there are none; None if it
                allocates what is needed.

        Raises:
            MemoryShortError: the models leave nothing.
        """
        limit = MAX_MEMORY_GB * GIB if free is None else free
        if self.max_memory_gb is not None:
            limit = int(self.max_memory_gb * GIB)
        if reserved is not None:
            limit = reserved if self.max_memory_gb is None else min(limit, reserved)
        if limit == 0 and (reserved == 0 or self.max_memory_gb is None):
            raise MemoryShortError(
                "the models leave the device no memory for KV caches; use a smaller target or one "
                f"in fewer bits{'' if reserved == 0 else ', or set a limit with --max-memory-gb'}"
            )
        cache = self.prefix_cache_gb
        return limit, limit // 2 if cache is None else min(int(cache * GIB), limit)


DISK_OPTIONS = tuple(options_of(Settings)[x] for x in ("prefix_cache_dir", "prefix_cache_disk_gb"))
"""The options of the prefix cache's disk tier."""


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only a server has."""
    group = parser.add_argument_group("server")

    def add(flag: str, help: str, default: object = None, **settings: Any) -> None:
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, help=help + shown, default=default, **settings)

    add("--host", "address to listen on", "127.0.0.1")
    add("--port", "port to listen on; 0 chooses a free one", 8000, type=_port)
    help = "name of the model for clients; may be repeated (default: the target's name)"
    add("--model-name", help, action="append", type=_model_name, metavar="NAME")
    levels = ("error", "warning", "info", "debug")
    add("--log-level", "least severe level to log", "info", choices=levels)
    for limit in options_of(Settings).values():
        add_option(group, limit, default=limit.default)
    help = "format of the model's tool calls (default: the format of its tokenizer or family)"
    add("--tool-call-parser", help, choices=tuple(TOOL_CALL_PARSERS))
    help = "file with one API key per line; every request must then have one of them"
    add("--api-key-file", help, type=Path, metavar="FILE")
    help = "origin whose web pages may use the server, or * for every origin; may be repeated"
    add("--cors-origin", help, action="append", type=_origin, metavar="ORIGIN")


def read_settings(args: argparse.Namespace) -> Settings:
    """Read the settings of the command line.

    Raises:
        ConfigError, PromptError: a setting is invalid, or the file of API keys has none.
    """
    names = {field.name for field in fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    api_keys: tuple[str, ...] = ()
    if args.api_key_file is not None:
        lines = read_text(args.api_key_file).split("\n")
        api_keys = tuple(line.strip() for line in lines if line.strip())
        if not api_keys:
            raise ConfigError(f"{args.api_key_file} has no API key; write one per line")
    return Settings(**given, api_keys=api_keys, cors_origins=tuple(args.cors_origin or ()))


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, got {text}")
    return int(text)


def _model_name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a name is empty; remove it")
    return text


def _origin(text: str) -> str:
    if text not in ("*", "null") and not ORIGIN.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"must be * or an origin without a path, such as https://example.com, got {text!r}"
        )
    return text
