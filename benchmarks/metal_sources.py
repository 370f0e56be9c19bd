"""Write the source of every Metal kernel of the MLX backend, as MLX would compile it.

    python -m benchmarks.metal_sources FOLDER

It writes one file for each kernel and instantiation, for which no Metal is needed, and prints the
command that compiles them on a Mac. The kernels of MLX and of mlx-lm are not among them.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias
from unittest.mock import patch

import mlx.core as mx
from mlx import nn
from treeflash_mlx import hybrid
from treeflash_mlx.metal_kernels import attention, gated_delta, products
from treeflash_mlx.metal_kernels.gated_delta import Steps

from benchmarks.common import Parser, command

INCLUDES = Path(mx.__file__).parent / "include"
"""A folder of MLX's package, which has the file of the `PRELUDE`."""
PRELUDE = '#include "mlx/backend/metal/kernels/utils.h"\n\n'
"""What MLX puts before the source of every kernel."""
DTYPES = (mx.float16, mx.bfloat16, mx.float32)

DELTA_KINDS = {"packed": (128, ()), "by_head": (64, ()), "by_channel": (128, (128,))}
"""Widths of keys and of the gates of a head; mlx-lm packs keys of 128."""

Call: TypeAlias = tuple[Callable[..., Any], Sequence[mx.array]]
"""A function that calls kernels, and its arguments."""


def calls() -> Iterator[Call]:
    """Call all kernels, with all types and settings."""
    systems = mx.zeros((1, 2, 8, 8)), mx.zeros((1, 2, 8, 128))
    yield partial(hybrid.solve_by_substitution, depth=7), systems
    for dtype in DTYPES:
        yield from product_calls(dtype)
        yield from gated_delta_calls(dtype)
        yield from attention_calls(dtype)


def product_calls(dtype: mx.Dtype) -> Iterator[Call]:
    linear = nn.Linear(512, 64, bias=False)
    linear.set_dtype(dtype)
    kinds = product((4, 8), products.GROUP_SIZES)
    layers = [nn.QuantizedLinear.from_linear(linear, group, bits) for bits, group in kinds]
    for layer in [linear, *layers]:
        if (shape := products.shape_of(layer)) is None:
            continue  # weights in float32
        for rows in sorted({8 * -(-n // 8) for n in products.TIMED_ROWS[shape[1]]}):
            for geometry in products.variants(shape, rows):
                yield (
                    lambda x, y=layer, z=geometry: products.multiply(y, x, z),
                    [mx.zeros((rows, 512), dtype)],
                )


def gated_delta_calls(dtype: mx.Dtype) -> Iterator[Call]:
    order, counts = mx.zeros((1, 8, 3), mx.int32), mx.zeros(1, mx.int32)
    nodes, kept = mx.zeros((1, 8), mx.int32), mx.ones((1, 8), mx.bool_)
    for key_dim, gates in DELTA_KINDS.values():
        keys, values, betas = (mx.zeros((1, 8, *x), dtype) for x in ((2, key_dim), (4, 128), (4,)))
        state = mx.zeros((1, 4, 128, key_dim))
        steps = [keys, values, mx.zeros((1, 8, 4, *gates)), betas]
        arrays = [*steps, keys, state, order, counts]
        yield lambda k, v, g, b, *x: gated_delta.run_nodes(x[0], Steps(k, v, g, b), *x[1:]), arrays
        yield lambda *x: Steps(*x[:4]).commit(*x[4:]), [*steps, state, nodes, kept]


def attention_calls(dtype: mx.Dtype) -> Iterator[Call]:
    words = mx.zeros((1, 16), mx.uint64)
    paths = mx.zeros((1, 16, 4), mx.int32), mx.zeros((1, 1, 1), mx.int32)  # of trees, of chains
    rows = [mx.zeros((1, 16), mx.int32), mx.zeros(1, mx.int32)]
    for width in (64, 128, 256, 512):
        q, key = (mx.zeros((1, heads, 16, width), dtype) for heads in (8, 2))
        for bits, group in ((0, 0), *product(attention.BITS, attention.GROUP_SIZES)):
            stored = mx.quantize(key, group, bits) if bits else [key]

            def call(q: mx.array, *x: mx.array, bits: int = bits) -> mx.array:
                *parts, ancestors, positions, starts = x
                n, depths = len(parts) // 2, 4 if ancestors.ndim == 3 else 0
                nodes = attention.Nodes(
                    ancestors, positions, starts, 600, depths, branches=depths > 0
                )
                sinks = None if bits else mx.zeros(8, q.dtype)
                return attention.tree_attention(
                    q, parts[:n], parts[n:], nodes, 0.1, sinks=sinks, bits=bits
                )

            for ancestors in (words,) if bits else (words, *paths):
                yield call, [q, *stored, *stored, ancestors, *rows]


def sources(call: Callable[..., Any], arguments: Sequence[mx.array]) -> dict[str, str]:
    """Collect the sources of the kernels that a function calls, by the names of their functions.

    MLX prints them while it traces the function, which takes no device.
    """
    make: Any = mx.fast.metal_kernel

    def metal_kernel(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        kernel = make(*args, **kwargs)
        return lambda **settings: kernel(**settings, verbose=True)

    flush = ctypes.CDLL(None).fflush  # empties the buffers of C, which MLX prints to
    sys.stdout.flush()
    flush(None)
    stdout = os.dup(1)
    with TemporaryDirectory() as folder, patch.object(mx.fast, "metal_kernel", metal_kernel):
        with (Path(folder) / "printed").open("wb") as file:
            os.dup2(file.fileno(), 1)
        try:
            mx.export_function(str(Path(folder) / "traced"), call, *arguments)
        finally:
            flush(None)
            os.dup2(stdout, 1)
            os.close(stdout)
        printed = (Path(folder) / "printed").read_text()
    texts = re.findall(r"^```\n(.*?)^```$", printed, re.MULTILINE | re.DOTALL)
    names = [re.findall(r"\[\[kernel\]\] void custom_kernel_(\w+)\(", text) for text in texts]
    return {name: text for (name,), text in zip(names, texts, strict=True)}


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__, json=False)
    options.add_argument("folder", type=Path, metavar="FOLDER", help="made if missing")
    return options


@command(parser)
def main(args: Namespace) -> int:
    """Write the files."""
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    # While it traces, MLX computes some weights, which a virtual GPU may not be able to.
    mx.set_default_device(mx.cpu)
    for call, arguments in calls():
        for name, text in sources(call, arguments).items():
            (folder / f"{name}.metal").write_text(PRELUDE + text)
    print(f"{len(list(folder.glob('*.metal')))} kernels are in {folder}. To compile one on a Mac:")
    print(f"xcrun -sdk macosx metal -c -I {INCLUDES} -o /dev/null FILE")
    return 0


if __name__ == "__main__":
    sys.exit(main())
