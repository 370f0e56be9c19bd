"""What an answer may hold and how long it may take: tools, schemas, stop strings, limits."""

from __future__ import annotations

import json
import re
import time

import pytest
from servers import Gate, check_error, serving, wait_until
from tool_models import tool_model

from treeflash.decoding.sampling import unpack
from treeflash.serving.errors import APIError

CHAT, TEXT, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
USER = [{"role": "user", "content": "Hi"}]
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
RED, GREEN = '{"colour": "red"}', '{"colour": "green"}'


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A server whose model calls tools."""
    with serving(
        tool_model(tmp_path_factory.mktemp("tools")), {"temperature": 1.0, "seed": 3}
    ) as running:
        yield running


class SubmittedError(APIError):
    """The answers would have been decoded."""

    def __init__(self):
        super().__init__(503, "not decoded")


@pytest.fixture
def submitted(tools, monkeypatch):
    """The one request that the server would decode for a body: its prompt, and a checker.

    The checker tells whether a text would be allowed as the whole answer.
    """
    tokenizer = tools.engine.model.tokenizer
    vocab_size = tools.engine.model.backend.vocab_size
    caught = []

    def submit(answers, **_):
        caught.append(answers)
        raise SubmittedError

    def capture(path, body):
        caught.clear()
        with monkeypatch.context() as patch:
            patch.setattr(tools.engine, "submit", submit)
            response = tools.post(path, body)
        assert response.status_code == 503, response.text
        ((answer,),) = caught

        def accepts(text):
            if answer.make_constraint is None:
                return True
            constraint = answer.make_constraint()
            ids = [*tokenizer.encode(text), min(tokenizer.stop_token_ids)]
            for token in ids:
                if not unpack(constraint.allowed()[None], vocab_size)[0][token]:
                    return False
                constraint.advance(token)
            return True

        return tokenizer.decode_verbatim(answer.prompt_ids), accepts

    return capture


def call(name, arguments):
    return f'<call>{{"name": "{name}", "arguments": {arguments}}}</call>'


def request(path, functions, choice=None, *, parallel=True):
    """A request with tools in the form of an API; `choice` is a mode, or a function's name."""
    names = ("auto", "none", "required", None)
    if path == MESSAGES:
        listed = [{"name": f["name"], "input_schema": f["parameters"]} for f in functions]
        kind = {"required": "any", None: "auto"}.get(choice, choice)
        kind = {"type": kind} if choice in names else {"type": "tool", "name": choice}
        if not parallel:
            kind["disable_parallel_tool_use"] = True
        body = {"messages": USER, "max_tokens": 50, "tools": listed, "tool_choice": kind}
        return {**body, "thinking": {"type": "disabled"}}
    if path == CHAT:
        body = {
            "messages": USER,
            "tools": [{"type": "function", "function": f} for f in functions],
            "chat_template_kwargs": {"enable_thinking": False},
        }
        named = {"type": "function", "function": {"name": choice}}
    else:
        listed = [{"type": "function", **f} for f in functions]
        body = {"input": "Hi", "tools": listed, "reasoning": {"effort": "none"}}
        named = {"type": "function", "name": choice}
    if choice is not None:
        body["tool_choice"] = choice if choice in names else named
    return body if parallel else {**body, "parallel_tool_calls": False}


def function(name, **fields):
    return {"name": name, "parameters": COLOUR, **fields}


