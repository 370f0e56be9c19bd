"""The target's responses to many prompts, written to a file that an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import TextColumn

from treeflash.cli.progress import progress
from treeflash.config import SamplingConfig
from treeflash.errors import ConfigError, PromptError
from treeflash.text.output_file import OutputFile, finished_records
from treeflash.text.prompt_file import Key, Row
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.interfaces import Request, Responder
from treeflash.training.provenance import check_settings, provenance

Record: TypeAlias = dict[str, Any]
LINE_START = b'{"id":'
SETTINGS = {"target", "backend", "dtype", "top_p", "max_tokens", "temperature", "seed"}
NAMED = 5
"""Skipped prompts that the report names."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How the target responds.

    Attributes:
        temperatures: assigned to the prompts in turn; 0 is greedy.
        top_p: nucleus sampling of the responses whose temperature is above 0.
        max_tokens: maximum length of a response.
        max_prompt_tokens: longer prompts are skipped.
        slots: prompts answered at the same time.
        seed: of sampling; prompt n uses `seed + n`.
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
            raise ConfigError("temperatures must have at least one value")
        for temperature in self.temperatures:
            SamplingConfig(temperature=temperature, top_p=self.top_p, seed=self.seed)


@dataclass
class Distillation:
    """Prompts to answer, and the output file with the responses so far.

    Attributes:
        rows: conversations to answer, turn by turn.
        output: JSON lines of `id`, `turn`, the settings of the response, `prompt_ids` and
            `response_ids`.
        records: finished lines by row and turn.
        output_bytes: size of the part of `output` that they take.
        skipped: ids of the rows with a prompt over the limit.
    """

    rows: Sequence[Row]
    output: Path
    records: dict[Key, Record] = field(default_factory=dict)
    output_bytes: int = 0
    skipped: list[str | int] = field(default_factory=list)

    @classmethod
    def resume(cls, rows: Sequence[Row], output: Path) -> Distillation:
        """Read what an earlier run left in `output`, which need not exist; drop a torn last line.

        Raises:
            ConfigError: the file cannot be written, or another program wrote it.
        """
        found = finished_records(output, LINE_START, _checked)
        records = {(record["id"], record["turn"]): record for record, _ in found}
        return cls(rows, output, records, sum(size for _, size in found))

    def check(self, responder: Responder, config: DistillConfig) -> None:
        """Check that the output's responses were generated with these settings.

        Raises:
            ConfigError: they were not.
        """
        for record in self.records.values():
            check_settings(self.output, record, _settings(responder, config))
        for n, row in enumerate(self.rows):
            for turn in range(len(row.turns)):
                if found := self.records.get((row.id, turn)):
                    check_settings(self.output, found, _row_settings(config, n))

    def run(
        self, responder: Responder, tokenizer: Tokenizer, config: DistillConfig, console: Console
    ) -> None:
        """Answer what is missing; each response is on disk as soon as it ends.

        Raises:
            ConfigError: the output has responses to other prompts or with other settings, or all
                prompts are too long.
            PromptError: the chat template rejects a row.
        """
        self.check(responder, config)
        settings = _settings(responder, config)
        with (
            OutputFile(self.output, self.output_bytes) as file,
            progress(console, TextColumn("{task.fields[rate]}")) as bar,
        ):
            task = bar.add_task("answers", total=sum(len(r.turns) for r in self.rows), rate="")
            tokens, started = 0, bar.get_time()
            for turn in range(max(len(row.turns) for row in self.rows)):
                numbers = [n for n, row in enumerate(self.rows) if turn < len(row.turns)]
                requests = self._requests(numbers, turn, responder, tokenizer, config)
                bar.update(task, advance=len(numbers) - len(requests))
                responses = responder.respond(
                    [request for _, request in requests], tokenizer.stop_token_ids, config.slots
                )
                for i, response_ids in responses:
                    n, request = requests[i]
                    record = {
                        "id": self.rows[n].id,
                        "turn": turn,
                        **settings,
                        **_row_settings(config, n),
                        "prompt_ids": list(request.prompt_ids),
                        "response_ids": response_ids,
                    }
                    file.append(json.dumps(record, separators=(",", ":")))
                    self.records[self.rows[n].id, turn] = record
                    tokens += len(response_ids)
                    rate = tokens / (bar.get_time() - started)
                    bar.update(task, advance=1, rate=f"{rate:.0f} tokens/s")
        if not any((row.id, 0) in self.records for row in self.rows):
            if config.max_prompt_tokens < responder.max_positions:
                raise ConfigError(
                    f"all prompts are longer than --max-prompt-tokens {config.max_prompt_tokens}; "
                    "raise it"
                )
            raise ConfigError(
                "all prompts are too long for the target, which has "
                f"{responder.max_positions} positions"
            )

    def report(self) -> str:
        """One line: responses and tokens in the output, and which prompts were skipped."""
        keys = [(row.id, turn) for row in self.rows for turn in range(len(row.turns))]
        found = [self.records[key] for key in keys if key in self.records]
        line = (
            f"{self.output}: {len(found)} of {len(keys)} prompts answered, "
            f"{sum(len(record['response_ids']) for record in found)} tokens"
        )
        if self.skipped:
            names = [repr(name) for name in self.skipped[:NAMED]]
            names += ["..."] * (len(self.skipped) > NAMED)
            line += f"; skipped as too long: {len(self.skipped)} ({', '.join(names)})"
        return line

    def _requests(
        self,
        numbers: Sequence[int],
        turn: int,
        responder: Responder,
        tokenizer: Tokenizer,
        config: DistillConfig,
    ) -> list[tuple[int, Request]]:
        """The number of each row that still needs a response in this turn, and the request."""
        requests = []
        for n in numbers:
            row = self.rows[n]
            if any((row.id, before) not in self.records for before in range(turn)):
                continue  # an earlier turn was skipped
            prompt = self._prompt(row, turn, tokenizer)
            if found := self.records.get((row.id, turn)):
                if found["prompt_ids"] != prompt:
                    raise ConfigError(
                        f"{self.output} has a response to another prompt of the id {row.id!r}; "
                        "use another --output, or give the changed row another id"
                    )
                continue
            if len(prompt) > _limit(responder, config):
                self.skipped.append(row.id)
                continue
            sampling = SamplingConfig(top_p=config.top_p, **_row_settings(config, n))
            room = responder.max_positions - len(prompt)
            request = Request(
                prompt_ids=tuple(prompt),
                sampling=sampling,
                max_tokens=min(config.max_tokens, room),
            )
            requests.append((n, request))
        return requests

    def _prompt(self, row: Row, turn: int, tokenizer: Tokenizer) -> list[int]:
        """The token ids of a row's conversation up to the response of a turn."""
        messages = list(row.turns[0])
        for before in range(turn):
            response = tokenizer.decode(self.records[row.id, before]["response_ids"])
            messages.append({"role": "assistant", "content": response})
            messages += row.turns[before + 1]
        try:
            return tokenizer.chat(messages)
        except PromptError as error:
            raise PromptError(f"the row {row.id!r}: {error}") from None


def _limit(responder: Responder, config: DistillConfig) -> int:
    """Tokens of the longest prompt that can be answered."""
    return min(config.max_prompt_tokens, responder.max_positions - 1)


def _settings(responder: Responder, config: DistillConfig) -> Record:
    """The settings that all responses of a run share."""
    return {**provenance(responder), "top_p": config.top_p, "max_tokens": config.max_tokens}


def _row_settings(config: DistillConfig, n: int) -> Record:
    """The settings of the responses to row n."""
    temperatures = config.temperatures
    return {"temperature": temperatures[n % len(temperatures)], "seed": config.seed + n}


def _checked(record: Any) -> Record:
    """The record, if a run like this one wrote it."""
    kinds = {"id": str | int, "turn": int, "prompt_ids": list, "response_ids": list}
    if not all(isinstance(record[name], kind) for name, kind in kinds.items()):
        raise TypeError
    if not record.keys() >= SETTINGS:
        raise KeyError
    return dict(record)
