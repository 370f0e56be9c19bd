"""A body of a few megabytes is refused without work for each of its items.

Bodies are checked in the event loop, and a fault takes longer to describe than an item to check: a
body with a million faults would hold up all streams for minutes.
"""

from __future__ import annotations

import pytest
from recordings import recording

from treeflash.serving import application
from treeflash.serving.schemas import MAX_FAULTS, MAX_ITEMS, Function, allowed_tools
from treeflash.serving.service import Service

MANY = 3 * MAX_ITEMS
MESSAGE = {"role": "user", "content": "a"}
PART = {"type": "text", "text": "a"}
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = "/v1/messages"
FAULTY = {
    "messages": (CHAT, {"messages": [{}] * MANY}),
    "messages that are no objects": (CHAT, {"messages": [0] * MANY}),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    "calls": (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]}),
    "tools": (CHAT, {"messages": [MESSAGE], "tools": [{}] * MANY}),
    "biases": (CHAT, {"messages": [MESSAGE], "logit_bias": {f"x{i}": 0 for i in range(MANY)}}),
    "unknown fields": (CHAT, {"messages": [MESSAGE], **{f"x{i}": 0 for i in range(MANY)}}),
    "metadata": (CHAT, {"messages": [MESSAGE], "metadata": {f"x{i}": 0 for i in range(MANY)}}),
    "prompts": (TEXT, {"prompt": [{}] * MANY}),
    "token ids": (TEXT, {"prompt": [-1] * MANY}),
    "lists of token ids": (TEXT, {"prompt": [[]] * MANY}),
    "items": (RESPONSES, {"input": [{}] * MANY}),
    "functions of a namespace": (
        RESPONSES,
        {"input": "a", "tools": [{"type": "namespace", "name": "n", "tools": [{}] * MANY}]},
    ),
    "turns": (MESSAGES, {"max_tokens": 1, "messages": [{}] * MANY}),
    "blocks": (MESSAGES, {"max_tokens": 1, "messages": [{"role": "user", "content": [{}] * MANY}]}),
    "messages of Ollama": ("/api/chat", {"model": "tiny", "messages": [{}] * MANY}),
    "images of Ollama": ("/api/generate", {"model": "tiny", "prompt": "a", "images": [0] * MANY}),
    "tools to tokenize": ("/tokenize", {"messages": [MESSAGE], "tools": [{}] * MANY}),
    "tokens": ("/detokenize", {"tokens": [-1] * MANY}),
}


@pytest.mark.parametrize("name", FAULTY)
def test_few_faults_are_described(server, name):
    path, body = FAULTY[name]
    with recording(application, "field_error") as described:
        assert server.post(path, body).status_code == 400
    errors, _ = described[0]
    assert len(errors) <= MAX_FAULTS


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [MESSAGE] * (MAX_ITEMS + 1)}),
        (CHAT, {"messages": [{"role": "user", "content": [PART] * (MAX_ITEMS + 1)}]}),
        (RESPONSES, {"input": [MESSAGE] * (MAX_ITEMS + 1)}),
        (MESSAGES, {"max_tokens": 1, "messages": [MESSAGE] * (MAX_ITEMS + 1)}),
        (TEXT, {"prompt": [[1]] * (MAX_ITEMS + 1)}),
        (RESPONSES, {"input": "a", "metadata": {f"x{i}": "" for i in range(MAX_ITEMS + 1)}}),
    ],
)
def test_no_list_is_longer_than_conversations_are(server, path, body):
    response = server.post(path, body)
    assert response.status_code == 400
    assert f"at most {MAX_ITEMS} items" in response.json()["error"]["message"]


def test_entries_that_are_few_are_named(server):
    response = server.chat(metadata={"a": 1, "b": 2})
    assert "metadata.a" in response.json()["error"]["message"]


def test_entries_that_are_many_are_counted(server):
    response = server.chat(metadata={f"x{i}": 0 for i in range(MANY)})
    assert response.json()["error"]["message"] == f"metadata: {MANY} entries are invalid"


def test_too_many_prompts_are_refused_before_any_is_encoded(server):
    with recording(Service, "encode") as encoded:
        response = server.complete(["a"] * MAX_ITEMS)
    assert response.status_code == 400
    assert f"asks for {MAX_ITEMS} answers" in response.json()["error"]["message"]
    assert not encoded


class Counting(str):
    """A text that counts how often any of its kind is compared."""

    compared = 0

    def __eq__(self, other):
        type(self).compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.fixture
def counting():
    """A kind of texts of its own, which nothing has compared yet."""
    return type("Counting", (Counting,), {})


def test_names_of_tools_are_not_compared_each_with_each(counting):
    functions = [Function.model_construct(name=counting(f"f{i}")) for i in range(1000)]
    allowed_tools(functions, None)
    assert counting.compared < len(functions)


def test_the_name_of_a_type_is_not_looked_for_among_the_items(counting):
    error = {"type": "missing", "loc": ("body", "input", counting("list"), 0, "role")}
    path = application.field_path(error, {"input": [{}] * 1000})
    assert path == ["input", "0", "role"]
    assert counting.compared < 10
