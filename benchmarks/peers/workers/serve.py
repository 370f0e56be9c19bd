"""The worker's side of the protocol: JSON lines, one answer to each request.

The first request is the setup, and its answer describes the loaded models. All others are prompts.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

Answer = dict[str, Any]
Decode = Callable[..., Answer]


def serve(load: Callable[[dict[str, Any]], tuple[Answer, Decode]]) -> None:
    """Answer requests until standard input ends; a failure is answered with its error.

    Args:
        load: takes the setup; returns a result of `describe`, and a function of `prompt_ids`,
            `method`, `budget` and `max_tokens` that returns a result of `answer`.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
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


def describe(
    methods: list[str],
    device: object,
    dtype: object,
    packages: tuple[str, ...],
    skipped: dict[str, str] | None = None,
) -> Answer:
    """Answer the setup; `skipped` has the reason by method."""
    return {
        "methods": methods,
        "device": str(device).rpartition(".")[2],
        "dtype": str(dtype).rpartition(".")[2],
        "versions": {name: version(name) for name in packages},
        "skipped": skipped or {},
    }


def answer(
    token_ids: list[int],
    tokens: int,
    forwards: int,
    seconds: float,
    processor_seconds: float | None = None,
) -> Answer:
    """Answer a prompt.

    Args:
        token_ids: all new tokens.
        tokens: number of new tokens, without the prefill's.
        forwards: target forward passes after the prefill.
        seconds: wall time from the end of the prefill to the last token.
        processor_seconds: time of all threads in between; None if it was not measured.
    """
    return {
        "token_ids": token_ids,
        "tokens": tokens,
        "forwards": forwards,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
    }
