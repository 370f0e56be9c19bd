"""API keys, and what they may see of each other; web pages of other origins."""

from __future__ import annotations

import pytest
from servers import check_error

PROMPT = "The same long prompt, sent by two users."


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        {"Authorization": "Bearer"},
        bearer("firs"),
        {"Authorization": "first"},
        {"Authorization": "Basic first"},
        {"x-api-key": "wrong"},
        {"x-api-key": "fi\u00e4st"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")],
)
def test_without_a_key(guarded, headers, method, path):
    headers = {name: value.encode() for name, value in headers.items()}
    response = guarded.client.request(method, path, headers=headers)
    check_error(response, 401, "API key is missing or wrong")
    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.fixture(scope="module")
def guarded(model):
    from servers import serving

    with serving(model, api_keys=("first", "second")) as running:
        yield running


@pytest.mark.parametrize("headers", [bearer("first"), bearer("second"), {"x-api-key": "first"}])
def test_with_a_key(guarded, headers):
    assert guarded.client.get("/v1/models", headers=headers).status_code == 200
    assert guarded.post("/tokenize", {"prompt": "A"}, **headers).status_code == 200


def test_health_needs_no_key(guarded):
    assert guarded.client.get("/health").status_code == 200


def test_keys_share_no_states(guarded):
    """Otherwise the time of an answer would tell one user what another has asked."""

    def cached(key):
        body = {"prompt": PROMPT, "max_tokens": 2}
        usage = guarded.post("/v1/completions", body, **bearer(key)).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached("first") == 0
    assert cached("second") == 0
    assert cached("first") > 0
    assert cached("second") > 0


ORIGIN = {"Origin": "https://chat.example"}
PREFLIGHT = {
    **ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type, authorization",
}
ALLOW = "Access-Control-Allow-Origin"


def test_other_origins_are_allowed_only_if_named(serve):
    server = serve(cors_origins=("https://chat.example",), api_keys=("first",))
    path = "/v1/chat/completions"
    preflight = server.client.options(path, headers=PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers[ALLOW] == "https://chat.example"
    refused = server.post(path, {}, **ORIGIN)
    assert refused.status_code == 401
    assert refused.headers[ALLOW] == "https://chat.example"  # so that a page sees the error
    other = server.client.options(path, headers={**PREFLIGHT, "Origin": "https://evil.example"})
    assert other.status_code == 400


def test_no_origin_is_allowed_by_default(server):
    assert server.client.options("/v1/models", headers=PREFLIGHT).status_code == 405
    assert ALLOW not in server.client.get("/v1/models", headers=ORIGIN).headers
