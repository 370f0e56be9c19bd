"""The target's responses to prompts, which are given or its own, and their files."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn

from treeflash.cli.console import progress
from treeflash.cli.prompt_batch import provenance
from treeflash.config import DecodeConfig, SamplingConfig, later_seed
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.interfaces import Backend
from treeflash.errors import ConfigError, PromptError
from treeflash.hub.published import family_name, model_name
from treeflash.language_model import LanguageModel
from treeflash.option import check, option
from treeflash.text.input_file import read_json_lines
from treeflash.text.output_file import OutputFile, Record, has_fields
from treeflash.text.prompt import Row, check_messages, encode_chat
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.config import spelled


@dataclass(frozen=True, kw_only=True)
class Response:
    """A prompt, after the chat template, and the response, with its end token if it ended.

    `target` is the name of the model that wrote the response; None if unknown.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    target: str | None = field(default=None, compare=False)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.response_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def truncate(self, length: int) -> Response:
        """Truncate the response so that prompt and response have `length` tokens."""
        room = max(0, length - len(self.prompt_ids))
        return replace(self, response_ids=self.response_ids[:room])


def foreign_responses(responses: Sequence[Response], target: Path) -> list[str]:
    """Return a warning for each other model that wrote some of the responses.

    A drafter learns what its own target writes.
    """
    names = Counter(response.target for response in responses if response.target)
    return [
        f"warning: {count} of {len(responses)} responses were written by {name}, not by the target "
        f"{model_name(target)}; the drafter will draft less well than with the target's own"
        for name, count in names.items()
        if family_name(Path(name)) != family_name(target)
    ]


def read_responses(path: Path, tokenizer: Tokenizer) -> list[Response]:
    """Read a file of JSON objects, one per line, in one of two forms; other keys are ignored.

    - `prompt_ids` and `response_ids`: token ids, as `treeflash distill` writes them, perhaps with
      `target`, the name of the model;
    - `messages`: a conversation that ends with the assistant's message, as other engines write
      it; its response gets the target's end token.

    Raises:
        PromptError: a line has neither form; names the file and the line.
    """
    lines = read_json_lines(path, "responses", lambda value, _: _response(value, tokenizer))
    return [response for _, response in lines]


def _response(value: Any, tokenizer: Tokenizer) -> Response:
    if not isinstance(value, dict):
        raise PromptError("the line must be a JSON object")
    if "messages" in value:
        return _conversation(value["messages"], tokenizer)
    target = value.get("target")
    return Response(
        prompt_ids=_token_ids(value.get("prompt_ids")),
        response_ids=_token_ids(value.get("response_ids")),
        target=target if isinstance(target, str) else None,
    )


def _conversation(messages: Any, tokenizer: Tokenizer) -> Response:
    if not isinstance(messages, list) or not messages:
        raise PromptError("'messages' must be a non-empty list")
    check_messages(messages)
    text = messages[-1]["content"]
    if messages[-1]["role"] != "assistant" or not text or not isinstance(text, str):
        raise PromptError("the last message must be a non-empty message of the assistant")
    prompt = encode_chat(tokenizer, messages[:-1]).token_ids
    return Response(prompt_ids=tuple(prompt), response_ids=tuple(tokenizer.answer(text)))


def _token_ids(value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(type(token) is int and token >= 0 for token in value)
    ):
        raise PromptError(
            "the line needs 'messages', or 'prompt_ids' and 'response_ids' as lists of token ids"
        )
    return tuple(value)


