"""Requests that are passed on: the same answers, streams piece by piece, disconnects."""

from __future__ import annotations

import asyncio

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from treeflash.serving.relay import PrefixIndex, RelayedRequest, response_app, response_pieces


def relayed(app):
    """An application that passes everything on to another."""

    async def pass_on(scope, receive, send):
        scope["state"] = {"cache_salt": ""}
        pieces = response_pieces(app, await RelayedRequest.receive(scope, receive))
        head = await anext(pieces)
        await response_app(head, pieces)(scope, receive, send)

    return pass_on


def test_answers_are_the_same():
    app = FastAPI()

    @app.post("/echo/{name}")
    async def echo(name: str, request: Request):
        return {"name": name, "q": request.query_params["q"], "body": await request.json()}

    async def ask(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            found = await client.post("/echo/a%20b?q=1", json={"messages": ["é"] * 1000})
            missing = await client.get("/missing")
            return found.json(), dict(found.headers), missing.status_code

    assert asyncio.run(ask(relayed(app))) == asyncio.run(ask(app))


def test_streams_come_piece_by_piece_and_end_with_the_client():
    app, ended = FastAPI(), []

    @app.post("/stream")
    async def stream():
        async def pieces():
            try:
                for i in range(1000):
                    yield b"%d\n" % i
                    await asyncio.sleep(0.001)
            finally:
                ended.append(True)

        return StreamingResponse(pieces())

    async def run():
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/stream",
            "raw_path": b"/stream",
            "query_string": b"",
            "headers": [],
            "http_version": "1.1",
            "scheme": "http",
            "client": None,
            "server": None,
        }
        pieces = response_pieces(app, RelayedRequest(scope, b"", "-"))
        status, _ = await anext(pieces)
        assert status == 200
        assert [await anext(pieces) for _ in range(3)] == [b"0\n", b"1\n", b"2\n"]
        await pieces.aclose()
        for _ in range(100):
            await asyncio.sleep(0.01)
            if ended:
                return
        raise AssertionError("the stream went on")

    asyncio.run(run())


def prompt_of(text, salt="one user"):
    return RelayedRequest({}, b"", text, salt)


def test_the_router_finds_the_replica_with_the_longest_beginning():
    index = PrefixIndex(block=4, max_blocks=6)
    index.add(prompt_of("abcdefgh-first"), "one")
    index.add(prompt_of("abcdxxxx-second"), "two")
    both = {"one", "two"}

    def find(text, replicas=both, **user):
        return index.find(prompt_of(text, **user), replicas)

    assert find("abcdefghijkl") == {"one"}
    assert find("abcdefghijkl", salt="another user") == set(), "they share no cached states"
    assert find("abcdyyyy") == both
    assert find("abcdefghijkl", {"two"}) == {"two"}, "one is gone"
    assert find("abc") == set()
    assert find("abcd" + "y" * 40) == set(), "too little of it"
    for i in range(5):
        index.add(prompt_of(f"{i:4}"), "three")
    assert find("abcdefghijkl") == both, "the oldest continuations are forgotten first"


def test_prompts_of_all_apis():
    async def prompt(body):
        async def receive():
            return {"type": "http.request", "body": body}

        names = ("method", "path", "raw_path", "query_string", "headers", "http_version")
        scope = dict.fromkeys((*names, "scheme", "client", "server", "type"))
        scope["state"] = {"cache_salt": ""}
        return (await RelayedRequest.receive(scope, receive)).prompt

    cases = {
        b'{"messages": [{"role": "user", "content": [{"text": "a"}]}]}': "user\na",
        b'{"instructions": "i", "input": [{"role": "user", "content": "a"}]}': "i\nuser\na",
        b'{"system": [{"text": "s"}], "messages": []}': "s",
        b'{"prompt": "p"}': "p",
        b"[1": "-",
        b"": "-",
        b'{"prompt": ' + b"[" * 50 + b"]" * 50 + b"}": "-",
    }
    for body, expected in cases.items():
        assert asyncio.run(prompt(body)) == expected
