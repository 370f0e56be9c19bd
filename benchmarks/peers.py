"""Other systems beside treeflash: same weights, prompts, type, threads and token counts.

    python benchmarks/peers.py gsm8k.jsonl mt_bench.jsonl [--json FILE] [--plot FILE.png]

Each system is installed from the package index into an environment of its own, and runs in a
process that loads its models once; treeflash runs with what is installed here. Every prompt is
decoded by every system and method in turn before the next prompt, so that what disturbs the
machine disturbs all of them; processes that wait their turn sleep. What cannot run is named with
the reason.

Decoding is greedy, ends at the same stop tokens and the same limit, and starts from the same token
ids. Timed is what follows the target's first forward, the one over the prompt, up to the last
token; what that forward brought (usually one token) does not count, nor do loading and tokenizing.
The first prompt of all is decoded once by everybody before anything is measured.

`ratio_to_generate` is the median over prompts of the speed as a multiple of the same prompt's plain
decoding by the system that most people use: `generate` of transformers for what runs on PyTorch,
of mlx-lm for what runs on MLX. `equal` counts the texts that have the same tokens as that one's.
MLX runs in float32 on Linux, whatever the type of the others: its other types are slow there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import Namespace
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import Parser, at_least_one, machine, output_file, show, write_json
from peer import SYSTEMS, Peer, PeerError, System, interpreter
from peer_rows import Record, draw, rows
from platformdirs import user_cache_path
from race import Race
from rich.progress import track
from safetensors.numpy import save_file

from treeflash.cli.options import guarded
from treeflash.config import DTYPES, Budget, DecodeConfig
from treeflash.drafters.checkpoints import canonical_name, read_config, read_tensors
from treeflash.drafters.rope import rope_parameters
from treeflash.errors import ConfigError
from treeflash.hub.models import resolve_drafter, resolve_target
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import read_rows
from treeflash.text.tokenizer import Tokenizer


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("prompts", nargs="+", type=Path, metavar="FILE.jsonl", help="one a set")
    options.add_argument("--sets", type=names, help="only these, by the names of their files")
    options.add_argument("--limit", type=at_least_one, default=8, help="prompts a set (8)")
    options.add_argument("--max-tokens", type=at_least_one, default=128, help="a prompt (128)")
    options.add_argument("--systems", type=names, help="only these, separated by commas")
    options.add_argument("--methods", type=names, help="only these, whichever system has them")
    options.add_argument("--backends", type=names, help="cuda for PyTorch, mlx, or both (both)")
    options.add_argument(
        "--budgets", type=names, default=["auto"], help="of treeflash's trees (auto)"
    )
    options.add_argument("--target", metavar="FOLDER_OR_ID", help="(SmolLM2-135M-Instruct)")
    options.add_argument("--drafter", metavar="FOLDER_OR_ID", help="(the published one)")
    options.add_argument(
        "--assistant",
        metavar="FOLDER_OR_ID",
        help="a small model with the target's tokenizer, for methods that draft with one",
    )
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="(float32)")
    options.add_argument("--device", help="of what runs on PyTorch (cuda where there is one)")
    options.add_argument(
        "--threads", type=at_least_one, default=os.cpu_count(), help="a system (all cores)"
    )
    options.add_argument(
        "--environments",
        type=Path,
        default=user_cache_path("treeflash") / "peers",
        metavar="FOLDER",
        help="where systems are installed (a cache folder)",
    )
    options.add_argument("--no-install", action="store_true", help="use what is installed there")
    options.add_argument("--plot", type=output_file, metavar="FILE.png", help="draw the ratios")
    return options


def names(text: str) -> list[str]:
    """What commas separate."""
    return text.split(",")


def chosen_systems(wanted: list[str] | None, backends: list[str] | None) -> list[System]:
    """The systems of these names and backends; None is all.

    Raises:
        ConfigError: there is none of that name.
    """
    for option, values, known in (
        ("systems", wanted, {system.name: None for system in SYSTEMS}),
        ("backends", backends, {system.backend: None for system in SYSTEMS}),
    ):
        if unknown := [value for value in values or () if value not in known]:
            raise ConfigError(f"--{option} has no {unknown[0]!r}; choose from {', '.join(known)}")
    return [
        system
        for system in SYSTEMS
        if (wanted is None or system.name in wanted)
        and (backends is None or system.backend in backends)
    ]


def parse_budgets(texts: list[str]) -> list[Budget]:
    """Numbers of nodes, or `auto`.

    Raises:
        ConfigError: one is neither.
    """
    sizes: list[Budget] = [int(text) if text.isdecimal() else text for text in texts]
    return [DecodeConfig(budget=size).budget for size in sizes]


def read_sets(
    paths: list[Path], wanted: list[str] | None, limit: int, tokenizer: Tokenizer
) -> dict[str, list[list[int]]]:
    """Token ids of prompts, by set.

    Raises:
        ConfigError: a set was asked for that no file holds.
    """
    files = {path.stem: path for path in paths}
    if unknown := [name for name in wanted or () if name not in files]:
        raise ConfigError(f"--sets has no {unknown[0]!r}; the files are {', '.join(files)}")
    return {
        name: [encode(tokenizer, row.turns[0]) for row in read_rows(files[name])[:limit]]
        for name in wanted or files
    }


def write_dflash(drafter: Path, folder: Path) -> None:
    """Write a drafter as DFlash's own packages read it: without the AR head, in float32."""
    config = read_config(drafter)
    config.setdefault("rope_theta", rope_parameters(config)["rope_theta"])
    config |= {"architectures": ["DFlashDraftModel"], "treeflash_config": None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {canonical_name(name): tensor for name, tensor in read_tensors(drafter).items()}
    backbone = {n: tensor for n, tensor in tensors.items() if not n.startswith("ar_approximation")}
    save_file(backbone, folder / "model.safetensors", metadata={"format": "pt"})


def start(system: System, args: Namespace, setup: dict[str, Any]) -> Peer:
    """The running process of a system.

    Raises:
        PeerError: it cannot run here.
    """
    python = interpreter(system, args.environments, install=not args.no_install)
    dtype = "float32" if system.backend == "mlx" and sys.platform == "linux" else args.dtype
    log = args.environments / f"{system.name}-{system.backend}.log"
    setup = setup | {"backend": system.backend, "dtype": dtype}
    return Peer(system, python, setup, args.threads, log)


def report(race: Race, args: Namespace) -> None:
    """Print, write and draw what came out.

    Raises:
        ConfigError: nothing did.
    """
    if race.skipped:
        show("skipped", race.skipped)
    found = rows(race.records)
    if not found:
        raise ConfigError("nothing was measured; see why above")
    types = dict.fromkeys(f"{row['backend']} {row['dtype']}" for row in found)
    where = ", ".join([*types, f"threads: {args.threads}", f"{args.max_tokens} tokens a prompt"])
    show(f"peers, {where}", [cells(row) for row in found])
    systems = [
        {"system": peer.system.name, "backend": peer.system.backend}
        | {key: peer.about[key] for key in ("device", "dtype", "versions")}
        for peer in dict.fromkeys(case.peer for case in race.cases)
    ]
    settings = {"threads": args.threads, "max_tokens": args.max_tokens, "systems": systems}
    write_json(args.json, "peers", settings | {"rows": found, "skipped": race.skipped})
    if args.plot:
        devices = ", ".join(dict.fromkeys(system["device"] for system in systems))
        used = dict.fromkeys(" ".join(v) for system in systems for v in system["versions"].items())
        hardware = f"{machine()['cpu']}, threads: {args.threads}, on {devices}"
        draw(found, f"{hardware}; {', '.join(used)}", args.plot)


def cells(row: Record) -> Record:
    """A row as the terminal shows it, where columns are dear."""
    return {key: row[key] for key in ("system", "method", "budget", "backend", "set")} | {
        "tokens/s": row["tokens_per_s"],
        "block": row["block_efficiency"],
        "ratio": row["ratio_to_generate"],
        "equal": f"{row['equal']}/{row['prompts']}",
    }


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    if args.plot and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; pip install 'treeflash[report]'")
    systems = chosen_systems(args.systems, args.backends)
    budgets = parse_budgets(args.budgets)
    target = resolve_target(args.target)
    drafter = resolve_drafter(args.drafter, args.target)
    tokenizer = Tokenizer.from_folder(target)
    sets = read_sets(args.prompts, args.sets, args.limit, tokenizer)
    args.environments.mkdir(parents=True, exist_ok=True)
    race = Race()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        write_dflash(drafter, Path(folder))
        setup = {
            "target": str(target),
            "drafter": str(drafter),
            "dflash_drafter": folder,
            "assistant": args.assistant and str(resolve_target(args.assistant)),
            "device": args.device,
            "stop_token_ids": sorted(tokenizer.stop_token_ids),
        }
        for system in systems:
            try:
                peer = start(system, args, setup)
            except PeerError as error:
                race.skip(system, error)
            else:
                stack.callback(peer.close)
                race.enter(peer, budgets, args.methods)
        race.warm_up(next(iter(sets.values()))[0], args.max_tokens)
        for name, prompts in sets.items():
            for number, prompt_ids in enumerate(track(prompts, name)):
                race.run(name, number, prompt_ids, args.max_tokens)
    report(race, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
