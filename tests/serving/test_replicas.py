"""Replicas: requests that are passed on, the choice of a replica, and Ray nightly."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
import threading
from itertools import count
from types import ModuleType, SimpleNamespace

import httpx
import psutil
import pytest
from asgi import Pieces, ask, ingress
from bodies import CHAT
from servers import PATIENCE, wait_until
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from treeflash.serving.relay import PrefixIndex, RelayedRequest, response_app, response_pieces
from treeflash.serving.settings import Settings

JSON = {"Content-Type": "application/json"}


def relayed(app):
    """An application that passes everything on to another."""

    async def pass_on(scope, receive, send):
        scope["state"] = {"cache_salt": ""}
        pieces = response_pieces(app, await RelayedRequest.receive(scope, receive))
        head = await anext(pieces)
        await response_app(head, pieces)(scope, receive, send)

    return pass_on


def test_answers_are_the_same():
    async def echo(request):
        return JSONResponse([request.path_params, request.url.query, await request.json()])

    app = Starlette(routes=[Route("/echo/{name}", echo, methods=["POST"])])
    body = [json.dumps({"messages": ["é"] * 1000}).encode()]
    for path, status in (("/echo/a b?q=1", 200), ("/missing", 404)):
        found, expected = (ask(x, "POST", path, JSON, body) for x in (relayed(app), app))
        assert (found.status, found.body) == (expected.status, expected.body)
        assert (found.headers, found.status) == (expected.headers, status)


def test_streams_come_piece_by_piece_and_end_with_the_client():
    ended = asyncio.Event()

    async def pieces():
        try:
            for i in count():
                yield b"%d\n" % i
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    async def run():
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        found = response_pieces(StreamingResponse(pieces()), RelayedRequest(scope, b"", "-"))
        status, _ = await anext(found)
        assert status == 200
        assert [await anext(found) for _ in range(3)] == [b"0\n", b"1\n", b"2\n"]
        await found.aclose()
        await asyncio.wait_for(ended.wait(), PATIENCE)

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


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (b'{"messages": [{"role": "user", "content": [{"text": "a"}]}]}', "user\na"),
        (b'{"instructions": "i", "input": [{"role": "user", "content": "a"}]}', "i\nuser\na"),
        (b'{"system": [{"text": "s"}], "messages": []}', "s"),
        (b'{"prompt": "p"}', "p"),
        (b"[1", "-"),
        (b"[1]", "-"),
        (b"", "-"),
        (b'{"prompt": ' + b"[" * 50 + b"]" * 50 + b"}", "-"),
        (b'{"prompt": ' + b"[" * 8 + b'"a"' + b"]" * 8 + b"}", "a"),
        (b'{"prompt": ' + b"[" * 9 + b'"a"' + b"]" * 9 + b"}", "-"),
    ],
)
def test_prompts_of_all_apis(body, prompt):
    passed_on = []
    ask(ingress(Starlette(), Settings(), passed_on), "POST", "/any", JSON, [body])
    assert [request.prompt for request in passed_on] == [prompt]


class Deployment:
    """What Ray would run: a class or function, its arguments, and options."""

    def __init__(self, target, **options):
        self.target, self.options, self.arguments = target, options, ()

    def bind(self, *arguments):
        self.arguments = arguments
        return self


class Locality:
    """Ray's choice of near replicas: all of them, except for `far`."""

    far = frozenset()

    def apply_locality_routing(self, pending):
        return {"a", "b", "c"} - self.far


@pytest.fixture
def ray_app(monkeypatch):
    """The module `ray_app` with a stand-in for Ray, which is large and starts slowly."""
    serve = {
        "deployment": Deployment,
        "ingress": lambda make: lambda: make,
        "Application": Deployment,
        "get_replica_context": lambda: SimpleNamespace(app_name="treeflash"),
    }
    kinds = ("PendingRequest", "ReplicaID", "RunningReplica")
    configs = ("AutoscalingConfig", "RequestRouterConfig")
    modules = {
        "ray": {},
        "ray.serve": serve,
        "ray.exceptions": {"RayError": type("RayError", (Exception,), {})},
        "ray.serve.config": dict.fromkeys(configs, SimpleNamespace),
        "ray.serve.request_router": {
            **dict.fromkeys(kinds, SimpleNamespace),
            "LocalityMixin": Locality,
            "RequestRouter": type("RequestRouter", (), {}),
        },
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["ray"])["serve"] = sys.modules["ray.serve"]
    monkeypatch.delitem(sys.modules, "treeflash.serving.ray_app", raising=False)
    yield importlib.import_module("treeflash.serving.ray_app")
    del sys.modules["treeflash.serving.ray_app"]


KEY = {**JSON, "Authorization": "Bearer secret"}
SETTINGS = {"api_keys": ("secret",), "max_parallel": 3, "max_queue": 9, "timeout": 50.0}