PAINT, WASH = function("paint"), function("wash")


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_the_modes_of_tool_choice(submitted, path):
    """Without a call, with any call, with a call of one function."""
    both = [PAINT, WASH]
    prompt, accepts = submitted(path, request(path, both, "none"))
    assert "paint" not in prompt
    assert accepts("Hello.")
    for choice in (None, "auto"):
        prompt, accepts = submitted(path, request(path, both, choice))
        assert "paint" in prompt
        assert "wash" in prompt
        assert accepts("Hello.")
        assert accepts(call("paint", GREEN)), "nothing is enforced"
    prompt, accepts = submitted(path, request(path, both, "required"))
    assert "paint" in prompt
    assert "wash" in prompt
    assert accepts(call("paint", RED))
    assert accepts(call("wash", RED))
    for text in ("", "Hello.", call("paint", GREEN), call("paint", "{}"), call("other", RED)):
        assert not accepts(text), text
    assert not accepts("Hello." + call("paint", RED))
    prompt, accepts = submitted(path, request(path, both, "wash"))
    assert "wash" in prompt
    assert accepts(call("wash", RED))
    for text in ("Hello.", call("wash", GREEN), call("paint", RED)):
        assert not accepts(text), text


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("choice", ["required", "wash"])
def test_one_enforced_call_or_several(submitted, path, choice):
    one, two = call("wash", RED), call("wash", RED) * 2
    _, accepts = submitted(path, request(path, [WASH], choice))
    assert accepts(one)
    assert accepts(two) == (choice == "required"), "a named function is called once"
    _, accepts = submitted(path, request(path, [WASH], choice, parallel=False))
    assert accepts(one)
    assert not accepts(two)


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("choice", [None, "auto"])
def test_strict_functions_are_enforced_in_free_text(submitted, path, choice):
    """Text is free until it begins a call; the arguments of a strict function follow its schema."""
    functions = [function("paint", strict=True), WASH]
    _, accepts = submitted(path, request(path, functions, choice))
    for text in ("Hello.", call("paint", RED), f"I paint. {call('paint', RED)} Done."):
        assert accepts(text), text
    assert accepts(call("wash", GREEN)), "it is not strict"
    for wrong in (GREEN, "{}", "[]", '{"colour": "red", "more": 1}', '{"colour": 1}'):
        assert not accepts(call("paint", wrong)), wrong
        assert not accepts(f"I paint. {call('paint', wrong)}"), wrong
    assert not accepts(call("other", RED))
    _, accepts = submitted(path, request(path, functions, choice, parallel=False))
    assert accepts(call("paint", RED))
    assert accepts(f"I paint. {call('paint', RED)} Done.")
    for text in (call("paint", RED) * 2, call("wash", RED) + " and " + call("paint", GREEN)):
        assert not accepts(text), text
    _, accepts = submitted(path, request(path, [function("paint", strict=False)], choice))
    assert accepts(call("paint", GREEN))


def formats(path, schema, **fields):
    """A request for JSON that conforms to a schema."""
    named = {"name": "n", "schema": schema, **fields}
    if path == MESSAGES:
        form = {"format": {"type": "json_schema", "schema": schema}}
        body = {"messages": USER, "max_tokens": 50, "output_config": form}
        return {**body, "thinking": {"type": "disabled"}}
    if path == RESPONSES:
        form = {"format": {"type": "json_schema", **named}}
        return {"input": "Hi", "text": form, "reasoning": {"effort": "none"}}
    form = {"response_format": {"type": "json_schema", "json_schema": named}}
    if path == TEXT:
        return {"prompt": "Hi", **form}
    return {"messages": USER, "chat_template_kwargs": {"enable_thinking": False}, **form}


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("choice", ["required", "wash"])
def test_a_required_call_has_no_content_to_constrain(submitted, path, choice):
    """`Mode.RESPONSES_TOOLS` of instructor asks for both."""
    _, accepts = submitted(path, formats(path, COLOUR) | request(path, [WASH], choice))
    assert accepts(call("wash", RED))
    assert not accepts(RED)


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("fields", [{}, {"strict": False}, {"strict": True}])
def test_schemas_are_always_enforced(submitted, path, fields):
    _, accepts = submitted(path, formats(path, COLOUR, **fields))
    assert accepts(RED)
    for text in (GREEN, "{}", "Hello.", "", RED + "x", "x" + RED):
        assert not accepts(text), text


def test_white_space_between_json_tokens_is_bounded(submitted):
    _, accepts = submitted(CHAT, formats(CHAT, COLOUR))
    for space in ("", " ", "\n", "\n" + " " * 20):
        assert accepts(RED.replace(" ", space)), repr(space)
    for space in ("  ", "\n" + " " * 21, "\n\n", "\t\t"):
        assert not accepts(RED.replace(" ", space)), repr(space)
    own = {**COLOUR, "x-guidance": {"whitespace_pattern": " {0,5}"}}
    _, accepts = submitted(CHAT, formats(CHAT, own))
    assert accepts(RED.replace(" ", " " * 5))
    assert not accepts(RED.replace(" ", "\n"))


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_schemas_apply_after_the_reasoning(submitted, path):
    body = formats(path, COLOUR)
    thinks = {
        CHAT: {"chat_template_kwargs": {"enable_thinking": True}},
        RESPONSES: {"reasoning": {"effort": "high"}},
        MESSAGES: {"thinking": {"type": "enabled", "budget_tokens": 99}, "max_tokens": 100},
    }
    prompt, accepts = submitted(path, body | thinks[path])
    assert prompt.endswith("<think>")
    assert accepts(f"Any thought, {GREEN}.</think>{RED}")
    assert not accepts(f"A thought.</think>{GREEN}")
    assert not accepts(RED)


NOT_JSON = ["NaN", "Infinity", "-Infinity", r'"\ud800"']
ECHOED = {
    "metadata": '{{"a": {}}}',
    "instructions": "{}",
    "user": "{}",
    "prompt_cache_key": "{}",
    "safety_identifier": "{}",
    "temperature": "{}",
    "tools": '[{{"type": "function", "name": "f", "parameters": {{"default": {}}}}}]',
    "text": '{{"format": {{"type": "json_schema", "name": "n", "schema": {{"const": {}}}}}}}',
}
"""Fields that a response of `/v1/responses` repeats."""


