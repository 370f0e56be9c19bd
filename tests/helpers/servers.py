"""A server in a thread of the tests, over a real connection."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from failures import failing
from recordings import recording

from treeflash.decoding.sampling import unpack
from treeflash.language_model import LanguageModel
from treeflash.serving.application import Server, application, bind, configuration
from treeflash.serving.connections import Protocol
from treeflash.serving.engine import Engine
from treeflash.serving.errors import APIError
from treeflash.serving.models import ModelPool, ModelSpec
from treeflash.serving.settings import Settings
from treeflash.text.stream import Assembler

NAME = "tiny"
MAX_POSITIONS = 512


@dataclass(frozen=True)
class Running:
    """A running server.

    Attributes:
        url: the URL of the server's root.
        pool: the server's models.
        client: sends requests to the server.
        server: uvicorn's server.
    """

    url: str
    pool: ModelPool
    client: httpx.Client
    server: Server

    @property
    def engine(self) -> Engine:
        """What decodes the requests for the first model, which must be in memory."""
        return self.pool.models[0].service.engine

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        """Send a body: bytes, or what becomes JSON, with NaN and lone surrogates too."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | headers
        return self.client.post(path, content=content, headers=headers)

    def chat(self, content: str = "Hello.", **fields: object) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", {"messages": messages, **fields})

    def complete(self, prompt: object = "Hello.", **fields: object) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def choices(self, path: str, *, stream: bool = False, **body: object) -> list[dict]:
        """The choices of a whole answer of OpenAI's APIs, or of all chunks of a stream."""
        if stream:
            return [choice for frame in self.frames(path, **body) for choice in frame["choices"]]
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()["choices"]

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


def error_of(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The fields of an error, which must have the form of the path's API."""
    error = body["error"]
    if path.startswith("/api/"):
        assert (set(body), type(error)) == ({"error"}, str)
        return {"message": error}
    anthropic = path.startswith("/v1/messages")
    assert body == ({"type": "error"} if anthropic else {}) | {"error": error}
    optional, others = ({"details"}, set()) if anthropic else (set(), {"param", "code"})
    assert error.keys() - optional == {"message", "type"} | others
    return error


def check_error(response: httpx.Response, status: int, says: str = "", **fields: object) -> str:
    """Check an error's form, message and, where its API has them, fields; returns the message."""
    error = error_of(response.request.url.path, response.json())
    assert response.status_code == status, error
    assert says in error["message"], error
    assert "\n" not in error["message"]
    assert {name: error.get(name, value) for name, value in fields.items()} == fields
    return error["message"]


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
        step = self.engine.scheduler.step

        def gated():
            self.arrivals += 1
            if not self._open:
                self._permits.acquire()
            return step()

        self.engine.scheduler.step = gated
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


def slow_down(server: Running, seconds: float) -> None:
    """Let every iteration of a server take some time."""
    step = server.engine.scheduler.step

    def slow():
        time.sleep(seconds)
        return step()

    server.engine.scheduler.step = slow


def post_bytes(path: str, body: object) -> bytes:
    """Return a request as it is sent over a connection."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@contextmanager
def request_without_a_reader(server: Running, path: str, body: object) -> Iterator[None]:
    """Send a request for a whole answer that would take long; the end of the block disconnects."""
    unfinished = server.engine.unfinished
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(post_bytes(path, body))
        wait_until(lambda: server.engine.unfinished == unfinished + 1)
        yield


@dataclass(frozen=True)
class Submitted:
    """An answer that a server would decode."""

    answer: Assembler
    model: LanguageModel

    @property
    def prompt(self) -> str:
        return self.model.tokenizer.decode_verbatim(self.answer.prompt_ids)

    def accepts(self, text: str) -> bool:
        """Return whether a text would be allowed as the whole answer."""
        if self.answer.make_constraint is None:
            return True
        constraint, tokenizer = self.answer.make_constraint(), self.model.tokenizer
        for token in [*tokenizer.encode(text), min(tokenizer.stop_token_ids)]:
            if not unpack(constraint.allowed()[None], self.model.backend.vocab_size)[0][token]:
                return False
            constraint.advance(token)
        return True


def submitted(server: Running, path: str, body: object) -> Submitted:
    """Return the one answer that a server would decode for a request, which it then refuses."""
    refused = APIError(503, "not decoded")
    with failing(server.engine, "submit", refused), recording(server.engine, "submit") as calls:
        response = server.post(path, body)
    assert response.status_code == 503, response.text
    (((answer,),),) = calls
    return Submitted(answer, server.engine.model)


def pool_of(
    model: LanguageModel, defaults: dict | None = None, names: tuple[str, ...] = (NAME,), **settings
) -> ModelPool:
    """Return the pool of a server of one model, which is loaded already."""
    limits = Settings(**settings)
    spec = ModelSpec(names=names, load=lambda: model, settings=limits, defaults=defaults or {})
    pool = ModelPool([spec], limits)
    pool.start()
    return pool


@contextmanager
def serving(
    model: LanguageModel, defaults: dict | None = None, **settings: object
) -> Iterator[Running]:
    """Serve a model on a free port."""
    with serving_pool(pool_of(model, defaults, **settings)) as running:
        yield running


class QuickServer(Server):
    """Ends at once where it is forced to: uvicorn waits a tenth of a second, twice."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.005)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.force_exit:
            for listening in (*self.servers, *(sockets or ())):
                listening.close()
            for connection in list(self.server_state.connections):
                connection.shutdown()
            await asyncio.sleep(0.001)  # they are closed
        else:
            await super().shutdown(sockets)


@contextmanager
def serving_pool(pool: ModelPool, protocol: type[Protocol] = Protocol) -> Iterator[Running]:
    """Serve models on a free port."""
    listening = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = QuickServer(configuration(application(pool), protocol=protocol), pool)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        wait_until(lambda: server.started)
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            yield Running(url, pool, client, server)
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        pool.close()
