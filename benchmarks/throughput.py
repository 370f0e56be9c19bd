"""Throughput of many sequences at once, beside the batched generation of other packages.

    python -m benchmarks.throughput gsm8k.jsonl mt_bench.jsonl --backend cuda [--json FILE]

For every number of sequences, the prompts of a set are cut into groups of that size, and a group is
handed over at once. Every system and method answers a group in turn before the next group, so that
a disturbance of the machine affects all of them. A group ends with its last sequence. The first
group of each number is answered once before anything is measured. Decoding is greedy, from the same
token ids to the same stop tokens and limit; the budget is `auto`.

Tokens per second count all new tokens of a group and all its time, the prefill included. The other
packages run in the same process, on the same device and in the same dtype: with `--backend cuda`,
transformers' padded `generate`, with `--backend mlx`, mlx-lm's `BatchGenerator`. Systems that
cannot run are listed with the reason.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from operator import eq
from statistics import median
from typing import Any, NamedTuple, TypeAlias

from rich.progress import track

from benchmarks.common import (
    Parser,
    Row,
    describe,
    mean_row,
    show,
    supported_methods,
    write_json,
)
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import METHODS, Method
from treeflash.decoding import Request, SchedulerConfig
from treeflash.errors import ConfigError
from treeflash.evaluation.records import MEAN
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import encode, read_rows

SYSTEMS = ("treeflash", "transformers", "mlx-lm")


Group: TypeAlias = Sequence[list[int]]
"""Prompts that are handed over at once."""


class Answers:
    """The tokens of a group's sequences, and the times at which they arrived.

    Attributes:
        tokens: the new tokens of each sequence, the stop token included.
        times: seconds from handing over the group to the arrivals of each sequence.
    """

    def __init__(self, sequences: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(sequences)]
        self.times: list[list[float]] = [[] for _ in range(sequences)]
        self._started = time.perf_counter()

    def add(self, sequence: int, tokens: Sequence[int]) -> None:
        """Record tokens of a sequence that have just arrived."""
        self.tokens[sequence] += tokens
        self.times[sequence].append(time.perf_counter() - self._started)


Run: TypeAlias = Callable[[Group, int], Answers]
"""Answers a group, each prompt with at most that many tokens."""


class System(NamedTuple):
    """A package with one of its ways to decode."""

    name: str
    method: str


FIGURES = ("tokens_per_s", "first_token_s", "ratio_to_ar", "ratio_to_padded", "ratio_to_one")


class Case(NamedTuple):
    """The records that are aggregated into one row."""

    set: str
    concurrency: int
    system: System

    @property
    def columns(self) -> Row:
        """The columns that name the case, without the set."""
        return {
            "concurrency": self.concurrency,
            "system": self.system.name,
            "method": self.system.method,
        }


Records: TypeAlias = dict[Case, list[Answers]]
"""The answers to each group of a case; the groups of a set have the same order in every case."""


def treeflash(model: LanguageModel, method: Method) -> Run:
    """Run a method of treeflash through the scheduler."""

    def run(group: Group, max_tokens: int) -> Answers:
        config = model.decode_config({"method": method, "max_tokens": max_tokens})
        scheduler = model.scheduler(SchedulerConfig(max_parallel=len(group)), None)
        answers = Answers(len(group))
        requests = [Request(prompt_ids=ids, config=config, tag=n) for n, ids in enumerate(group)]
        for request, step in scheduler.decode(requests):
            answers.add(request.tag, step.tokens)
        return answers

    return run


def transformers(model: LanguageModel) -> Run:
    """Run padded `generate`."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    backend: Any = model.backend
    dtype, device = backend.target.dtype, backend.target.device
    stop = sorted(model.tokenizer.stop_token_ids)
    pad = stop[0] if stop else 0
    # A checkpoint's own settings may sample or penalise repetition.
    config = GenerationConfig(do_sample=False, eos_token_id=stop or None, pad_token_id=pad)
    other: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype)
    other.generation_config = config
    other = other.to(device).eval()

    def generate(group: Group, max_tokens: int) -> Answers:
        class Clock(BaseStreamer):
            """Passes on the tokens of each forward pass, one for each sequence."""

            saw_prompts = False

            def put(self, value: torch.Tensor) -> None:
                if self.saw_prompts:
                    for sequence, token in enumerate(value.tolist()):
                        if sequence not in ended:
                            answers.add(sequence, [token])
                            ended.update([sequence] if token in stop else [])
                self.saw_prompts = True

            def end(self) -> None:
                pass

        ended: set[int] = set()
        answers = Answers(len(group))
        width = max(map(len, group))
        padded = [[pad] * (width - len(ids)) + ids for ids in group]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in group]
        other.generate(
            torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_tokens,
            streamer=Clock(),
        )
        return answers

    return generate


