"""`/v1/responses` through the `openai` package."""

from __future__ import annotations

import json

import httpx
import pytest
from failures import failing
from pydantic import TypeAdapter
from servers import NAME
from tool_models import COLOUR

from treeflash.serving.errors import SERVER_FAILED
from treeflash.serving.responses import ResponsesRequest

openai = pytest.importorskip("openai")
ResponseStreamEvent = openai.types.responses.ResponseStreamEvent

TOOL = {"type": "function", "name": "paint", "parameters": COLOUR, "strict": True}
ONE_CALL = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def server(tool_server):
    return tool_server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_the_events_of_a_response(client):
    fields = {"model": NAME, "input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 9}
    with client.responses.stream(**fields) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def events_of(response):
    """The events of a stream that was read to its end."""
    lines = response.text.splitlines()
    return [json.loads(x.removeprefix("data: ")) for x in lines if x.startswith("data: ")]


@pytest.mark.parametrize("fields", [{"max_output_tokens": 9}, ONE_CALL], ids=["text", "call"])
def test_items_begin_empty_and_grow_by_deltas(server, fields):
    """As clients put them together, which do not wait for the last event."""
    body = {"input": "Paint it.", "stream": True, **fields}
    items, events = [], events_of(server.post("/v1/responses", body))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            items.append(event["item"] | {"status": "completed"})
        elif kind == "content_part.added":
            items[event["output_index"]]["content"].append(event["part"])
        elif kind == "output_text.delta":
            items[event["output_index"]]["content"][event["content_index"]]["text"] += event[
                "delta"
            ]
        elif kind == "function_call_arguments.delta":
            items[event["output_index"]]["arguments"] += event["delta"]
    assert items == events[-1]["response"]["output"]


def text(*texts, kind="input_text"):
    return [{"type": kind, "text": text} for text in texts]


def test_all_of_a_conversation_reaches_the_model():
    """Items of one turn are one message; the instructions and the developer's are one, too."""
    call = {"type": "function_call", "name": "paint", "arguments": '{"colour": "red"}'}
    thoughts = text("It ", "is red.", kind="reasoning_text")
    items = [
        {"role": "developer", "content": text("Be kind.")},
        {"role": "developer", "content": "Be quick."},
        {"role": "user", "content": text("Paint ", "it.")},
        {
            "type": "reasoning",
            "summary": text("Left out", kind="summary_text"),
            "content": thoughts,
        },
        {"role": "assistant", "content": text("I ", "paint.", kind="output_text")},
        {**call, "call_id": "call_1"},
        {**call, "call_id": "call_2", "namespace": "art", "arguments": ""},
        {"type": "function_call_output", "call_id": "call_1", "output": "Done."},
        {"type": "function_call_output", "call_id": "call_2", "output": text("So ", "is this.")},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Again."},
    ]
    request = ResponsesRequest(input=items, instructions="Help.")

    def asked(i, name, arguments):
        function = {"name": name, "arguments": arguments}
        return {"id": f"call_{i}", "type": "function", "function": function}

    assert request.conversation(supports_reasoning=True).messages == [
        {"role": "system", "content": "Help.\n\nBe kind.\n\nBe quick."},
        {"role": "user", "content": "Paint it."},
        {
            "role": "assistant",
            "content": "I paint.",
            "reasoning_content": "It is red.",
            "tool_calls": [asked(1, "paint", {"colour": "red"}), asked(2, "art.paint", {})],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Done."},
        {"role": "tool", "tool_call_id": "call_2", "content": "So is this."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Again."},
    ]


@pytest.mark.parametrize(("effort", "thinks"), [(None, None), ("minimal", False), ("low", True)])
def test_degrees_of_reasoning(effort, thinks):
    request = ResponsesRequest(input="Hi", reasoning={"effort": effort})
    args = {} if thinks is None else {"enable_thinking": thinks}
    assert request.conversation(supports_reasoning=True).template_args == args


def test_details_of_the_usage(client):
    reasoning = {"effort": "low", "summary": "detailed"}
    asked = {"model": NAME, "input": "Hi", "max_output_tokens": 8}
    found = client.responses.create(**asked, reasoning=reasoning)
    assert found.usage.output_tokens_details.reasoning_tokens == 8
    assert found.usage.input_tokens_details.cache_write_tokens == 0, "nobody pays for them"
    again = client.responses.create(**asked, reasoning=reasoning).usage
    assert again.input_tokens_details.cached_tokens > again.input_tokens / 2


def test_a_failure_ends_the_stream_with_events(server):
    body = {"input": "Hi", "stream": True}
    with failing(server.engine.scheduler, "step", ZeroDivisionError):
        response = httpx.post(f"{server.url}/v1/responses", json=body)
    lines = [line for line in response.text.splitlines() if line.startswith("event: ")]
    assert lines[-2:] == ["event: error", "event: response.failed"]
    error, failed = events_of(response)[-2:]
    assert (error["code"], error["message"]) == ("server_error", SERVER_FAILED)
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": SERVER_FAILED}
