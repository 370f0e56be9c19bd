"""Continue training a drafter, for a fine-tuned target: `treeflash adapt`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.filesize import decimal

from treeflash.cli import options as cli
from treeflash.cli.console import Parser, guarded, plain_console
from treeflash.cli.prompt_batch import is_from_chosen
from treeflash.config import AUTO, LoadConfig, check_writable, write_whole
from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.folder import read_config, stored_tensors
from treeflash.drafters.formats import HEADS
from treeflash.drafters.loading import drafter_config
from treeflash.errors import ConfigError, PromptError
from treeflash.evaluation.records import block_efficiencies, resamples, with_interval
from treeflash.evaluation.run import Case, Evaluation, check_max_tokens, encode_rows
from treeflash.hub.models import resolve_drafter, resolve_target
from treeflash.hub.published import model_name
from treeflash.interruption import EXIT_INTERRUPTED
from treeflash.language_model import LanguageModel
from treeflash.registry import available
from treeflash.text.output_file import OutputFile
from treeflash.text.prompt import Row, read_rows
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.config import (
    SHAPE,
    TrainConfig,
    given_options,
    make_train_config,
    trained_head_name,
)
from treeflash.training.distillation import (
    Distillation,
    DistillConfig,
    count_responses,
    is_finished,
    mix,
    read_responses,
    response_file,
)
from treeflash.training.interfaces import TRAINER_ENTRY_POINTS, show_records, trainer

DEFAULTS: dict[str, Any] = {
    "minutes": 10.0,
    "patience": 5,
    "learning_rate": 2e-4,
    "validate_every": 25,
    "save_every": 25,
}
"""Options of `TrainConfig` that have other defaults than in `treeflash train`."""
SHOWN_DEFAULTS = {"head": "the drafter's", "freeze_backbone": "on if a head is added, else off"}
"""What happens without an option, where it depends on the drafter."""
LEFT_OUT = {"init", "seed", *SHAPE}
"""Options of `TrainConfig` that the drafter determines, or that `DistillConfig` has too."""
MEASURED = 32
BUDGET = 16
"""Nodes of the draft trees that measure block efficiency."""
SHARE_MEASURED = 4
"""At most one in this number of prompts measures; the others are trained on."""
TRAINED_BYTES = 16
"""Bytes of a trained parameter: float32 weight and gradient, and two averages of AdamW."""
FROZEN_BYTES = 4
CARD = """
## Block efficiency

Tokens per target forward pass on {prompts} prompts that were not trained on, trees of {budget} nodes, at most
{max_tokens} tokens at temperature {temperature}, target {target}; in brackets 95 % bootstrap intervals over prompts.

