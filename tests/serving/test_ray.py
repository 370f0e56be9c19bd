"""Two replicas of the default pair behind Ray Serve: answers, prefixes, and a replica's death."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import httpx
import psutil
import pytest

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.nightly

STREAMS = 20
REPLICA = "ray::ServeReplica:treeflash:Replica"


@pytest.fixture(scope="module")
def url():
    from ray import serve

    from treeflash.serving.ray_app import RayConfig, build

    config = RayConfig(
        model={"device": "cpu", "dtype": "bfloat16"},
        options={"method": "ddtree", "budget": 4},
        replicas=2,
        cpus=0.5,
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    serve.run(build(config), name="treeflash")
    yield "http://127.0.0.1:8123"
    serve.shutdown()
    ray.shutdown()


def chat(content, **fields):
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def replica_pids():
    """Ray names the processes of its actors."""
    processes = psutil.process_iter(["pid", "cmdline"])
    names = {process.pid: " ".join(process.info["cmdline"] or ()) for process in processes}
    return {pid for pid, name in names.items() if name.startswith(REPLICA)}


def test_answers(url):
    body = chat("Name a river.", max_tokens=8)
    whole = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).json()
    assert whole["usage"]["completion_tokens"] == 8
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=300
    ) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.post(f"{url}/v1/chat/completions", json={}).status_code == 400


def test_the_same_beginning_goes_to_the_same_replica(url):
    long = "The Rhine flows from the Alps to the North Sea, and many towns lie on it. " * 8
    cached = []
    for question in ("Where does it end?", "Where does it begin?", "Which towns?"):
        body = chat(long + question, max_tokens=2)
        found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).json()
        cached.append(found["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert min(cached[1:]) > 100, cached


def test_a_killed_replica_loses_only_its_own_streams_and_is_replaced(url):
    ends: dict[int, str] = {}
    started = threading.Semaphore(0)

    def stream(i):
        body = chat(f"{i}: {'go on ' * i}", max_tokens=48, stream=True, ignore_eos=True)
        address = f"{url}/v1/chat/completions"
        with httpx.stream("POST", address, json=body, timeout=600) as response:
            first = True
            for line in response.iter_lines():
                if line.startswith("data: "):
                    ends[i] = line[6:]
                    if first:
                        started.release()
                        first = False
        assert not first

    before = replica_pids()
    assert len(before) == 2, before
    threads = [threading.Thread(target=stream, args=(i,)) for i in range(STREAMS)]
    for thread in threads:
        thread.start()
    for _ in range(STREAMS // 2):
        assert started.acquire(timeout=300)
    os.kill(min(before), signal.SIGKILL)
    for thread in threads:
        thread.join(timeout=600)
    assert len(ends) == STREAMS
    finished = sum(end == "[DONE]" for end in ends.values())
    lost = [json.loads(end)["error"] for end in ends.values() if end != "[DONE]"]
    assert finished >= 1
    assert lost
    assert {error["code"] for error in lost} == {"replica_lost"}
    for _ in range(120):
        now = replica_pids()
        if len(now) == 2 and now != before:
            break
        time.sleep(1)
    else:
        pytest.fail("the replica was not replaced")
    body = chat("Name a river.", max_tokens=2)
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).status_code == 200