ANSWER_SETTINGS = {"target", "backend", "dtype", "top_p", "max_tokens", "temperature", "seed"}
PROMPT_SETTINGS = {"target", "backend", "dtype", "seed"}
PROMPT_TEMPERATURE = 1.0
MAX_PROMPT_TOKENS = 256
"""Tokens of a prompt that the target generates itself."""
MAX_NAMED_ROWS = 5
"""Skipped rows that the report names."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How the target responds."""

    temperature: tuple[float, ...] = option(
        (0.0,),
        "sampling temperature; 0 is greedy; several are assigned to the prompts in turn",
        accepts=lambda values: isinstance(values, tuple) and values != (),
        rule="a tuple of at least one number",
        metavar="T",
    )
    top_p: float = option(
        1.0,
        "sample from the smallest set of most probable tokens whose probabilities add up to this",
    )
    max_tokens: int = option(512, "maximum number of tokens in a response", 1)
    max_prompt_tokens: int = option(1024, "skip prompts with more tokens", 1)
    parallel: int = option(128, "number of prompts to answer at the same time", 1)
    seed: int = option(0, "random seed for mixing and sampling; prompt n uses the seed plus n")

    def __post_init__(self) -> None:
        check(self, spelled)
        for temperature in self.temperature:
            SamplingConfig(temperature=temperature, top_p=self.top_p, seed=self.seed)

    def sampling(self, n: int) -> SamplingConfig:
        temperature = self.temperature[n % len(self.temperature)]
        seed = later_seed(self.seed, n)
        return SamplingConfig(temperature=temperature, top_p=self.top_p, seed=seed)

    @property
    def settings(self) -> Record:
        """The settings that the records of all rows have."""
        return {"top_p": self.top_p, "max_tokens": self.max_tokens}

    def row_settings(self, n: int) -> Record:
        """Return the settings that the records of one row have."""
        sampling = self.sampling(n)
        return {"temperature": sampling.temperature, "seed": sampling.seed}


def mix(
    files: Sequence[Sequence[Row]], weights: Sequence[float], limit: int | None, seed: int
) -> list[Row]:
    """Shuffle the rows of several files; equal arguments give equal results.

    The weights are the files' shares of the rows; once a file is used up, the others share its
    part. Without a limit all rows are taken. An id in two files raises a PromptError.
    """
    random_ = random.Random(seed)
    remaining = [random_.sample(list(rows), len(rows)) for rows in files]
    total = sum(map(len, remaining))
    size = total if limit is None else min(limit, total)
    mixed: list[Row] = []
    while len(mixed) < size:
        shares = [w if rows else 0.0 for w, rows in zip(weights, remaining, strict=True)]
        mixed.append(random_.choices(remaining, shares)[0].pop())
    ((name, count),) = Counter(row.id for row in mixed).most_common(1)
    if count > 1:
        raise PromptError(f"the id {name!r} is in two files of prompts; make ids unique")
    return mixed


def respond(
    backend: Backend, requests: Sequence[Request], parallel: int
) -> Iterator[tuple[int, list[int]]]:
    """Decode many requests, up to `parallel` at once; yields each index and its new tokens."""
    scheduler = Scheduler(backend, SchedulerConfig(max_parallel=parallel))
    numbers = {request: number for number, request in enumerate(requests)}
    responses: dict[Request, list[int]] = defaultdict(list)
    with closing(scheduler.decode(requests)) as steps:
        for request, step in steps:
            responses[request] += step.tokens
            if step.finish_reason is not None:
                yield numbers[request], responses.pop(request)


def _request(
    model: LanguageModel, prompt_ids: Sequence[int], sampling: SamplingConfig, max_tokens: int
) -> Request:
    """Build a request for a text that the target writes without drafts."""
    config = DecodeConfig(
        method="ar",
        max_tokens=max_tokens,
        stop_token_ids=model.tokenizer.stop_token_ids,
        sampling=sampling,
    )
    return Request(prompt_ids=prompt_ids, config=config)


