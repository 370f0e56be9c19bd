"""Files of responses to train on: JSON lines from treeflash.distill or from another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treeflash.errors import PromptError
from treeflash.text.prompt import check_messages
from treeflash.text.prompt_file import read_json_lines
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.interfaces import Response


def read_responses(path: Path, tokenizer: Tokenizer) -> list[Response]:
    """Read a file of JSON objects, one per line, in one of two forms; other keys are ignored.

    - `prompt_ids` and `response_ids`: token ids, as `treeflash.distill` writes them;
    - `messages`: a conversation that ends with the assistant's message, as other engines write
      it. The chat template is applied, and the target's end token is appended.

    Raises:
        PromptError: a line has neither form; names the file and the line.
    """
    found = read_json_lines(path, "responses", lambda value: _response(value, tokenizer))
    return [response for _, response in found]


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
        raise PromptError("the last message must be a non-empty one of the assistant")
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