| drafter | method | tokens per pass |
| --- | --- | --- |
"""  # noqa: E501


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse(argv)
    console = plain_console()
    distill = DistillConfig(**given_options(args, DistillConfig))
    check_max_tokens(distill.max_tokens)
    if args.measured < 1:
        raise ConfigError(f"measured must be 1 or more, got {args.measured}")
    check_writable(args.output, folder=True)
    base = resolve_drafter(args.drafter, args.target)
    if args.output.resolve() == base.resolve():
        raise ConfigError(f"{args.output} has the drafter itself; give another --output")
    config = train_config(args, base, distill)
    # A backend without training answers and measures, and PyTorch trains.
    trains = args.backend is None or args.backend in available(TRAINER_ENTRY_POINTS)
    train = trainer(args.backend if trains else None).train
    target = resolve_target(args.target)
    if args.output.resolve() == target.resolve():
        raise ConfigError(f"{args.output} has the target itself; give another --output")
    rows = mix([read_rows(path) for path in args.prompts], [1.0] * len(args.prompts), None, 0)
    measured, answered = divide_prompts(rows, args.measured)
    answers = sum(len(row.turns) for row in answered)
    if answers <= config.validation_sequences:
        raise ConfigError(
            f"{answers} answers leave nothing to train on after {config.validation_sequences} are "
            "held out for validation; add prompts, or lower --validation-sequences"
        )
    for line in _cost(target, base, config, distill, len(answered), len(measured)):
        console.print(line)
    args.output.mkdir(parents=True, exist_ok=True)
    answers_file = args.output / "answers.jsonl"
    try:
        tokenizer = Tokenizer.from_folder(target)
        with response_file(answers_file) as file:
            chosen = partial(is_from_chosen, args=args)
            if is_finished(file, answered, distill, chosen, lambda: tokenizer):
                console.print(count_responses(file, answered))
                before = _measure(args, base, measured, distill, console)
            else:
                before = _answer(args, base, measured, distill, console, file, answered)
        responses = read_responses(answers_file, tokenizer)
        # The named device is one of the backend that answers; PyTorch's may be missing.
        own = {} if trains else {"backend": None, "device": None}
        device = argparse.Namespace(**{**vars(args), **own})

        def start(load: LoadConfig) -> Any:
            load = replace(load, adapter=args.adapter)
            return train(target, responses, args.output, config, load)

        show_records(cli.with_device(device, start), config, console)
        after = _measure(args, args.output, measured, distill, console)
    except KeyboardInterrupt:
        console.print("interrupted; run the same command again to resume")
        return EXIT_INTERRUPTED
    table = _table(before, after)
    _extend_card(args.output / "README.md", before, distill, table)
    print("\n".join(table))
    console.print(f"{args.output}: adapted; pass it as --drafter")
    return 0


def make_parser() -> Parser:
    parser = Parser(
        "adapt", "Continue training a drafter for a fine-tuned target, and measure the gain."
    )
    parser.add_config_option()
    parser.add_argument(
        "--drafter",
        metavar="FOLDER_OR_ID",
        help="the drafter of the base model (default: the published drafter of the target)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE.jsonl",
        help="files of prompts like those that will be decoded, one JSON object per line, with a "
        "prompt, messages, or turns, and perhaps an id",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder for the drafter, the target's answers, the measurements, and the state from "
        "which an interrupted run resumes",
    )
    parser.add_argument(
        "--measured",
        type=int,
        default=MEASURED,
        metavar="N",
        help="number of prompts that measure the block efficiency before and after training and "
        f"are not trained on; at most a quarter of all prompts (default: {MEASURED})",
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="merge a LoRA adapter of PEFT or mlx-lm into the target"
    )
    cli.add_options(parser.add_argument_group("answers"), DistillConfig)
    shown = DEFAULTS | SHOWN_DEFAULTS
    cli.add_options(parser.add_argument_group("training"), TrainConfig, LEFT_OUT, shown)
    cli.add_device_options(parser)
    return parser


def train_config(args: argparse.Namespace, base: Path, distill: DistillConfig) -> TrainConfig:
    given = {k: v for k, v in given_options(args, TrainConfig).items() if k not in LEFT_OUT}
    options = {**DEFAULTS, **given, "init": str(base), "seed": distill.seed}
    options.setdefault("head", trained_head_name(drafter_config(base).head))
    if drafter_config(base).head is None and options["head"] != "none":
        # The layers are right already; a new head has everything to learn.
        options.setdefault("freeze_backbone", "freeze_layers" not in given)
    return make_train_config(options)


def divide_prompts(rows: Sequence[Row], measured: int) -> tuple[list[Row], list[Row]]:
    """Divide the prompts into some that measure and others with other texts.

    Raises a PromptError if there are too few prompts.
    """
    count = min(measured, len(rows) // SHARE_MEASURED)
    texts = [row.turns[0] for row in rows[:count]]
    others = [row for row in rows[count:] if row.turns[0] not in texts]
    if not texts or not others:
        raise PromptError(
            f"adapt needs {SHARE_MEASURED} prompts or more, and not all of them equal; "
            f"got {len(rows)}"
        )
    return list(rows[:count]), others


def _cost(
    target: Path,
    base: Path,
    config: TrainConfig,
    distill: DistillConfig,
    prompts: int,
    measured: int,
) -> list[str]:
    """Estimate what the command takes, before a model is loaded: tokens, passes and memory."""
    length = min(config.max_length, distill.max_prompt_tokens + distill.max_tokens)
    passes = math.ceil(prompts / distill.parallel) * distill.max_tokens
    sequences = config.sequences * config.accumulation
    trained, frozen = _parameters(target, base, config)
    stored = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return [
        f"answers: at most {prompts * distill.max_tokens:,} tokens to {prompts} prompts, "
        f"in {passes:,} passes of up to {distill.parallel} sequences",
        f"block efficiency: at most {2 * measured * distill.max_tokens:,} tokens, "
        f"{measured} prompts before and after",
        f"training: {config.minutes:g} minutes or {config.steps:,} steps at most; a step runs the "
        f"target over {sequences} answers, at most {sequences * length:,} tokens",
        f"memory: {decimal(stored)} for the target as stored, "
        f"{decimal(trained * TRAINED_BYTES)} for {trained:,} trained parameters, "
        f"{decimal(frozen * FROZEN_BYTES)} for {frozen:,} frozen ones, and the activations",
    ]


def _parameters(target: Path, base: Path, config: TrainConfig) -> tuple[int, int]:
    """Count the trained and the frozen parameters of the drafter."""
    drafter = drafter_config(base)
    shapes = {name: tensor.shape for name, tensor in stored_tensors(base).items()}
    prefix = "" if drafter.head is None else HEADS[drafter.head].prefix
    parts = {"head": 0, "fc": 0, "layers": 0}
    for name, shape in shapes.items():
        part = "fc" if name.endswith("fc.weight") else "layers"
        parts["head" if prefix and prefix in name else part] += math.prod(shape)
    if trained_head_name(drafter.head) != config.head:
        parts["head"] = _new_head(drafter, target, config)
    frozen_layers = config.freeze_backbone or config.freeze_layers
    idle = parts["fc"] * config.freeze_backbone + parts["layers"] * frozen_layers
    return sum(parts.values()) - idle, idle


def _new_head(drafter: DrafterConfig, target: Path, config: TrainConfig) -> int:
    if config.head == "none":
        return 0
    name = next(name for name, head in HEADS.items() if head.training_name == config.head)
    size = config.head_size or drafter.intermediate_size
    changed = replace(drafter, head=name, head_rank=config.head_size or drafter.head_rank)
    settings = read_config(target)
    vocab = {**settings, **settings.get("text_config", {})}["vocab_size"]
    return sum(math.prod(shape) for shape in HEADS[name].shapes(changed, vocab, size).values())


def _answer(
    args: argparse.Namespace,
    base: Path,
    measured: Sequence[Row],
    distill: DistillConfig,
    console: Console,
    file: OutputFile,
    answered: Sequence[Row],
) -> dict[str, Any]:
    """Let the target answer the prompts to train on; return the drafter's measurement before."""
    model = cli.load_model(args, drafter=str(base))
    if args.device is None:  # later loads choose the same device without a warning
        args.device = model.backend.device
    distillation = Distillation(model, distill, file, answered)
    distillation.check()
    before = _measure(args, base, measured, distill, console, model)
    distillation.run(console)
    console.print(distillation.report())
    return before


