"""Limits on the queue, sizes, times and memory; keep-alive frames; a disconnect in the queue."""

from __future__ import annotations

import socket
import threading

import httpx
import pytest
from servers import (
    PATIENCE,
    Gate,
    check_error,
    parse,
    request_without_a_reader,
    wait_until,
)

FOREVER = {"max_tokens": 400, "ignore_eos": True, "method": "ar"}


@pytest.fixture
def in_background():
    """Run functions in threads; returns their results."""
    threads = []

    def start(function):
        results = []
        thread = threading.Thread(target=lambda: results.append(function()))
        thread.start()
        threads.append(thread)
        return results

    yield start
    for thread in threads:
        thread.join()


def test_full_queue(serve, in_background):
    server = serve(max_parallel=1, max_queue=2)
    with Gate(server.engine):
        answers = in_background(lambda: server.chat(n=2, max_tokens=4))
        wait_until(lambda: server.engine.unfinished == 2)
        refused = server.chat(n=2)
        check_error(refused, 429, "2 answers are being generated or waiting, and the limit is 3")
        assert int(refused.headers["Retry-After"]) >= 1
        last = in_background(lambda: server.chat(max_tokens=4))
        wait_until(lambda: server.engine.unfinished == 3)
        check_error(server.chat(), 429, "try again")
    wait_until(lambda: answers and last)
    assert answers[0].status_code == last[0].status_code == 200
    assert server.engine.unfinished == 0


def test_an_answer_that_ends_leaves_the_queue_before_its_request(serve, in_background):
    server = serve(max_parallel=1)
    with Gate(server.engine) as gate:
        answers = in_background(lambda: server.complete("A", n=3, max_tokens=1))
        wait_until(lambda: server.engine.unfinished == 3)
        gate.allow(1)
        assert server.engine.unfinished == 2
    wait_until(lambda: answers)
    assert answers[0].status_code == 200


def test_body_size(serve):
    server = serve(max_body_mb=0.001)
    check_error(server.chat("x" * 2000), 413, "more than 1048 bytes")
    assert server.chat("x", max_tokens=1).status_code == 200


def test_body_that_does_not_arrive(serve):
    server = serve(body_timeout=0.2)
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=PATIENCE) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"mess'
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


@pytest.mark.sample(1)
@pytest.mark.parametrize("stream", [False, True])
def test_time_limit(serve, stream):
    server = serve(timeout=0.3)
    with Gate(server.engine):
        if stream:
            with server.client.stream(
                "POST", "/v1/completions", json={"prompt": "A", "stream": True}
            ) as response:
                assert response.status_code == 200
                assert '"code":"timeout"' in response.read().decode()
        else:
            check_error(server.complete("A"), 504, "longer than this server allows")
    wait_until(lambda: server.engine.unfinished == 0)
    assert not server.engine.scheduler.busy


def test_text_that_needs_too_much_memory(serve):
    server = serve(max_memory_gb=1e-4)
    check_error(server.complete("A", max_tokens=500), 400, "MiB for its KV cache and the limit is")
    assert server.complete("A", max_tokens=2, budget=2).status_code == 200


def test_an_answer_without_a_length_takes_the_memory_that_there_is(serve):
    server = serve(max_memory_gb=1e-4)
    answer = server.complete("A", budget=2, ignore_eos=True).json()
    assert 2 < answer["usage"]["completion_tokens"] < 500
    assert answer["choices"][0]["finish_reason"] == "length"
    # After a longer prompt there is not room for one token.
    check_error(server.complete("A" * 400), 400, "MiB for its KV cache and the limit is")


def test_keep_alive(serve):
    server = serve(keep_alive=0.05)
    with Gate(server.engine) as gate:
        body = {"prompt": "A", "stream": True, "max_tokens": 2}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines) == ": ping"
            assert next(lines) == ""
            assert next(lines) == ": ping"
            gate.open()
            assert "data: [DONE]" in list(lines)


def test_disconnect_while_waiting(serve, in_background, caplog):
    server = serve(max_parallel=1)
    with caplog.at_level("INFO", "treeflash.serving"), Gate(server.engine):
        first = in_background(lambda: server.complete("A", max_tokens=3))
        wait_until(lambda: server.engine.unfinished == 1)
        with request_without_a_reader(server, "/v1/completions", {"prompt": "A", **FOREVER}):
            pass
        wait_until(lambda: "unfinished" in caplog.text)
    wait_until(lambda: first and server.engine.unfinished == 0)
    assert first[0].status_code == 200
    assert "0 new tokens" in caplog.text
    assert "-1.00 tokens per iteration" not in caplog.text


def test_a_slow_reader_does_not_hold_up_others(serve):
    server = serve()
    body = {"prompt": "A", "stream": True, **FOREVER, "logprobs": 20}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        wait_until(lambda: server.engine.unfinished == 0)  # nobody has read its answer
        assert (
            sum(len(frame["choices"][0]["logprobs"]["tokens"]) for frame in parse(response)) == 400
        )
