"""Tools, reasoning and structured output over HTTP."""

from __future__ import annotations

import json

import pytest
from servers import serving
from tool_models import CHAT_TEMPLATE, RESPONSE_TEMPLATE, tool_model

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello."}]
COLOUR = {"type": "string", "enum": ["red", "blue"]}
PAINT = {
    "type": "object",
    "properties": {"colour": COLOUR, "twice": {"type": "boolean"}},
    "required": ["colour", "twice"],
    "additionalProperties": False,
}


def tool(name, parameters, **fields):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


TOOLS = [tool("paint", PAINT), tool("stop", {"type": "object", "additionalProperties": False})]
FORMAT = {"type": "json_schema", "json_schema": {"name": "paint", "schema": PAINT}}
SAMPLED = {"max_tokens": 600, "temperature": 1.0, "seed": 0}
"""With the same seed always, because a few random texts do not end within the limit."""


@pytest.fixture(scope="module")
def tokenizer(server):
    return server.engine.model.tokenizer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tool_model(tmp_path_factory.mktemp("tools")), SAMPLED) as running:
        yield running


def message(response):
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["message"], choice["finish_reason"]


def check(call):
    """Raise unless a call follows the schema of its tool."""
    assert call["type"] == "function"
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "paint":
        assert arguments["colour"] in ("red", "blue")
        assert isinstance(arguments["twice"], bool)
        assert len(arguments) == 2
    else:
        assert (call["function"]["name"], arguments) == ("stop", {})


@pytest.mark.sample(3)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("thinking", [False, None])
def test_a_call_that_must_be_made(server, seed, thinking):
    args = {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
    found, reason = message(
        server.chat(
            tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed, **args
        )
    )
    assert "tool_calls" in found, found
    (call,) = found["tool_calls"]
    check(call)
    assert (found["content"], reason) == (None, "tool_calls")


def test_a_named_call_streamed(server):
    choice = {"type": "function", "function": {"name": "paint"}}
    body = {
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": choice,
        "seed": 4,
    }
    frames = server.frames(PATH, **body)
    choices = [frame["choices"][0] for frame in frames]
    (call,) = [call for x in choices for call in x["delta"].get("tool_calls", [])]
    assert (call["index"], call["function"]["name"]) == (0, "paint")
    check(call)
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert all(x["delta"] for x in choices[:-1])  # no chunk says nothing
    whole, _ = message(server.post(PATH, body))
    assert whole["tool_calls"][0]["function"] == call["function"]


def test_calls_and_results_reach_the_chat_template(server, tokenizer):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "paint", "arguments": '{"colour": "red"}'},
    }
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Done."}]},
    ]
    body = {"messages": messages, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": True}}
    found = server.post("/tokenize", body).json()["tokens"]
    text = tokenizer.decode_verbatim(found)
    assert '<call>{"name": "paint", "arguments": {"colour": "red"}}</call>' in text
    assert "<|start|>tool: Done.<|end|>" in text
    assert '"name": "stop"' in text
    assert text.endswith("<|start|>assistant: <think>")


def test_json_after_reasoning(server, tokenizer):
    """JSON begins after the thought, if that ends."""
    body = {"messages": HELLO, "response_format": FORMAT, "seed": 0}
    args = {"chat_template_kwargs": {"enable_thinking": True}}
    # It is pushed to the end of its thought.
    bias = {str(token): 14 for token in tokenizer.encode("</think>{")}
    found, reason = message(
        server.post(PATH, {**body, **args, "logit_bias": bias, "max_tokens": 200})
    )
    assert found["reasoning_content"]
    if reason == "stop":
        json.loads(found["content"])
    found, reason = message(server.post(PATH, body))
    assert json.loads(found["content"])["colour"] in ("red", "blue")
    assert "reasoning_content" not in found
    assert reason == "stop"


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"structured_outputs": {"json": PAINT}},
        {"structured_outputs": {"regex": "(red|blue)!", "json": None, "disable_fallback": None}},
        {"structured_outputs": {"choice": ["red!", "blue!"]}},
        {"structured_outputs": {"grammar": 'start: ("red" | "blue") "!"'}},
        {"structured_outputs": {"grammar": 'root ::= ("red" | "blue") "!"'}},
    ],
    ids=["format", "json", "regex", "choice", "lark", "gbnf"],
)
@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
def test_structured_output(server, path, fields):
    prompt = {"messages": HELLO} if path == PATH else {"prompt": "Hello."}
    seen = set()
    for method in ("ar", "treeflash"):
        body = {**prompt, **fields, "seed": 3, "n": 2, "method": method}
        response = server.post(path, body)
        assert response.status_code == 200, response.text
        choices = response.json()["choices"]
        texts = tuple(x["message"]["content"] if path == PATH else x["text"] for x in choices)
        for text in texts:
            if "!" in text:
                assert text in ("red!", "blue!")
            else:
                assert json.loads(text)["colour"] in ("red", "blue")
        seen.add(texts)
    assert len(seen) == 1, "drafting changes nothing"


