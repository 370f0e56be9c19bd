"""What each choice in training is worth: one drafter for each cell, measured by block efficiency.

    python -m benchmarks.ablation --output ablation.jsonl

Each cell trains a drafter with one choice changed, then decodes held-out prompts with its chain and
its tree of 16 nodes, greedy and at temperature 1. By default the target is a small one of random
weights, so that a cell takes seconds; --target, --greedy, --sampled and --prompts name another one.
Rerun to resume; cells that are in the output are not trained again. The table is Markdown.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from rich.console import Console

from benchmarks.common import Parser, Row, markdown_table, read_prompts
from treeflash.cli.console import guarded
from treeflash.config import DTYPES, DecodeConfig, LoadConfig, Method, SamplingConfig
from treeflash.decoding import Request
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import ConfigError
from treeflash.evaluation.records import ratios_of_sums, resamples, with_interval
from treeflash.evaluation.run import Case, Evaluation
from treeflash.hub.models import resolve_target
from treeflash.registry import loader
from treeflash.testing.models import save, write_target
from treeflash.text.output_file import OutputFile, has_fields
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response, read_responses, respond
from treeflash.training.interfaces import trainer

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
BUDGET = 16
TEMPERATURES = {"greedy": 0.0, "temperature 1": 1.0}
SHAPES = ("chain", "tree")
FIGURES = [f"{shape}, {name}" for name in TEMPERATURES for shape in SHAPES]
"""The columns of the table."""

# The target is random.
VOCAB, PROMPT_TOKENS, SLOTS = 256, 8, 64
SHARPNESS = 6.0
"""Factor on the output head, so that the next token can be predicted."""

Answers: TypeAlias = Literal["all", "half", "quarter", "greedy", "sampled"]
"""The answers to train on: both kinds, a part of both, or one kind alone."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A drafter to train, with one choice that differs from the base.

    Attributes:
        choice: the choice that is varied.
        value: its value, as the table shows it.
        changes: the options of `TrainConfig` that differ from the base.
        answers: the answers to train on.
    """

    choice: str
    value: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    answers: Answers = "all"

    @property
    def name(self) -> str:
        """The cell's name in the results."""
        return f"{self.choice}: {self.value}"


