"""Who may use the server: keys, bodies and origins, on every route, of replicas too."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import ExitStack
from functools import cache

import httpx
import pytest
from asgi import LostReplicaError, Pieces, ask, ask_async, ingress
from bodies import MESSAGES, OLLAMA, REQUESTS, USER
from failures import failing
from pydantic import TypeAdapter
from recordings import recording
from servers import PATIENCE, Gate, check_error, error_of, pool_of, serving, wait_until
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

anthropic = pytest.importorskip("anthropic")

from treeflash.errors import ConfigError, NumericalError, PromptError
from treeflash.serving import authentication
from treeflash.serving.application import application as app_of
from treeflash.serving.authentication import AuthenticationMiddleware
from treeflash.serving.errors import APIError
from treeflash.serving.relay import relay_application
from treeflash.serving.settings import Settings

KEYS = ("first-key", "second-key", "third-key", "Fourth key", "fünfter")
OPEN = {
    *("/", "/health", "/page.css", "/chat.js", "/stream.js", "/tree.js", "/markdown.js"),
    *("/images.js", "/vendor/marked.js", "/vendor/purify.js"),
}
"""All paths that need no key, according to the documentation."""
JSON = {"Content-Type": "application/json"}
STREAMS = [
    path for path in REQUESTS if path.startswith("/v1/") and not path.endswith("count_tokens")
]
"""The routes whose streams are server-sent events."""


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def content(path, **fields):
    return json.dumps(REQUESTS[path] | fields).encode()


@pytest.fixture(scope="module")
def started(model):
    """Servers by their settings; they live as long as the module's tests."""
    with ExitStack() as servers:
        start = cache(
            lambda settings: servers.enter_context(serving(model, **json.loads(settings)))
        )
        yield lambda **settings: start(json.dumps(settings, sort_keys=True))


@pytest.fixture(params=["server", "ingress"])
def application(request, started):
    """The application with some settings: the server's own, or the one in front of replicas."""

    def make(**settings):
        server = started(**settings)
        app = server.server.config.app
        return ingress(app, server.engine.settings) if request.param == "ingress" else app

    return make


@pytest.fixture
def guarded(application):
    return application(api_keys=KEYS)


@pytest.fixture(scope="module")
def routes(started):
    """Each method and path of the server's application, with examples for the parts in braces."""
    routes = started(api_keys=KEYS).server.config.app.routes
    found = {
        (method, re.sub(r"\{[^}]*\}", "tiny", route.path))
        for route in routes
        for method in route.methods
    }
    assert {path for method, path in found if method == "POST"} == set(REQUESTS)
    return sorted(found)


def test_every_route_but_health_and_the_page_needs_a_key(guarded, routes):
    assert {path for _, path in routes} > OPEN | {"/openapi.json", "/metrics", "/v1/models/tiny"}
    for method, path in routes:
        answer = ask(guarded, method, path, JSON)
        if path in OPEN:
            assert answer.status == 200, path
        else:
            assert answer.status == 401, (method, path)
            assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_every_method_and_every_other_path_needs_a_key(guarded, routes, method):
    closed = {path for _, path in routes} - OPEN
    odd = ["/nothing", "/health/", "/healthz", "/health/x", "//health", "/HEALTH", "/health.json"]
    odd += ["/v1/../health", "/v1", "/index.html", "/page.css/../../metrics", "/docs", ""]
    for path in [*closed, *odd]:
        assert ask(guarded, method, path, JSON).status == 401, path


def test_a_key_opens_every_route(guarded, routes):
    for method, path in routes:
        body = content(path) if method == "POST" else b""
        headers = JSON | bearer("second-key")
        assert ask(guarded, method, path, headers, [body]).status == 200, (method, path)


def test_every_key_is_accepted_in_both_headers(guarded):
    for key in KEYS:
        sent = key.encode().decode("latin-1")
        ascii_only = key.isascii()
        for headers in (bearer(sent), {"Authorization": f"bearer {sent}"}, {"x-api-key": sent}):
            status = ask(guarded, "GET", "/v1/models", headers).status
            assert status == (200 if ascii_only else 401), (key, headers)


