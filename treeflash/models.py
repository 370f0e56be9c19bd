"""List models on this machine and drafters of targets: `treeflash models`, `treeflash drafters`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from treeflash.cli.console import Parser, guarded
from treeflash.decoding.families import family_of
from treeflash.drafters.folder import read_config
from treeflash.errors import CheckpointError, ConfigError
from treeflash.hub.models import (
    DEFAULT_TARGET,
    KNOWN_TARGETS,
    PUBLISHED_DRAFTERS,
    CachedModel,
    DraftSource,
    cached_models,
    draft_sources,
    published_drafters,
    remove_model,
    resolve_drafter,
    resolve_target,
)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line of `models`, list, fetch or remove, and return the exit status."""
    args = make_parser().parse(argv)
    if args.action == "rm":
        if not args.names:
            raise ConfigError("rm needs the name of a model; `treeflash models` lists them")
        for name in args.names:
            print(f"removed {name}, {decimal(remove_model(name))}")
        return 0
    models = cached_models() if args.download is None else _download(args.download)
    rows = [_row(model) for model in models]
    if args.json:
        print(json.dumps({"cached": rows}))
    else:
        _print(rows)
        if args.download is None:
            print(f"{decimal(sum(model.nbytes for model in models))} in all")
    return 0


@guarded
def drafters(argv: Sequence[str] | None = None) -> int:
    """Parse the command line of `drafters`, list what can draft, and return the exit status."""
    args = make_drafters_parser().parse(argv)
    if args.target == "":
        raise ConfigError("the name of the target is empty; give a folder or a hub id")
    cached = {model.name.lower(): model for model in cached_models()}
    rows = {
        target: [_source_row(source, cached) for source in draft_sources(target)]
        for target in ([args.target] if args.target is not None else KNOWN_TARGETS)
    }
    if args.json:
        print(json.dumps(rows))
        return 0
    for target, sources in rows.items():
        model = cached.get(target.lower())
        print(target if model is None else f"{target}: {decimal(model.nbytes)} in {model.folder}")
        if (folder := Path(target) if model is None else model.folder).is_dir():
            print(f"  {_images(folder)}")
        _print(sources)
    return 0


def _images(target: Path) -> str:
    """Say whether a target on this machine takes images."""
    try:
        config = read_config(target)
    except CheckpointError as error:
        return f"cannot be loaded: {error}"
    images = family_of(config.get("model_type")).images
    if "vision_config" not in config:
        return "takes no images: it has no vision tower"
    if isinstance(images, str):
        return f"takes no images: {images}"
    return "takes images, if it passes the check at load, which treeflash doctor reports"


def make_parser() -> Parser:
    parser = Parser(
        "models", "List models on this machine, fetch models ahead of use, and remove them."
    )
    parser.add_argument(
        "--download",
        metavar="ID",
        help=f"fetch this drafter, or this target and its published drafter ({DEFAULT_TARGET} is "
        "the default target)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "action", nargs="?", choices=["rm"], help="rm deletes the named models from the caches"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a name that the list shows")
    return parser


def make_drafters_parser() -> Parser:
    parser = Parser("drafters", "List what can draft for a target, the best first.")
    parser.add_argument("target", nargs="?", help="folder or hub id (default: all known targets)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _download(name: str) -> list[CachedModel]:
    """Fetch a known drafter, or a target with its default drafter."""
    known = {drafter.name.lower() for ds in PUBLISHED_DRAFTERS.values() for drafter in ds}
    if name.lower() in known:
        folders = {name: resolve_drafter(name, None)}
    else:
        folders = {name: resolve_target(name)}
        if drafters := published_drafters(name):
            folders[drafters[0].name] = resolve_drafter(None, name)
    return [CachedModel.from_folder(name, folder) for name, folder in folders.items()]


def _row(model: CachedModel) -> dict[str, Any]:
    return {"name": model.name, "bytes": model.nbytes, "folder": str(model.folder)}


def _source_row(source: DraftSource, cached: Mapping[str, CachedModel]) -> dict[str, Any]:
    model = cached.get(source.name.lower())
    return {
        "name": source.name,
        "bytes": None if model is None else model.nbytes,
        "kind": source.kind,
        "option": source.option,
        "thinking": source.drafter is not None and source.drafter.thinking,
        "system": None if source.drafter is None else source.drafter.system,
    }


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows in columns."""
    cells = [[_cell(name, value) for name, value in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"  {line.rstrip()}")


def _cell(name: str, value: Any) -> str:
    if name == "bytes":
        return "" if value is None else decimal(value)
    if name == "thinking":
        return "thinking" if value else ""
    if name == "system":
        return "" if value is None else f"system message {value!r}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