CELLS = [
    Cell(choice="base", value="kl, exponential, swiglu"),
    *(
        Cell(choice="loss", value=loss, changes={"loss": loss})
        for loss in ("ce", "tv", "lk", "0.1 ce + 0.9 tv", "kl + tv")
    ),
    Cell(choice="weights", value="prefix-product", changes={"position_weights": "prefix-product"}),
    Cell(
        choice="weights",
        value="prefix-product, ce",
        changes={"position_weights": "prefix-product", "loss": "ce"},
    ),
    *(
        Cell(choice="head", value=head, changes={"head": head, "head_size": size})
        for head, size in (("linear", None), ("markov", 32), ("selector", 32), ("none", None))
    ),
    *(
        Cell(choice="on-policy", value=str(share), changes={"on_policy": share})
        for share in (0.5, 1.0)
    ),
    *(Cell(choice="block size", value=str(s), changes={"block_size": s}) for s in (4, 12)),
    *(Cell(choice="layers", value=str(n), changes={"layers": n}) for n in (1, 3)),
    Cell(choice="data", value="a half", answers="half"),
    Cell(choice="data", value="a quarter", answers="quarter"),
    Cell(choice="data", value="greedy alone", answers="greedy"),
    Cell(choice="data", value="sampled alone", answers="sampled"),
]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A target, its answers, and prompts to measure on; all cells share it.

    Attributes:
        target: its folder.
        greedy: answers at temperature 0.
        sampled: answers at temperature 1, to other prompts.
        prompts: token ids of prompts that no answer belongs to.
    """

    target: Path
    greedy: list[Response]
    sampled: list[Response]
    prompts: list[list[int]]

    def select(self, answers: Answers) -> list[Response]:
        """Return the answers that a cell trains on."""
        kinds = {"greedy": self.greedy, "sampled": self.sampled}
        if answers in kinds:
            return kinds[answers]
        divisor = {"half": 2, "quarter": 4}.get(answers, 1)
        return [r for kind in kinds.values() for r in kind[: len(kind) // divisor]]


def random_setting(
    folder: Path, load: LoadConfig, *, answers: int, tokens: int, prompts: int
) -> Setting:
    """Write a small target of random weights that answers random prompts.

    Args:
        folder: for the target.
        load: where and how it runs.
        answers: number of answers, half of them greedy.
        tokens: tokens of an answer.
        prompts: number of prompts to measure on.
    """
    write_target(folder, "llama", seed=3, vocab_size=VOCAB, hidden_size=64, layers=6)
    tensors = read_tensors(folder)
    tensors["lm_head.weight"] *= SHARPNESS
    save(folder, read_config(folder), tensors)
    random = np.random.default_rng(1)
    ids = random.integers(2, VOCAB, (answers + prompts, PROMPT_TOKENS)).tolist()
    samplings = [SamplingConfig(temperature=float(n % 2), seed=n) for n in range(answers)]
    requests = [
        Request(
            prompt_ids=row,
            config=DecodeConfig(method="ar", max_tokens=tokens, sampling=sampling),
        )
        for row, sampling in zip(ids[:answers], samplings, strict=True)
    ]
    token_ids = dict(respond(loader("cuda")(folder, None, load), requests, SLOTS))
    responses = [
        Response(prompt_ids=tuple(request.prompt_ids), response_ids=tuple(token_ids[n]))
        for n, request in enumerate(requests)
    ]
    return Setting(
        target=folder, greedy=responses[::2], sampled=responses[1::2], prompts=ids[answers:]
    )


def measure(
    cell: Cell, seed: int, base: TrainConfig, setting: Setting, load: LoadConfig, max_tokens: int
) -> Row:
    """Train the drafter of a cell with a seed, and decode all prompts.

    Returns:
        The cell's name, the seed, the last loss, and for each of `FIGURES` the tokens and the
        forward passes of every prompt.
    """
    config = replace(base, **cell.changes, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        drafter = Path(folder)
        answers = setting.select(cell.answers)
        log = list(trainer("cuda").train(setting.target, answers, drafter, config, load))
        backend = loader("cuda")(setting.target, drafter, load)
    methods: tuple[Method, Method] = ("treeflash-chain", "treeflash")
    if config.head == "none":
        methods = ("dflash", "ddtree")
    record: Row = {"cell": cell.name, "seed": seed, "loss": log[-1]["loss"]}
    for name, temperature in TEMPERATURES.items():
        sampling = SamplingConfig(temperature=temperature, seed=seed)
        configs = {
            # Without copies of the text, the figures are the drafter's own.
            Case(method, BUDGET): DecodeConfig(
                method=method,
                budget=BUDGET,
                max_tokens=max_tokens,
                sampling=sampling,
                suffix=False,
            )
            for method in methods
        }
        evaluation = Evaluation()
        quiet = Console(stderr=True, quiet=True)
        evaluation.run(backend, {"": setting.prompts}, configs, quiet, len(setting.prompts))
        for shape, case in zip(SHAPES, configs, strict=True):
            lengths = [sample.runs[case].accepted_lengths for sample in evaluation.samples[""]]
            record[f"{shape}, {name}"] = [[sum(x), len(x)] for x in lengths]
    return record


def ablation_table(records: Sequence[Row]) -> str:
    """Format a line for each cell that was measured, in the order of `CELLS`.

    A figure is the mean over seeds of the block efficiency, with its 95 % bootstrap interval over
    prompts; the seeds share the resampled prompts.
    """
    rows = []
    for cell in CELLS:
        seeds = [record for record in records if record["cell"] == cell.name]
        if seeds:
            figures = {name: _figure([record[name] for record in seeds]) for name in FIGURES}
            rows.append({"choice": cell.choice, "value": cell.value, "seeds": len(seeds)} | figures)
    return markdown_table(rows)


def _figure(seeds: Sequence[Sequence[tuple[int, int]]]) -> str:
    """Return the figure of (tokens, forward passes) by seed and prompt."""
    count = min(map(len, seeds))
    drawn = resamples(count, np.random.default_rng(0))
    values = [ratios_of_sums(prompts[:count], drawn) for prompts in seeds]
    return with_interval(np.mean(values, 0))


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__, json=False)
    options.add_argument(
        "--output", type=Path, required=True, metavar="FILE.jsonl", help="a line for each drafter"
    )
    options.add_argument(
        "--target", metavar="FOLDER_OR_ID", help="a target, or `default` (default: a random one)"
    )
    for kind in ("greedy", "sampled"):
        options.add_argument(
            f"--{kind}",
            type=Path,
            metavar="FILE.jsonl",
            help=f"{kind} answers of treeflash distill",
        )
    options.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="to measure on")
    options.add_names("--cells", dict.fromkeys(cell.choice for cell in CELLS), "choices to vary")
    options.add_numbers("--seeds", [0, 1], "seeds of training", minimum=0)
    options.add_number("--steps", 300, "training steps")
    options.add_number("--answers", 400, "answers of the random target")
    options.add_number("--limit", 32, "prompts to measure on")
    options.add_number("--max-tokens", 48, "new tokens of a prompt, and of an answer")
    options.add_argument("--device", default="cpu", help="a device of PyTorch (default: cpu)")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    return options


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cells that are missing, and print the table."""
    args = parser().parse_args(argv)
    files = [args.greedy, args.sampled, args.prompts]
    if (args.target is not None) != all(files) or any(files) != all(files):
        raise ConfigError("--target, --greedy, --sampled and --prompts go together")
    load = LoadConfig(device=args.device, dtype=args.dtype)
    base = replace(RECIPE if args.target else BASE, steps=args.steps, save_every=args.steps)
    console = Console(stderr=True, highlight=False)
    cells = [cell for cell in CELLS if cell.choice in args.cells]
    output = OutputFile(
        args.output, lambda line: has_fields(line, cell=str, seed=int), key=("cell", "seed")
    )
    with output as file, tempfile.TemporaryDirectory() as folder:
        setting: Setting | None = None
        for seed in args.seeds:
            for cell in cells:
                if (cell.name, seed) in file.records:
                    continue
                setting = setting or make_setting(args, Path(folder), load)
                record = measure(cell, seed, base, setting, load, args.max_tokens)
                file.append(record)
                console.print(f"{cell.name}, seed {seed}: loss {record['loss']:.3f}")
    print(ablation_table(list(file.records.values())))
    return 0


def make_setting(args: Any, folder: Path, load: LoadConfig) -> Setting:
    """Return the setting that the options choose."""
    if args.target is None:
        return random_setting(
            folder, load, answers=args.answers, tokens=args.max_tokens, prompts=args.limit
        )
    target = resolve_target(None if args.target == "default" else args.target)
    tokenizer = Tokenizer.from_folder(target)
    return Setting(
        target=target,
        greedy=read_responses(args.greedy, tokenizer),
        sampled=read_responses(args.sampled, tokenizer),
        prompts=read_prompts(tokenizer, args.prompts, args.limit),
    )


if __name__ == "__main__":
    sys.exit(main())