def test_json_object(server):
    response = server.chat(response_format={"type": "json_object"}, max_tokens=60)
    found, reason = message(response)
    assert found["content"].lstrip().startswith("{")
    if reason == "stop":
        assert isinstance(json.loads(found["content"]), dict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("start", ["{", "<"], ids=["content", "call"])
def test_content_of_a_form_or_calls(server, tokenizer, start, strict):
    """The grammar is for the content, and the model may call a function instead."""
    tools = [tool("paint", PAINT, strict=strict)]
    bias = {str(token): 25 for token in tokenizer.encode(start)}
    args = {"chat_template_kwargs": {"enable_thinking": False}, "parallel_tool_calls": False}
    found, _ = message(server.chat(tools=tools, response_format=FORMAT, logit_bias=bias, **args))
    if start == "{":
        assert json.loads(found["content"])["colour"] in ("red", "blue")
        return
    assert not found["content"]
    if strict:
        check(*found["tool_calls"])


def test_a_model_without_reasoning_does_not_begin_to_think(tmp_path):
    """Its response template has reasoning, as all of Qwen's do, but not its chat template."""
    model = tool_model(tmp_path, chat_template=CHAT_TEMPLATE.partition("{% if enable")[0])
    bias = {str(model.tokenizer.encode("<")[0]): 30}
    with serving(model, {**SAMPLED, "max_tokens": 200}) as running:
        body = {"tools": TOOLS, "logit_bias": bias}
        found, _ = message(running.chat(response_format=FORMAT, logit_bias=bias))
        assert json.loads(found["content"])["colour"] in ("red", "blue")
        assert "reasoning_content" not in found
        named = {"type": "function", "function": {"name": "stop"}}
        found, _ = message(running.chat(tool_choice=named, **body))
        assert "reasoning_content" not in found
        check(*found["tool_calls"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "function", "function": {"name": "missing"}},
            },
            "tool_choice",
        ),
        ({"tools": TOOLS[:1] * 2}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "[a-"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= missing"}}, "structured_outputs"),
        (
            {"tools": [tool("a", {"type": "objekt"})], "tool_choice": "required"},
            "tool_choice",
        ),
    ],
)
def test_errors(server, fields, param):
    response = server.chat(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert "\n" not in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "bad",
    [
        {"role": "user", "content": None},
        {"role": "tool", "content": "Done."},
        {"role": "user", "content": "Hi", "tool_call_id": "call_1"},
        {"role": "user", "content": "Hi", "tool_calls": []} | {"reasoning_content": "Hm"},
    ],
)
def test_malformed_messages(server, bad):
    response = server.post(PATH, {"messages": [*HELLO, bad]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


CHOSEN = {
    "llama3_json": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "deepseek_v3": "<｜Assistant｜>",
    "deepseek_v31": "<｜Assistant｜>",
    "hermes": "<|im_start|>assistant\n",
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", CHOSEN)
def test_a_chosen_tool_call_parser(tmp_path, name):
    """Calls are enforced in the form that the parser reads."""
    before = CHAT_TEMPLATE.partition("<|start|>assistant: ")[0]
    start = json.dumps(CHOSEN[name], ensure_ascii=False)
    template = f"{before}{{{{ {start} }}}}"
    model = tool_model(tmp_path, response_template=None, chat_template=template)
    choice = {"type": "function", "function": {"name": "paint"}}
    defaults = {**SAMPLED, "max_tokens": 300, "seed": 1}
    with serving(model, defaults, tool_call_parser=name) as running:
        found, reason = message(running.chat(tools=TOOLS, tool_choice=choice))
        (call,) = found["tool_calls"]
        check(call)
        assert reason == "tool_calls"
        assert running.chat(tools=TOOLS, max_tokens=3).status_code == 200


def test_calls_that_cannot_be_enforced(tmp_path):
    fields = RESPONSE_TEMPLATE["fields"]
    inline = {
        "open_pattern": "<call=(?P<name>[^>]+)>",
        "close": "</call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {"tag_pattern": "<(?P<key>[^>]+)>(?P<value>.*?)</>"},
        "transform": {
            "type": "function",
            "function": {"name": "{name}", "arguments": "{content}"},
        },
    }
    template = RESPONSE_TEMPLATE | {"fields": fields | {"tool_calls": inline}}
    with serving(tool_model(tmp_path, template)) as running:
        assert running.chat(tools=TOOLS, max_tokens=3).status_code == 200
        response = running.chat(tools=TOOLS, tool_choice="required")
        with_form = running.chat(tools=TOOLS, response_format=FORMAT)
    assert response.status_code == 400
    assert "cannot be enforced" in with_form.json()["error"]["message"]
    assert "cannot be enforced" in response.json()["error"]["message"]
