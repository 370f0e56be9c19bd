"""The APIs of the server, each behind one adapter, for the scenarios that all of them share."""

from __future__ import annotations

import pytest

from protocols.chat import Chat
from protocols.completions import Completions
from protocols.messages import Messages
from protocols.ollama_api import OllamaChat, OllamaPrompt
from protocols.protocol import Answer, Ask, Protocol
from protocols.responses import Responses

PROTOCOLS = [Chat(), Completions(), Responses(), Messages(), OllamaChat(), OllamaPrompt()]
CAPABILITIES = {
    "messages": "it has messages of roles, and a system message; without, a prompt is plain text",
    "stop": "requests have stop strings",
    "named stop": "answers name the stop string that ended them",
    "calls": "the model may call functions, and gets their results",
    "call ids": "calls have ids",
    "choice": "requests choose whether and which function is called",
    "schema": "requests have a JSON schema of the answer",
    "thinking": "requests turn reasoning on and off",
    "images": "messages have images",
    "log probabilities": "answers have log probabilities",
    "own token among the best": "a token itself is listed with the most probable ones",
    "continuation": "the last message may be the beginning of the answer",
    "free length": "requests may leave the length of the answer to the server",
}
"""What an API may have; an adapter lists in `can` what its API has."""
assert all(api.can <= CAPABILITIES.keys() for api in PROTOCOLS)


def having(*capabilities: str) -> list[object]:
    """Return the APIs that have these capabilities, as parameters of a test."""
    assert CAPABILITIES.keys() >= set(capabilities)
    chosen = [api for api in PROTOCOLS if api.can >= set(capabilities)]
    return [pytest.param(api, id=type(api).__name__) for api in chosen]


__all__ = ["PROTOCOLS", "Answer", "Ask", "Protocol", "having"]
