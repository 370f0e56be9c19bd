"""A target whose responses are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from byte_tokens import END

from treeflash.decoding.interfaces import Pass, Prefill
from treeflash.decoding.sampling import SampledTokens
from treeflash.language_model import LanguageModel
from treeflash.text.tokenizer import Tokenizer


class EchoState:
    """The state of a sequence is its tokens."""

    nbytes, needs_snapshots = 0, False

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: list[int] = []
        self.script: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def restorable(self, length: int) -> int:
        return min(length, self.length)

    def close(self) -> None:
        pass


class EchoBackend:
    """Repeats the prompt's last tokens and ends.

    `asked` has the prompt, the sampling and the maximum length of each response;
    `interrupt_at` counts the responses before an interrupt.
    """

    device, max_positions, vocab_size = "cpu", 400, 259
    inexact = "rounding may differ"
    drafter_config = drafter = head = None

    def __init__(self, name: str, dtype: str, interrupt_at: int | None) -> None:
        self.name, self.dtype = name, dtype
        self.verifier = self
        self.interrupt_at = interrupt_at
        self.asked: list[SimpleNamespace] = []

    def open(self, capacity: int, *, drafts: bool) -> EchoState:
        assert not drafts
        return EchoState(capacity)

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        return 0

    def run(self, work) -> Pass:
        return Pass([self.sampled(item) for item in work])

    def sampled(self, item) -> SampledTokens | None:
        state, prompt = item.state, item.state.tokens
        if isinstance(item, Prefill):
            prompt += item.token_ids
            if item.params is None:
                return None
            if len(self.asked) == self.interrupt_at:
                raise KeyboardInterrupt
            state.script = [*prompt[-2:], END]
            self.asked.append(
                SimpleNamespace(
                    prompt_ids=list(prompt),
                    sampling=item.params.sampling,
                    max_tokens=state.capacity - len(prompt) - 1,
                )
            )
        return SampledTokens(np.array([state.script.pop(0)], np.int32))

    def commit(self, verified, paths) -> None:
        for state, path in paths:
            state.tokens += [0] * len(path)


@pytest.fixture
def echo(byte_tokenizer: Tokenizer) -> Callable[..., LanguageModel]:
    """Makes a model that repeats the end of each prompt."""

    def echo(interrupt_at=None, target="target", backend="echo", dtype="float32"):
        return LanguageModel(
            EchoBackend(backend, dtype, interrupt_at), byte_tokenizer, Path(target)
        )

    return echo
