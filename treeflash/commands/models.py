"""List, fetch and remove models on this machine: `treeflash models`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.filesize import decimal

from treeflash.cli.console import Parser, guarded, print_columns
from treeflash.cli.running_server import served_models
from treeflash.config import LoadConfig
from treeflash.errors import ConfigError
from treeflash.hub.cached import CachedModel, cached_models, removable
from treeflash.hub.models import resolve_drafter, resolve_target
from treeflash.hub.published import DEFAULT_TARGET, PUBLISHED_DRAFTERS, published_drafters
from treeflash.registry import bits_refusal, default_backend, loader
from treeflash.text.input_file import read_text

DEFAULT_SERVER = "http://127.0.0.1:8000"
DECLINED = 1
"""The exit status if nothing was deleted, because the answer was no."""


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, list, fetch or remove models, and return the exit status."""
    args = make_parser().parse_intermixed_args(argv)
    if args.action == "rm":
        if not args.names:
            raise ConfigError("rm needs the name of a model; `treeflash models` lists them")
        if args.server is not None or args.download is not None:
            raise ConfigError("rm deletes models of this machine; remove --server or --download")
        return _remove(args.names, ask=not args.yes)
    if args.api_key_file is not None and args.server is None:
        raise ConfigError("--api-key-file is for a running server; add --server")
    if args.server is not None:
        return _list_served(args.server, args.api_key_file, as_json=args.json)
    models = cached_models() if args.download is None else _download(args.download)
    rows = [_row(model) for model in models]
    if args.json:
        print(json.dumps({"cached": rows}))
    else:
        print_columns((row["name"], decimal(row["bytes"]), row["folder"]) for row in rows)
        if args.download is None:
            print(f"{decimal(sum(model.nbytes for model in models))} in all")
    return 0


def make_parser() -> Parser:
    parser = Parser(
        "models",
        "List the models on this machine, download models ahead of use, and remove models.",
    )
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument(
        "--download",
        metavar="ID",
        help=f"download this drafter, or this target and its published drafter ({DEFAULT_TARGET} "
        "is the default target)",
    )
    sources.add_argument(
        "--server",
        nargs="?",
        const=DEFAULT_SERVER,
        metavar="URL",
        help="list the models of a running server, with their lengths and which are in memory "
        f"(without a URL: {DEFAULT_SERVER})",
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="file with the API key of --server"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--yes", "-y", action="store_true", help="let rm delete without asking")
    parser.add_argument(
        "action",
        nargs="?",
        choices=["rm"],
        help="rm deletes the named models from the caches, after a question",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="name of a model, as listed")
    return parser


def _list_served(url: str, key_file: Path | None, *, as_json: bool) -> int:
    """Print the models of a running server."""
    if not _is_address(url):
        raise ConfigError(f"{url!r} is not the address of a server, such as {DEFAULT_SERVER}")
    keys = [] if key_file is None else read_text(key_file).split()
    advice = "give the address of a server of treeflash"
    key = (keys or ["-"])[0]
    found = served_models(url.rstrip("/"), key, if_taken=advice, if_unreachable=advice)
    if found is None:
        raise ConfigError(f"no server listens at {url}; start one with `treeflash serve`")
    rows = [
        {
            "name": model["id"],
            "context": model["max_model_len"],
            "in_memory": model["status"]["value"] == "loaded",
        }
        for model in found
    ]
    if as_json:
        print(json.dumps({"served": rows}))
    else:
        print_columns(
            (row["name"], f"{row['context']:,} tokens", "in memory" * row["in_memory"])
            for row in rows
        )
    return 0


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _remove(names: Sequence[str], *, ask: bool) -> int:
    """Delete models, none of them if a name is unknown or the answer to the question is no."""
    found = {name: removable(name) for name in names}
    sizes = {name: sum(model.nbytes for model in own) for name, own in found.items()}
    if ask:
        if not sys.stdin.isatty():
            raise ConfigError("rm asks before it deletes, which needs a terminal; add --yes")
        listed = ", ".join(f"{name} ({decimal(nbytes)})" for name, nbytes in sizes.items())
        if input(f"delete {listed}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was deleted")
            return DECLINED
    for name, own in found.items():
        for model in own:
            if model.remove is not None:
                model.remove()
        print(f"removed {name}, {decimal(sizes[name])}")
    return 0


def _download(name: str) -> list[CachedModel]:
    """Fetch a known drafter, or a target with its default drafter."""
    known = {drafter.name.lower() for ds in PUBLISHED_DRAFTERS.values() for drafter in ds}
    if name.lower() in known:
        folders = {name: resolve_drafter(name, None)}
    else:
        # As `generate` takes it with its default settings.
        packed = bits_refusal(loader(default_backend()), LoadConfig()) is None
        folders = {name: resolve_target(name, packed=packed)}
        if drafters := published_drafters(name):
            folders[drafters[0].name] = resolve_drafter(None, name)
    return [CachedModel.from_folder(name, folder) for name, folder in folders.items()]


def _row(model: CachedModel) -> dict[str, Any]:
    return {"name": model.name, "bytes": model.nbytes, "folder": str(model.folder)}