def self_prompts(
    model: LanguageModel, count: int, path: Path, console: Console, *, parallel: int, seed: int
) -> list[Row]:
    """Sample `count` user messages by letting the target continue its chat template's user header.

    Prompt n uses `seed + n`. Empty prompts are dropped; prompts that `path` already has are kept.
    Raises a PromptError without a chat template, and a ConfigError if all prompts are empty or the
    file cannot be written, is in use, or has lines of another program or of other settings.
    """
    try:
        header = model.tokenizer.user_header()
    except PromptError as error:
        raise PromptError(f"{error}; use --prompts instead") from None
    settings = provenance(model)
    with _self_prompt_file(path) as file:
        for record in file.records.values():
            number = int(record["id"].removeprefix("self-"))
            file.check_settings(record, {**settings, "seed": later_seed(seed, number)})
        missing = [n for n in range(count) if (f"self-{n}",) not in file.records]
        seeds = [later_seed(seed, n) for n in missing]
        samplings = [SamplingConfig(temperature=PROMPT_TEMPERATURE, seed=x) for x in seeds]
        requests = [_request(model, header, x, MAX_PROMPT_TOKENS) for x in samplings]
        file.resume()
        with progress(console) as bar:
            task = bar.add_task("prompts", total=count, completed=count - len(missing))
            for index, tokens in respond(model.backend, requests, parallel):
                bar.advance(task)
                if text := model.tokenizer.decode(tokens).strip():
                    record = {"id": f"self-{missing[index]}", "prompt": text}
                    file.append({**record, **settings, "seed": seeds[index]})
    if not (rows := _self_prompted(file, count)):
        raise ConfigError("the target generated only empty prompts; use --prompts instead")
    return rows


def stored_self_prompts(path: Path, count: int) -> list[Row]:
    """Return the prompts of an earlier run of `self_prompts`; none if some are missing."""
    if not path.exists():
        return []
    with _self_prompt_file(path) as file:
        rows = _self_prompted(file, count)
    return rows if len(rows) == count else []


def _self_prompted(file: OutputFile, count: int) -> list[Row]:
    """Return the first `count` prompts that the target generated, without those it left empty."""
    return [
        Row(id=record["id"], turns=(({"role": "user", "content": record["prompt"]},),))
        for record in file.select((f"self-{n}",) for n in range(count))
    ]


def _self_prompt_file(path: Path) -> OutputFile:
    return OutputFile(path, _is_self_prompt, key=("id",))


def _is_self_prompt(record: Record) -> bool:
    return (
        has_fields(record, id=str, prompt=str)
        and re.fullmatch(r"self-\d+", record["id"]) is not None
        and record.keys() >= PROMPT_SETTINGS
    )


def response_file(path: Path) -> OutputFile:
    return OutputFile(path, _is_response, compact=True)


def _is_response(record: Record) -> bool:
    return (
        has_fields(record, id=str | int, turn=int, prompt_ids=list, response_ids=list)
        and record.keys() >= ANSWER_SETTINGS
    )