@pytest.mark.parametrize("field", ECHOED)
@pytest.mark.parametrize("value", NOT_JSON)
@pytest.mark.parametrize("stream", ["false", "true"])
def test_what_a_response_could_not_repeat_is_refused(tools, caplog, field, value, stream):
    """NaN and lone surrogates are no JSON, so the response that repeats them would be none."""
    fields = f'"{field}": {ECHOED[field].format(value)}, "max_output_tokens": 1'
    body = f'{{"input": "Hi", "stream": {stream}, {fields}}}'
    response = tools.client.post(
        RESPONSES, content=body.encode(), headers={"Content-Type": "application/json"}
    )
    check_error(response, 400, "")
    assert not [record for record in caplog.records if record.exc_info]


def is_first(text, i, length):
    return text.index(text[i : i + length]) == i


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_sequence_that_ended_a_message_is_named(model, serve, stream):
    """If two end at the same token, the one that began first ends the text."""
    letters = {model.tokenizer.encode(x)[0] for x in "abcdefghijklmnopqrstuvwxyz"}
    bias = {i: -100.0 for i in range(model.backend.vocab_size) if i not in letters}
    server = serve(defaults={"temperature": 1.0, "seed": 3, "logit_bias": bias})
    fields = {"messages": USER, "max_tokens": 60}
    text = server.post(MESSAGES, fields).json()["content"][0]["text"]
    i = next(i for i in range(40) if all(is_first(text, i + j, 3 - j) for j in (0, 1, 2)))
    longer, shorter, later = text[i : i + 3], text[i + 1 : i + 3], text[i + 3 : i + 15]
    for stops in ([shorter, longer], [longer, shorter], [later, longer], ["\0none", longer]):
        body = {**fields, "stop_sequences": stops}
        if stream:
            with server.client.stream("POST", MESSAGES, json=body | {"stream": True}) as response:
                lines = [x for x in response.iter_lines() if x.startswith("data: ")]
            events = [json.loads(line[6:]) for line in lines]
            (found,) = [x["delta"] for x in events if x["type"] == "message_delta"]
            parts = [x["delta"]["text"] for x in events if x["type"] == "content_block_delta"]
            found["text"] = "".join(parts)
        else:
            found = server.post(MESSAGES, body).json()
            found["text"] = found["content"][0]["text"]
        assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", longer), stops
        assert found["text"] == text[:i]


