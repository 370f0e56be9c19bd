"""The worker's side of the protocol: JSON lines, one answer to each request.

The first request is the setup, and its answer describes the loaded models. All others have prompts
that are handed over at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

Answer = dict[str, Any]


class Answers:
    """The new tokens of prompts that are handed over now, and the times at which they arrive."""

    def __init__(self, prompts: int) -> None:
        self.token_ids: list[list[int]] = [[] for _ in range(prompts)]
        self._first: list[float | None] = [None] * prompts
        self._started = time.perf_counter()
        self._processor: list[float] = []

    def add(self, number: int, token_ids: Sequence[int]) -> None:
        """Record tokens of a prompt's answer that have just arrived."""
        self.token_ids[number] += token_ids
        self._last = time.perf_counter() - self._started
        self._processor.append(time.process_time())
        if self._first[number] is None:
            self._first[number] = self._last

    def reply(self, forwards: int) -> Answer:
        """Answer the prompts.

        Times are seconds: to the first token of each answer, to the last token of all, and the
        processor time of all threads in between.

        Args:
            forwards: the target's forward passes after the prefill.
        """
        return {
            "token_ids": self.token_ids,
            "first": self._first,
            "seconds": self._last,
            "processor_seconds": self._processor[-1] - self._processor[0],
            "forwards": forwards,
        }


Decode = Callable[..., Answer]
"""Takes `prompts`, `method`, `budget` and `max_tokens`; returns the reply of `Answers`."""


def serve(load: Callable[[dict[str, Any]], tuple[Answer, Decode]]) -> None:
    """Answer requests until standard input ends; a failure is answered with its error.

    Args:
        load: takes the setup; returns the description of the models, made by `describe`, and the
            function that decodes.
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
