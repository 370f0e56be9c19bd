"""vllm-router in front of two servers."""

from __future__ import annotations

import shutil
import socket
import subprocess

import httpx
import pytest
from servers import serving, wait_until

pytestmark = pytest.mark.full
BODY = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 8}
PATH = "/v1/chat/completions"


@pytest.fixture
def router():
    """Start a router in front of these servers; returns its address."""
    command = shutil.which("vllm-router")
    if command is None:
        pytest.skip("vllm-router is not installed")
    processes = []

    def router(*urls):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = ["--policy", "cache_aware", "--host", "127.0.0.1", "--port", str(port)]
        processes.append(subprocess.Popen([command, "--worker-urls", *urls, *arguments]))
        url = f"http://127.0.0.1:{port}"

        def ready():
            assert processes[0].poll() is None, "the router has ended"
            try:
                return httpx.post(url + PATH, json=BODY).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, 60)
        return url

    yield router
    for process in processes:
        process.terminate()
        process.wait()


def test_answers_and_streams_through_the_router(model, router):
    with serving(model) as first, serving(model) as second:
        url = router(first.url, second.url)
        expected = first.post(PATH, BODY).json()["choices"][0]["message"]["content"]
        found = httpx.post(url + PATH, json=BODY).json()
        assert found["choices"][0]["message"]["content"] == expected
        with httpx.stream("POST", url + PATH, json=BODY | {"stream": True}) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        bad = httpx.post(url + PATH, json={"messages": []})
        assert bad.status_code == 400
