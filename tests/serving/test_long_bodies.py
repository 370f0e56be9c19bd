"""A body of a few megabytes is refused without work for each of its items.

Bodies are checked in the event loop, and a fault takes longer to describe than an item to check: a
body with a million faults would hold up all streams for minutes.
"""

from __future__ import annotations

import pytest
from bodies import TOKENIZE, USER, chat, messages, ollama, responses, text
from recordings import recording
from servers import check_error

from treeflash.serving import application
from treeflash.serving.schemas import MAX_FAULTS, MAX_ITEMS, Function, allowed_tools
from treeflash.serving.service import Service

MANY = 3 * MAX_ITEMS
PART = {"type": "text", "text": "a"}
NAMES = {f"x{i}": 0 for i in range(MANY)}
NAMESPACE = {"type": "namespace", "name": "n", "tools": [{}] * MANY}
FAULTY = {
    "messages": chat(messages=[{}] * MANY),
    "messages that are no objects": chat(messages=[0] * MANY),
    "parts": chat(messages=[{"role": "user", "content": [{}] * MANY}]),
    "calls": chat(messages=[{"role": "assistant", "tool_calls": [{}] * MANY}]),
    "tools": chat(tools=[{}] * MANY),
    "biases": chat(logit_bias=NAMES),
    "unknown fields": chat(**NAMES),
    "metadata": chat(metadata=NAMES),
    "prompts": text(prompt=[{}] * MANY),
    "token ids": text(prompt=[-1] * MANY),
    "lists of token ids": text(prompt=[[]] * MANY),
    "items": responses(input=[{}] * MANY),
    "functions of a namespace": responses(tools=[NAMESPACE]),
    "turns": messages(messages=[{}] * MANY),
    "blocks": messages(messages=[{"role": "user", "content": [{}] * MANY}]),
    "messages of Ollama": ollama("chat", messages=[{}] * MANY),
    "images of Ollama": ollama("generate", prompt="a", images=[0] * MANY),
    "tools to tokenize": (TOKENIZE, {"messages": [USER], "tools": [{}] * MANY}),
    "tokens": ("/detokenize", {"tokens": [-1] * MANY}),
}


@pytest.mark.parametrize("name", FAULTY)
def test_few_faults_are_described(server, name):
    with recording(application, "field_error") as described:
        assert server.post(*FAULTY[name]).status_code == 400
    errors, _ = described[0]
    assert len(errors) <= MAX_FAULTS


@pytest.mark.parametrize(
    "request_",
    [
        chat(messages=[USER] * (MAX_ITEMS + 1)),
        chat(messages=[{"role": "user", "content": [PART] * (MAX_ITEMS + 1)}]),
        responses(input=[USER] * (MAX_ITEMS + 1)),
        messages(messages=[USER] * (MAX_ITEMS + 1)),
        text(prompt=[[1]] * (MAX_ITEMS + 1)),
        responses(metadata={f"x{i}": "" for i in range(MAX_ITEMS + 1)}),
    ],
    ids=range(6),
)
def test_no_list_is_longer_than_conversations_are(server, request_):
    check_error(server.post(*request_), 400, f"at most {MAX_ITEMS} items")


def test_entries_are_named_if_they_are_few(server):
    check_error(server.chat(metadata={"a": 1, "b": 2}), 400, "metadata.a")
    assert check_error(server.chat(metadata=NAMES), 400) == f"metadata: {MANY} entries are invalid"


def test_too_many_prompts_are_refused_before_any_is_encoded(server):
    with recording(Service, "encode") as encoded:
        response = server.complete(["a"] * MAX_ITEMS)
    check_error(response, 400, f"asks for {MAX_ITEMS} answers")
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
