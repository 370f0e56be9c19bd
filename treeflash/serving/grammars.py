"""Grammars that answers must follow, and the constraints that llguidance makes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.text.tokenizer import Tokenizer

ANSWER = "answer"
SPACE = r"[ \t\r\n]{0,4}"
"""Space between parts: with no bound, small models may write nothing else."""
JSON_SPACE = r" |\n[ \t]{0,20}"
"""The same inside JSON."""


@dataclass(frozen=True)
class Grammar:
    """A grammar for llguidance.

    Attributes:
        entries: each has a `json_schema` or a `lark_grammar`, and a `name` if another one refers to
            it as `@name`. The first one is what the text must match.
    """

    entries: tuple[Mapping[str, Any], ...]

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool) -> Grammar:
        """JSON that conforms to a JSON schema."""
        return cls(({"json_schema": bounded(schema)},))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that matches a regular expression as a whole."""
        return cls.lark(f"start: /{slashed(pattern)}/")

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of some texts."""
        return cls.lark("start: " + " | ".join(map(quoted, texts)))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A grammar in the Lark format.

        See https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
        """
        return cls(({"lark_grammar": text},))

    @classmethod
    def lark_or_gbnf(cls, text: str) -> Grammar:
        """A grammar in the Lark format or in that of llama.cpp.

        Raises:
            ValueError: it is neither.
        """
        return cls.lark(any_to_lark(text))

    def after(self, rule: str, *, lead: str) -> Grammar:
        """This grammar after what `lead` matches, which may use the Lark `rule`."""
        first, *others = self.entries
        start = {"lark_grammar": f"start: {lead} @{ANSWER}\n{rule}"}
        return Grammar((start, {**first, "name": ANSWER}, *others))


def bounded(schema: Mapping[str, Any] | bool) -> Mapping[str, Any]:
    """A JSON schema for llguidance, in which the space between tokens has a bound."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    given = schema.get("x-guidance")
    options = given if isinstance(given, Mapping) else {}
    return {**schema, "x-guidance": {"whitespace_pattern": JSON_SPACE, **options}}


def slashed(pattern: str) -> str:
    """A regular expression for use between the slashes of the Lark format."""
    return re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern, flags=re.DOTALL)


def quoted(text: str) -> str:
    """A text as a string of the Lark format."""
    return json.dumps(text, ensure_ascii=False)


class GrammarConstraint:
    """What a grammar allows after the tokens so far: a `Constraint` of the decode loop."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        """Start before the first token.

        Args:
            matcher: belongs to this constraint alone.
            vocab_size: of the target.
        """
        self._matcher = matcher
        self._words = -(-vocab_size // 32)
        # A matcher that has stopped does not count the end tokens that it is given.
        self._after_stop = 0

    def allowed(self) -> NDArray[np.uint32]:
        """(ceil(vocab / 32),) bitmask of the tokens that may come next."""
        mask = np.zeros((1, self._words), np.int32)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, mask)
        self._check()
        found: NDArray[np.uint32] = mask[0].view(np.uint32)
        return found

    def advance(self, token: int) -> None:
        """Append a token that is allowed."""
        if self._matcher.is_stopped():
            self._after_stop += 1
        else:
            self._matcher.consume_token(token)
            self._check()

    def rollback(self, tokens: int) -> None:
        """Take the last tokens back."""
        beyond = min(tokens, self._after_stop)
        self._after_stop -= beyond
        if tokens > beyond:
            self._matcher.rollback(tokens - beyond)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _error(self._matcher.get_error(), None)


class GrammarCompiler:
    """Makes constraints for one tokenizer. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Prepare; the first grammar takes about a second for the vocabulary.

        Args:
            tokenizer: of the target.
            vocab_size: of the target, which may be larger than the tokenizer's.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._lock = Lock()

    def compile(self, grammar: Grammar, param: str) -> Callable[[], GrammarConstraint]:
        """What makes a constraint for each of several answers.

        Args:
            grammar: to follow.
            param: the field of the request that it comes from.

        Raises:
            APIError: the grammar is invalid, or uses what llguidance does not support.
        """
        text = json.dumps({"grammars": grammar.entries})
        # Errors are reported to the client, not printed.
        matcher = llguidance.LLMatcher(self._loaded(), text, log_level=0)
        if matcher.is_error():
            raise _error(matcher.get_error(), param)
        return lambda: GrammarConstraint(matcher.deep_copy(), self._vocab_size)

    def _loaded(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = llguidance.hf.from_tokenizer(
                    self._tokenizer.transformers,
                    n_vocab=self._vocab_size,
                    eos_token=sorted(self._tokenizer.stop_token_ids),
                )
            return self._vocabulary


def _error(reason: str, param: str | None) -> APIError:
    return APIError(
        BAD_REQUEST,
        f"the grammar cannot be followed: {' '.join(reason.split())}",
        param=param,
        code="invalid_grammar",
    )
