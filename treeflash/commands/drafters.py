"""List what can draft for a target, the best first: `treeflash drafters`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from treeflash.cli.console import Parser, guarded, print_columns
from treeflash.decoding.families import family_of
from treeflash.drafters.folder import read_config
from treeflash.errors import CheckpointError
from treeflash.hub.cached import CachedModel, cached_models
from treeflash.hub.models import DraftSource, check_target_name, draft_sources
from treeflash.hub.published import KNOWN_TARGETS


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, list what can draft, and return the exit status."""
    args = make_parser().parse(argv)
    if args.target is not None:
        check_target_name(args.target)
    # The first of a name is what the commands load; the file that it was made from comes later.
    cached = {model.name.lower(): model for model in reversed(cached_models())}
    rows = {
        target: [_row(source, cached) for source in draft_sources(target)]
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
        print_columns(map(_cells, sources))
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
    parser = Parser("drafters", "List what can draft for a target, the best first.")
    parser.add_argument("target", nargs="?", help="folder or hub id (default: all known targets)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _row(source: DraftSource, cached: Mapping[str, CachedModel]) -> dict[str, Any]:
    model = cached.get(source.name.lower())
    return {
        "name": source.name,
        "bytes": None if model is None else model.nbytes,
        "kind": source.kind,
        "option": source.option,
        "thinking": source.drafter is not None and source.drafter.thinking,
        "system": None if source.drafter is None else source.drafter.system,
    }


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    """Return a row as `print_columns` takes it."""
    size = "" if row["bytes"] is None else decimal(row["bytes"])
    system = "" if row["system"] is None else f"system message {row['system']!r}"
    return (
        row["name"],
        size,
        row["kind"],
        row["option"],
        "thinking" if row["thinking"] else "",
        system,
    )
