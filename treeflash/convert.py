"""Write a drafter in another published format: `python -m treeflash.convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from treeflash.cli.exit_status import guarded
from treeflash.cli.options import Parser
from treeflash.drafters.conversion import FORMATS, convert
from treeflash.hub.models import resolve_drafter


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, convert, and return the exit status."""
    args = _parser().parse_args(argv)
    convert(resolve_drafter(args.drafter, None), args.output, args.to, target=args.target)
    print(args.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser("treeflash.convert", "Write a drafter in another published format.")
    parser.add_argument("drafter", help="folder or Hugging Face id")
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument(
        "--to",
        choices=FORMATS,
        required=True,
        help="treeflash: a DFlash drafter with a head that changes nothing, to train; speculators: "
        "a DFlash, DFlash2 or DSpark drafter for vLLM; dflash, deepspec: a speculators drafter as "
        "z-lab's or DeepSpec's",
    )
    parser.add_argument("--target", help="the target's name, which speculators needs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