def _measure(
    args: argparse.Namespace,
    drafter: Path,
    rows: Sequence[Row],
    distill: DistillConfig,
    console: Console,
    model: LanguageModel | None = None,
) -> dict[str, Any]:
    """Return a drafter's accepted lengths by prompt, measured once for each output folder."""
    path = args.output / ("after.json" if drafter == args.output else "before.json")
    settings = {
        "target": model_name(resolve_target(args.target)),
        "drafter": model_name(drafter),
        "adapter": args.adapter and Path(args.adapter).name,
        "prompts": [row.id for row in rows],
        "budget": BUDGET,
        "max_tokens": distill.max_tokens,
        "temperature": distill.temperature[0],
    }
    if path.exists():
        found = read_config(args.output, path.name)
        for name, value in settings.items():
            if (other := found.get(name)) != value:
                difference = f"{name} {other}, not {value}"
                raise ConfigError(
                    f"{path} was measured with "
                    f"{'other prompts' if name == 'prompts' else difference}; use the same "
                    "options, or give another --output"
                )
        return found
    model = model or cli.load_model(args, drafter=str(drafter))
    method = model.best_method
    configs = {
        Case(method, BUDGET): model.decode_config(
            {
                "method": method,
                "budget": BUDGET,
                "suffix": False,
                "max_tokens": distill.max_tokens,
                "temperature": distill.temperature[0],
                "seed": distill.seed,
            }
        )
    }
    evaluation = Evaluation()
    evaluation.run(
        model.backend, {"prompts": encode_rows(model, rows, configs)}, configs, console, AUTO
    )
    samples = evaluation.samples.get("prompts", [])
    if not samples:
        raise PromptError("every answer ended with its first token, so nothing was drafted")
    lengths = [list(run.accepted_lengths) for sample in samples for run in sample.runs.values()]
    measured = {**settings, "method": method, "lengths": lengths}
    write_whole(path, json.dumps(measured) + "\n")  # whenever the process ends
    return measured


def _table(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Build the rows of the card's table: both drafters, and the ratio of both."""
    rows, values = [], []
    for record in (before, after):
        # Both are resampled by the same prompts.
        indices = resamples(len(record["lengths"]), np.random.default_rng(0))
        values.append(block_efficiencies(record["lengths"], indices))
        rows.append(f"| {record['drafter']} | {record['method']} | {with_interval(values[-1])} |")
    return [*rows, f"| ratio | | {with_interval(values[1] / values[0])} |"]


def _extend_card(
    path: Path, before: Mapping[str, Any], distill: DistillConfig, table: Sequence[str]
) -> None:
    """Add the measurements to the card that the training wrote."""
    heading = CARD.format(
        prompts=len(before["prompts"]),
        budget=BUDGET,
        max_tokens=distill.max_tokens,
        temperature=before["temperature"],
        target=before["target"],
    )
    card = path.read_text(encoding="utf-8").partition(CARD.splitlines()[1])[0].rstrip()
    path.write_text(card + "\n" + heading + "\n".join(table) + "\n", encoding="utf-8")
