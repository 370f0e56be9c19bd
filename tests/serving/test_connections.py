"""Connections that no request comes through."""

from __future__ import annotations

import resource
import socket
from contextlib import closing

import pytest
from servers import PATIENCE, pool_of, serving_pool, slow_down

from treeflash.serving.connections import Protocol, allow_many_files

HEAD = b"GET /health HTTP/1.1\r\nHost: a\r\n"


class ImpatientProtocol(Protocol):
    head_seconds = 0.05


@pytest.fixture(scope="module")
def impatient(model):
    """A server that waits for the head of a request for a moment only."""
    with serving_pool(pool_of(model), ImpatientProtocol) as running:
        yield running


def connect(server) -> socket.socket:
    address = server.client.base_url.host, server.client.base_url.port
    return socket.create_connection(address, timeout=PATIENCE)


@pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"X-A: "])
def test_a_connection_without_a_request_is_closed(impatient, sent):
    with closing(connect(impatient)) as connection:
        connection.sendall(sent)
        assert connection.recv(1) == b""


def test_a_connection_whose_second_request_does_not_come_is_closed(impatient):
    with closing(connect(impatient)) as connection:
        connection.sendall(HEAD + b"\r\n" + HEAD)
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.count(b"HTTP/1.1") == 1


def test_an_answer_may_take_longer_than_a_head(impatient):
    slow_down(impatient, 2 * ImpatientProtocol.head_seconds)
    assert impatient.chat(max_tokens=1).status_code == 200


def test_a_head_without_an_end_is_refused(server):
    """Whatever other parsers of HTTP are installed."""

    def send():
        for _ in range(2000):  # 120 MB
            connection.sendall(b"X-A: " + b"a" * 60_000 + b"\r\n")

    with closing(connect(server)) as connection:
        connection.sendall(HEAD)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
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
