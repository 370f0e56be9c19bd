"""Prompts that the target writes itself: what it answers to, where no prompt set is at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

from treeflash.config import SamplingConfig
from treeflash.errors import ConfigError
from treeflash.prompt_file import Row, finished_lines, read_rows
from treeflash.text import Tokenizer
from treeflash.training import Request, Responder

TEMPERATURE = 1.0
MAX_TOKENS = 256
LINE_START = b'{"id": '


def self_prompts(
    responder: Responder, tokenizer: Tokenizer, count: int, path: Path, *, slots: int, seed: int
) -> list[Row]:
    """Let the target go on from the user's header of its chat template, `count` times.

    Args:
        responder: the target.
        tokenizer: of the target.
        count: prompts to write; one that comes out empty is left out.
        path: JSON lines of `id` and `prompt`; those that it holds already are kept.
        slots: prompts written at a time.
        seed: of sampling; prompt n counts on from it.

    Raises:
        PromptError: the tokenizer has no chat template, or another program wrote the file.
        ConfigError: the target writes nothing but empty prompts, or the file cannot be written.
    """
    header = tuple(tokenizer.user_header())
    finished = sum(map(len, finished_lines(path, LINE_START)))
    os.truncate(path, finished)
    known = {row.id for row in read_rows(path)} if finished else set()
    missing = [n for n in range(count) if f"self-{n}" not in known]
    requests = [
        Request(
            prompt_ids=header,
            sampling=SamplingConfig(temperature=TEMPERATURE, seed=seed + n),
            max_tokens=MAX_TOKENS,
        )
        for n in missing
    ]
    with path.open("a", encoding="utf-8", newline="\n") as file:
        for index, tokens in responder.respond(requests, tokenizer.stop_token_ids, slots):
            if text := tokenizer.decode(tokens).strip():
                record = {"id": f"self-{missing[index]}", "prompt": text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
    if not path.stat().st_size:
        raise ConfigError("the target wrote no prompts by itself; give --prompts")
    wanted = {f"self-{n}" for n in range(count)}
    return [row for row in read_rows(path) if row.id in wanted]