@pytest.mark.parametrize("key", [k for k in KEYS if k.isascii()])
def test_what_resembles_a_key_is_none(guarded, key):
    digest = authentication.digest_of(key)
    for wrong in ("", key[:-1], key + "x", key.swapcase(), f"{key},{key}", f'"{key}"', digest, "*"):
        for headers in (bearer(wrong), {"x-api-key": wrong}, {"Authorization": wrong}):
            assert ask(guarded, "GET", "/v1/models", headers).status == 401, headers
    others = ({"Authorization": f"Basic {key}"}, {"api-key": key}, {"Cookie": f"key={key}"})
    for headers in (*others, {"Authorization": "Bearer"}, {}):
        assert ask(guarded, "GET", "/v1/models", headers).status == 401, headers
    assert ask(guarded, "GET", f"/v1/models?api_key={key}").status == 401


def test_the_time_of_a_check_does_not_depend_on_the_key():
    """A key is compared with all valid keys, whichever is right, by a function made for that."""
    app = AuthenticationMiddleware(JSONResponse({}), Settings(api_keys=KEYS))
    for key in ("first-key", "third-key", "Fourth key", "wrong", ""):
        with recording(authentication.hmac, "compare_digest") as compared:
            ask(app, "GET", "/v1/models", bearer(key))
        assert len(compared) == len(KEYS)
        assert len({one for one, _ in compared}) == 1


def test_without_a_key_no_part_of_a_body_is_read(guarded, routes):
    """Otherwise anyone could fill the server's memory."""
    posts = [path for method, path in routes if method == "POST"]
    assert posts
    for path in posts:
        answer = ask(guarded, "POST", path, JSON, [b"x" * 1000] * 50)
        assert (answer.status, answer.pieces_read) == (401, 0), path


def test_websockets_are_refused(guarded):
    """No route is one, and a key is not asked for before the application sees it."""
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message["type"])

    scope = {"type": "websocket", "path": "/v1/completions", "headers": [], "query_string": b""}
    asyncio.run(asyncio.wait_for(guarded(scope | {"root_path": ""}, receive, send), PATIENCE))
    assert sent == ["websocket.close"]


def test_each_key_has_its_own_salt():
    """The salt keeps cached states apart, so no two keys may have the same one."""
    salts = []

    async def endpoint(request):
        salts.append(request.state.cache_salt)
        return JSONResponse({})

    keys = tuple(f"key-{i}" for i in range(400))
    app = Starlette(routes=[Route("/{path:path}", endpoint)])
    guarded = AuthenticationMiddleware(app, Settings(api_keys=keys))

    async def send_all(header):
        for key in keys:
            await ask_async(guarded, "GET", "/v1/models", header(key))

    asyncio.run(send_all(bearer))
    assert len(set(salts)) == len(keys)
    assert not set(salts) & {"", None, *keys}
    # Nor may anyone find another text with the salt of a key: that would be a key, too.
    assert {len(bytes.fromhex(salt)) for salt in salts} == {32}
    assert {len(set(digits)) for digits in zip(*salts, strict=True)} == {16}
    first = salts.copy()
    salts.clear()
    asyncio.run(send_all(lambda key: {"x-api-key": key}))
    assert salts == first, "a key has one salt, whatever header it is in"


@pytest.mark.sample(2)
@pytest.mark.parametrize("path", STREAMS)
def test_no_route_shares_cached_states_between_keys(application, path, request):
    """A client would learn from the usage, and from the time, what another has asked."""
    keys = tuple(f"{request.node.name}-{i}" for i in range(6))
    app = application(api_keys=keys)
    secret = "A long secret that only some users have sent. " * 2
    (field,) = {"prompt", "messages", "input"} & set(REQUESTS[path])
    prompt = [USER | {"content": secret}] if field == "messages" else secret

    def cached(key):
        answer = ask(app, "POST", path, JSON | bearer(key), [content(path, **{field: prompt})])
        assert answer.status == 200, answer.body
        (found,) = re.findall(rb'"(?:cached|cache_read_input)_tokens":(\d+)', answer.body)
        return int(found)

    assert [cached(key) for key in keys] == [0] * len(keys)
    assert min(cached(key) for key in keys) > 0


