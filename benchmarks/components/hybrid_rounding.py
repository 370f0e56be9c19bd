"""What half precision changes on draft trees: families with recurrent layers beside others.

    python -m benchmarks.components.hybrid_rounding [TYPE ...] [--dtype bfloat16] [--json FILE]

The targets are the tiny random ones of `tests/cuda/families.py`, on PyTorch and a CPU. After a
prompt, random trees are verified, and the logits of nodes compared with those of the same tokens
decoded one by one. `deviation` is the root mean square difference over the logits' standard
deviation, `largest` that of the worst node, and `other_token` the share of nodes whose most
probable token differs. The same computation in float32 differs by some 1e-6.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Parser, at_least_one, show, write_json
from treeflash.cli.exit_status import guarded
from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.registry import loader
from treeflash.testing.texts import random_tokens, random_tree

TESTS = Path(__file__).parents[2] / "tests" / "cuda"
KINDS = {
    "llama": "attention",
    "qwen3": "attention",
    "qwen3_moe": "attention, experts",
    "qwen3_5": "gated delta net",
    "qwen3_next": "gated delta net, experts",
    "olmo_hybrid": "gated delta net",
    "lara_mini": "gated delta net, experts",
    "mamba2": "Mamba-2",
    "bamba": "Mamba-2",
    "falcon_h1": "Mamba-2",
    "granitemoehybrid": "Mamba-2, experts",
    "nemotron_h": "Mamba-2, experts",
    "zamba2": "Mamba-2",
    "lfm2": "convolution",
    "lfm2_moe": "convolution, experts",
}
PROMPT, NODES = 24, 32
"""Tokens, the root of the tree included, and nodes."""


def differences(backend: Backend, trees: int) -> Iterator[tuple[float, bool]]:
    """Of nodes on the paths to the deepest node and to the last: deviation, and other token."""
    rng = np.random.default_rng(0)
    root_alone = np.zeros(1, np.int32)
    for _ in range(trees):
        prompt = random_tokens(rng, backend.vocab_size, PROMPT)
        tree = random_tree(rng, prompt.pop(), NODES, backend.vocab_size)
        with TextSession(backend) as text:
            text.extend(prompt)
            branched = text.logits(tree)
        for leaf in {int(tree.depths.argmax()), NODES - 1}:
            with TextSession(backend) as alone:
                alone.extend(prompt)
                for node in np.flatnonzero(tree.ancestor_mask()[leaf]):
                    plain = alone.logits(DraftTree.root_only(int(tree.tokens[node])))[0]
                    alone.commit(root_alone)
                    other = branched[node].argmax() != plain.argmax()
                    yield deviation(branched[node], plain), other


def deviation(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Root mean square, over the standard deviation of the expected ones."""
    return float(np.sqrt(np.mean((logits - expected) ** 2)) / expected.std())


def measure(name: str, dtype: str, trees: int) -> dict[str, Any]:
    """The row of a type."""
    sys.path.insert(0, str(TESTS))
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module("families").write(Path(folder), name)
        config = LoadConfig(device="cpu", dtype=dtype)
        found = list(differences(loader("cuda")(Path(folder), None, config), trees))
    deviations, others = (np.array(column) for column in zip(*found, strict=True))
    return {
        "type": name,
        "layers": KINDS.get(name, ""),
        "nodes": len(found),
        "deviation": float(deviations.mean()),
        "largest": float(deviations.max()),
        "other_token": float(others.mean()),
    }


@guarded
def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("types", nargs="*", default=list(KINDS), metavar="TYPE")
    options.add_argument("--dtype", default="bfloat16", help="(default: bfloat16)")
    options.add_argument("--trees", type=at_least_one, default=20, help="(default: 20)")
    args = options.parse_args(argv)
    rows = [measure(name, args.dtype, args.trees) for name in args.types]
    show(f"trees in {args.dtype} beside single steps", rows)
    write_json(args.json, "hybrid_rounding", {"dtype": args.dtype, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
