"""`/v1/responses` through the `openai` package."""

from __future__ import annotations

import json

import httpx
import pytest
from servers import NAME, serving
from tool_models import tool_model

openai = pytest.importorskip("openai")

PAINT = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "paint", "parameters": PAINT, "strict": True}
ONE_CALL = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
FORMAT = {"format": {"type": "json_schema", "name": "paint", "schema": PAINT, "strict": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(
        tool_model(tmp_path_factory.mktemp("tools")), {"temperature": 1.0, "seed": 3}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_text_is_that_of_chat_completions(client, server):
    found = client.responses.create(
        model=NAME, input="Hello.", instructions="Be brief.", max_output_tokens=12
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    chat = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 12}).json()
    assert found.output_text == chat["choices"][0]["message"]["content"]
    assert found.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert found.usage.output_tokens == 12
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_events_build_the_response(client):
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
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert text == client.responses.create(**fields).output_text


@pytest.mark.parametrize("stream", [False, True])
def test_calls(client, stream):
    fields = {"model": NAME, "input": "Paint it.", **ONE_CALL}
    if stream:
        with client.responses.stream(**fields) as events:
            found = events.get_final_response()
    else:
        found = client.responses.create(**fields)
    (call,) = found.output
    assert (call.type, call.name, found.status) == ("function_call", "paint", "completed")
    assert json.loads(call.arguments)["colour"] in ("red", "blue")


def test_a_conversation_with_calls_continues(client):
    first = client.responses.create(model=NAME, input="Paint it.", **ONE_CALL)
    (call,) = first.output
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Paint it."}]},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Done."},
    ]
    second = client.responses.create(model=NAME, input=items, tools=[TOOL], max_output_tokens=4)
    assert second.usage.input_tokens > first.usage.input_tokens


def test_structured_output(client):
    found = client.responses.create(model=NAME, input="Paint it.", text=FORMAT)
    assert json.loads(found.output_text)["colour"] in ("red", "blue")


def test_reasoning(client):
    found = client.responses.create(
        model=NAME, input="Hi", reasoning={"effort": "low"}, max_output_tokens=8
    )
    (item,) = found.output
    assert item.type == "reasoning"
    assert item.content[0].text


def test_what_codex_sends(server):
    body = {
        "model": NAME,
        "instructions": "You are a coding agent.",
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "<permissions>"}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "Run ls."}],
            },
        ],
        "tools": [TOOL],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "none", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199",
    }
    with server.client.stream("POST", "/v1/responses", json=body) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line.startswith("event: ")]
    assert lines[0] == "event: response.created"
    assert lines[-1] in ("event: response.completed", "event: response.incomplete")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "file_search"}]}, "tools.0"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, None),
        ({"input": []}, None),
    ],
)
def test_what_needs_stored_responses_or_other_tools_is_refused(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": NAME, "input": "Hi", **fields})
    assert param is None or caught.value.param == param
    assert caught.value.body["message"]


def test_a_failure_ends_the_stream_with_events(server, monkeypatch):
    monkeypatch.setattr(server.engine._scheduler, "step", lambda: 1 / 0)
    body = {"input": "Hi", "stream": True}
    response = httpx.post(f"{server.url}/v1/responses", json=body)
    lines = [line for line in response.text.splitlines() if line.startswith("event: ")]
    assert lines[-2:] == ["event: error", "event: response.failed"]