@pytest.mark.sample(1)
@pytest.mark.parametrize("path", STREAMS)
def test_no_route_copies_answers_to_another_key(application, started, path, request):
    """A copied answer takes fewer iterations, and so less time."""
    keys = tuple(f"{request.node.name}-{i}" for i in range(4))
    # Answers of random tokens hardly repeat a part of themselves.
    defaults = {"method": "suffix", "budget": 16, "temperature": 1.0, "seed": 5}
    settings = {"api_keys": keys, "suffix_cache_gb": 0.01, "defaults": defaults}
    app, scheduler = application(**settings), started(**settings).engine.scheduler
    (limit,) = {"max_tokens", "max_output_tokens"} & set(REQUESTS[path])

    def iterations_of(key):
        with recording(scheduler, "step") as steps:
            answer = ask(app, "POST", path, JSON | bearer(key), [content(path, **{limit: 60})])
        assert answer.status == 200, answer.body
        return len(steps)

    firsts = [iterations_of(key) for key in keys]
    assert firsts == firsts[:1] * len(keys)
    assert max(iterations_of(key) for key in keys) < firsts[0] / 2


WRONG_TYPES = [
    *("text/plain", "text/plain; application/json", "text/plain;charset=application/json"),
    *("text/plain, application/json", "multipart/form-data; boundary=application/json"),
    *("application/x-www-form-urlencoded; application/json", "application/jsonp"),
    *("application/json-patch+json", "application/vnd.api+json", "x-application/json"),
    *("application/ld+json; profile=application/json", "application", "json", "", None),
]
"""Types that a page of another origin may send without asking, and others that are not JSON."""


BROWSERS = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Sec-Fetch-Site": "cross-site"},
    {"sec-fetch-site": "same-origin"},
]
"""Headers of which a browser adds at least one to each body that a page sends."""


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("browser", BROWSERS, ids=lambda x: "-".join([*x, *x.values()]))
def test_bodies_of_another_type_are_refused_from_browsers(application, path, browser):
    """A page of any origin may send them without the browser's asking for permission."""
    app = application(cors_origins=("*",))
    for kind in WRONG_TYPES:
        headers = browser if kind is None else {"Content-Type": kind, **browser}
        answer = ask(app, "POST", path, headers, [content(path)])
        assert answer.status == 415, kind
        says = error_of(path, answer.json())["message"]
        assert "send Content-Type: application/json" in says


@pytest.mark.sample(60)
@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("kind", WRONG_TYPES)
def test_programs_may_send_bodies_of_any_type(application, path, kind):
    """Curl calls every body a form, unless it is told otherwise."""
    headers = {} if kind is None else {"Content-Type": kind}
    answer = ask(application(), "POST", path, headers, [content(path)])
    assert answer.status == 200, answer.body


def test_other_spellings_of_the_type_are_accepted(application):
    for kind in ("application/json; charset=utf-8", "Application/JSON", " application/json ;x=y"):
        headers = {"Content-Type": kind, "Origin": "null"}
        answer = ask(application(), "POST", "/tokenize", headers, [content("/tokenize")])
        assert answer.status == 200, kind


LIMIT = int(0.01 * 2**20)


def padded(path, size):
    """A valid request of some bytes."""
    body = content(path)
    return body + b" " * (size - len(body))


def pieces(body, size=500):
    return [body[i : i + size] for i in range(0, len(body), size)]


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("size", [100, 10**9])
def test_a_body_is_limited_as_a_whole(application, path, size):
    app = application(max_body_mb=0.01)
    assert ask(app, "POST", path, JSON, pieces(padded(path, LIMIT), size)).status == 200
    for length in (LIMIT + 1, 5 * LIMIT):
        answer = ask(app, "POST", path, JSON, pieces(padded(path, length), size))
        assert answer.status == 413, length
        assert f"more than {LIMIT} bytes" in error_of(path, answer.json())["message"]


@pytest.mark.parametrize("declared", ["10", None])
def test_reading_stops_at_the_limit(application, declared):
    """Whatever length the client declares, the server does not keep more than the limit."""
    headers = JSON if declared is None else {**JSON, "Content-Length": declared}
    answer = ask(application(max_body_mb=0.01), "POST", "/tokenize", headers, [b" " * 1000] * 200)
    assert answer.status == 413
    assert answer.pieces_read <= LIMIT // 1000 + 1


