"""Which operations of MLX give a row the same bits whatever rows and keys are beside it.

    python -m benchmarks.mlx_rows
    python -m benchmarks.mlx_rows --device cpu --json rows.json

Each operation is computed for many rows at once and for the first few of them. Attention of a token
is also computed where a key that it does not see lies between its keys, as in a draft tree. An
exact mode needs all of them to be equal bit for bit; see docs/exact.md. The sizes are SmolLM2's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from treeflash_mlx.device import choose_device
from treeflash_mlx.exact import ALL_ROWS, RowFunction, attend, attend_beside, differing

from benchmarks.common import Parser, Row, show, write_json
from treeflash.cli.console import guarded

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
HIDDEN, WIDE, VOCABULARY = 576, 1536, 49152
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
KEYS = 300
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63)


def operations(dtype: mx.Dtype) -> Iterator[tuple[str, RowFunction]]:
    """Return the operations of a layer, by name."""
    keys = iter(mx.random.split(mx.random.key(0), 16))

    def numbers(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(keys)).astype(dtype)

    x, wide = numbers(ALL_ROWS, HIDDEN), numbers(ALL_ROWS, WIDE)
    weight = numbers(HIDDEN)
    for size, out in ((HIDDEN, WIDE), (WIDE, HIDDEN), (HIDDEN, VOCABULARY)):
        matrix, rows = numbers(out, size), x if size == HIDDEN else wide
        yield f"product {size} x {out}", partial(multiply, rows, matrix)
    yield "RMSNorm", lambda n: mx.fast.rms_norm(x[:n], weight, 1e-5)
    yield "SiLU", lambda n: nn.silu(wide[:n])
    q, (k, v) = numbers(1, HEADS, ALL_ROWS, HEAD_DIM), numbers(2, 1, KV_HEADS, KEYS, HEAD_DIM)
    yield "rotary angles", lambda n: rotate(q[:, :, :n]).transpose(0, 2, 1, 3)[0]
    yield "attention, rows", lambda n: attend(q[:, :, :n], k, v)
    yield "attention, keys", lambda n: attend_beside(q[:, :, :n], k, v)


def multiply(x: mx.array, matrix: mx.array, n: int) -> mx.array:
    """Multiply the first n rows with the rows of a matrix."""
    return x[:n] @ matrix.T


def rotate(x: mx.array) -> mx.array:
    """Rotate the (1, heads, n, head_dim) rotated rows at the positions from 100 on."""
    return mx.fast.rope(x, HEAD_DIM, traditional=False, base=1e5, scale=1.0, offset=100)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Compute, print, write."""
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "gpu"), help="(default: MLX's own)")
    args = parser.parse_args(argv)
    choose_device(args.device)
    rows: list[Row] = []
    for dtype in DTYPES:
        for name, function in operations(dtype):
            numbers = differing(function, COUNTS)
            answer = "equal" if not numbers else f"differs: {', '.join(map(str, numbers))}"
            rows.append({"dtype": str(dtype).split(".")[-1], "operation": name, "rows": answer})
    device = str(mx.default_device())
    show(f"rows of MLX on {device}", rows)
    write_json(args.json, "mlx_rows", {"device": device, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
