"""Limits on the queue, times and memory, and connections that hold what others need."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from bodies import TEXT, chat, text
from servers import (
    PATIENCE,
    Gate,
    check_error,
    parse,
    pool_of,
    post_bytes,
    request_without_a_reader,
    serving_pool,
    slow_down,
    wait_until,
)

from treeflash.config import DecodeConfig
from treeflash.serving.connections import Protocol, allow_many_files
from treeflash.serving.engine import Engine
from treeflash.serving.errors import APIError
from treeflash.serving.settings import Settings
from treeflash.text.stream import Assembler

FOREVER = {"max_tokens": 400, "ignore_eos": True, "temperature": 0}


def test_a_full_queue_says_when_to_come_back(serve):
    """In whole seconds, which grow with the answers that are before."""
    server = serve(max_parallel=2, max_queue=6)
    with Gate(server.engine) as gate:
        told = []
        body = {"prompt": "A", "stream": True, "n": 4, "max_tokens": 4}
        with server.client.stream("POST", TEXT, json=body):
            for answers in (5, 8):
                refused = server.complete("A", n=answers)
                says = "4 answers are being generated or waiting, and the limit is 8"
                message = check_error(refused, 429, says, code="queue_full")
                told.append(int(refused.headers["Retry-After"]))
                assert f"again in {told[-1]} second" in message
            with server.client.stream("POST", TEXT, json=body):
                refused = server.complete("A")
                told.append(int(refused.headers["Retry-After"]))
            gate.open()
        assert told[0] == told[1] >= 1
        assert told[2] > told[0]
    wait_until(lambda: server.engine.unfinished == 0)


def test_the_time_of_answers_decides_when_clients_come_back(model):
    """A second for each at first, then a tenth of the way to the time of each new one."""
    now = 0.0
    engine = Engine(lambda: model, Settings(max_parallel=2, max_queue=2), clock=lambda: now)
    engine.start()

    async def told(seconds):
        """Answer four prompts in this time, while the queue is full; returns the wait."""
        nonlocal now
        config = DecodeConfig(method="ar", max_tokens=1)
        ask = [Assembler(model.backend, model.tokenizer, (5,), config) for _ in range(4)]
        with Gate(engine) as gate:
            answered = engine.submit(ask, prompts=4)
            with pytest.raises(APIError) as refused:
                engine.submit(ask[:1], prompts=1)
            now += seconds
            gate.open()
            await answered.wait()
        return int(refused.value.headers["Retry-After"])

    try:
        assert [asyncio.run(told(seconds)) for seconds in (11, 0, 0)] == [2, 9, 6]
    finally:
        engine.stop()


def test_more_answers_than_the_server_has_room_for_are_an_error_of_the_request(serve):
    """Coming back later would not help."""
    server = serve(max_parallel=1, max_queue=2)
    for many in ({"prompt": "A", "n": 4}, {"prompt": ["A"] * 4}):
        check_error(server.complete(**many, max_tokens=1), 400, "asks for 4 answers")
    for few in ({"prompt": "A", "n": 3}, {"prompt": ["A"] * 3}, {"prompt": "A"}):
        assert server.complete(**few, max_tokens=1).status_code == 200


def test_answers_to_a_request_are_limited(serve):
    server = serve(max_choices=2)
    for request in (chat, text):
        assert len(server.post(*request(n=2)).json()["choices"]) == 2
        check_error(server.post(*request(n=3)), 400, "at most 2 answers")


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


def test_time_in_the_queue_counts(serve):
    server = serve(timeout=0.2, max_parallel=1)
    with Gate(server.engine):
        for _ in range(2):
            check_error(server.complete("A"), 504, "longer than this server allows")


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


@pytest.mark.parametrize("method", ["ar", "treeflash"])
def test_an_answer_that_stopped_is_kept_for_the_next_prompt(serve, model, method):
    """The next prompt begins with the interrupted answer, as it does with a finished one."""
    server = serve()
    text = model.generate("A story.", raw=True, temperature=0, max_tokens=40).text
    whole = server.complete("A story.", **FOREVER, method=method, stop=text[10:13])
    assert whole.json()["choices"][0]["finish_reason"] == "stop"
    wait_until(lambda: server.engine.unfinished == 0)
    usage = server.complete("A story. It goes on.", **FOREVER, method=method).json()["usage"]
    kept = len(model.tokenizer.encode("A story."))
    assert usage["prompt_tokens_details"]["cached_tokens"] == kept


def test_an_answer_whose_client_leaves_is_kept_for_the_next_prompt(serve, model, caplog):
    server, options = serve(), {**FOREVER, "method": "ar"}
    with caplog.at_level("INFO", "treeflash.serving"), Gate(server.engine) as gate:
        body = {"prompt": "A story.", "stream": True, **options}
        with server.client.stream("POST", TEXT, json=body):
            gate.allow(6)
        wait_until(lambda: "unfinished" in caplog.text)
    begun = model.generate("A story.", raw=True, temperature=0, max_tokens=6)
    prompt = [*model.tokenizer.encode("A story."), *begun.token_ids]
    usage = server.complete(prompt, **options).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1


def test_an_answer_that_ends_leaves_the_queue_before_its_request(serve):
    server = serve(max_parallel=1)
    with ThreadPoolExecutor() as clients, Gate(server.engine) as gate:
        asked = clients.submit(server.complete, "A", n=3, max_tokens=1)
        wait_until(lambda: server.engine.unfinished == 3)
        gate.allow(1)
        assert server.engine.unfinished == 2
    assert asked.result().status_code == 200


def test_a_disconnect_while_waiting(serve, caplog):
    server = serve(max_parallel=1)
    with caplog.at_level("INFO", "treeflash.serving"), ThreadPoolExecutor() as clients:
        with Gate(server.engine):
            first = clients.submit(server.complete, "A", max_tokens=3)
            wait_until(lambda: server.engine.unfinished == 1)
            with request_without_a_reader(server, TEXT, {"prompt": "A", **FOREVER}):
                pass
            wait_until(lambda: "unfinished" in caplog.text)
        assert first.result().status_code == 200
    wait_until(lambda: server.engine.unfinished == 0)
    assert "0 new tokens" in caplog.text
    assert "-1.00 tokens per iteration" not in caplog.text


def test_a_slow_reader_does_not_hold_up_others(serve):
    server = serve()
    body = {"prompt": "A", "stream": True, **FOREVER, "logprobs": 20}
    with server.client.stream("POST", TEXT, json=body) as response:
        wait_until(lambda: server.engine.unfinished == 0)  # nobody has read its answer
        frames = parse(response)
        assert sum(len(x["choices"][0]["logprobs"]["tokens"]) for x in frames) == 400


def test_keep_alive(serve):
    server = serve(keep_alive=0.05)
    with Gate(server.engine) as gate:
        body = {"prompt": "A", "stream": True, "max_tokens": 2}
        with server.client.stream("POST", TEXT, json=body) as response:
            lines = response.iter_lines()
            assert [next(lines) for _ in range(3)] == [": ping", "", ": ping"]
            gate.open()
            assert "data: [DONE]" in list(lines)


def test_a_stream_of_responses_is_kept_alive_by_events(serve):
    """Codex does not count comments."""
    server = serve(keep_alive=0.05)
    with Gate(server.engine) as gate:
        body = {"input": "A", "stream": True, "max_output_tokens": 2}
        with server.client.stream("POST", "/v1/responses", json=body) as response:
            lines = response.iter_lines()
            data = (json.loads(x.removeprefix("data: ")) for x in lines if x.startswith("data"))
            first = [next(data) for _ in range(4)]
            gate.open()
            events = [*first, *data]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "in_progress", "in_progress"]
    assert kinds[-1] == "incomplete"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_an_answer_has_the_memory_that_there_is(serve):
    """One without a length takes all of it; more than that is refused with both numbers."""
    server = serve(max_memory_gb=1e-4)
    says = r"([\d.]+) MiB for its KV cache and the limit is ([\d.]+) MiB"
    message = check_error(server.complete("A", max_tokens=500), 400)
    needed, limit = map(float, re.search(says, message).groups())
    assert needed > limit == pytest.approx(1e-4 * 2**10, rel=0.01)
    answer = server.complete("A", budget=2, ignore_eos=True).json()
    assert 2 < answer["usage"]["completion_tokens"] < 500
    assert answer["choices"][0]["finish_reason"] == "length"
    # After a longer prompt there is not room for one token.
    check_error(server.complete("A" * 400), 400, "MiB for its KV cache and the limit is")


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


HEAD = b"GET /health HTTP/1.1\r\nHost: a\r\n"


class ImpatientProtocol(Protocol):
    head_seconds = 0.05


@pytest.fixture(scope="module")
def impatient(model):
    """A server that waits for the head of a request for a moment only."""
    with serving_pool(pool_of(model), ImpatientProtocol) as running:
        yield running


def connect(server, sent: bytes) -> socket.socket:
    """Connect and send; the server's event loop, which waits meanwhile, finds both together."""
    done = threading.Event()
    server.server.servers[0].get_loop().call_soon_threadsafe(done.wait)
    try:
        address = server.client.base_url.host, server.client.base_url.port
        connection = socket.create_connection(address, timeout=PATIENCE)
        connection.sendall(sent)
    finally:
        done.set()
    return connection


@pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"X-A: "])
def test_a_connection_without_a_request_is_closed(impatient, sent):
    with closing(connect(impatient, sent)) as connection:
        assert connection.recv(1) == b""


def test_a_connection_whose_second_request_does_not_come_is_closed(impatient):
    with closing(connect(impatient, HEAD + b"\r\n" + HEAD)) as connection:
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.count(b"HTTP/1.1") == 1


def test_an_answer_may_take_longer_than_a_head(impatient):
    slow_down(impatient, 2 * ImpatientProtocol.head_seconds)
    with closing(connect(impatient, post_bytes(*text()))) as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_a_head_without_an_end_is_refused(server):
    """Whatever other parsers of HTTP are installed."""

    def send():
        for _ in range(2000):  # 120 MB
            connection.sendall(b"X-A: " + b"a" * 60_000 + b"\r\n")

    refused = pytest.raises((ConnectionResetError, BrokenPipeError))
    with closing(connect(server, HEAD)) as connection, refused:
        send()


@pytest.mark.parametrize("maximum", [1, 1 << 30])
def test_the_process_may_open_as_many_files_as_the_system_lets_it(maximum):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else maximum
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        allow_many_files(maximum)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == max(200, min(maximum, most))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_kernel_sends_at_once_what_is_written(server):
    """Otherwise it waits, before the second packet of an answer, until the first is acknowledged.

    asyncio asks for this only on sockets that say they are TCP's.
    """
    server.client.get("/health")
    connection = next(iter(server.server.server_state.connections))
    accepted = connection.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
