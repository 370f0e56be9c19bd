"""Write a drafter in another published format: `treeflash convert`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from treeflash.cli.console import Parser, guarded
from treeflash.drafters.conversion import CONVERSIONS, convert
from treeflash.hub.models import resolve_drafter


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse(argv)
    left_out = convert(
        resolve_drafter(args.drafter, None), args.output, args.to, target=args.target
    )
    print(args.output)
    if left_out is not None:
        print(f"{args.to} has no AR heads: the {left_out} head was left out", file=sys.stderr)
    return 0


def make_parser() -> Parser:
    parser = Parser("convert", "Convert a drafter to another published format.")
    parser.add_argument("drafter", help="the drafter: a folder or a Hugging Face id")
    parser.add_argument("output", type=Path, help="the folder to write, which must be new or empty")
    parser.add_argument(
        "--to",
        choices=CONVERSIONS,
        required=True,
        help="treeflash: give a DFlash drafter a head that changes nothing, to train it; "
        "speculators: convert a DFlash, DFlash2 or DSpark drafter for vLLM; dflash, deepspec: "
        "convert a speculators drafter to the format of z-lab or DeepSpec; dflash also takes a "
        "TreeFlash drafter and leaves its AR head out",
    )
    parser.add_argument(
        "--target", help="name of the target, which the format speculators requires"
    )
    return parser
