"""Where the time of an iteration goes on a GPU: random weights in the shapes of Qwen3-4B and 8B.

    python -m benchmarks.gpu --shape qwen3-4b [--json FILE]

Nothing is downloaded: a checkpoint of random weights is written to a temporary folder and loaded
like any other. The drafter has the published shape: 5 layers, a block of 16, M = K = 16, and an
AR head with the intermediate size of the target's MLP. Drafts are almost never accepted, so this
measures the parts of an iteration, not end-to-end speed.

- `verify`: one target forward pass over a tree, by nodes and committed positions. `of_limit` is the
  fraction of the memory bandwidth used: the time to read weights, keys and values once at the
  bandwidth of a large copy (measured in the same run), divided by the time taken. 1 is the limit.
- `iterations`: the decode loop by phase. Work that a phase leaves running on the device counts
  towards the next phase that waits for it.
- `parts`: the drafter's forward pass, its marginals, and the AR head by shortlist size and number
  of previous tokens.

Everything is measured with `--no-cuda-graphs`, and as it is by default; with `--compile`, both with
compiled layers. `attention` says whether it runs in two parts or, as on a CPU, with a mask.
All times are medians, in milliseconds.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import (
    Parser,
    at_least_one,
    median_ms,
    numbers,
    random_tree,
    show,
    write_json,
)
from benchmarks.random_pair import (
    BLOCK_SIZE,
    SHAPES,
    TOP_K,
    TOP_M,
    random_prompt,
    write_drafter,
    write_target,
)
from treeflash.cli.exit_status import guarded
from treeflash.config import DTYPES, DecodeConfig, LoadConfig
from treeflash.decoding import decode
from treeflash.decoding.statistics import PHASES
from treeflash.decoding.text_session import TextSession
from treeflash.errors import ConfigError
from treeflash.registry import loader

BUDGETS = (16, 64)
HEADS = ((None, None), (1024, None), (1024, 128), (256, 128))  # head_vocab, head_rows
WARM_UP = 3  # iterations


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="(default: qwen3-4b)")
    options.add_argument(
        "--layers", type=at_least_one, help="target layers (default: as published)"
    )
    options.add_argument("--device", help="cuda, cuda:1, ... or cpu (default: cuda if available)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: bfloat16)")
    options.add_argument(
        "--sizes",
        type=numbers,
        default=[2**n for n in range(10)],
        help="tree sizes, nodes (default: 1,2,4,...,512)",
    )
    options.add_argument(
        "--contexts",
        type=numbers,
        default=[0, 1024, 2048, 4096, 8192],
        help="committed positions (default: 0,1024,2048,4096,8192)",
    )
    options.add_argument("--compile", action="store_true", help="compile the target's layers")
    options.add_argument(
        "--repeats", type=at_least_one, default=20, help="calls per median (default: 20)"
    )
    options.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to write the temporary checkpoint"
    )
    return options


def copy_bandwidth(device: Any) -> float:
    """Bytes per second read and written by a large copy, best of ten."""
    import torch

    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def wait(device: Any) -> None:
    """Wait until the device is idle."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bytes(backend: Any, shape: dict[str, Any], context: int) -> int:
    """Bytes that a forward pass must read: weights, and the keys and values of the context."""
    model = backend.target.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    embeddings = backend.target.embeddings
    if not shape["tie_word_embeddings"]:  # the lookup reads one row per token
        weights -= embeddings.numel() * embeddings.element_size()
    width = shape["num_key_value_heads"] * shape["head_dim"] * embeddings.element_size()
    return weights + 2 * shape["num_hidden_layers"] * width * context


def verify_rows(backend: Any, shape: dict[str, Any], bandwidth: float, args: Any) -> list[dict]:
    """Time of a target forward pass by context and nodes."""
    rows = []
    for context in args.contexts:
        text = TextSession(backend, drafts=True, capacity=context + max(args.sizes))
        if context:
            text.extend(random_prompt(backend.vocab_size, context))
        limit_ms = 1000 * read_bytes(backend, shape, context) / bandwidth
        for size in args.sizes:
            tree = random_tree(backend.vocab_size, size)
            verify_ms = median_ms(lambda v=text, t=tree: v.verify(t), args.repeats)
            row = {"context": context, "nodes": len(tree), "verify_ms": verify_ms}
            rows.append(row | {"limit_ms": limit_ms, "of_limit": limit_ms / verify_ms})
        text.close()
    return rows


