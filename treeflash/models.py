"""List drafters and cached models, and fetch models ahead of use: `treeflash models`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.filesize import decimal

from treeflash.cli.console import guarded
from treeflash.cli.parser import Parser
from treeflash.errors import ConfigError
from treeflash.hub.cached import CachedModel, cached_models, folder_nbytes
from treeflash.hub.models import (
    DEFAULT_TARGET,
    PUBLISHED_DRAFTERS,
    PublishedDrafter,
    published_drafters,
    resolve_drafter,
    resolve_target,
)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, list or fetch models, and return the exit status."""
    args = make_parser().parse(argv)
    if args.download is not None:
        if args.target is not None:
            raise ConfigError("--download names the model itself; remove the target")
        models = [_row(model) for model in _download(args.download)]
        print(json.dumps({"cached": models})) if args.json else _print(models)
        return 0
    cached = {model.name.lower(): model for model in cached_models()}
    targets = PUBLISHED_DRAFTERS if args.target is None else {}
    if args.target is not None:
        targets = {args.target: published_drafters(args.target)}
    rows = {
        target: [_drafter_row(drafter, cached) for drafter in drafters]
        for target, drafters in targets.items()
    }
    if args.json:
        models = [_row(model) for model in cached.values()]
        print(json.dumps({"cached": models, "drafters": rows}))
        return 0
    if args.target is None:
        print("Models on this machine:")
        _print([_row(model) for model in cached.values()])
        print("\nPublished drafters by target, the default of each first:")
    elif model := cached.get(args.target.lower()):
        print(f"{decimal(model.nbytes)} in {model.folder}")
    else:
        print(f"{args.target} is not on this machine")
    for target, drafters in rows.items():
        print(target)
        _print(drafters)
        if not drafters:
            print(
                "  no published drafter is known; train one (treeflash distill, treeflash train), "
                "name one (--drafter), or decode without one (--method suffix)"
            )
    return 0


def make_parser() -> Parser:
    """The options of the command."""
    parser = Parser("models", "List drafters and cached models, and fetch models ahead of use.")
    parser.add_argument(
        "target", nargs="?", help="list the drafters of this target (default: of all targets)"
    )
    parser.add_argument(
        "--download",
        metavar="ID",
        help=f"fetch this drafter, or this target and its published drafter ({DEFAULT_TARGET} is "
        "the default target)",
    )
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
    return [
        CachedModel(name=name, folder=folder, nbytes=folder_nbytes(folder))
        for name, folder in folders.items()
    ]


def _row(model: CachedModel) -> dict[str, Any]:
    return {"name": model.name, "bytes": model.nbytes, "folder": str(model.folder)}


def _drafter_row(drafter: PublishedDrafter, cached: Mapping[str, CachedModel]) -> dict[str, Any]:
    model = cached.get(drafter.name.lower())
    return {
        "name": drafter.name,
        "bytes": None if model is None else model.nbytes,
        "thinking": drafter.thinking,
        "system": drafter.system,
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
