"""A limit on the tokens of a message's reasoning.

After `budget` tokens of reasoning the end of the reasoning is the only text that may follow, and
the answer goes on freely after it. It is a `Constraint` of the decode loop, so draft trees end
where the reasoning must, and the tokens before are the ones without a limit.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.sampling import Constraint, only
from treeflash.text.tokenizer import Tokenizer

Phase = Literal["before", "reasoning", "after"]


@dataclass(frozen=True)
class _State:
    """What is known of a message after some tokens."""

    phase: Phase
    tail: bytes = b""  # the first bytes of the message, or the latest ones of its reasoning
    tokens: int = 0  # tokens of the reasoning so far
    end: tuple[int, ...] = ()  # ids of the end of the reasoning that must still follow


class ThinkingBudget:
    """A `Constraint` that ends the reasoning after `budget` tokens, and obeys another one if given.

    `opening` begins the reasoning, and is empty if the prompt has begun it; `close` ends it.
    `vocab_size` is the target's.
    """

    def __init__(
        self,
        budget: int,
        opening: str,
        close: str,
        tokenizer: Tokenizer,
        vocab_size: int,
        other: Constraint | None = None,
    ) -> None:
        self._budget, self._tokenizer, self._vocab_size = budget, tokenizer, vocab_size
        self._opening, self._close, self._other = opening.encode(), close.encode(), other
        first = _State("before" if opening else "reasoning")
        self._states = [self._due(first)]

    @property
    def end_tokens(self) -> Set[int]:
        return frozenset() if self._other is None else self._other.end_tokens

    def allowed(self) -> NDArray[np.uint32]:
        words = -(-self._vocab_size // 32)
        other = np.full(words, 2**32 - 1, np.uint32)
        if self._other is not None:
            other = self._other.allowed()
        if not (end := self._states[-1].end):
            return other
        forced: NDArray[np.uint32] = only(np.array(end[:1], np.int32), self._vocab_size)[0]
        both = np.bitwise_and(other, forced)
        return both if both.any() else other  # a grammar completes a character first

    def advance(self, token: int) -> None:
        self._states.append(self._due(self._after(self._states[-1], token)))
        if self._other is not None:
            self._other.advance(token)

    def rollback(self, tokens: int) -> None:
        if tokens:
            del self._states[-tokens:]
        if self._other is not None:
            self._other.rollback(tokens)

    def _after(self, state: _State, token: int) -> _State:
        """Return the state after one more token."""
        if state.phase == "after":
            return state
        tail = state.tail + self._tokenizer.token_bytes(token)
        if state.phase == "before":
            tail = tail.lstrip()  # else a state of many spaces would keep all of them
            if tail.startswith(self._opening):
                return _State("reasoning")
            return _State("before", tail) if self._opening.startswith(tail) else _State("after")
        if self._close in tail:
            return _State("after")
        end = state.end[1:] if state.end[:1] == (token,) else ()
        return _State("reasoning", tail[-len(self._close) :], state.tokens + 1, end)

    def _due(self, state: _State) -> _State:
        """Return the state with the end of the reasoning, if it must follow now."""
        if state.phase != "reasoning" or state.end or state.tokens < self._budget:
            return state
        begun = next(
            n for n in range(len(self._close) - 1, -1, -1) if state.tail.endswith(self._close[:n])
        )
        end = self._tokenizer.encode_continuation(self._close[begun:].decode())
        return _State(state.phase, state.tail, state.tokens, tuple(end))
