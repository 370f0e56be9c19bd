"""Responses to train on, and their files: JSON lines of `treeflash distill` or another engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeflash.errors import PromptError
from treeflash.text.prompt import check_messages, read_json_lines
from treeflash.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Response:
    """A prompt, after the chat template, and the response, with its end token if it ended."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.response_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def truncate(self, length: int) -> Response:
        """Truncate the response so that prompt and response have `length` tokens."""
        room = max(0, length - len(self.prompt_ids))
        return Response(prompt_ids=self.prompt_ids, response_ids=self.response_ids[:room])


def read_responses(path: Path, tokenizer: Tokenizer) -> list[Response]:
    """Read a file of JSON objects, one per line, in one of two forms; other keys are ignored.

    - `prompt_ids` and `response_ids`: token ids, as `treeflash distill` writes them;
    - `messages`: a conversation that ends with the assistant's message, as other engines write
      it; its response gets the target's end token.

    Raises:
        PromptError: a line has neither form; names the file and the line.
    """
    lines = read_json_lines(path, "responses", lambda value, _: _response(value, tokenizer))
    return [response for _, response in lines]


def _response(value: Any, tokenizer: Tokenizer) -> Response:
    if not isinstance(value, dict):
        raise PromptError("the line must be a JSON object")
    if "messages" in value:
        return _conversation(value["messages"], tokenizer)
    return Response(
        prompt_ids=_token_ids(value.get("prompt_ids")),
        response_ids=_token_ids(value.get("response_ids")),
    )


def _conversation(messages: Any, tokenizer: Tokenizer) -> Response:
    if not isinstance(messages, list) or not messages:
        raise PromptError("'messages' must be a non-empty list")
    check_messages(messages)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise PromptError("the last message must be a non-empty message of the assistant")
    prompt = tokenizer.chat(messages[:-1])
    answer = tokenizer.answer(messages[-1]["content"])
    return Response(prompt_ids=tuple(prompt), response_ids=tuple(answer))


def _token_ids(value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(type(token) is int and token >= 0 for token in value)
    ):
        raise PromptError(
            "the line needs 'messages', or 'prompt_ids' and 'response_ids' as lists of token ids"
        )
    return tuple(value)
