"""What `/v1/messages` and `/v1/responses` have beyond the scenarios of all APIs."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest

anthropic, openai = (pytest.importorskip(package) for package in ("anthropic", "openai"))
from failures import failing
from protocols.responses import Responses
from pydantic import TypeAdapter
from servers import NAME
from tool_models import COLOUR

from treeflash.serving.anthropic import MessagesRequest
from treeflash.serving.errors import SERVER_FAILED
from treeflash.serving.responses import ResponsesRequest

ResponseStreamEvent = openai.types.responses.ResponseStreamEvent
HELLO = [{"role": "user", "content": "Hello."}]
PAINT = {"name": "paint", "description": "Paints.", "input_schema": COLOUR}
TOOL = {"type": "function", "name": "paint", "parameters": COLOUR, "strict": True}
ONE_CALL = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def server(tool_server):
    return tool_server


@pytest.fixture(scope="module")
def messages(server):
    """The client of Anthropic's package."""
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def responses(server):
    """The client of OpenAI's package."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_what_is_told_about_the_model(messages, server):
    (listed,) = messages.models.list()
    shown = messages.models.retrieve(NAME)
    limit = server.engine.model.backend.max_positions
    assert listed.max_input_tokens == shown.max_input_tokens == limit


def test_counted_tokens_are_those_of_the_message(messages):
    fields = {"model": NAME, "messages": HELLO, "tools": [PAINT]}
    usage = messages.messages.create(**fields, max_tokens=4).usage
    counted = messages.messages.count_tokens(**fields).input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == counted


def conversation(**fields):
    """What the model gets to see of a request."""
    return MessagesRequest(**{"messages": HELLO, "max_tokens": 9, **fields}).conversation()


def variables(conversation, supports_reasoning=True):
    """The variables that the chat template gets from a conversation."""
    tokenizer = SimpleNamespace(knows_thinking=supports_reasoning)
    return conversation.variables(SimpleNamespace(tokenizer=tokenizer, defaults={}))


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_the_helper_for_tools_sends_whole_conversations(messages):
    """It asks the server to keep the conversation, and goes on without if the refusal says so."""
    painted = []

    @anthropic.beta_tool(input_schema=COLOUR)
    def paint(colour: str) -> str:
        """Paint."""
        painted.append(colour)
        return f"It is {colour}."

    answers = messages.beta.messages.tool_runner(
        model=NAME,
        max_tokens=150,
        messages=HELLO,
        tools=[paint],
        tool_choice={"type": "tool", "name": "paint"},
        thinking={"type": "disabled"},
        max_iterations=2,
    )
    assert [answer.stop_reason for answer in answers] == ["tool_use", "tool_use"]
    assert set(painted) <= {"red", "blue"}
    assert painted


def test_no_conversation_is_kept(messages):
    """The error has the code by which clients know that they have to send all messages."""
    with pytest.raises(anthropic.BadRequestError, match="keeps no conversations") as refused:
        messages.messages.create(
            model=NAME, max_tokens=4, messages=HELLO, extra_body={"thread": {"type": "create"}}
        )
    details = refused.value.body["error"]["details"]
    assert details == {"error_code": "thread_unsupported_request"}


def test_no_response_is_kept(responses):
    """The error has the code by which clients know that they have to send all items."""
    options = {"model": NAME, "max_output_tokens": 4, "input": "Hello."}
    assert responses.responses.create(**options, store=True).model_extra["store"] is False
    with pytest.raises(openai.BadRequestError, match="stores no responses") as refused:
        responses.responses.create(**options, previous_response_id="resp_1")
    assert refused.value.code == "previous_response_not_found"


def test_all_messages_reach_the_model():
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
    turns = [
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
    assert conversation(messages=turns, system=parts("Be brief.", "Be kind.")).messages == [
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
    assert variables(conversation(thinking={"type": "adaptive"}), supported) == args


def test_fields_keep_their_meaning():
    tool = PAINT | {"strict": True, "eager_input_streaming": True}
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7}
    request = MessagesRequest(
        messages=HELLO, max_tokens=9, stop_sequences=["a"], tools=[tool], **sampling
    )
    options = request.options()
    assert options == {"max_tokens": 9, "stop": ["a"], **sampling}
    (function,) = request.conversation().tools.functions
    expected = {"name": "paint", "description": "Paints.", "parameters": COLOUR, "strict": True}
    assert function == {"type": "function", "function": expected}


def test_a_special_token_can_be_a_stop_sequence(model, serve):
    special = min(model.tokenizer.special_token_ids - model.tokenizer.stop_token_ids)
    name = model.tokenizer.token_text(special)
    server = serve(defaults={"logit_bias": {special: 100.0}})
    body = {"messages": HELLO, "max_tokens": 9, "stop_sequences": [name]}
    found = server.post("/v1/messages", body).json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", name)
    assert found["usage"]["output_tokens"] == 1


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        (
            {"max_output_tokens": 9},
            ["content_part.added", "output_text.delta", "output_text.done", "content_part.done",
             "output_item.done", "incomplete"],
        ),
        (
            ONE_CALL,
            ["function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
             "completed"],
        ),
    ],
    ids=["text", "call"],
)  # fmt: skip
def test_items_begin_empty_and_grow_by_deltas(server, fields, kinds):
    """As clients put them together, which do not wait for the last event."""
    response = server.post("/v1/responses", {"input": "Paint it.", "stream": True, **fields})
    items, events, parts = [], Responses().frames(response.text), []
    for number, event in enumerate(events):
        TypeAdapter(ResponseStreamEvent).validate_python(event)
        assert event["sequence_number"] == number
        kind = event["type"].removeprefix("response.")
        parts += [kind] * (parts[-1:] != [kind])
        if kind == "output_item.added":
            items.append(event["item"] | {"status": kinds[-1]})
        elif kind == "content_part.added":
            items[event["output_index"]]["content"].append(event["part"])
        elif kind == "output_text.delta":
            part = items[event["output_index"]]["content"][event["content_index"]]
            part["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            items[event["output_index"]]["arguments"] += event["delta"]
        elif kind == "output_item.done":
            assert event["item"] == items[event["output_index"]]
    assert items == events[-1]["response"]["output"]
    assert parts == ["created", "in_progress", "output_item.added", *kinds]


def text(*texts, kind="input_text"):
    return [{"type": kind, "text": text} for text in texts]


def test_all_items_reach_the_model():
    """Items of one turn are one message; the instructions and the developer's are one, too."""
    call = {"type": "function_call", "name": "paint", "arguments": '{"colour": "red"}'}
    thoughts = text("It ", "is red.", kind="reasoning_text")
    (rule,) = text("Be kind.")
    cached = rule | {"prompt_cache_breakpoint": {"mode": "explicit"}}
    items = [
        {"role": "developer", "content": [cached]},
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

    assert request.conversation().messages == [
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
    assert variables(request.conversation()) == args


def test_details_of_the_usage(responses):
    reasoning = {"effort": "low", "summary": "detailed"}
    asked = {"model": NAME, "input": "Hi", "max_output_tokens": 8}
    found = responses.responses.create(**asked, reasoning=reasoning)
    assert found.usage.output_tokens_details.reasoning_tokens == 8
    assert found.usage.input_tokens_details.cache_write_tokens == 0, "nobody pays for them"
    again = responses.responses.create(**asked, reasoning=reasoning).usage
    assert again.input_tokens_details.cached_tokens > again.input_tokens / 2


def test_a_failure_ends_a_response_with_events(server):
    with failing(server.engine.scheduler, "step", ZeroDivisionError):
        response = httpx.post(f"{server.url}/v1/responses", json={"input": "Hi", "stream": True})
    assert Responses().last_message(response.text) == SERVER_FAILED
