"""Device memory of a text at a long context, from shapes alone: nothing is allocated.

    python -m benchmarks.memory [--shape qwen3-8b] [--context 32768] [--json FILE]

`--kv-bits 8` on CUDA: a layer's keys and values are converted while it attends.

`before` is version 0.1.0 with `--cuda-graphs` at its first release to a GPU: capacities of texts
were rounded up to powers of two, the drafter was made in float32 on the device, and the target was
read into the memory of the host first.
"""

from __future__ import annotations

import sys
from math import prod
from typing import Any

from benchmarks.common import Parser, at_least_one, show, write_json
from benchmarks.random_pair import DRAFTER_LAYERS, SHAPES, drafter_config
from treeflash.cli.exit_status import guarded
from treeflash.drafters.formats import drafter_shapes, parse_drafter_config

NEW_TOKENS, TREE = 256, 64
HALF, SINGLE = 2, 4  # bytes of a number


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("--shape", choices=SHAPES, default="qwen3-8b", help="(default: qwen3-8b)")
    options.add_argument(
        "--context", type=at_least_one, default=32_768, help="prompt tokens (default: 32768)"
    )
    return options


def rows(shape: dict[str, Any], context: int) -> list[dict[str, Any]]:
    """Bytes by part, before and after."""
    target = target_parameters(shape)
    config = drafter_config(shape)
    tensors = drafter_shapes(parse_drafter_config(config), shape["intermediate_size"])
    drafter = sum(prod(size) for size in tensors.values())
    capacity = context + NEW_TOKENS + TREE
    rounded = 1 << (capacity - 1).bit_length()
    vectors = 2 * shape["num_key_value_heads"]
    column = vectors * shape["head_dim"] * HALF
    quantised = vectors * (shape["head_dim"] + SINGLE)  # a byte a number, and a scale
    layers = shape["num_hidden_layers"]
    features = context * shape["hidden_size"] * HALF
    found = [
        ("target's weights", target * HALF, target * HALF),
        ("target's weights on the host while loading", target * HALF, 0),
        ("drafter's weights while loading", drafter * SINGLE, drafter * HALF),
        ("target's keys and values", rounded * layers * column, capacity * layers * column),
        ("the same, --kv-bits 8", rounded * layers * column, capacity * layers * quantised),
        ("one layer of them, converted", 0, capacity * column),
        ("drafter's keys and values", *[capacity * DRAFTER_LAYERS * column] * 2),
        ("features that the drafter has not read", features, features),
    ]
    return [
        {"part": part, "before": before, "after": after, "saved_mb": (before - after) / 1e6}
        for part, before, after in found
    ]


def target_parameters(shape: dict[str, Any]) -> int:
    """How many numbers the target's weights are."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape))
    return sum(x.numel() for x in model.parameters())


@guarded
def main(argv=None) -> int:
    """Compute, print, write."""
    args = parser().parse_args(argv)
    found = rows(SHAPES[args.shape], args.context)
    show(f"bytes, {args.shape} after {args.context} tokens", found)
    write_json(args.json, "memory", {"shape": args.shape, "context": args.context, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
