"""Time of the AR head at a published shape, by shortlist size and number of previous tokens.

    python -m benchmarks.components.ar_head --backend mlx [--device cpu] [--shape qwen3-4b]

A target with few layers, which do not matter here, and a drafter of the published shape are written
with random weights to a temporary folder. The block has 16 positions, M = K = 16. One call of
`ARHead.transitions` is timed; `own_ms` excludes the marginals, which any tree needs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.common import Parser, at_least_one, median_ms, show, write_json
from benchmarks.random_pair import (
    SHAPES,
    TOP_K,
    TOP_M,
    random_prompt,
    write_drafter,
    write_target,
)
from treeflash.cli.exit_status import guarded
from treeflash.config import DTYPES, LoadConfig
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.text_session import TextSession
from treeflash.registry import loader

LAYERS = 4
HEADS = (
    ("full", "full"),
    (1024, "full"),
    ("full", 64),
    (1024, 128),
    (1024, 64),
    (1024, 32),
    (256, 64),
)


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("--backend", default="cuda", help="(default: cuda)")
    options.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="(default: qwen3-4b)")
    options.add_argument("--device", help="the backend's name for a device (default: its best)")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    options.add_argument(
        "--repeats", type=at_least_one, default=5, help="calls per median (default: 5)"
    )
    return options


def rows(backend: Backend, repeats: int) -> list[dict]:
    """One row for each setting of the head."""
    drafter, head = backend.drafter, backend.head
    assert drafter is not None
    assert head is not None
    text = TextSession(backend, drafts=True)
    blocks = [text.draft(text.extend(random_prompt(backend.vocab_size, 16)))]
    marginals_ms = median_ms(lambda: drafter.marginals(blocks, TOP_K, 1.0), repeats)
    found = []
    for vocab, previous in HEADS:
        sizes = {"shortlist": vocab, "rows": previous}
        scored = {name: None if size == "full" else size for name, size in sizes.items()}
        ms = median_ms(lambda s=scored: head.transitions(blocks, TOP_M, TOP_K, 1.0, **s), repeats)
        found.append({"backend": backend.name, "vocab": vocab, "rows": previous, "ms": ms})
    full_ms = found[0]["ms"]
    for row in found:
        own_ms = row["ms"] - marginals_ms
        row |= {"times_cheaper": full_ms / row["ms"], "own_ms": own_ms}
        row["own_times_cheaper"] = (full_ms - marginals_ms) / own_ms
    return found


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    load = loader(args.backend)
    shape = SHAPES[args.shape] | {"num_hidden_layers": LAYERS}
    with tempfile.TemporaryDirectory() as scratch:
        target, drafter = Path(scratch, "target"), Path(scratch, "drafter")
        write_target(target, shape, "cpu", args.dtype)
        write_drafter(drafter, shape, "cpu", args.dtype)
        backend = load(target, drafter, LoadConfig(device=args.device, dtype=args.dtype))
    found = rows(backend, args.repeats)
    show(f"AR head, {args.shape}, {args.dtype}, {args.device or 'best device'}", found)
    write_json(args.json, "head", {"shape": args.shape, "dtype": args.dtype, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
