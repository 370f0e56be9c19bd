"""The time of an iteration on a GPU: random weights in the shapes of Qwen3-4B and Qwen3-8B.

    python -m benchmarks.gpu --shape qwen3-4b [--json FILE]

Nothing is downloaded: a checkpoint of random weights is written to the folder of temporary files
(`TMPDIR`) and loaded like any other. The drafter has the published shape: 5 layers, a block of 16,
M = K = 16, and an AR head with the intermediate size of the target's MLP. Drafts are almost never
accepted, so this measures the parts of an iteration, not the speed of decoding.

- `verify`: one target forward pass over a tree, by nodes and committed positions. `of_limit` is the
  fraction of the memory bandwidth used: the time to read the weights and the KV cache once at the
  bandwidth of a large copy (measured in the same run), divided by the time taken.
- `phases`: the decode loop by phase. Work that a phase leaves running on the device counts towards
  the next phase that waits for it.
- `parts`: the drafter's forward pass, its marginals, and the AR head by shortlist size and number
  of previous tokens.

Everything is measured with `--no-cuda-graphs`, and as it is by default; with `--compile`, both with
compiled layers. `attention` says whether it is one operation or, as on a CPU, has masks. All
times are medians, in milliseconds.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import Parser, Row, alternate_ms, random_prompt, show, write_json
from benchmarks.decoding.iteration import WARM_UP, make_cases, phase_rows, verify_rows
from benchmarks.random_pair import BLOCK_SIZE, SHAPES, TOP_K, TOP_M, write_drafter, write_target
from treeflash.cli.console import guarded
from treeflash.config import DTYPES, DecodeConfig, LoadConfig
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.session import SequenceSession
from treeflash.registry import loader

BUDGETS = (16, 64)
HEADS = ((None, None), (1024, None), (1024, 128), (256, 128))  # shortlist size, previous tokens


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="(default: qwen3-4b)")
    options.add_argument("--device", help="cuda, cuda:1, ... or cpu (default: cuda if available)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: bfloat16)")
    options.add_numbers("--sizes", [2**n for n in range(10)], "nodes of the trees of `verify`")
    options.add_numbers("--contexts", [0, 1024, 2048, 4096, 8192], "committed positions", minimum=0)
    options.add_argument("--compile", action="store_true", help="compile the target's layers")
    options.add_number("--repeats", 20, "calls per median")
    return options


def synchronize(device: Any) -> None:
    """Wait until the device is idle."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: Any) -> float:
    """Measure the bytes per second of a large copy, read and written, the best of ten."""
    import torch

    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size / min(times)


def read_bytes(backend: Any, shape: Row, context: int) -> int:
    """Count what a forward pass must read: the weights, and the KV cache of the context."""
    weights = sum(p.numel() * p.element_size() for p in backend.target.model.parameters())
    embeddings = backend.target.embeddings
    if not shape["tie_word_embeddings"]:  # the lookup reads one row per token
        weights -= embeddings.numel() * embeddings.element_size()
    width = shape["num_key_value_heads"] * shape["head_dim"] * embeddings.element_size()
    return int(weights + 2 * shape["num_hidden_layers"] * width * context)


def part_rows(backend: Any, context: int, repeats: int) -> list[Row]:
    """Measure the time of the parts of a draft."""
    prompt = random_prompt(backend.vocab_size, max(1, context))
    drafter, head = backend.drafter, backend.head
    with SequenceSession(backend, drafts=True, capacity=len(prompt) + 1) as session:
        root = session.extend(prompt)
        blocks = [session.draft(root)]

        def draft() -> None:
            session.draft(root)
            synchronize(backend.target.device)

        parts: dict[str, Callable[[], object]] = {
            "marginals": lambda: drafter.marginals(blocks, TableOptions(k=TOP_K))
        }
        for vocab, rows in HEADS:
            options = TableOptions(k=TOP_K, m=TOP_M, shortlist=vocab, rows=rows)
            name = f"head, {vocab or 'all'} tokens after {rows or 'all'}"
            parts[name] = partial(head.transitions, blocks, options)
        times = alternate_ms(list(parts.values()), repeats)
        # It runs alone, because a block is valid until the next draft.
        times += alternate_ms([draft], repeats)
    return [{"part": n, "ms": ms} for n, ms in zip([*parts, "drafter"], times, strict=True)]


def measure(backend: Any, shape: Row, bandwidth: float, args: Any) -> dict[str, list[Row]]:
    """Measure all rows of a loaded pair."""
    verify = verify_rows(backend, args.contexts, args.sizes, args.repeats)
    for row in verify:
        row["limit_ms"] = 1000 * read_bytes(backend, shape, row["context"]) / bandwidth
        row["of_limit"] = row["limit_ms"] / row["verify_ms"]
    context = sorted(args.contexts)[len(args.contexts) // 2]
    prompts = [random_prompt(backend.vocab_size, max(1, context))]
    max_tokens = (WARM_UP + args.repeats) * BLOCK_SIZE
    configs = [
        DecodeConfig(method=method, budget=budget, max_tokens=max_tokens)
        for method, budget in make_cases(backend, BUDGETS)
    ]
    phases = phase_rows(backend, prompts, configs, args.repeats)
    return {
        "verify": verify,
        "phases": [{"context": context} | row for row in phases],
        "parts": part_rows(backend, context, args.repeats),
    }


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    shape = SHAPES[args.shape]
    load = loader("cuda")
    from treeflash_cuda.device import choose_device

    device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        target, drafter = Path(scratch, "target"), Path(scratch, "drafter")
        write_target(target, shape, device, args.dtype)
        write_drafter(drafter, shape, device, args.dtype)
        bandwidth = copy_bandwidth(device)
        results: dict[str, list[Row]] = {}
        for graphs in (False, True):
            config = LoadConfig(
                device=str(device), dtype=args.dtype, cuda_graphs=graphs, compile=args.compile
            )
            backend: Any = load(target, drafter, config)
            about = {
                "card": backend.device_name,
                "shape": args.shape,
                "dtype": args.dtype,
                "compile": args.compile,
                "copy_gb_per_s": bandwidth / 1e9,
                "weights_gb": read_bytes(backend, shape, 0) / 1e9,
                "attention": "mask" if backend.target.operations is None else "operation",
            }
            for name, rows in measure(backend, shape, bandwidth, args).items():
                results.setdefault(name, []).extend({"graphs": graphs} | row for row in rows)
            del backend  # a small GPU has no room for two
            gc.collect()
    show("device and model", [about])
    for name, rows in results.items():
        show(name, rows)
    write_json(args.json, "gpu", about | {"repeats": args.repeats} | results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
