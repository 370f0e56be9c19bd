"""The pair with which all systems of a comparison decode, and the start of their processes."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import Parser
from benchmarks.peers.comparison import Comparison
from benchmarks.peers.system import Peer, PeerError, System
from treeflash.config import AUTO, DTYPES
from treeflash.hub.models import choose_drafter, resolve_drafter
from treeflash.text.tokenizer import Tokenizer


def add_pair_options(options: Parser) -> None:
    """Add the options that choose the pair, and how all systems run it."""
    options.add_argument(
        "--target", metavar="FOLDER_OR_ID", help="(default: SmolLM2-135M-Instruct)"
    )
    options.add_argument(
        "--drafter", metavar="FOLDER_OR_ID", help="(default: the published one, if any)"
    )
    options.add_argument(
        "--dtype",
        choices=(*DTYPES, AUTO),
        default="float32",
        help="auto is what each system chooses itself (default: float32)",
    )
    options.add_argument(
        "--device", help="device of the PyTorch systems (default: cuda if available)"
    )


def setup_of(args: Namespace, target: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what every worker is told about a target without a drafter."""
    return {
        "target": str(target),
        # Treeflash finds the weights by this name, which may keep few bits on a CPU.
        "name": args.target,
        "drafter": None,
        "gguf": None,
        "dtype": args.dtype or AUTO,
        "device": args.device,
        "stop_token_ids": sorted(tokenizer.stop_token_ids),
    }


@contextmanager
def running(
    systems: Iterable[tuple[System, int]],
    args: Namespace,
    setup: Mapping[str, Any],
    comparison: Comparison,
) -> Iterator[list[Peer]]:
    """Run systems with numbers of threads; the comparison skips those that cannot run."""
    if args.drafter is None:
        drafter = choose_drafter(args.target).folder
    else:
        drafter = resolve_drafter(args.drafter, args.target)
    setup = {**setup, "drafter": drafter and str(drafter)}
    peers = []
    with ExitStack() as stack:
        for system, threads in systems:
            try:
                peers.append(stack.enter_context(closing(Peer(system, setup, threads))))
            except PeerError as error:
                comparison.skip(system, error)
        yield peers