def iteration_rows(backend: Any, context: int, repeats: int) -> list[dict]:
    """Time of an iteration by method, budget and phase."""
    prompt = random_prompt(backend.vocab_size, max(1, context))
    cases = [("ar", 1), *((m, budget) for m in ("ddtree", "treeflash") for budget in BUDGETS)]
    rows = []
    for method, budget in cases:
        most = (1 + WARM_UP + repeats) * BLOCK_SIZE
        config = DecodeConfig(method=method, budget=budget, max_tokens=most)
        steps = islice(decode(backend, prompt, config), 1 + WARM_UP, 1 + WARM_UP + repeats)
        seconds, sizes = zip(*((s.seconds, len(s.tree)) for s in steps), strict=True)
        split = {
            f"{phase}_ms": 1000 * median(s.get(phase, 0.0) for s in seconds) for phase in PHASES[1:]
        }
        total_ms = 1000 * median(sum(s.values()) for s in seconds)
        row = {"method": method, "budget": budget, "context": len(prompt), "nodes": median(sizes)}
        rows.append(row | split | {"iteration_ms": total_ms})
    return rows


def part_rows(backend: Any, context: int, repeats: int) -> list[dict]:
    """Time of the parts of a draft."""
    prompt = random_prompt(backend.vocab_size, max(1, context))
    text = TextSession(backend, drafts=True, capacity=len(prompt) + 1)
    root = text.extend(prompt)
    drafter, head, device = backend.drafter, backend.head, backend.target.device
    blocks = [text.draft(root)]

    def draft() -> None:
        text.draft(root)
        wait(device)

    parts = {"marginals": lambda: drafter.marginals(blocks, TOP_K, 1.0)}
    for vocab, rows in HEADS:
        parts[f"head, {vocab or 'all'} tokens after {rows or 'all'}"] = lambda n=vocab, r=rows: (
            head.transitions(blocks, TOP_M, TOP_K, 1.0, shortlist=n, rows=r)
        )
    parts["drafter"] = draft  # last: a block is valid until the next one
    found = [{"part": name, "ms": median_ms(part, repeats)} for name, part in parts.items()]
    text.close()
    return found


def card(device: Any) -> str:
    """The name of the device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    shape = SHAPES[args.shape]
    if args.layers:
        shape = shape | {"num_hidden_layers": args.layers}
    if shape["num_hidden_layers"] < 4:
        raise ConfigError("--layers must be 4 or more for the drafter's default target layers")
    load = loader("cuda")
    from treeflash_cuda.backend import choose_device

    device = choose_device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        target, drafter = Path(scratch, "target"), Path(scratch, "drafter")
        write_target(target, shape, device, args.dtype)
        write_drafter(drafter, shape, device, args.dtype)
        bandwidth = copy_bandwidth(device)
        context = sorted(args.contexts)[len(args.contexts) // 2]
        about = {
            "card": card(device),
            "shape": args.shape,
            "layers": shape["num_hidden_layers"],
            "dtype": args.dtype,
            "compile": args.compile,
            "copy_gb_per_s": bandwidth / 1e9,
        }
        results: dict[str, list[dict]] = {"verify": [], "iterations": [], "parts": []}
        for graphs in (False, True):
            backend: Any = load(
                target,
                drafter,
                LoadConfig(
                    device=str(device),
                    dtype=args.dtype,
                    cuda_graphs=graphs,
                    compile=args.compile,
                ),
            )
            about["attention"] = "mask" if backend.target.kernels is None else "two parts"
            about["weights_gb"] = read_bytes(backend, shape, 0) / 1e9
            found = {
                "verify": verify_rows(backend, shape, bandwidth, args),
                "iterations": iteration_rows(backend, context, args.repeats),
                "parts": part_rows(backend, context, args.repeats),
            }
            for name, rows in found.items():
                results[name] += [{"graphs": graphs} | row for row in rows]
            del backend  # a small GPU has no room for two
            gc.collect()
    show("device and model", [about])
    for name, rows in results.items():
        show(name, rows)
    write_json(args.json, "gpu", about | {"repeats": args.repeats} | results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