@dataclass
class Distillation:
    """Lets the target answer the conversations `rows`, turn by turn.

    The output is made by `response_file`. `skipped` has the ids of the rows with a too long prompt.
    """

    model: LanguageModel
    config: DistillConfig
    output: OutputFile
    rows: Sequence[Row] = ()
    skipped: list[str | int] = field(default_factory=list)

    def check(self) -> None:
        """Raise a ConfigError if the output has responses with other settings."""
        for record in self.output.records.values():
            self.output.check_settings(record, self._settings)
        for n, row in enumerate(self.rows):
            for record in self.output.select(row.keys):
                self.output.check_settings(record, self.config.row_settings(n))

    def run(self, console: Console) -> None:
        """Answer the missing turns; each response is on disk as soon as it ends.

        Raises a ConfigError if the output has responses to other prompts or with other settings, or
        all prompts are too long, and a PromptError if the chat template rejects a row.
        """
        self.check()
        self.output.resume()
        with progress(console, TextColumn("{task.fields[rate]}")) as bar:
            task = bar.add_task("answers", total=sum(len(row.turns) for row in self.rows), rate="")
            tokens, started = 0, bar.get_time()
            for turn in range(max(len(row.turns) for row in self.rows)):
                numbers = [n for n, row in enumerate(self.rows) if turn < len(row.turns)]
                missing = self._missing(numbers, turn)
                bar.update(task, advance=len(numbers) - len(missing))
                requests = [
                    _request(self.model, prompt, self.config.sampling(n), self.config.max_tokens)
                    for n, prompt in missing
                ]
                responses = respond(self.model.backend, requests, self.config.parallel)
                for index, response_ids in responses:
                    n, prompt = missing[index]
                    record: Record = {"id": self.rows[n].id, "turn": turn}
                    record |= self._settings | self.config.row_settings(n)
                    record |= {"prompt_ids": prompt, "response_ids": response_ids}
                    self.output.append(record)
                    tokens += len(response_ids)
                    rate = tokens / (bar.get_time() - started)
                    bar.update(task, advance=1, rate=f"{rate:.0f} tokens/s")
        if not any((row.id, 0) in self.output.records for row in self.rows):
            limit = self.model.backend.max_positions
            if self.config.max_prompt_tokens < limit:
                raise ConfigError(
                    "all prompts are longer than --max-prompt-tokens "
                    f"{self.config.max_prompt_tokens}; raise it"
                )
            raise ConfigError(
                f"all prompts are too long for the target, which has {limit} positions"
            )

    def report(self) -> str:
        """Report one line: responses and tokens in the output, and which prompts were skipped."""
        line = count_responses(self.output, self.rows)
        if self.skipped:
            names = [repr(name) for name in self.skipped[:MAX_NAMED_ROWS]]
            names += ["..."] * (len(self.skipped) > MAX_NAMED_ROWS)
            line += f"; skipped as too long: {len(self.skipped)} ({', '.join(names)})"
        return line

    @property
    def _settings(self) -> Record:
        return provenance(self.model) | self.config.settings

    def _missing(self, numbers: Sequence[int], turn: int) -> list[tuple[int, list[int]]]:
        """Select the rows that still need a response in this turn: their numbers and prompts."""
        records = self.output.records
        limit = min(self.config.max_prompt_tokens, self.model.backend.max_positions - 1)
        missing = []
        for n in numbers:
            row = self.rows[n]
            if any(key not in records for key in row.keys[:turn]):
                continue  # an earlier turn was skipped
            prompt = _prompt(row, turn, self.output, self.model.tokenizer)
            if record := records.get((row.id, turn)):
                if record["prompt_ids"] != prompt:
                    raise ConfigError(
                        f"{self.output.path} has a response to another prompt of the id "
                        f"{row.id!r}; give another --output, or give the changed row another id"
                    )
            elif len(prompt) > limit:
                self.skipped.append(row.id)
            else:
                missing.append((n, prompt))
        return missing


def is_finished(
    output: OutputFile,
    rows: Sequence[Row],
    config: DistillConfig,
    is_from_chosen: Callable[[Record], bool],
    tokenizer: Callable[[], Tokenizer],
) -> bool:
    """Return whether the output has a response to every prompt, with these settings.

    It is found out without the target: `is_from_chosen` tells whether a record is the chosen one's,
    whose `tokenizer` is loaded if nothing else is missing.
    """
    for n, row in enumerate(rows):
        records, settings = output.select(row.keys), config.settings | config.row_settings(n)
        if len(records) < len(row.keys) or not all(map(is_from_chosen, records)):
            return False
        if not all(record.items() >= settings.items() for record in records):
            return False
    encoder = tokenizer()
    return all(
        output.records[key]["prompt_ids"] == _prompt(row, turn, output, encoder)
        for row in rows
        for turn, key in enumerate(row.keys)
    )


def count_responses(output: OutputFile, rows: Sequence[Row]) -> str:
    """Return a line that counts the responses to these prompts in the output, and their tokens."""
    keys = [key for row in rows for key in row.keys]
    records = output.select(keys)
    tokens = sum(len(record["response_ids"]) for record in records)
    return f"{output.path}: {len(records)} of {len(keys)} prompts answered, {tokens} tokens"


def _prompt(row: Row, turn: int, output: OutputFile, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a row's conversation up to the response of a turn."""
    messages = list(row.turns[0])
    for key, new_messages in zip(row.keys[:turn], row.turns[1:], strict=False):
        response = tokenizer.decode(output.records[key]["response_ids"])
        messages += [{"role": "assistant", "content": response}, *new_messages]
    try:
        return tokenizer.chat(messages)
    except PromptError as error:
        raise PromptError(f"the row {row.id!r}: {error}") from None
