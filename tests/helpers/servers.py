"""A server in a thread of the tests, over a real connection."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from treeflash.language_model import LanguageModel
from treeflash.serving.application import Server, application, bind, configuration
from treeflash.serving.engine import Engine
from treeflash.serving.service import Service
from treeflash.serving.settings import Settings

NAME = "tiny"
MAX_POSITIONS = 512


@dataclass(frozen=True)
class Running:
    """A running server.

    Attributes:
        url: the URL of the server's root.
        engine: decodes the server's requests.
        client: sends requests to the server.
        server: uvicorn's server.
    """

    url: str
    engine: Engine
    client: httpx.Client
    server: Server

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return self.client.post(path, json=body, headers=headers)

    def chat(self, content: str = "Hello.", **fields: object) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", {"messages": messages, **fields})

    def complete(self, prompt: object = "Hello.", **fields: object) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def frames(self, path: str, **body: object) -> list[dict]:
        """The events of a stream, which must end with `[DONE]`."""
        with self.client.stream("POST", path, json={"stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            return list(parse(response))


def parse(response: httpx.Response) -> Iterator[dict]:
    """The events of a stream, which must end with `[DONE]`."""
    done = False
    for line in response.iter_lines():
        if not line or line.startswith(":"):
            continue
        assert line.startswith("data: "), line
        assert not done, "an event follows the last one"
        if line == "data: [DONE]":
            done = True
            continue
        yield json.loads(line.removeprefix("data: "))
    assert done, "the stream was cut off"


def check_error(response, status, says):
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"], error
    assert "\n" not in error["message"]


PATIENCE = 120.0
"""Seconds until a test fails that waits; far more than a busy machine needs."""


def wait_until(condition, seconds: float = PATIENCE) -> None:
    """Wait until another thread or process makes a condition true, or fail."""
    end, pause = time.monotonic() + seconds, 0.001
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(pause)
        pause = min(2 * pause, 0.05)  # whoever is waited for needs the processor


def wait_until_ready(client: httpx.Client) -> None:
    """Wait until the server of another process answers that it is ready."""

    def ready():
        try:
            return client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(ready)


class Gate:
    """Lets an engine run as many iterations as a test allows, and all after the `with` block.

    An engine that stayed shut after a failed test would never end.
    """

    def __init__(self, engine: Engine) -> None:
        self.allowed = 0
        self.arrivals = 0  # how often the engine was about to run an iteration
        self.engine = engine
        self._permits = threading.Semaphore(0)
        self._open = False

    def __enter__(self) -> Gate:
        step = self.engine._scheduler.step

        def gated():
            self.arrivals += 1
            if not self._open:
                self._permits.acquire()
            return step()

        self.engine._scheduler.step = gated
        return self

    def __exit__(self, *exception: object) -> None:
        self.open()

    def allow(self, iterations: int) -> None:
        """Allow some iterations, and wait until the engine is about to run the one after them."""
        self.allowed += iterations
        self._permits.release(iterations)
        wait_until(lambda: self.arrivals > self.allowed)

    def open(self) -> None:
        """Allow all iterations from now on."""
        self._open = True
        self._permits.release()


@contextmanager
def serving(
    model: LanguageModel, defaults: dict | None = None, **settings: object
) -> Iterator[Running]:
    """Serve a model on a free port."""
    engine = Engine(lambda: model, Settings(**settings))
    engine.start()
    service = Service(engine, defaults or {}, (NAME,))
    listening = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = Server(configuration(application(service)), engine)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        wait_until(lambda: server.started)
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            yield Running(url, engine, client, server)
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        engine.stop()
