"""Where the time of an iteration goes on a GPU: random weights in the shapes of Qwen3-4B and 8B.

    python benchmarks/gpu.py --shape qwen3-4b [--json FILE]

Nothing is downloaded: a checkpoint of random weights is written to a temporary folder and loaded
as any other is. The drafter has the published shape: 5 layers, a block of 16, M = K = 16, and an
AR head as wide inside as the target's MLP. Hardly a draft is accepted, so that the parts of an
iteration are measured, not the speed of texts.

- `verify`: one target forward over a tree, by nodes and committed positions. `of_limit` is the time
  that reading the weights, keys and values once would take at the bandwidth of a large copy, which
  is measured in the same run, as a share of the time taken: 1 is as fast as the memory allows.
- `iterations`: the decode loop by phase. What a phase leaves running on the device counts to the
  next that waits for it.
- `parts`: the drafter's forward, its marginals, and the AR head by the tokens that it scores, and
  after how many previous tokens.

Everything is measured without and with `--cuda-graphs`; a CPU runs the same fixed shapes without
graphs. All times are medians, in milliseconds.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import Parser, at_least_one, median_ms, numbers, random_tree, show, write_json

from treeflash.cli.options import guarded
from treeflash.config import DTYPES, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.statistics import PHASES
from treeflash.drafters.checkpoints import parse_drafter_config, tensor_shapes
from treeflash.errors import ConfigError
from treeflash.registry import loader

QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "qwen3-8b": QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12_288, "tie_word_embeddings": False},
    "tiny": QWEN3
    | {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}
    | {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"head_dim": 16, "vocab_size": 2048},
}
DRAFTER_LAYERS, BLOCK_SIZE, TOP_M, TOP_K = 5, 16, 16, 16
BUDGETS = (16, 64)
HEADS = ((None, None), (1024, None), (1024, 128), (256, 128))  # head_vocab, head_rows
WARM_UP = 3  # iterations
GREEDY = SamplingConfig()


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="(qwen3-4b)")
    options.add_argument("--layers", type=at_least_one, help="of the target (as published)")
    options.add_argument("--device", help="cuda, cuda:1, ... or cpu (cuda)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(bfloat16)")
    options.add_argument(
        "--sizes",
        type=numbers,
        default=[2**n for n in range(10)],
        help="nodes of the trees (1,2,4, ..., 512)",
    )
    options.add_argument(
        "--contexts",
        type=numbers,
        default=[0, 1024, 2048, 4096, 8192],
        help="committed positions (0,1024,2048,4096,8192)",
    )
    options.add_argument("--repeats", type=at_least_one, default=20, help="calls a median (20)")
    options.add_argument(
        "--folder", type=Path, metavar="DIR", help="for the checkpoint, as big as the model"
    )
    return options


def write_target(folder: Path, shape: dict[str, Any], device: Any, dtype: str) -> None:
    """Write a target of random weights, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)


def write_drafter(folder: Path, shape: dict[str, Any], device: Any, dtype: str) -> None:
    """Write a drafter for it, likewise."""
    import torch
    from safetensors.torch import save_file

    config = shape | {
        "model_type": "qwen3",
        "num_hidden_layers": DRAFTER_LAYERS,
        "num_target_layers": shape["num_hidden_layers"],
        "block_size": BLOCK_SIZE,
        "dflash_config": {"mask_token_id": shape["vocab_size"] - 1},
        "treeflash_config": {"ar_approximation": "swiglu", "candidate_tokens": TOP_M},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = tensor_shapes(parse_drafter_config(config), shape["intermediate_size"])
    tensors = {}
    for name, size in shapes.items():
        tensor = torch.empty(size, device=device, dtype=getattr(torch, dtype))
        tensors[name] = (tensor.fill_(1) if len(size) == 1 else tensor.normal_(std=0.02)).cpu()
    # As training begins: a head of random weights would leave most nodes without children.
    tensors["ar_approximation.d.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def copy_bandwidth(device: Any) -> float:
    """Bytes a second that a large copy reads and writes, the best of several."""
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
    """Let the device finish."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bytes(backend: Any, shape: dict[str, Any], context: int) -> int:
    """Bytes that a forward cannot but read: weights, and the keys and values of the context."""
    model = backend.target.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    embeddings = backend.target.embeddings
    if not shape["tie_word_embeddings"]:  # then it reads a row a token, no more
        weights -= embeddings.numel() * embeddings.element_size()
    width = shape["num_key_value_heads"] * shape["head_dim"] * embeddings.element_size()
    return weights + 2 * shape["num_hidden_layers"] * width * context


def random_prompt(vocab_size: int, length: int) -> list[int]:
    """Token ids."""
    return np.random.default_rng(length).integers(0, vocab_size, length).tolist()


def verify_rows(backend: Any, shape: dict[str, Any], bandwidth: float, args: Any) -> list[dict]:
    """Time of a target forward by context and nodes."""
    rows = []
    for context in args.contexts:
        verifier = backend.verifier(features=True)
        if context:
            verifier.prefill(random_prompt(backend.vocab_size, context), GREEDY, None)
        limit_ms = 1000 * read_bytes(backend, shape, context) / bandwidth
        for size in args.sizes:
            tree = random_tree(backend.vocab_size, size)
            verify_ms = median_ms(
                lambda v=verifier, t=tree: v.verify(t, GREEDY, None), args.repeats
            )
            row = {"context": context, "nodes": len(tree), "verify_ms": verify_ms}
            rows.append(row | {"limit_ms": limit_ms, "of_limit": limit_ms / verify_ms})
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
    verifier = backend.verifier(features=True)
    root, features = verifier.prefill(prompt, GREEDY, None)
    drafter, device = backend.drafter(), backend.target.device
    drafter.draft(features, root)
    newest = features[-1:]
    block = drafter.draft(newest, root)
    head = backend.head

    def draft() -> None:
        drafter.draft(newest, root)
        wait(device)

    parts = {"marginals": lambda: drafter.marginals(block, TOP_K, 1.0)}
    for vocab, rows in HEADS:
        parts[f"head, {vocab or 'all'} tokens after {rows or 'all'}"] = lambda n=vocab, r=rows: (
            head.transitions(block, TOP_M, TOP_K, 1.0, shortlist=n, rows=r)
        )
    parts["drafter"] = draft  # the last: a block is valid until the next
    return [{"part": name, "ms": median_ms(part, repeats)} for name, part in parts.items()]


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
        raise ConfigError("--layers must be 4 or more; the drafter's choice of layers needs them")
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
            "copy_gb_per_s": bandwidth / 1e9,
        }
        results: dict[str, list[dict]] = {"verify": [], "iterations": [], "parts": []}
        for graphs in (False, True):
            backend: Any = load(
                target,
                drafter,
                LoadConfig(device=str(device), dtype=args.dtype, cuda_graphs=graphs),
            )
            about["weights_gb"] = read_bytes(backend, shape, 0) / 1e9
            found = {
                "verify": verify_rows(backend, shape, bandwidth, args),
                "iterations": iteration_rows(backend, context, args.repeats),
                "parts": part_rows(backend, context, args.repeats),
            }
            for name, rows in found.items():
                results[name] += [{"graphs": graphs} | row for row in rows]
            del backend  # two would not fit on a small card
            gc.collect()
    show("device and model", [about])
    for name, rows in results.items():
        show(name, rows)
    write_json(args.json, "gpu", about | {"repeats": args.repeats} | results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
