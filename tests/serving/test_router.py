"""vllm-router in front of two servers."""

from __future__ import annotations

import shutil
import socket
import subprocess

import httpx
import pytest
from servers import parse, serving, wait_until

pytestmark = pytest.mark.nightly

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
QUESTION = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 8}


@pytest.fixture
def route():
    """Start a router in front of servers with these addresses; returns its own."""
    command = shutil.which("vllm-router")
    if command is None:
        pytest.skip("vllm-router is not installed")
    processes = []

    def route(*urls):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--policy", "cache_aware", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen([command, *options, "--worker-urls", *urls])
        processes.append(process)

        def ready():
            assert process.poll() is None, "the router has ended"
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, 60)
        return f"http://127.0.0.1:{port}"

    yield route
    for process in processes:
        process.terminate()
        process.wait()


@pytest.fixture
def servers(model):
    with serving(model) as first, serving(model) as second:
        yield first, second


def test_whole_answers(servers, route):
    url = route(*(server.url for server in servers))
    for path, body in ((CHAT, QUESTION), (TEXT, {"prompt": "Hello.", "max_tokens": 8})):
        expected = servers[0].post(path, body).json()
        found = httpx.post(url + path, json=body, timeout=60).json()
        assert found["choices"] == expected["choices"]


def test_streams(servers, route):
    url = route(*(server.url for server in servers))
    expected = servers[0].post(CHAT, QUESTION).json()["choices"][0]["message"]["content"]
    with httpx.stream("POST", url + CHAT, json=QUESTION | {"stream": True}) as response:
        chunks = [event["choices"][0] for event in parse(response)]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == expected
    assert chunks[-1]["finish_reason"] == "length"


def test_errors_reach_the_client(servers, route):
    url = route(*(server.url for server in servers))
    refused = httpx.post(url + CHAT, json=QUESTION | {"include_reasoning": False})
    assert refused.status_code == 400
    assert "include_reasoning" in refused.json()["error"]["message"]


def test_the_other_server_answers_when_one_has_ended(model, route):
    with serving(model) as second:
        with serving(model) as first:
            url = route(first.url, second.url)
        wait_until(lambda: httpx.post(url + CHAT, json=QUESTION).status_code == 200, 60)