def test_what_is_deployed(ray_app):
    config = ray_app.RayConfig(
        replicas=2, max_replicas=5, target_requests=7, imbalance=4, cpus=2, gpus=1,
        settings=SETTINGS,
    )  # fmt: skip
    (replica,) = ray_app.build(config).arguments
    assert (replica.target, replica.arguments) == (ray_app.Replica, (config,))
    scaling, router = (
        replica.options[name] for name in ("autoscaling_config", "request_router_config")
    )
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.target_ongoing_requests == 7
    assert router.request_router_class is ray_app.PrefixRouter
    assert router.request_router_kwargs == {"imbalance": 4}
    assert replica.options["max_ongoing_requests"] == 3 + 9, "more must wait where they count"
    assert replica.options["graceful_shutdown_timeout_s"] == 50
    assert replica.options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 1}
    (fixed,) = ray_app.build(ray_app.RayConfig(replicas=3)).arguments
    assert vars(fixed.options["autoscaling_config"])["max_replicas"] == 3
    for wrong in ({"replicas": 0}, {"max_replicas": 0}, {"imbalance": -1}, {"replica": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ray_app.RayConfig(**wrong)


def test_the_ingress_and_its_replica(ray_app, folders):
    """Both have the settings, so neither answers without a key."""
    model = dict(zip(("target", "drafter"), map(str, folders), strict=True), backend="reference")
    config = ray_app.RayConfig(
        model=model, options={"max_tokens": 3}, names=("first",), settings=SETTINGS
    )
    replica, asked, relayed = ray_app.Replica(config), [], []

    def remote(request):
        relayed.append(request)
        return Pieces(replica.answer(request))

    def handle(name, **where):
        asked.append((name, where))
        return SimpleNamespace(
            options=lambda **x: asked.append(x) or SimpleNamespace(remote=remote)
        )

    try:
        vars(ray_app.serve)["get_deployment_handle"] = handle
        assert replica.pool.models[0].service.engine.model.folder == folders[0]
        app = ray_app.build(config).target()
        assert asked[0] == ("Replica", {"app_name": "treeflash"})
        assert asked[1] == {"stream": True, "method_name": "answer"}
        body = [b'{"prompt": "A", "ignore_eos": true}']
        assert ask(app, "POST", "/v1/completions", JSON, body).status == 401
        assert not relayed
        answer = ask(app, "POST", "/v1/completions", KEY, body)
        assert (answer.status, answer.json()["model"]) == (200, "first")
        assert answer.json()["usage"]["completion_tokens"] == 3
        (request,) = relayed
        request.scope["headers"] = [x for x in request.scope["headers"] if x[0] != b"authorization"]

        async def head():
            return await anext(replica.answer(request))

        assert asyncio.run(head())[0] == 401
        replica.check_health()
    finally:
        replica.pool.models[0].service.engine.stop()
    with pytest.raises(RuntimeError, match="the engine has ended"):
        replica.check_health()


def test_a_prompt_goes_where_its_beginning_went(ray_app):
    """If that queue is too long, the shortest one gets it. Only near replicas count."""
    router = ray_app.PrefixRouter()
    router.initialize_state(imbalance=2)
    router.replica_queue_len_cache = {}
    replicas = [SimpleNamespace(replica_id=name) for name in "abc"]

    def choose(text, **user):
        pending = None if text is None else SimpleNamespace(args=(prompt_of(text, **user),))
        chosen = asyncio.run(router.choose_replicas(replicas, pending))
        return ["".join(sorted(x.replica_id for x in ranks)) for ranks in chosen]

    text = "A beginning. " * 20
    assert choose(None) == ["abc"]
    assert choose(text) == ["", "abc"]
    router.on_request_routed(SimpleNamespace(args=(prompt_of(text),)), "b", None)
    assert choose(text + "An end.") == ["b", "ac"]
    assert choose(text, salt="another user") == ["", "abc"]
    assert choose("Something else. " * 20) == ["", "abc"]
    router.on_request_routed(SimpleNamespace(args=(prompt_of("x" * 64 + "y" * 90),)), "c", None)
    assert choose("x" * 64 + "z" * 90) == ["c", "ab"]
    assert choose("x" * 63 + "z" * 90) == ["", "abc"], "prompts are compared in blocks"
    router.replica_queue_len_cache = {"b": 2}
    assert choose(text) == ["b", "ac"]
    router.replica_queue_len_cache = {"b": 3}
    assert choose(text) == ["abc"]
    router.replica_queue_len_cache = {"a": 2, "b": 3, "c": 1}
    router.far = frozenset("c")
    assert choose(text) == ["b", "a"]


# Two replicas of the default pair behind Ray Serve.

STREAMS = 20
REPLICA = "ray::ServeReplica:treeflash:Replica"


@pytest.fixture(scope="module")
def url():
    ray = pytest.importorskip("ray")
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


# Ray is needed, which starts processes. `PrefixIndex` and the relay are tested above without it.
@pytest.mark.nightly
def test_the_same_beginning_goes_to_the_same_replica(url):
    long = "The Rhine flows from the Alps to the North Sea, and many towns lie on it. " * 8
    cached = []
    for question in ("Where does it end?", "Where does it begin?", "Which towns?"):
        body = chat(long + question, max_tokens=2)
        found = httpx.post(url + CHAT, json=body, timeout=300).json()
        cached.append(found["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert min(cached[1:]) > 100, cached


@pytest.mark.nightly
def test_a_killed_replica_loses_only_its_own_streams_and_is_replaced(url):
    ends: dict[int, str] = {}
    started = threading.Semaphore(0)

    def stream(i):
        body = chat(f"{i}: {'go on ' * i}", max_tokens=48, stream=True, ignore_eos=True)
        with httpx.stream("POST", url + CHAT, json=body, timeout=600) as response:
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
    wait_until(lambda: len(now := replica_pids()) == 2 and now != before)
    body = chat("Name a river.", max_tokens=2)
    assert httpx.post(url + CHAT, json=body, timeout=300).status_code == 200