@pytest.mark.sample(4)
@pytest.mark.parametrize("path", REQUESTS)
def test_all_pieces_of_a_body_must_arrive_in_time(application, path):
    """A client cannot hold a connection by sending a bit of its body at times."""
    app = application(body_timeout=0.2)
    slow = pieces(padded(path, 800), 20)
    answer = ask(app, "POST", path, JSON, slow, pause=0.05)
    assert answer.status == 408
    assert "did not arrive within 0.2 seconds" in error_of(path, answer.json())["message"]
    assert answer.headers["Connection"] == "close", "the rest of the body is not a request"
    assert answer.pieces_read < len(slow)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE"])
def test_the_ingress_reads_no_body_without_a_limit(started, method):
    """Only a POST has a body, as no other route reads one."""
    server, relayed = started(max_body_mb=0.01), []
    app = ingress(server.server.config.app, server.engine.settings, relayed)
    for path in ("/v1/models", "/v1/completions"):
        ask(app, method, path, JSON, [b"x" * 1000] * 50)
    assert [request.body for request in relayed] == [b"", b""]


def test_bodies_in_many_pieces_are_put_together(application):
    body = json.dumps({"prompt": "Größe 🙂" * 30}).encode()
    whole = ask(application(), "POST", "/tokenize", JSON, [body]).json()
    assert ask(application(), "POST", "/tokenize", JSON, pieces(body, 1)).json() == whole
    assert whole["count"] > 30


ORIGIN, OTHER = "https://chat.example", "https://evil.example"


def preflight(app, path, origin=ORIGIN, method="POST", headers="authorization, content-type"):
    asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    return ask(app, "OPTIONS", path, {"Origin": origin, **asked})


@pytest.mark.parametrize("path", [*REQUESTS, "/v1/models", "/metrics"])
def test_pages_of_a_named_origin_may_use_every_route(application, path):
    """Browsers send the preflight without a key."""
    app = application(cors_origins=(ORIGIN, "https://b.example"), api_keys=KEYS)
    answer = preflight(app, path)
    assert answer.status == 200
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert {"POST", "GET"} == set(answer.headers["Access-Control-Allow-Methods"].split(", "))
    assert preflight(app, path, OTHER).status == 400
    assert preflight(app, path, headers="x-api-key, anthropic-version").status == 200
    for method in ("DELETE", "PUT", "PATCH"):
        assert preflight(app, path, method=method).status == 400
    post = path in REQUESTS
    for headers, status in ((bearer("wrong"), 401), (bearer("first-key"), 200)):
        for origin, allowed in ((ORIGIN, ORIGIN), (OTHER, None)):
            sent = JSON | headers | {"Origin": origin}
            body = [content(path)] if post else [b""]
            found = ask(app, "POST" if post else "GET", path, sent, body)
            assert found.status == status
            assert found.headers.get("Access-Control-Allow-Origin") == allowed
            assert "Access-Control-Allow-Credentials" not in found.headers


@pytest.mark.parametrize("origins", [(ORIGIN,), ("*",)])
def test_pages_may_not_send_credentials(application, origins):
    """A key is not a cookie: a page must have it, and not only the browser."""
    app = application(cors_origins=origins)
    assert "Access-Control-Allow-Credentials" not in preflight(app, "/v1/models").headers
    found = ask(app, "GET", "/v1/models", {"Origin": ORIGIN, "Cookie": "a=b"})
    assert "Access-Control-Allow-Credentials" not in found.headers
    assert found.headers["Access-Control-Allow-Origin"] == origins[0]


def test_no_origin_is_allowed_by_default(application):
    for origin in (ORIGIN, "null", "http://127.0.0.1:8000", "http://localhost"):
        assert preflight(application(), "/v1/completions", origin).status == 405
        found = ask(application(), "GET", "/v1/models", {"Origin": origin})
        assert not [name for name in found.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("origin", "address", "settings", "status"),
    [
        (OTHER, "127.0.0.1", {}, 403),
        (OTHER, "::1", {}, 403),
        (OTHER, "::ffff:127.0.0.1", {}, 403),
        (OTHER, "::ffff:192.168.0.7", {}, 200),
        (OTHER, "127.0.0.1", {"cors_origins": (ORIGIN,)}, 403),
        (OTHER, "127.0.0.1", {"cors_origins": (OTHER,)}, 200),
        (OTHER, "127.0.0.1", {"cors_origins": ("*",)}, 200),
        (OTHER, "127.0.0.1", {"api_keys": KEYS}, 200),
        (OTHER, "192.168.0.7", {}, 200),
        ("http://localhost:8000", "127.0.0.1", {}, 200),
        ("http://[::1]:8000", "::1", {}, 200),
        ("vscode-file://vscode-app", "127.0.0.1", {}, 200),
        ("null", "127.0.0.1", {}, 200),
        ("http://[", "127.0.0.1", {}, 403),
    ],
)
def test_a_page_whose_name_leads_to_this_machine_is_refused(
    application, origin, address, settings, status
):
    app, headers = application(**settings), JSON | bearer("first-key") | {"Origin": origin}

    async def at_address(scope, receive, send):
        await app({**scope, "server": (address, 8000)}, receive, send)

    answer = ask(at_address, "POST", "/tokenize", headers, [content("/tokenize")])
    assert answer.status == status
    assert ("--cors-origin" in answer.body.decode()) == (status == 403)


