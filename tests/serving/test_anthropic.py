"""`/v1/messages` through the `anthropic` package."""

from __future__ import annotations

import pytest
from servers import NAME
from tool_models import COLOUR

from treeflash.serving.anthropic import MessagesRequest

anthropic = pytest.importorskip("anthropic")

TOOL = {"name": "paint", "description": "Paints.", "input_schema": COLOUR}
HELLO = [{"role": "user", "content": "Hello."}]


@pytest.fixture(scope="module")
def server(tool_server):
    return tool_server


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as client:
        yield client


def test_what_is_told_about_the_model(client, server):
    (listed,) = client.models.list()
    shown = client.models.retrieve(NAME)
    limit = server.engine.model.backend.max_positions
    assert listed.max_input_tokens == shown.max_input_tokens == limit


def test_the_events_of_a_message(client):
    with client.messages.stream(model=NAME, max_tokens=9, messages=HELLO) as stream:
        kinds = [event.type for event in stream if event.type.startswith("message")]
    assert kinds == ["message_start", "message_delta", "message_stop"]


def test_counted_tokens_are_those_of_the_message(client):
    fields = {"model": NAME, "messages": HELLO, "tools": [TOOL]}
    usage = client.messages.create(**fields, max_tokens=4).usage
    counted = client.messages.count_tokens(**fields).input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == counted


def conversation(supports_reasoning=True, **fields):
    """What the model gets to see of a request."""
    request = MessagesRequest(**{"messages": HELLO, "max_tokens": 9, **fields})
    return request.conversation(supports_reasoning=supports_reasoning)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_all_of_a_conversation_reaches_the_model():
    calls = [
        {"type": "tool_use", "id": f"call_{i}", "name": "paint", "input": {"colour": colour}}
        for i, colour in enumerate(("red", "green"))
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "call_0", "content": "Done."},
        {"type": "tool_result", "tool_use_id": "call_1", "content": parts("No", "green.")},
        {"type": "tool_result", "tool_use_id": "call_2"},
    ]
    results[1]["is_error"] = True
    thought = {"type": "thinking", "thinking": "Both?", "signature": ""}
    messages = [
        {"role": "user", "content": parts("Paint ", "it.")},
        {"role": "assistant", "content": [thought, *parts("I paint."), *calls]},
        {"role": "user", "content": [*results, *parts("Again.")]},
    ]
    asked = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": "paint", "arguments": call["input"]},
        }
        for call in calls
    ]
    assert conversation(messages=messages, system=parts("Be brief.", "Be kind.")).messages == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Paint it."},
        {
            "role": "assistant",
            "content": "I paint.",
            "reasoning_content": "Both?",
            "tool_calls": asked,
        },
        {"role": "tool", "tool_call_id": "call_0", "content": "Done."},
        {"role": "tool", "tool_call_id": "call_1", "content": "Error: No\n\ngreen."},
        {"role": "tool", "tool_call_id": "call_2", "content": ""},
        {"role": "user", "content": "Again."},
    ]
    only_results = [{"role": "user", "content": results[:1]}]
    assert [x["role"] for x in conversation(messages=only_results).messages] == ["tool"]
    empty = [{"role": "user", "content": []}]
    assert conversation(messages=empty).messages == [{"role": "user", "content": ""}]


@pytest.mark.parametrize(("supported", "args"), [(True, {"enable_thinking": True}), (False, {})])
def test_adaptive_thinking_is_on_where_the_model_reasons(supported, args):
    assert conversation(supported, thinking={"type": "adaptive"}).template_args == args


def test_fields_keep_their_meaning():
    tool = {"name": "paint", "description": "Paints.", "input_schema": {}, "strict": True}
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7}
    request = MessagesRequest(
        messages=HELLO, max_tokens=9, stop_sequences=["a"], tools=[tool], **sampling
    )
    options = request.options()
    assert options == {"max_tokens": 9, "stop": ["a"], **sampling}
    (function,) = request.conversation(supports_reasoning=False).tools.functions
    expected = {"name": "paint", "description": "Paints.", "parameters": {}, "strict": True}
    assert function == {"type": "function", "function": expected}


def test_a_special_token_can_be_a_stop_sequence(model, serve):
    special = min(model.tokenizer.special_token_ids - model.tokenizer.stop_token_ids)
    name = model.tokenizer.token_text(special)
    server = serve(defaults={"logit_bias": {special: 100.0}})
    body = {"messages": HELLO, "max_tokens": 9, "stop_sequences": [name]}
    found = server.post("/v1/messages", body).json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", name)
    assert found["usage"]["output_tokens"] == 1
