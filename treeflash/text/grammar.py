"""Grammars of texts, and the constraints of decoding that enforce them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np
from numpy.typing import NDArray

from treeflash.errors import ConfigError
from treeflash.text.grammar_sandbox import ANY_FORM, LIMITS, STACK, GrammarSandbox, SandboxError
from treeflash.text.tokenizer import Tokenizer

ANSWER, OTHER, REST = "answer", "other", "rest"
"""Names of grammars that another one refers to."""
SPACE = r"[ \t\r\n]{0,4}"
"""White space between parts; without a bound, small models may write nothing else."""
JSON_SPACE = r" |\n[ \t]{0,20}"
"""White space inside JSON."""


class GrammarError(ConfigError):
    """A grammar is invalid, unsupported, or takes too much to compile."""

    def __init__(self, reason: str) -> None:
        message, _, _ = reason.partition("\n<")  # the parser's state or a backtrace
        super().__init__(f"invalid grammar: {' '.join(message.split())}")


@dataclass(frozen=True)
class Grammar:
    """A grammar for llguidance: a text must match the first of the entries.

    Each has a `json_schema`, a `lark_grammar` or an `ANY_FORM`, and a `name` if another one refers
    to it as `@name`.
    """

    entries: tuple[Mapping[str, Any], ...]

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool) -> Grammar:
        """Accept JSON that conforms to a JSON schema."""
        return cls(({"json_schema": bound_white_space(schema)},))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Accept texts that match a regular expression as a whole."""
        return cls.lark(f"start: /{escape_slashes(pattern)}/")

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """Accept one of several texts."""
        strings = (json.dumps(text, ensure_ascii=False) for text in texts)
        # The Lark format takes no delete character as it is, and JSON does not escape it.
        return cls.lark("start: " + " | ".join(strings).replace("\x7f", r"\u007f"))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Accept the texts of a grammar in llguidance's Lark format.

        https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md describes it.
        """
        return cls(({"lark_grammar": text},))

    @classmethod
    def lark_or_gbnf(cls, text: str) -> Grammar:
        """Accept the texts of a grammar in the Lark format or in llama.cpp's GBNF."""
        return cls(({ANY_FORM: text},))

    def either(self, other: Grammar) -> Grammar:
        """Return a grammar that accepts the texts of this one and of another one."""
        entries: list[Mapping[str, Any]] = [{"lark_grammar": f"start: @{ANSWER} | @{OTHER}"}]
        for name, (first, *others) in ((ANSWER, self.entries), (OTHER, other.entries)):
            entries += {**first, "name": name}, *others
        return Grammar(tuple(entries))

    def prepend(self, lead: str, *, rule: str) -> Grammar:
        """Put a match of `lead`, which may use the Lark `rule`, before a text of this grammar."""
        first, *others = self.entries
        start = {"lark_grammar": f"start: {lead} @{REST}\n{rule}"}
        return Grammar((start, {**first, "name": REST}, *others))


