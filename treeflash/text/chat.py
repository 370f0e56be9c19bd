"""How messages become a prompt: through the chat template, with or without thinking, or raw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treeflash.hub.published import DEEPSPEC_SYSTEM
from treeflash.text.prompt import Message, encode
from treeflash.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """A way to turn messages into a prompt.

    Attributes:
        raw: plain text, without the chat template.
        thinking: whether thinking is on, if the chat template has a switch for it.
        system: a system message to put before the messages.
    """

    raw: bool = False
    thinking: bool = False
    system: str | None = None

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation up to the response; see `prompt.encode`."""
        if self.raw:
            text = "\n\n".join(message["content"] for message in messages)
            return encode(tokenizer, text, raw=True)
        return encode(
            tokenizer,
            messages,
            system=self.system,
            template_args={"enable_thinking": self.thinking},
        )

    def others(self, tokenizer: Tokenizer) -> list[Prompting]:
        """The other ways that this tokenizer supports."""
        ways = [Prompting(raw=True)]
        if tokenizer.has_chat_template:
            ways.append(Prompting())
            ways.append(Prompting(thinking=self.thinking, system=DEEPSPEC_SYSTEM))
        if tokenizer.knows_thinking:
            ways.append(Prompting(thinking=True))
        return [way for way in ways if way != self]

    def __str__(self) -> str:
        if self.raw:
            return "without the chat template"
        thinking = f"thinking {'on' if self.thinking else 'off'}"
        system = "" if self.system is None else f", the system message {self.system!r}"
        return f"with the chat template, {thinking}{system}"
