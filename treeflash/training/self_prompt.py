"""Prompts that the target writes itself: what it answers to, where no prompt set is at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from treeflash.config import SamplingConfig
from treeflash.errors import ConfigError
from treeflash.text.output_file import finished_records
from treeflash.text.prompt_file import Row
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.interfaces import Request, Responder

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
    """Let the target go on from the user's header of its chat template, `count` times.

    Args:
        responder: the target.
        tokenizer: of the target.
        count: prompts to write; one that comes out empty is left out.
        path: JSON lines of `id` and `prompt`; those that it holds already are kept.
        console: for a progress bar.
        slots: prompts written at a time.
        seed: of sampling; prompt n counts on from it.

    Raises:
        PromptError: the tokenizer has no chat template.
        ConfigError: the target writes nothing but empty prompts, or another program wrote the
            file, or it cannot be written.
    """
    header = tuple(tokenizer.user_header())
    found = finished_records(path, LINE_START, _prompt)
    prompts = {name: prompt for (name, prompt), _ in found}
    missing = [n for n in range(count) if _name(n) not in prompts]
    requests = [
        Request(
            prompt_ids=header,
            sampling=SamplingConfig(temperature=TEMPERATURE, seed=seed + n),
            max_tokens=MAX_TOKENS,
        )
        for n in missing
    ]
    with path.open("a", encoding="utf-8", newline="\n") as file, Progress(console=console) as bar:
        file.truncate(sum(size for _, size in found))
        task = bar.add_task("prompts", total=count, completed=count - len(missing))
        for index, tokens in responder.respond(requests, tokenizer.stop_token_ids, slots):
            bar.advance(task)
            if text := tokenizer.decode(tokens).strip():
                name = _name(missing[index])
                prompts[name] = text
                record = {"id": name, "prompt": text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
    wanted = [name for n in range(count) if (name := _name(n)) in prompts]
    if not wanted:
        raise ConfigError("the target wrote no prompts by itself; give --prompts")
    return [Row(id=name, turns=(({"role": "user", "content": prompts[name]},),)) for name in wanted]


def _name(number: int) -> str:
    return f"self-{number}"


def _prompt(record: Any) -> tuple[str, str]:
    name, prompt = record["id"], record["prompt"]
    if not isinstance(prompt, str) or not re.fullmatch(r"self-\d+", name):
        raise ValueError
    return name, prompt
