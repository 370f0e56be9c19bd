"""How prompts are put to a target: through its chat template, in which mode, or raw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treeflash.text.prompt import Message, encode
from treeflash.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """One way to put prompts.

    Attributes:
        raw: the text alone, without the chat template.
        thinking: the mode, where the chat template has a switch for it.
    """

    raw: bool = False
    thinking: bool = False

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation up to the answer; see `treeflash.text.prompt.encode`."""
        if self.raw:
            text = "\n\n".join(message["content"] for message in messages)
            return encode(tokenizer, text, raw=True)
        return encode(tokenizer, messages, template_args={"enable_thinking": self.thinking})

    def others(self, tokenizer: Tokenizer) -> list[Prompting]:
        """The other ways that this tokenizer offers."""
        ways = [Prompting(raw=True)]
        if tokenizer.has_chat_template:
            ways.append(Prompting())
        if tokenizer.knows_thinking:
            ways.append(Prompting(thinking=True))
        return [way for way in ways if way != self]

    def __str__(self) -> str:
        if self.raw:
            return "without the chat template"
        return f"with the chat template, thinking {'on' if self.thinking else 'off'}"
