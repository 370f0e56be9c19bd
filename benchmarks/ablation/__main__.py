"""Run the ablation of training: `python -m benchmarks.ablation --output ablation.jsonl`.

Each cell trains a drafter with one choice changed, then decodes held-out prompts with its chain and
its tree of 16 nodes, greedy and at temperature 1. By default the target is a small one of random
weights, so that a cell takes seconds; with --target, --greedy, --sampled and --prompts it is any.
Rerun to resume; cells that are in the output are not trained again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.ablation.cells import CELLS
from benchmarks.ablation.measure import measure
from benchmarks.ablation.setting import Setting, random_setting, read_setting
from benchmarks.ablation.table import ablation_table
from benchmarks.common import Parser, at_least_one, numbers
from treeflash.cli.exit_status import guarded
from treeflash.config import LoadConfig
from treeflash.errors import ConfigError
from treeflash.hub.models import resolve_target
from treeflash.text.output_file import OutputFile, finished_records, locked
from treeflash.training.config import TrainConfig

BASE = TrainConfig(
    layers=2,
    block_size=8,
    gamma=4.0,
    top_tokens=16,
    sequences=8,
    anchors=16,
    learning_rate=3e-3,
    validation_sequences=0,
)
"""For the random target; for others the options of the recipe in docs/training.md."""
RECIPE = replace(
    BASE, layers=3, block_size=10, anchors=32, learning_rate=8e-4, max_length=640, negatives=1024
)


@guarded
def main(argv: list[str] | None = None) -> int:
    """Measure the cells that are missing, and print the table."""
    parser = _parser()
    args = parser.parse_args(argv)
    files = [args.greedy, args.sampled, args.prompts]
    if (args.target is not None) != all(files) or any(files) != all(files):
        raise ConfigError("--target, --greedy, --sampled and --prompts go together")
    load = LoadConfig(device=args.device, dtype=args.dtype)
    base = replace(RECIPE if args.target else BASE, steps=args.steps, save_every=args.steps)
    console = Console(stderr=True, highlight=False)
    wanted = [cell for cell in CELLS if args.cells is None or cell.choice in args.cells]
    with locked(args.output), tempfile.TemporaryDirectory() as folder:
        found = finished_records(args.output, b'{"cell":', dict)
        records = [record for record, _ in found]
        done = {(record["cell"], record["seed"]) for record in records}
        setting: Setting | None = None
        with OutputFile(args.output, sum(size for _, size in found)) as file:
            for seed in args.seeds:
                for cell in wanted:
                    if (cell.name, seed) in done:
                        continue
                    setting = setting or _setting(args, Path(folder), load)
                    records.append(measure(cell, seed, base, setting, load, args.max_tokens))
                    file.append(json.dumps(records[-1]))
                    console.print(f"{cell.name}, seed {seed}: loss {records[-1]['loss']:.3f}")
    print(ablation_table(records))
    return 0


def _setting(args, folder: Path, load: LoadConfig) -> Setting:
    if args.target is None:
        return random_setting(
            folder, load, answers=args.answers, tokens=args.max_tokens, prompts=args.limit
        )
    target = resolve_target(None if args.target == "default" else args.target)
    return read_setting(target, args.greedy, args.sampled, args.prompts, args.limit)


def _parser() -> Parser:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.jsonl", help="a line for each drafter"
    )
    parser.add_argument("--target", metavar="FOLDER_OR_ID", help="or `default`")
    parser.add_argument("--greedy", type=Path, metavar="FILE.jsonl", help="of treeflash.distill")
    parser.add_argument("--sampled", type=Path, metavar="FILE.jsonl", help="of treeflash.distill")
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="to measure on")
    parser.add_argument("--cells", nargs="+", metavar="CHOICE", help="only these, such as loss")
    parser.add_argument("--seeds", type=numbers, default=[0, 1], metavar="N,M")
    for name, default, text in (
        ("steps", 300, "of training"),
        ("answers", 400, "of the random target"),
        ("limit", 32, "prompts to measure on"),
        ("max-tokens", 48, "new tokens of a prompt, and of the random target's answers"),
    ):
        parser.add_argument(
            f"--{name}", type=at_least_one, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument("--device", default="cpu", help="of PyTorch (default: cpu)")
    parser.add_argument("--dtype", default="float32", help="(default: float32)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