FOREVER = {"max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("method", ["ar", "treeflash"])
@pytest.mark.parametrize("answers", [1, 3])
def test_an_answer_that_stopped_holds_no_slot(serve, method, answers):
    """Nothing decodes on behind a stop string, unseen, up to the limit."""
    server = serve()
    text = server.complete("A", **FOREVER, method=method).json()["choices"][0]["text"]
    stop = text[10:13]
    whole = server.complete("A", **FOREVER, method=method, stop=stop, n=answers)
    assert {x["finish_reason"] for x in whole.json()["choices"]} == {"stop"}
    wait_until(lambda: server.engine.unfinished == 0)
    assert server.engine._scheduler.running == server.engine._scheduler.waiting == 0
    assert not server.engine._scheduler.busy


def slow_down(server, seconds):
    """Let every iteration of a server take some time."""
    step = server.engine._scheduler.step

    def slow():
        time.sleep(seconds)
        return step()

    server.engine._scheduler.step = slow


LONG = {
    CHAT: {"messages": USER, "max_tokens": 150, "ignore_eos": True, "method": "ar"},
    TEXT: {"prompt": "A", "max_tokens": 150, "ignore_eos": True, "method": "ar"},
    RESPONSES: {"input": "A", "max_output_tokens": 150},
    MESSAGES: {"messages": USER, "max_tokens": 150},
}


@pytest.mark.parametrize("path", LONG)
@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit_is_for_the_whole_answer(model, path, stream):
    """A token at times does not put it off."""
    defaults = {"method": "ar", "stop_token_ids": ()}
    with serving(model, defaults, timeout=0.4, keep_alive=0.05) as server:
        slow_down(server, 0.02)
        response = server.post(path, LONG[path] | {"stream": stream})
        if stream:
            assert response.status_code == 200
            assert "longer than this server allows" in response.text
        else:
            assert response.status_code == 504
        wait_until(lambda: server.engine.unfinished == 0)
        assert not server.engine._scheduler.busy


def test_time_in_the_queue_counts(serve):
    server = serve(timeout=0.5, max_parallel=1)
    with Gate(server.engine):
        for _ in range(2):
            check_error(server.complete("A"), 504, "longer than this server allows")


def test_a_full_queue_says_when_to_come_back(serve):
    """In whole seconds, which grow with the answers that are before."""
    server = serve(max_parallel=2, max_queue=6)
    with Gate(server.engine) as gate:
        told = []
        body = {"prompt": "A", "stream": True, "n": 4, "max_tokens": 4}
        with server.client.stream("POST", TEXT, json=body):
            for answers in (5, 8):
                refused = server.complete("A", n=answers)
                check_error(
                    refused, 429, "4 answers are being generated or waiting, and the limit is 8"
                )
                assert refused.json()["error"]["code"] == "queue_full"
                told.append(int(refused.headers["Retry-After"]))
                assert f"again in {told[-1]} second" in refused.json()["error"]["message"]
            with server.client.stream("POST", TEXT, json=body):
                refused = server.complete("A")
                told.append(int(refused.headers["Retry-After"]))
            gate.open()
        assert told[0] == told[1] >= 1
        assert told[2] > told[0]


def test_slow_answers_make_clients_wait_longer(serve):
    server = serve(max_parallel=1, max_queue=1)
    slow_down(server, 0.15)
    assert server.complete("A", max_tokens=12, ignore_eos=True, method="ar").status_code == 200
    with Gate(server.engine) as gate:
        body = {"prompt": "A", "stream": True, "n": 2, "max_tokens": 1}
        with server.client.stream("POST", TEXT, json=body):
            refused = server.complete("A")
            assert int(refused.headers["Retry-After"]) > 2, "an answer takes more than a second"
            gate.open()


def test_more_answers_than_the_server_has_room_for_are_an_error_of_the_request(serve):
    """Coming back later would not help."""
    server = serve(max_parallel=1, max_queue=2)
    check_error(server.complete("A", n=4, max_tokens=1), 400, "prompt")
    assert server.complete("A", n=3, max_tokens=1).status_code == 200
    assert server.complete("A", n=1, max_tokens=1).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_answers_to_a_request_are_limited(serve, path):
    server = serve(max_choices=2)
    body = LONG[path] | {"max_tokens": 1}
    assert len(server.post(path, body | {"n": 2}).json()["choices"]) == 2
    check_error(server.post(path, body | {"n": 3}), 400, "at most 2 answers")


def test_the_default_length_of_an_answer(server, serve):
    """2,048 tokens, or as many as the command's option allows; never beyond the context."""
    found = []

    def submit(answers, **_):
        found.extend(answers)
        raise SubmittedError

    for running in (server, serve(defaults={"max_tokens": 7})):
        real = running.engine.submit
        running.engine.submit = submit
        for path, body in LONG.items():
            names = ("max_tokens", "max_output_tokens")
            short = {k: x for k, x in body.items() if k not in names or path == MESSAGES}
            running.post(path, short)
        running.engine.submit = real
    lengths = [x.config.max_tokens for x in found]
    assert lengths == [2048, 2048, 2048, 150, 7, 7, 7, 150]
    assert {x.config.sampling.temperature for x in found} == {0.0}, "answers are greedy"


def test_the_prefix_cache_is_a_part_of_the_memory(serve):
    """Finished sequences keep at most the prefix cache's share."""
    server = serve(prefix_cache_gb=2e-4)
    for i in range(12):
        assert (
            server.complete(f"{i} is a number", max_tokens=40, ignore_eos=True).status_code == 200
        )
        assert server.engine._scheduler.prefix_cache.nbytes <= 2e-4 * 2**30
    assert len(server.engine._scheduler.prefix_cache) > 0
    off = serve(prefix_cache_gb=0)
    for _ in range(2):
        usage = off.complete("A long prompt", max_tokens=2).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert off.engine._scheduler.prefix_cache is None


def test_a_request_that_needs_too_much_memory_is_refused_with_both_numbers(serve):
    server = serve(max_memory_gb=1e-4)
    response = server.complete("A", max_tokens=500)
    check_error(response, 400, "")
    needed, limit = map(float, re.findall(r"([\d.]+) MiB", response.json()["error"]["message"]))
    assert needed > limit == pytest.approx(1e-4 * 2**10, rel=0.01)


def test_no_more_answers_are_decoded_at_once_than_allowed(serve):
    server = serve(max_parallel=2)
    scheduler = server.engine._scheduler
    most, step = [], scheduler.step

    def watched():
        events = step()
        most.append(scheduler.running)
        return events

    scheduler.step = watched
    assert server.complete("A", n=5, max_tokens=8, ignore_eos=True).status_code == 200
    assert max(most) == 2


def test_unsupported_fields_are_named_and_user_changes_nothing(server):
    for path, body in LONG.items():
        response = server.post(path, body | {"frobnicate": 1})
        assert response.status_code == 400
        assert "frobnicate" in response.json()["error"]["message"]
    texts = [server.complete("A", user=user, **FOREVER).json()["choices"] for user in ("x", None)]
    assert texts[0] == texts[1]
