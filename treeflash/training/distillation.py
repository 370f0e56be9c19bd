"""Answers of the target to many prompts, into a file that an interrupted run goes on with."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn

from treeflash.cli.progress import progress
from treeflash.config import SamplingConfig
from treeflash.errors import ConfigError, PromptError
from treeflash.text.output_file import finished_records
from treeflash.text.prompt_file import Key, Row
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.interfaces import Request, Responder

LINE_START = b'{"id":'
BATCHES_BETWEEN_SORTS = 8
"""Slots' worth of prompts that are sorted by length together: few enough to stay well mixed."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the target said to a prompt; both in token ids."""

    temperature: float
    prompt_ids: list[int]
    response_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How the target answers.

    Attributes:
        temperatures: one for each prompt, in turn; 0 is greedy.
        top_p: of the sampled ones.
        max_tokens: of an answer, at most.
        max_prompt_tokens: longer prompts are left out.
        slots: prompts answered at a time.
        seed: of sampling; a row's own seed is counted on from it.
    """

    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 1.0
    max_tokens: int = 512
    max_prompt_tokens: int = 1024
    slots: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_prompt_tokens", "slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', '-')} must be 1 or more")
        if not self.temperatures:
            raise ConfigError("temperatures must name one temperature at least")
        for temperature in self.temperatures:
            SamplingConfig(temperature=temperature, top_p=self.top_p, seed=self.seed)


@dataclass
class Distillation:
    """A file of prompts' answers, and those that it holds already.

    Attributes:
        rows: what to answer.
        output: JSON lines of `id`, `turn`, `temperature`, `prompt_ids`, `response_ids`.
        answers: by row and turn.
        output_bytes: size of the part of `output` that they take.
    """

    rows: Sequence[Row]
    output: Path
    answers: dict[Key, Answer] = field(default_factory=dict)
    output_bytes: int = 0

    @classmethod
    def resume(cls, rows: Sequence[Row], output: Path) -> Distillation:
        """Take up what an earlier run left in `output`, which need not exist; a torn line is lost.

        Raises:
            ConfigError: the file cannot be written, or another program wrote it.
        """
        found = finished_records(output, LINE_START, _answer)
        answers = {key: answer for (key, answer), _ in found}
        return cls(rows, output, answers, sum(size for _, size in found))

    def run(
        self, responder: Responder, tokenizer: Tokenizer, config: DistillConfig, console: Console
    ) -> None:
        """Answer what is missing; an answer is on disk as soon as the target ended it.

        Raises:
            ConfigError: the output holds answers to other prompts, or at other temperatures.
            PromptError: the chat template refuses a row.
        """
        with (
            self.output.open("a", encoding="utf-8", newline="\n") as file,
            progress(console, TextColumn("{task.fields[rate]}")) as bar,
        ):
            file.truncate(self.output_bytes)
            task = bar.add_task("answers", total=sum(len(r.turns) for r in self.rows), rate="")
            tokens, started = 0, bar.get_time()
            for turn in range(max(len(row.turns) for row in self.rows)):
                requests, skipped = self._requests(turn, responder, tokenizer, config)
                bar.update(task, advance=skipped)
                requests = _sorted(requests, BATCHES_BETWEEN_SORTS * config.slots)
                answers = responder.respond(
                    [request for _, request in requests], tokenizer.stop_token_ids, config.slots
                )
                for i, response_ids in answers:
                    key, request = requests[i]
                    answer = Answer(
                        temperature=request.sampling.temperature,
                        prompt_ids=list(request.prompt_ids),
                        response_ids=response_ids,
                    )
                    self.answers[key] = answer
                    record = {"id": key[0], "turn": turn, **asdict(answer)}
                    file.write(json.dumps(record, separators=(",", ":")) + "\n")
                    file.flush()
                    tokens += len(response_ids)
                    rate = tokens / (bar.get_time() - started)
                    bar.update(task, advance=1, rate=f"{rate:.0f} tokens/s")

    def report(self) -> str:
        """One line: how many answers and tokens there are, and how many prompts have none."""
        keys = [(row.id, turn) for row in self.rows for turn in range(len(row.turns))]
        answers = [self.answers[key] for key in keys if key in self.answers]
        return (
            f"{self.output}: {len(answers)} of {len(keys)} prompts answered, "
            f"{sum(len(answer.response_ids) for answer in answers)} tokens"
        )

    def _requests(
        self, turn: int, responder: Responder, tokenizer: Tokenizer, config: DistillConfig
    ) -> tuple[list[tuple[Key, Request]], int]:
        """What is to be answered in a turn, and how many rows need or allow no answer."""
        rows = [(n, row) for n, row in enumerate(self.rows) if turn < len(row.turns)]
        requests = []
        for n, row in rows:
            messages = list(row.turns[0])
            for before in range(turn):
                if (row.id, before) not in self.answers:
                    break
                answer = tokenizer.decode(self.answers[row.id, before].response_ids)
                messages.append({"role": "assistant", "content": answer})
                messages += row.turns[before + 1]
            else:
                try:
                    prompt = tokenizer.chat(messages)
                except PromptError as error:
                    raise PromptError(f"the row {row.id!r}: {error}") from None
                room = responder.max_positions - len(prompt)
                if len(prompt) > config.max_prompt_tokens or room < 1:
                    continue
                temperature = config.temperatures[n % len(config.temperatures)]
                if (row.id, turn) in self.answers:
                    self._check(row.id, turn, prompt, temperature)
                    continue
                sampling = SamplingConfig(
                    temperature=temperature, top_p=config.top_p, seed=config.seed + n
                )
                request = Request(
                    prompt_ids=tuple(prompt),
                    sampling=sampling,
                    max_tokens=min(config.max_tokens, room),
                )
                requests.append(((row.id, turn), request))
        return requests, len(rows) - len(requests)

    def _check(self, name: str | int, turn: int, prompt: list[int], temperature: float) -> None:
        """See that an answer that is there is what would be asked for now."""
        found = self.answers[name, turn]
        if (found.prompt_ids, found.temperature) != (prompt, temperature):
            raise ConfigError(
                f"{self.output} has an answer to {name!r} from another prompt, target, "
                "temperature or order of rows; use the same settings, or another --output"
            )


def _answer(record: Any) -> tuple[Key, Answer]:
    return (record["id"], record["turn"]), Answer(
        temperature=record["temperature"],
        prompt_ids=list(record["prompt_ids"]),
        response_ids=list(record["response_ids"]),
    )


def mix(
    files: Sequence[Sequence[Row]], weights: Sequence[float], limit: int | None, seed: int
) -> list[Row]:
    """Rows of several files, shuffled; the same for the same arguments.

    Args:
        files: each file's rows.
        weights: of the files' shares; a file that is used up gives its share to the others.
        limit: rows in all; None takes every row, whatever the weights.
        seed: of the shuffling.

    Raises:
        PromptError: an id is in two files.
    """
    random_ = random.Random(seed)
    left = [random_.sample(list(rows), len(rows)) for rows in files]
    total = sum(map(len, left))
    wanted = total if limit is None else min(limit, total)
    mixed: list[Row] = []
    while len(mixed) < wanted:
        shares = [w if rows else 0.0 for w, rows in zip(weights, left, strict=True)]
        if not any(shares):
            break
        mixed.append(random_.choices(left, shares)[0].pop())
    ids = [row.id for row in mixed]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise PromptError(f"the id {twice!r} is in two files of prompts; make ids unique")
    return mixed


def _sorted(requests: list[tuple[Key, Request]], size: int) -> list[tuple[Key, Request]]:
    """The longest prompts first, within parts of a size: those run together are padded little."""
    parts = [requests[i : i + size] for i in range(0, len(requests), size)]
    return [x for part in parts for x in sorted(part, key=lambda x: -len(x[1].prompt_ids))]
