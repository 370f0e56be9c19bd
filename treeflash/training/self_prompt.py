"""Prompts that the target generates itself, for when there is no set of prompts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from treeflash.cli.progress import progress
from treeflash.config import SamplingConfig
from treeflash.errors import ConfigError
from treeflash.text.output_file import OutputFile, finished_records, locked
from treeflash.text.prompt_file import Row
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.interfaces import Request, Responder
from treeflash.training.provenance import check_settings, provenance

Record: TypeAlias = dict[str, Any]
TEMPERATURE = 1.0
MAX_TOKENS = 256
LINE_START = b'{"id": '


def self_prompts(
    responder: Responder,
    tokenizer: Tokenizer,
    count: int,
    path: Path,
    console: Console,
    *,
    slots: int,
    seed: int,
) -> list[Row]:
    """Sample `count` user messages by letting the target continue its chat template's user header.

    Args:
        responder: the target.
        tokenizer: of the target.
        count: number of prompts; empty ones are dropped.
        path: JSON lines of `id`, `prompt` and the settings; prompts already in it are kept.
        console: for a progress bar.
        slots: prompts generated at the same time.
        seed: of sampling; prompt n uses `seed + n`.

    Raises:
        PromptError: the tokenizer has no chat template.
        ConfigError: all prompts are empty, or the file cannot be written, is being written by
            another process, or has lines of another program or of other settings.
    """
    header = tuple(tokenizer.user_header())
    settings = provenance(responder)
    with locked(path):
        found = finished_records(path, LINE_START, _checked)
        prompts = {record["id"]: record["prompt"] for record, _ in found}
        for record, _ in found:
            number = int(record["id"].removeprefix("self-"))
            check_settings(path, record, {**settings, "seed": seed + number})
        missing = [n for n in range(count) if _name(n) not in prompts]
        requests = [
            Request(
                prompt_ids=header,
                sampling=SamplingConfig(temperature=TEMPERATURE, seed=seed + n),
                max_tokens=MAX_TOKENS,
            )
            for n in missing
        ]
        with OutputFile(path, sum(size for _, size in found)) as file, progress(console) as bar:
            task = bar.add_task("prompts", total=count, completed=count - len(missing))
            for index, tokens in responder.respond(requests, tokenizer.stop_token_ids, slots):
                bar.advance(task)
                if text := tokenizer.decode(tokens).strip():
                    n = missing[index]
                    record = {"id": _name(n), "prompt": text, **settings, "seed": seed + n}
                    file.append(json.dumps(record, ensure_ascii=False))
                    prompts[_name(n)] = text
    wanted = [name for n in range(count) if (name := _name(n)) in prompts]
    if not wanted:
        raise ConfigError("the target generated no prompts; pass --prompts")
    return [Row(id=name, turns=(({"role": "user", "content": prompts[name]},),)) for name in wanted]


def _name(number: int) -> str:
    return f"self-{number}"


def _checked(record: Any) -> Record:
    """The record, if a run like this one wrote it."""
    if not isinstance(record["prompt"], str) or not re.fullmatch(r"self-\d+", record["id"]):
        raise ValueError
    if not record.keys() >= {"target", "backend", "dtype", "seed"}:
        raise KeyError
    return dict(record)
