"""Answers of a target, which drafters learn from: JSON lines, its own or another engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treeflash.errors import PromptError
from treeflash.text.prompt import check_messages
from treeflash.text.prompt_file import read_json_lines
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.interfaces import Response


def read_responses(path: Path, tokenizer: Tokenizer) -> list[Response]:
    """The answers of a file. Each line is a JSON object of one of two forms; other keys are free.

    - `prompt_ids` and `response_ids`: token ids, as `treeflash.distill` writes them;
    - `messages`: a conversation whose last message is the assistant's, as other engines write it.
      Its chat template is applied, and the target's end token closes the answer.

    Raises:
        PromptError: names the file and the line that is not of these forms.
    """
    found = read_json_lines(path, "responses", lambda value: _response(value, tokenizer))
    return [response for _, response in found]


def _response(value: Any, tokenizer: Tokenizer) -> Response:
    if not isinstance(value, dict):
        raise PromptError("a JSON object is needed")
    if "messages" in value:
        return _conversation(value["messages"], tokenizer)
    return Response(
        prompt_ids=_token_ids(value.get("prompt_ids")),
        response_ids=_token_ids(value.get("response_ids")),
    )


def _conversation(messages: Any, tokenizer: Tokenizer) -> Response:
    if not isinstance(messages, list) or not messages:
        raise PromptError("'messages' must be a list, not empty")
    check_messages(messages)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise PromptError("the last message must be an answer of the assistant, not empty")
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
            "the response needs 'messages', or 'prompt_ids' and 'response_ids', lists of token ids"
        )
    return tuple(value)
