"""Connections that no request comes through."""

from __future__ import annotations

import resource
import socket
from contextlib import closing

import pytest
from servers import PATIENCE

from treeflash.serving import connections

HEAD = b"GET /health HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture
def connect(server):
    address = server.client.base_url.host, server.client.base_url.port

    def connect() -> socket.socket:
        return socket.create_connection(address, timeout=PATIENCE)

    return connect


@pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"X-A: "])
def test_a_connection_without_a_request_is_closed(connect, monkeypatch, sent):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.05)
    with closing(connect()) as connection:
        connection.sendall(sent)
        assert connection.recv(1) == b""


def test_a_connection_whose_second_request_does_not_come_is_closed(connect, monkeypatch):
    with closing(connect()) as connection:
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0.05)
        connection.sendall(HEAD + b"\r\n" + HEAD)
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.count(b"HTTP/1.1") == 1


def test_an_answer_may_take_longer_than_a_head(server, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.001)
    assert server.chat(max_tokens=20, ignore_eos=True).status_code == 200


def test_a_head_without_an_end_is_refused(connect):
    """Whatever other parsers of HTTP are installed."""

    def send():
        for _ in range(2000):  # 120 MB
            connection.sendall(b"X-A: " + b"a" * 60_000 + b"\r\n")

    with closing(connect()) as connection:
        connection.sendall(HEAD)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send()


@pytest.mark.parametrize("maximum", [1, 1 << 30])
def test_the_process_may_open_as_many_files_as_the_system_lets_it(monkeypatch, maximum):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(connections, "MAX_FILES", maximum)
    most = hard if hard != resource.RLIM_INFINITY else maximum
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        connections.allow_many_files()
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