@pytest.mark.parametrize("path", STREAMS)
def test_proxies_are_asked_not_to_hold_streams_back(application, path):
    answer = ask(application(), "POST", path, JSON, [content(path, stream=True)])
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["Cache-Control"] == "no-cache"


DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
"""Fields of Ollama's answers that differ each time."""


@pytest.mark.parametrize("path", REQUESTS)
def test_the_ingress_passes_on_what_the_server_answers(started, path):
    server = started()
    app, relayed = server.server.config.app, []
    front = ingress(app, server.engine.settings, relayed)
    whole = [ask(x, "POST", path, JSON, [content(path)]) for x in (front, app)]
    assert len(relayed) == 1
    bodies = [answer.json() for answer in whole]
    for body in bodies:
        for name in ("id", "created", "created_at", "completed_at", "usage", "output", *DURATIONS):
            body.pop(name, None)
    assert bodies[0] == bodies[1]
    assert dict(whole[0].headers).keys() == dict(whole[1].headers).keys()


ENDS_OF_STREAMS = {
    "/v1/completions": r'data: \{"error":.*"code":"replica_lost"\}\}\n\n',
    "/v1/messages": r'event: error\ndata: \{"type":"error","error":\{.*\}\}\n\n',
    "/api/chat": r'\{"error":"the replica that answered has ended.*"\}\n',
}


@pytest.mark.parametrize("path", ENDS_OF_STREAMS)
def test_a_stream_of_a_lost_replica_ends_in_the_form_of_its_api(caplog, path):
    async def half():
        yield 200, []
        yield b"some\n"
        raise LostReplicaError("it died")

    app = relay_application(lambda request: Pieces(half()), LostReplicaError, Settings())
    body = ask(app, "POST", path, JSON, [b"{}"]).body.decode()
    assert re.fullmatch("some\n" + ENDS_OF_STREAMS[path], body), body
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_lost_replica_is_an_error_that_says_so(caplog):
    async def nothing():
        raise LostReplicaError("it died")
        yield

    before = relay_application(lambda request: Pieces(nothing()), LostReplicaError, Settings())
    answer = ask(before, "POST", "/v1/completions", JSON, [b"{}"])
    assert (answer.status, answer.json()["error"]["code"]) == (503, "replica_lost")
    assert int(answer.headers["Retry-After"]) >= 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_disconnect_reaches_the_replica(begun):
    """So does the disconnect of a whole answer, whose status comes at its end."""
    pieces = []

    async def run():
        disconnect = asyncio.Event()

        async def answer():
            if begun:
                yield 200, []
            disconnect.set()
            await asyncio.Event().wait()
            yield 200, []

        def send(request):
            pieces.append(Pieces(answer()))
            return pieces[0]

        app = relay_application(send, LostReplicaError, Settings())
        request = ask_async(app, "POST", "/v1/completions", JSON, [b"{}"], disconnect=disconnect)
        await asyncio.wait_for(request, PATIENCE)

    asyncio.run(run())
    assert pieces[0].cancelled


async def tasks_left():
    """The other tasks of the event loop that do not end by themselves."""
    for _ in range(100):
        if len(asyncio.all_tasks()) == 1:
            break
        await asyncio.sleep(0.01)
    return asyncio.all_tasks() - {asyncio.current_task()}


