"""Prompts: a string, messages or token ids, encoded into token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from treeflash.errors import ConfigError, PromptError
from treeflash.text.tokenizer import Tokenizer, check_unicode

Message: TypeAlias = Mapping[str, str]
"""One turn of a conversation: `role` and `content`."""

Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
"""A string, the messages of a conversation, or token ids."""

FORMS = "a prompt is a string, a list of messages, or a list of token ids"


def encode(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    system: str | None = None,
    raw: bool = False,
    template_args: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids of a prompt, as plain ints.

    Args:
        tokenizer: the target's.
        prompt: a string or messages go through the chat template; token ids are used as they are.
        system: a system message to put before the prompt.
        raw: encode a string as it is, without the chat template.
        template_args: extra variables for the chat template.

    Raises:
        PromptError: the prompt is empty, malformed, or rejected by the chat template.
        ConfigError: the other arguments do not fit the prompt's form.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is empty; give some text")
        check_unicode(prompt)
        if raw:
            if system is not None or template_args:
                raise ConfigError(
                    "a raw prompt does not use the chat template; leave out either raw, or the "
                    "system message and the template arguments"
                )
            return tokenizer.encode(prompt)
        return encode(
            tokenizer,
            [{"role": "user", "content": prompt}],
            system=system,
            template_args=template_args,
        )
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes):
        raise PromptError(f"{FORMS}, got {type(prompt).__name__}")
    items: list[Any] = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        if raw:
            raise ConfigError("messages need the chat template; leave out raw, or give a string")
        check_messages(items)
        if system is not None:
            check_unicode(system)
            if items[0]["role"] == "system":
                raise PromptError("the messages begin with a system message; leave out system")
            items.insert(0, {"role": "system", "content": system})
        return tokenizer.chat(items, template_args)
    if system is not None or template_args:
        raise ConfigError(
            "token ids are used as they are, with no system message or template arguments"
        )
    try:
        return [operator.index(item) for item in items]
    except TypeError:
        raise PromptError(FORMS) from None


def check_messages(messages: Sequence[Any]) -> None:
    """Raise a PromptError unless each is a mapping with strings `role` and `content`."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise PromptError(f"message {number} needs the strings 'role' and 'content'")
        check_unicode(message["content"])
