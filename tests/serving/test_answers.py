"""What an answer may hold and how long it may take: white space, stop strings, limits."""

from __future__ import annotations

import re

import pytest
from protocols import Ask, having
from protocols.chat import Chat
from servers import Gate, check_error, slow_down, submitted, wait_until
from tool_models import COLOUR

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = [{"role": "user", "content": "Hi"}]
RED = '{"colour": "red"}'


def test_white_space_between_json_tokens_is_bounded(tool_server):
    api = Chat()
    accepts = submitted(tool_server, CHAT, api.body(Ask(schema=COLOUR))).accepts
    for space in ("", " ", "\n", "\n" + " " * 20):
        assert accepts(RED.replace(" ", space)), repr(space)
    for space in ("  ", "\n" + " " * 21, "\n\n", "\t\t"):
        assert not accepts(RED.replace(" ", space)), repr(space)
    own = {**COLOUR, "x-guidance": {"whitespace_pattern": " {0,5}"}}
    accepts = submitted(tool_server, CHAT, api.body(Ask(schema=own))).accepts
    assert accepts(RED.replace(" ", " " * 5))
    assert not accepts(RED.replace(" ", "\n"))


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
def test_what_a_response_could_not_repeat_is_refused(tool_server, caplog, field, value, stream):
    """NaN and lone surrogates are no JSON, so the response that repeats them would be none."""
    fields = f'"{field}": {ECHOED[field].format(value)}, "max_output_tokens": 1'
    body = f'{{"input": "Hi", "stream": {stream}, {fields}}}'
    response = tool_server.client.post(
        RESPONSES, content=body.encode(), headers={"Content-Type": "application/json"}
    )
    check_error(response, 400, "")
    assert not [record for record in caplog.records if record.exc_info]


def is_first(text, i, length):
    return text.index(text[i : i + length]) == i


@pytest.mark.sample(1)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", having("named stop"))
def test_the_stop_string_that_ended_an_answer_is_named(model, serve, api, stream):
    """If two end at the same token, the one that began first ends the text."""
    letters = {model.tokenizer.encode(x)[0] for x in "abcdefghijklmnopqrstuvwxyz"}
    bias = {i: -100.0 for i in range(model.backend.vocab_size) if i not in letters}
    server = serve(defaults={"temperature": 1.0, "seed": 3, "logit_bias": bias})
    text = api.ask(server.url, Ask("Hi", max_tokens=60)).text
    i = next(i for i in range(40) if all(is_first(text, i + j, 3 - j) for j in (0, 1, 2)))
    longer, shorter, later = text[i : i + 3], text[i + 1 : i + 3], text[i + 3 : i + 15]
    for stops in ([shorter, longer], [longer, shorter], [later, longer], ["\0none", longer]):
        ask = Ask("Hi", max_tokens=60, stop=stops)
        found = api.ask(server.url, ask, stream=stream)
        assert (found.reason, found.stop_string) == ("stop", longer), stops
        assert found.text == text[:i]


FOREVER = {"max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.mark.sample(1)
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
    assert server.engine.scheduler.running == server.engine.scheduler.waiting == 0
    assert not server.engine.scheduler.busy


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


# Two seconds of waiting; the test above has the same formula.
@pytest.mark.nightly
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
    body = {CHAT: {"messages": USER}, TEXT: {"prompt": "A"}}[path] | {"max_tokens": 1}
    assert len(server.post(path, body | {"n": 2}).json()["choices"]) == 2
    check_error(server.post(path, body | {"n": 3}), 400, "at most 2 answers")


def test_the_prefix_cache_is_a_part_of_the_memory(serve):
    """Finished sequences keep at most the prefix cache's share."""
    server = serve(prefix_cache_gb=1e-4)
    for i in range(4):
        answer = server.complete(f"{i} is a number", max_tokens=40, ignore_eos=True)
        assert answer.status_code == 200
        assert server.engine.scheduler.prefix_cache.nbytes <= 1e-4 * 2**30
    assert len(server.engine.scheduler.prefix_cache) > 0
    off = serve(prefix_cache_gb=0)
    for _ in range(2):
        usage = off.complete("A long prompt", max_tokens=2).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert off.engine.scheduler.prefix_cache is None


def test_a_request_that_needs_too_much_memory_is_refused_with_both_numbers(serve):
    server = serve(max_memory_gb=1e-4)
    response = server.complete("A", max_tokens=500)
    check_error(response, 400, "")
    needed, limit = map(float, re.findall(r"([\d.]+) MiB", response.json()["error"]["message"]))
    assert needed > limit == pytest.approx(1e-4 * 2**10, rel=0.01)


def test_no_more_answers_are_decoded_at_once_than_allowed(serve):
    server = serve(max_parallel=2)
    scheduler = server.engine.scheduler
    most, step = [], scheduler.step

    def watched():
        events = step()
        most.append(scheduler.running)
        return events

    scheduler.step = watched
    assert server.complete("A", n=5, max_tokens=8, ignore_eos=True).status_code == 200
    assert max(most) == 2


def test_user_changes_nothing(server):
    texts = [server.complete("A", user=user, **FOREVER).json()["choices"] for user in ("x", None)]
    assert texts[0] == texts[1]