def mlx_lm(model: LanguageModel) -> Run:
    """Run mlx-lm's `BatchGenerator`."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.utils import load_model as load_folder

    backend: Any = model.backend
    other, _ = load_folder(model.folder)
    other.set_dtype(getattr(mx, backend.dtype))
    mx.eval(other.parameters())

    def batch_generate(group: Group, max_tokens: int) -> Answers:
        generator = BatchGenerator(
            other,
            stop_tokens=[[token] for token in sorted(model.tokenizer.stop_token_ids)],
            completion_batch_size=len(group),
            prefill_batch_size=len(group),
        )
        answers = Answers(len(group))
        uids = generator.insert(list(group), [max_tokens] * len(group))
        numbers = {uid: number for number, uid in enumerate(uids)}
        while responses := generator.next_generated():
            for response in responses:
                answers.add(numbers[response.uid], [response.token])
        generator.close()
        return answers

    return batch_generate


PLAIN, PADDED = System("treeflash", "ar"), System("transformers", "generate")
PEERS: dict[str, tuple[System, Callable[[LanguageModel], Run]]] = {
    "cpu": (PADDED, transformers),
    "cuda": (PADDED, transformers),
    "mlx": (System("mlx-lm", "batch_generate"), mlx_lm),
}
"""By backend, another package with the same framework."""


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=8, max_tokens=64)
    options.add_numbers(
        "--concurrency",
        [1, 2, 4, 8, 16, 32],
        "numbers of sequences at once; --limit is rounded up to a multiple of each",
    )
    others = ("generate", "batch_generate")
    options.add_names(
        "--methods",
        [*METHODS, *others],
        "methods of any system",
        ["ar", "ddtree", "treeflash", *others],
    )
    options.add_names("--systems", SYSTEMS, "systems")
    add_model_options(options)
    return options


def make_groups(prompts: Group, limit: int, concurrency: int, name: str) -> list[Group]:
    """Group the first prompts, at least `limit` of them, in groups of equal size."""
    count = -(-limit // concurrency) * concurrency
    if len(prompts) < count:
        raise ConfigError(
            f"{name} has {len(prompts)} prompts, but {count} are needed for groups of "
            f"{concurrency}; lower --limit or --concurrency"
        )
    return [prompts[first : first + concurrency] for first in range(0, count, concurrency)]


def load_systems(model: LanguageModel, args: Any) -> tuple[dict[System, Run], list[Row]]:
    """Select the systems that run with this backend, and say why the others do not."""
    systems: dict[System, Run] = {}
    skipped: list[Row] = []
    if "treeflash" in args.systems:
        for method in METHODS:
            if method not in supported_methods(model.backend):
                skipped.append(skip("treeflash", method, "the pair cannot draft for it"))
            else:
                systems[System("treeflash", method)] = treeflash(model, method)
    if model.backend.name in PEERS:
        peer, load = PEERS[model.backend.name]
        if peer.name in args.systems:
            try:
                systems[peer] = load(model)
            except Exception as error:  # of another package; the table shows it
                skipped.append(skip(*peer, error))
    chosen = {system: run for system, run in systems.items() if system.method in args.methods}
    return chosen, [row for row in skipped if row["method"] in args.methods]


def skip(system: str, method: str, reason: Exception | str) -> Row:
    """Build a row of the table of systems that cannot run."""
    if isinstance(reason, Exception):
        reason = " ".join(f"{type(reason).__name__}: {reason}".split())
    return {"system": system, "method": method, "reason": reason}


def measure(
    systems: dict[System, Run], sets: dict[str, Group], args: Any
) -> tuple[Records, list[Row]]:
    """Measure every group in every system; a package that fails loses its records."""
    records: Records = {}
    skipped: list[Row] = []

    def answer(name: str, group: Group, tokens: int) -> None:
        for system, run in tuple(systems.items()):
            try:
                answers = run(group, tokens)
            except Exception as error:  # of another package; the table shows it
                if system.name == "treeflash":
                    raise
                del systems[system]
                for case in [case for case in records if case.system == system]:
                    del records[case]
                skipped.append(skip(*system, error))
            else:
                if name:
                    records.setdefault(Case(name, len(group), system), []).append(answers)

    for concurrency in args.concurrency:
        for number, (name, prompts) in enumerate(sets.items()):
            groups = make_groups(prompts, args.limit, concurrency, name)
            if number == 0:
                answer("", groups[0], args.max_tokens)
            for group in track(groups, f"{name}, {concurrency} at once"):
                answer(name, group, args.max_tokens)
    return records, skipped


def make_rows(records: Records) -> list[Row]:
    """Make one row for each case, and one for its mean over sets.

    `first_token_s` is a median. Ratios compare tokens per second: `ratio_to_ar` with treeflash's
    plain decoding and `ratio_to_padded` with transformers' padded `generate` at the same
    concurrency, `ratio_to_one` with the same system and one sequence at a time. `equal` counts the
    sequences with the same tokens as treeflash's plain decoding at this concurrency.
    """
    speeds = {
        case: sum(len(tokens) for group in groups for tokens in group.tokens)
        / sum(max(times[-1] for times in group.times) for group in groups)
        for case, groups in records.items()
    }

    def ratio(case: Case, base: Case) -> float | None:
        return speeds[case] / speeds[base] if base in speeds else None

    rows = []
    for case, groups in records.items():
        texts = [tokens for group in groups for tokens in group.tokens]
        others = records.get(case._replace(system=PLAIN), [])
        plain = [tokens for group in others for tokens in group.tokens]
        first = [times[0] for group in groups for times in group.times]
        rows.append(
            {
                "set": case.set,
                **case.columns,
                "tokens_per_s": speeds[case],
                "first_token_s": median(first),
                "ratio_to_ar": ratio(case, case._replace(system=PLAIN)),
                "ratio_to_padded": ratio(case, case._replace(system=PADDED)),
                "ratio_to_one": ratio(case, case._replace(concurrency=1)),
                "equal": sum(map(eq, texts, plain)),
                "prompts": len(texts),
            }
        )
    cases = dict.fromkeys(case._replace(set=MEAN) for case in records)
    return rows + [mean_row(rows, case.columns, FIGURES) for case in cases]


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    prompts = {path.stem: [row.turns[0] for row in read_rows(path)] for path in args.prompts}
    for name, turns in prompts.items():
        for concurrency in args.concurrency:
            make_groups([[]] * len(turns), args.limit, concurrency, name)  # raises before the work
    model = load_model(args)
    sets: dict[str, Group] = {
        name: [encode(model.tokenizer, turn).token_ids for turn in turns]
        for name, turns in prompts.items()
    }
    systems, skipped = load_systems(model, args)
    records, failed = measure(systems, sets, args)
    skipped += failed
    if skipped:
        show("skipped", skipped)
    if not records:
        raise ConfigError("nothing was measured; see the reasons above, or --systems and --methods")
    rows = make_rows(records)
    pair = describe(model.backend)
    title = f"throughput, {', '.join(pair.values())}, {args.max_tokens} tokens per prompt"
    show(title, [row for row in rows if row["set"] == MEAN])
    results = {"max_tokens": args.max_tokens, "rows": rows, "skipped": skipped}
    write_json(args.json, "throughput", pair | results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
