"""What the AR head costs at a published shape, by the tokens and the previous tokens it scores.

    python benchmarks/head.py --backend mlx [--device cpu] [--shape qwen3-4b] [--json FILE]

A target of few layers, which the head does not ask, and a drafter of the published shape are
written with random weights to a temporary folder. The block has 16 positions, M = K = 16. What is
timed is one call of `ARHead.transitions`; `own_ms` leaves out the marginals, which any tree needs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gpu
from common import Parser, at_least_one, median_ms, show, write_json

from treeflash.cli.options import guarded
from treeflash.config import DTYPES, LoadConfig
from treeflash.decoding.interfaces import Backend
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
    """The options."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("--backend", default="cuda", help="(cuda)")
    options.add_argument("--shape", choices=gpu.SHAPES, default="qwen3-4b", help="(qwen3-4b)")
    options.add_argument("--device", help="as the backends name it (their best)")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="(float32)")
    options.add_argument("--repeats", type=at_least_one, default=5, help="calls a median (5)")
    return options


def rows(backend: Backend, repeats: int) -> list[dict]:
    """A line for each kind of head."""
    verifier, drafter, head = backend.verifier(features=True), backend.drafter(), backend.head
    assert head is not None
    root, features = verifier.prefill(gpu.random_prompt(backend.vocab_size, 16), gpu.GREEDY, None)
    block = drafter.draft(features, root)
    marginals_ms = median_ms(lambda: drafter.marginals(block, gpu.TOP_K, 1.0), repeats)
    found = []
    for vocab, previous in HEADS:
        sizes = {"shortlist": vocab, "rows": previous}
        scored = {name: None if size == "full" else size for name, size in sizes.items()}
        ms = median_ms(
            lambda s=scored: head.transitions(block, gpu.TOP_M, gpu.TOP_K, 1.0, **s), repeats
        )
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
    shape = gpu.SHAPES[args.shape] | {"num_hidden_layers": LAYERS}
    with tempfile.TemporaryDirectory() as scratch:
        target, drafter = Path(scratch, "target"), Path(scratch, "drafter")
        gpu.write_target(target, shape, "cpu", args.dtype)
        gpu.write_drafter(drafter, shape, "cpu", args.dtype)
        backend = load(target, drafter, LoadConfig(device=args.device, dtype=args.dtype))
    found = rows(backend, args.repeats)
    show(f"AR head, {args.shape}, {args.dtype}, {args.device or 'best device'}", found)
    write_json(args.json, "head", {"shape": args.shape, "dtype": args.dtype, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