def bound_white_space(schema: Mapping[str, Any] | bool) -> Mapping[str, Any]:
    """Return a JSON schema for llguidance that bounds the white space between JSON's tokens.

    Keywords that it cannot enforce, and formats that it does not know, are left out.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    given = schema.get("x-guidance")
    options = {"whitespace_pattern": JSON_SPACE, "coerce_one_of": True, "lenient": True}
    options |= given if isinstance(given, dict) else {}
    return {**schema, "x-guidance": options}


def escape_slashes(pattern: str) -> str:
    """Return a regular expression, escaped for the slashes of the Lark format.

    There an escaped end of a line, as `re.escape` writes it, would end the expression.
    """

    def escape(found: re.Match[str]) -> str:
        return {"/": r"\/", "\\\n": r"\n"}.get(found[0], found[0])

    return re.sub(r"\\.|/", escape, pattern, flags=re.DOTALL)


class GrammarConstraint:
    """A `Constraint` of the decode loop that allows the texts of a grammar.

    The matcher belongs to this constraint alone. `vocab_size` is the target's, and `end_tokens` are
    the ones that the matcher allows after a complete text.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher, vocab_size: int, end_tokens: Set[int]
    ) -> None:
        self.end_tokens = end_tokens
        self._matcher = matcher
        self._words = -(-vocab_size // 32)
        self._after_stop = 0  # a matcher that has stopped does not count later end tokens
        # Whether the matcher's latest mask may be of a text that was rolled back: llguidance would
        # take it for the mask of another text with as many lexemes.
        self._keeps_old_mask = False

    def allowed(self) -> NDArray[np.uint32]:
        mask = np.zeros((1, self._words), np.int32)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, mask)
        self._check()
        if self._keeps_old_mask:  # where bytes are forced, it keeps the old one
            self._keeps_old_mask = bool(self._matcher.compute_ff_bytes())
        allowed: NDArray[np.uint32] = mask[0].view(np.uint32)
        return allowed

    def advance(self, token: int) -> None:
        if self._matcher.is_stopped():
            self._after_stop += 1
        else:
            if self._keeps_old_mask:
                self.allowed()
            self._matcher.consume_token(token)
            self._check()

    def rollback(self, tokens: int) -> None:
        beyond = min(tokens, self._after_stop)
        self._after_stop -= beyond
        if tokens > beyond:
            self._matcher.rollback(tokens - beyond)
            self._check()
            self._keeps_old_mask = True

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error())


class GrammarCompiler:
    """Compiles grammars to constraints. Any thread may call it.

    The first grammar takes a second more. The target's `vocab_size` may exceed the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.parts: tuple[llguidance.LLTokenizer, GrammarSandbox] | None = None
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Callable[[], GrammarConstraint]:
        """Compile a grammar; returns a function that makes a constraint for one answer.

        A GrammarError is raised if the grammar is invalid, unsupported, or takes too much to
        compile, another ConfigError if llguidance cannot read the tokenizer, an OSError if no
        process for grammars can be started.
        """
        vocabulary, sandbox = self._loaded()
        try:
            text = sandbox.run(grammar.entries)
        except SandboxError as error:
            raise GrammarError(str(error)) from error
        make = partial(llguidance.LLMatcher, log_level=0, limits=LIMITS)  # prints no errors
        matcher = _in_deep_thread(partial(make, vocabulary, text))
        ends = self._tokenizer.stop_token_ids
        return lambda: GrammarConstraint(matcher.deep_copy(), self._vocab_size, ends)

    def _loaded(self) -> tuple[llguidance.LLTokenizer, GrammarSandbox]:
        with self._lock:
            if self.parts is None:
                # The arguments follow `llguidance.hf`, whose vocabulary cannot be handed to another
                # process.
                backend = copy(self._tokenizer.transformers.backend_tokenizer)
                backend.no_padding()
                backend.no_truncation()
                arguments = {
                    "tokenizer": backend.to_str(),
                    "n_vocab": self._vocab_size,
                    "eos_token": sorted(self._tokenizer.stop_token_ids),
                }
                sandbox = GrammarSandbox(arguments)  # loads the vocabulary meanwhile
                try:
                    vocabulary = llguidance.LLTokenizer(**arguments)
                except ValueError as error:
                    raise ConfigError(
                        "this model's answers cannot be given a form, because llguidance cannot "
                        f"read its tokenizer ({error}); remove schemas, grammars and enforced calls"
                    ) from error
                self.parts = vocabulary, sandbox
            return self.parts


_STACK_SIZE = threading.Lock()
"""The stack size of new threads is a setting of the whole process."""


def _in_deep_thread(function: Callable[[], llguidance.LLMatcher]) -> llguidance.LLMatcher:
    """Call a function in a thread with a larger stack than the sandbox's, on any system."""
    with ThreadPoolExecutor(1, "treeflash-grammar") as pool:
        with _STACK_SIZE:
            before = threading.stack_size(2 * STACK)
            try:
                result = pool.submit(function)
            finally:
                threading.stack_size(before)
        return result.result()
