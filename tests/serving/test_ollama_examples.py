"""The requests of Ollama's page about its API, sent as curl sends them.

The page is docs/api.md of Ollama's repository at fb307609. Each of its examples has a line here,
with this server's model; a body is a form by its content type, because curl says so unless it is
told otherwise.
"""

from __future__ import annotations

import json

import pytest
from servers import NAME, serving
from stub_images import picture, url_of
from tool_models import tool_model

IMAGE = url_of(picture(3)).partition(",")[2]
SKY = {"model": NAME, "prompt": "Why is the sky blue?"}
MESSAGES = [{"role": "user", "content": "why is the sky blue?"}]
CHAT = {"model": NAME, "messages": MESSAGES}
WHOLE = {"stream": False}
SHORT = {"options": {"num_predict": 9}}
AGE = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "available": {"type": "boolean"}},
    "required": ["age", "available"],
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PLACE = {
    "type": "object",
    "properties": {
        "location": {"type": "string", "description": "San Francisco, CA"},
        "format": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["location", "format"],
}


def tool(name, parameters):
    function = {"name": name, "description": "Get the weather", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}]}


HISTORY = [
    *MESSAGES,
    {"role": "assistant", "content": "due to rayleigh scattering."},
    {"role": "user", "content": "how is that different than mie scattering?"},
]
CALL = {"function": {"name": "get_weather", "arguments": {"city": "Toronto"}}}
CALLED = [
    {"role": "user", "content": "what is the weather in Toronto?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "11 degrees celsius", "tool_name": "get_weather"},
]
OPTIONS = {
    "num_keep": 5,
    "seed": 42,
    "num_predict": 9,
    "draft_num_predict": 4,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.0,
    "repeat_last_n": 33,
    "temperature": 0.8,
    "repeat_penalty": 1.2,
    "presence_penalty": 1.5,
    "frequency_penalty": 1.0,
    "penalize_newline": True,
    "stop": ["\n", "user:"],
    "numa": False,
    "num_ctx": 1024,
    "num_batch": 2,
    "num_gpu": 1,
    "main_gpu": 0,
    "use_mmap": True,
    "num_thread": 8,
}
GENERATE, TALK = "/api/generate", "/api/chat"
ANSWERED = [
    (GENERATE, {**SKY, **SHORT}),
    (GENERATE, {**SKY, **SHORT, **WHOLE}),
    (GENERATE, {**SKY, **WHOLE, "format": AGE, "options": {"num_predict": 200}}),
    (GENERATE, {**SKY, **SHORT, **WHOLE, "format": "json"}),
    (GENERATE, {**SKY, **SHORT, **WHOLE, "prompt": "[INST] why? [/INST]", "raw": True}),
    (GENERATE, {**SKY, "options": {"seed": 123, "num_predict": 9}}),
    (GENERATE, {**SKY, **WHOLE, "options": OPTIONS}),
    (GENERATE, {"model": NAME}),
    (GENERATE, {"model": NAME, "keep_alive": 0}),
    (TALK, {**CHAT, **SHORT}),
    (TALK, {**CHAT, **SHORT, **tool("get_weather", CITY)}),
    (TALK, {**CHAT, **SHORT, **WHOLE}),
    (TALK, {**CHAT, **SHORT, **WHOLE, **tool("get_weather", CITY)}),
    (TALK, {**CHAT, **WHOLE, "format": AGE, "options": {"temperature": 0, "num_predict": 200}}),
    (TALK, {**CHAT, **SHORT, "messages": HISTORY}),
    (TALK, {**CHAT, **SHORT, **WHOLE, **tool("get_weather", CITY), "messages": CALLED}),
    (TALK, {**CHAT, "options": {"seed": 101, "temperature": 0, "num_predict": 9}}),
    (TALK, {**CHAT, **SHORT, **WHOLE, **tool("get_current_weather", PLACE)}),
    (TALK, {"model": NAME, "messages": []}),
    (TALK, {"model": NAME, "messages": [], "keep_alive": 0}),
    ("/api/show", {"model": NAME}),
]
FILL, FIXED, NO_EMBEDDINGS = "suffix needs a model", "changes none", "embeddings"
DIGEST = "sha256:29fdb92e57cf0827ded04ae6461b5931d01fa595843f55d36f5b275a52087dd2"
REFUSED = [
    ("POST", GENERATE, {**SKY, **WHOLE, "suffix": "    return result"}, 400, FILL),
    ("POST", GENERATE, {**SKY, "options": {"typical_p": 0.7}}, 400, "options.typical_p"),
    ("POST", GENERATE, {**SKY, "images": [IMAGE]}, 400, "images"),
    ("POST", TALK, {**CHAT, "messages": [{**MESSAGES[0], "images": [IMAGE]}]}, 400, "images"),
    ("POST", "/api/create", {"model": "mario", "from": NAME, "system": "Be Mario."}, 404, FIXED),
    ("POST", "/api/create", {"model": "q", "from": NAME, "quantize": "q4_K_M"}, 404, FIXED),
    ("POST", "/api/create", {"model": "q", "files": {"test.gguf": DIGEST}}, 404, FIXED),
    ("POST", f"/api/blobs/{DIGEST}", {}, 404, FIXED),
    ("POST", "/api/copy", {"source": NAME, "destination": "other"}, 404, FIXED),
    ("DELETE", "/api/delete", {"model": NAME}, 404, FIXED),
    ("POST", "/api/pull", {"model": NAME}, 404, FIXED),
    ("POST", "/api/push", {"model": NAME}, 404, FIXED),
    ("POST", "/api/embed", {"model": NAME, "input": "Why?"}, 404, NO_EMBEDDINGS),
    ("POST", "/api/embed", {"model": NAME, "input": ["Why?", "How?"]}, 404, NO_EMBEDDINGS),
    ("POST", "/api/embeddings", {"model": NAME, "prompt": "Llamas"}, 404, NO_EMBEDDINGS),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tool_model(tmp_path_factory.mktemp("tools"))) as running:
        yield running


def curl(server, path, body, method="POST"):
    """Send a body as `curl -d` does."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    content = json.dumps(body).encode()
    return server.client.request(method, path, content=content, headers=headers)


@pytest.mark.parametrize(("path", "body"), ANSWERED)
def test_examples_are_answered(server, path, body):
    response = curl(server, path, body)
    assert response.status_code == 200, response.text
    *_, last = map(json.loads, response.text.splitlines())
    if path == "/api/show":
        assert last["details"]["family"] == "llama"
        return
    assert last["done"]
    if isinstance(body.get("format"), dict) and last["done_reason"] == "stop":
        text = last["response"] if path == GENERATE else last["message"]["content"]
        assert json.loads(text).keys() == {"age", "available"}


@pytest.mark.parametrize(("method", "path", "body", "status", "says"), REFUSED)
def test_examples_that_are_refused_have_a_reason(server, method, path, body, status, says):
    response = curl(server, path, body, method)
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert says in response.json()["error"]
    assert "\n" not in response.json()["error"]


def test_lists_are_asked_for_without_a_body(server):
    for path in ("/api/tags", "/api/ps"):
        (model,) = server.client.get(path).json()["models"]
        assert model["name"] == NAME
    assert server.client.head(f"/api/blobs/{DIGEST}").status_code == 404
    assert server.client.get("/api/version").json()["version"]
