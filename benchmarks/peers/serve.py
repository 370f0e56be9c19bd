"""A worker's side of the conversation: JSON lines, one answer to each request.

The first request says what to load, and its answer what was loaded. The others are prompts.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

NO_ASSISTANT = "needs a small model with the target's tokenizer: --assistant FOLDER_OR_ID"
Answer = dict[str, Any]
Decode = Callable[..., Answer]


def serve(load: Callable[[dict[str, Any]], tuple[Answer, Decode]]) -> None:
    """Answer until standard input ends; a failure is an answer too.

    Args:
        load: from the setup to what `about` gives, and a function of `prompt_ids`, `method`,
            `budget` and `max_tokens` that gives what `answer` does.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    decode: Decode | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if decode is None:
                reply, decode = load(request)
            else:
                reply = decode(**request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(reply), file=replies, flush=True)


def about(
    methods: list[str],
    device: object,
    dtype: object,
    packages: tuple[str, ...],
    skipped: dict[str, str] | None = None,
) -> Answer:
    """What was loaded: methods, where, versions, and methods that cannot run, with the reason."""
    return {
        "methods": methods,
        "device": str(device).rpartition(".")[2],
        "dtype": str(dtype).rpartition(".")[2],
        "versions": {name: version(name) for name in packages},
        "skipped": skipped or {},
    }


def answer(token_ids: list[int], tokens: int, forwards: int, seconds: float) -> Answer:
    """One text.

    Args:
        token_ids: all new tokens.
        tokens: those that came after the target's first forward, the one over the prompt.
        forwards: of the target, without the first.
        seconds: from the end of the first forward to the end of the text.
    """
    return {"token_ids": token_ids, "tokens": tokens, "forwards": forwards, "seconds": seconds}
