"""The smallest request to each path, to which tests add fields."""

from __future__ import annotations

from typing import Any

CHAT, TEXT, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
MESSAGES, RESPONSES, OLLAMA = "/v1/messages", "/v1/responses", "/api/"
USER = {"role": "user", "content": "Hi"}
MODEL = {"model": "tiny"}
FEW = {"options": {"num_predict": 1}, "stream": False}
REQUESTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER], "max_tokens": 1},
    TEXT: {"prompt": "Hi", "max_tokens": 1},
    RESPONSES: {"input": "Hi", "max_output_tokens": 1},
    MESSAGES: {"messages": [USER], "max_tokens": 1},
    f"{MESSAGES}/count_tokens": {"messages": [USER]},
    f"{OLLAMA}chat": {**MODEL, **FEW, "messages": [USER]},
    f"{OLLAMA}generate": {**MODEL, **FEW, "prompt": "Hi"},
    f"{OLLAMA}show": MODEL,
    TOKENIZE: {"prompt": "Hi"},
    "/detokenize": {"tokens": [72, 105]},
}

Request = tuple[str, dict[str, Any]]  # a path and a body


def chat(**fields: Any) -> Request:
    return CHAT, REQUESTS[CHAT] | fields


def text(**fields: Any) -> Request:
    return TEXT, REQUESTS[TEXT] | fields


def messages(**fields: Any) -> Request:
    return MESSAGES, REQUESTS[MESSAGES] | fields


def responses(**fields: Any) -> Request:
    return RESPONSES, REQUESTS[RESPONSES] | fields


def ollama(name: str, **fields: Any) -> Request:
    return f"{OLLAMA}{name}", MODEL | fields
