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
- `slabs`: allocations that hold the keys and values of all sequences, of target and drafter.
- `graphs`: CUDA graphs that `--budget auto` captures in `--iterations` iterations of texts of
  `TEXT` tokens, one text after another. Drafts are made up, and so are the tokens of the target.

All sequences have the same context, a tree of the same size, and capacity for 2,000 more tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks.common import (
    Parser,
    Row,
    layers_of_transformers,
    require_testing,
    show,
    write_json,
)
from benchmarks.random_pair import SHAPES, drafter_config
from treeflash.cli.console import guarded
from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.interfaces import Prefill, TableOptions, Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.formats import (
    DFLASH,
    HEADS,
    drafter_shapes,
    parse_drafter_config,
)
from treeflash.drafters.loading import DrafterTensors
from treeflash.errors import ConfigError

LAYERS = "treeflash", "transformers"
"""Whose layers the target has."""
HARNESS = Path(__file__).parents[1] / "tests" / "cuda"
CAPACITY, TEXT = 2000, 200
MEMORY = 80 << 30
"""Bytes that the device has free."""


class Cost(NamedTuple):
    """What a part of an iteration takes."""

    operations: int
    kernels: int
    nbytes: int
    syncs: int


def count_operations(
    cuda: Any,  # the fake device
    backend: Any,
    sequences: int,
    *,
    nodes: int = 6,
    context: int = 3,
    options: TableOptions | None = None,
) -> tuple[dict[str, Cost], int]:
    """Count what the parts of an iteration of some sequences take, and the allocations."""
    backend.target.graphs.enabled = False
    marks: list[Cost] = []
    layer = backend.target.layers[1]

    def so_far() -> Cost:
        attention = cuda.launches.count("tree_attention")
        operations = len(cuda.launches)
        return Cost(operations, operations + attention, cuda.nbytes, cuda.count.reads)

    def mark(*_: Any) -> None:
        marks.append(so_far())

    hooks = layer.register_forward_pre_hook(mark), layer.register_forward_hook(mark)
    states = [backend.open(context + CAPACITY, drafts=True) for _ in range(sequences)]
    backend.verifier.run([Prefill(state, [3] * context, None) for state in states])
    backend.drafter.draft([(state, 1) for state in states])
    found: dict[str, Cost] = {}

    def difference(first: Cost, last: Cost) -> Cost:
        return Cost(*(y - x for x, y in zip(first, last, strict=True)))

    def count(name: str, call: Callable[[], Any]) -> Any:
        before = so_far()
        result = call()
        found[name] = difference(before, so_far())
        return result

    marks.clear()
    parents = np.array([-1, *((i - 1) // 2 for i in range(1, nodes))])
    tree = DraftTree.from_parents(np.arange(nodes, dtype=np.int32), parents)
    work = [Verify(state, tree, SamplingParams()) for state in states]
    verified = count("verify", lambda: backend.verifier.run(work))
    found["layer"] = difference(*marks[:2])
    path = np.array([0, 2], np.int32)
    count("commit", lambda: backend.verifier.commit(verified, [(state, path) for state in states]))
    blocks = count("draft", lambda: backend.drafter.draft([(state, 1) for state in states]))
    options = options or TableOptions(m=4, k=8, shortlist=256, rows=16)
    count("head", lambda: backend.head.transitions(blocks, options))
    slabs = sum(len(x.slabs) for x in (backend.target.arena, backend.drafter_arena))
    for hook in hooks:
        hook.remove()
    for state in states:
        state.close()
    return found, slabs


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
    from transformers import AutoModelForCausalLM
    from treeflash_cuda import backend, drafter_loading, target_loading
    from treeflash_cuda.decoder.weights import Checkpoint
    from treeflash_cuda.hf import model_target

    class WithoutWeights(Checkpoint):
        """Tensors of any names."""

        foreign = None

        def __init__(self, *_: Any) -> None:
            self.wholes, self.packed, self.tensors, self.place = {}, {}, {}, "model"

        def read(self, _: str, shape: tuple[int, ...]) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16)

    config = parse_drafter_config(drafter_config(shape))
    head = shape["intermediate_size"]

    def load_model(_: Path, settings: Any, dtype: torch.dtype, device: Any, **__: Any) -> Any:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=dtype, attn_implementation="eager"
            )
        return model.eval()

    def read(*_: Any) -> DrafterTensors[torch.Tensor]:
        assert config.head is not None
        names = HEADS[config.head].shapes(config, shape["vocab_size"], head)
        prefix = HEADS[config.head].prefix
        parts: dict[str, dict[str, torch.Tensor]] = {"backbone": {}, "head": {}}
        for name, size in drafter_shapes(config, head).items():
            part = "head" if name in names else "backbone"
            stored = name.removeprefix(prefix) if name in names else name
            parts[part][stored] = torch.empty(size, dtype=torch.bfloat16)
        return DrafterTensors(config=config, head_size=head, vocabulary={}, **parts)

    layout = SimpleNamespace(format=DFLASH, config=config, read=read)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(drafter_loading, "read_layout", return_value=layout),
    ):
        Path(folder, "config.json").write_text(json.dumps(shape), encoding="utf-8")
        with (
            mock.patch.object(model_target, "load_model", load_model),
            mock.patch.object(target_loading, "Checkpoint", WithoutWeights),
            layers_of_transformers() if layers == "transformers" else nullcontext(),
        ):
            return backend.load(Path(folder), Path(folder), LoadConfig(dtype="bfloat16"))


def rows(cuda: Any, backend: Any, args: Any) -> list[Row]:
    """Build a row for each number of sequences and part of an iteration."""
    found = []
    for sequences in args.sequences:
        parts, slabs = count_operations(
            *(cuda, backend, sequences),
            nodes=args.nodes,
            context=args.context,
            options=TableOptions(m=16, k=16, shortlist=1024, rows=128),
        )
        totals = zip(*(parts[name] for name in parts if name != "layer"), strict=True)
        parts["iteration"] = Cost(*map(sum, totals))
        for name, cost in parts.items():
            row: Row = {"sequences": sequences, "part": name, "operations": cost.operations}
            row |= {"kernels": cost.kernels, "megabytes": cost.nbytes / 1e6}
            found.append(row | {"syncs": cost.syncs, "slabs": slabs})
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


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, write."""
    args = parser().parse_args(argv)
    require_testing("cuda")
    import pytest
    import torch

    if not torch.backends.cuda.is_built():
        raise ConfigError("this needs a build of PyTorch with CUDA; a GPU is not needed")
    sys.path.append(str(HARNESS))
    from fake_cuda import FakeCuda

    with pytest.MonkeyPatch.context() as patch, FakeCuda(patch) as cuda:
        cuda.free_bytes = MEMORY
        backend = load_without_weights(SHAPES[args.shape], args.layers)
        found = rows(cuda, backend, args)
        graphs: Row = {
            "iterations": args.iterations,
            "graphs": count_graphs(backend, args.iterations),
        }
    about = {
        "shape": args.shape,
        "layers": args.layers,
        "nodes": args.nodes,
        "context": args.context,
    }
    show("an iteration", found)
    show("graphs of --budget auto", [graphs])
    write_json(args.json, "launches", about | {"rows": found, "auto": graphs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
