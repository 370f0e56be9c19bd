"""Count what an iteration launches on a GPU, and the bytes that it moves, without a GPU.

    python -m benchmarks.launches
    python -m benchmarks.launches --shape qwen3-4b --sequences 1,4 --nodes 16 --json FILE
    python -m benchmarks.launches --layers transformers

Weights and activations are tensors without values on a CUDA device that need not be there, so that
models of any size fit. It needs a build of PyTorch with CUDA, and the extra `testing`.

- `operations`: operations that compute something on the device; `layer` is one layer of the target,
  and a part of `verify`.
- `kernels`: at least as many are launched, as attention has two kernels.
- `megabytes`: what the operations read and write, if each of them reads its inputs and writes its
  outputs once.
- `syncs`: copies to the host, which wait for the device.
- `graphs`: CUDA graphs that `--budget auto` captures in `--iterations` iterations of texts of
  `TEXT` tokens, one text after another. Drafts are made up, and so are the tokens of the target.

All sequences have the same context, a tree of the same size, and capacity for 2,000 more tokens.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks.common import ROOT, Parser, Row, command, publish, require_testing
from benchmarks.random_pair import SHAPES, load_pair
from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.interfaces import Prefill, TableOptions, Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError

LAYERS = "treeflash", "transformers"
"""Whose layers the target has."""
HARNESS = [str(ROOT / "tests" / name) for name in ("cuda", "helpers")]
CAPACITY, TEXT = 2000, 200
MEMORY = 80 << 30
"""Bytes that the device has free."""


class Cost(NamedTuple):
    """What a part of an iteration takes."""

    operations: int
    kernels: int
    megabytes: float
    syncs: int


def count_operations(
    cuda: Any,  # the fake device
    backend: Any,
    sequences: int,
    *,
    nodes: int = 6,
    context: int = 3,
    options: TableOptions | None = None,
) -> dict[str, Cost]:
    """Count what the parts of an iteration of some sequences take."""
    backend.target.graphs.enabled = False
    options = options or TableOptions(m=4, k=8, shortlist=256, rows=16)
    states = [backend.open(context + CAPACITY, drafts=True) for _ in range(sequences)]
    backend.verifier.run([Prefill(state, [3] * context, None) for state in states])
    backend.drafter.draft([(state, 1) for state in states])
    started: dict[str, Cost] = {}
    found: dict[str, Cost] = {}

    def so_far() -> Cost:
        attention = cuda.launches.count("tree_attention")
        operations = len(cuda.launches)
        return Cost(operations, operations + attention, cuda.nbytes / 1e6, cuda.count.reads)

    def begin(name: str) -> None:
        started[name] = so_far()

    def end(name: str) -> None:
        found[name] = Cost._make(y - x for x, y in zip(started[name], so_far(), strict=True))

    def count(name: str, call: Callable[[], Any]) -> Any:
        begin(name)
        result = call()
        end(name)
        return result

    parents = np.array([-1, *((i - 1) // 2 for i in range(1, nodes))])
    tree = DraftTree.from_parents(np.arange(nodes, dtype=np.int32), parents)
    work = [Verify(state, tree, SamplingParams()) for state in states]
    layer = backend.target.layers[1]
    hooks = (
        layer.register_forward_pre_hook(lambda *_: begin("layer")),
        layer.register_forward_hook(lambda *_: end("layer")),
    )
    verified = count("verify", lambda: backend.verifier.run(work))
    for hook in hooks:
        hook.remove()
    path = np.array([0, 2], np.int32)
    count("commit", lambda: backend.verifier.commit(verified, [(state, path) for state in states]))
    blocks = count("draft", lambda: backend.drafter.draft([(state, 1) for state in states]))
    count("head", lambda: backend.head.transitions(blocks, options))
    for state in states:
        state.close()
    return found


def count_graphs(backend: Any, iterations: int) -> int:
    """Count the graphs that an adaptive budget captures in a number of iterations."""
    backend.target.graphs.enabled = True
    before, left = backend.captures, iterations
    request = Request(prompt_ids=[3, 4, 5], config=DecodeConfig(budget="auto", max_tokens=TEXT))
    while left > 0:
        left -= len(list(islice(decode(backend, request), left)))
    return int(backend.captures - before)


def load_without_weights(shape: dict[str, Any], layers: str) -> Any:
    """Create a pair in a published shape whose weights have no values; see `LAYERS`."""
    import torch
    from treeflash_cuda import target_loading

    def make(_: str, size: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16)

    theirs = mock.patch.object(target_loading, "load_decoder", return_value="a benchmark's choice")
    with theirs if layers == "transformers" else nullcontext():
        return load_pair(shape, LoadConfig(dtype="bfloat16"), make)


def rows(cuda: Any, backend: Any, args: Any) -> list[Row]:
    """Build a row for each number of sequences and part of an iteration."""
    found = []
    for sequences in args.sequences:
        parts = count_operations(
            *(cuda, backend, sequences),
            nodes=args.nodes,
            context=args.context,
            options=TableOptions(m=16, k=16, shortlist=1024, rows=128),
        )
        totals = zip(*(parts[name] for name in parts if name != "layer"), strict=True)
        parts["iteration"] = Cost._make(map(sum, totals))
        for name, cost in parts.items():
            found.append({"sequences": sequences, "part": name, **cost._asdict()})
    return found


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="qwen3-8b", help="(default: qwen3-8b)")
    options.add_argument("--layers", choices=LAYERS, default=LAYERS[0], help="layers of the target")
    options.add_numbers("--sequences", [1, 8, 32], "numbers of sequences")
    options.add_number("--nodes", 64, "nodes of each tree")
    options.add_number("--context", 1024, "committed positions of each sequence")
    options.add_number("--iterations", 500, "iterations in which graphs are counted")
    return options


@command(parser)
def main(args: Namespace) -> int:
    """Count, print, write."""
    require_testing("cuda")
    import pytest
    import torch

    if not torch.backends.cuda.is_built():
        raise ConfigError("this needs a build of PyTorch with CUDA; a GPU is not needed")
    sys.path += HARNESS
    from fake_cuda import FakeCuda

    with pytest.MonkeyPatch.context() as patch, FakeCuda(patch) as cuda:
        cuda.free_bytes = MEMORY
        backend = load_without_weights(SHAPES[args.shape], args.layers)
        found = rows(cuda, backend, args)
        graphs = count_graphs(backend, args.iterations)
    about = {name: getattr(args, name) for name in ("shape", "layers", "nodes", "context")}
    auto = [{"iterations": args.iterations, "graphs": graphs}]
    return publish(args, about, rows=found, auto=auto)


if __name__ == "__main__":
    sys.exit(main())