@pytest.mark.parametrize("path", [*STREAMS, f"{OLLAMA}chat"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_leaves_no_task(started, path, stream):
    server = started()

    async def run():
        body = content(path, stream=stream)
        assert (await ask_async(server.server.config.app, "POST", path, JSON, [body])).body
        return await tasks_left()

    assert not asyncio.run(run())


@pytest.mark.parametrize("path", [*STREAMS, f"{OLLAMA}chat"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_leaves_no_task(started, path, stream):
    """A task that waited for the next tokens would keep the answer in memory up to its deadline."""
    server = started()
    body = content(path, stream=stream)

    async def run():
        gone = asyncio.Event()
        app = server.server.config.app
        asked = asyncio.create_task(ask_async(app, "POST", path, JSON, [body], disconnect=gone))
        while not server.engine.unfinished:
            await asyncio.sleep(0.001)
        gone.set()
        await asked
        return await tasks_left()

    with Gate(server.engine):
        assert not asyncio.run(run())
    wait_until(lambda: not server.engine.unfinished)


def test_requests_of_one_key_are_routed_by_their_prompts_alone(started):
    """A replica has cached states of the same key only."""
    server = started(api_keys=KEYS)
    relayed = []
    app = ingress(server.server.config.app, server.engine.settings, relayed)
    for key in ("first-key", "first-key", "second-key"):
        ask(app, "POST", "/tokenize", JSON | bearer(key), [content("/tokenize")])
    first, again, other = relayed
    assert first.prompt == again.prompt == other.prompt
    assert first.cache_salt == again.cache_salt != other.cache_salt


ERRORS = [
    (PromptError("x"), 400, "invalid_request_error", None),
    (ConfigError("x"), 400, "invalid_request_error", None),
    (APIError(401, "x"), 401, "authentication_error", None),
    (APIError(403, "x"), 403, "invalid_request_error", None),
    (APIError(404, "x"), 404, "not_found_error", None),
    (APIError(408, "x"), 408, "timeout_error", None),
    (APIError(413, "x"), 413, "invalid_request_error", None),
    (APIError(429, "x"), 429, "rate_limit_error", None),
    (NumericalError("x"), 500, "server_error", None),
    (KeyError("a secret"), 500, "server_error", "internal_error"),
    (MemoryError("a secret"), 503, "service_unavailable_error", "memory"),
    (TimeoutError("a secret"), 504, "timeout_error", "timeout"),
]
ANTHROPIC_TYPES = {
    403: "permission_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize(("error", "status", "kind", "code"), ERRORS)
def test_errors_have_the_form_of_their_api(started, caplog, path, error, status, kind, code):
    """Programs read the type; messages of unknown errors are for the log alone."""
    server = started()
    # The server closes the connection behind an error that it does not know.
    with failing(server.engine, "submit", error):
        response = httpx.post(f"{server.url}{path}", json=REQUESTS[path])
    if path == MESSAGES:
        kind = ANTHROPIC_TYPES.get(status, kind)
        if status != 413:  # the documentation has its type, and the package has not
            TypeAdapter(anthropic.types.ErrorResponse).validate_python(response.json())
    assert "secret" not in check_error(response, status, type=kind, code=code)
    if isinstance(error, KeyError):
        assert "a secret" in caplog.text


def test_refusals_have_the_form_of_their_api(guarded):
    """The endpoints never see the refused requests."""
    for path in REQUESTS:
        error = error_of(path, ask(guarded, "POST", path, JSON, [content(path)]).json())
        assert error["message"].startswith("the API key is missing or wrong; send it as ")
        assert error.get("type", "authentication_error") == "authentication_error"


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_have_any_name_of_the_model_and_responses_the_first(started, path, stream):
    model = started().engine.model
    app = app_of(pool_of(model, names=("first", "second")))
    for name in ("first", "second"):
        answer = ask(app, "POST", path, JSON, [content(path, model=name, stream=stream)])
        assert answer.status == 200, answer.body
        assert set(re.findall(r'"model": ?"(\w+)"', answer.body.decode())) == {"first"}
        assert ask(app, "GET", f"/v1/models/{name}").json()["id"] == name
    assert [x["id"] for x in ask(app, "GET", "/v1/models").json()["data"]] == ["first", "second"]
    for method, sent in (("POST", [content(path, model="third")]), ("GET", [b""])):
        where = path if method == "POST" else "/v1/models/third"
        assert ask(app, method, where, JSON, sent).status == 404
