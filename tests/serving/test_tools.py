"""Tools, reasoning and structured output over HTTP."""

from __future__ import annotations

import json
from functools import partial

import pytest
from bodies import chat, ollama, responses, text
from servers import serving, submitted
from tool_models import CHAT_TEMPLATE, FIELDS, RESPONSE_TEMPLATE, tool_model

from treeflash.decoding.sampling import unpack
from treeflash.serving.call_grammar import call_grammar
from treeflash.serving.message_parser import ResponseTemplate
from treeflash.serving.response_templates import JSON_CALL
from treeflash.serving.schemas import AllowedTools

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


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"json": PAINT}},
        {"structured_outputs": {"regex": "(red|blue)!", "json": None, "disable_fallback": None}},
        {"structured_outputs": {"choice": ["red!", "blue!"]}},
        {"structured_outputs": {"grammar": 'start: ("red" | "blue") "!"'}},
        {"structured_outputs": {"grammar": 'root ::= ("red" | "blue") "!"'}},
    ],
    ids=["json", "regex", "choice", "lark", "gbnf"],
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
        for found in texts:
            if "!" in found:
                assert found in ("red!", "blue!")
            else:
                assert json.loads(found)["colour"] in ("red", "blue")
        seen.add(texts)
    assert len(seen) == 1, "drafting changes nothing"


@pytest.mark.parametrize(
    "request_",
    [
        chat(response_format={"type": "json_object"}, reasoning_effort="none"),
        text(response_format={"type": "json_object"}),
        ollama("chat", messages=HELLO, format="json", think=False),
        ollama("generate", prompt="Hello.", format="json", think=False),
    ],
    ids=["Chat", "Completions", "OllamaChat", "OllamaPrompt"],
)
def test_json_is_any_object(server, request_):
    answer = submitted(server, *request_)
    for value in ("{}", '{"a": [1, "b", {"c": null}], "d": true}'):
        assert answer.accepts(value), value
    for wrong in ("", "Hello.", "[1]", '"a"', "1", '{"a": 1', '{"a": 1} b', "{a: 1}"):
        assert not answer.accepts(wrong), wrong


LIST = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "object", "properties": {"a": LIST}, "required": ["a"]}, {"a": [1]}, {"a": "x"}),
        ({"type": "string", "format": "path"}, "/a", 1),
        ({"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, 1, "x"),
        ({"type": "object", "propertyNames": {"enum": ["a"]}}, {"a": 1}, [1]),
    ],
    ids=["set", "path", "one of", "names"],
)
def test_keywords_that_llguidance_lacks_are_left_out(server, schema, right, wrong):
    """Packages for structured output write them; the rest of the schema is enforced."""
    for form in (
        {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        {"type": "json_object", "schema": schema},
    ):
        answer = submitted(server, *chat(response_format=form, reasoning_effort="none"))
        assert answer.accepts(json.dumps(right))
        assert not answer.accepts(json.dumps(wrong))


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


def named(*names, mode="auto"):
    """The choice of some functions, in the form of chat completions."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def flat(*names, mode="auto"):
    """The choice of some functions, in the form of Responses."""
    tools = [{"type": "function", "name": name} for name in names]
    return {"type": "allowed_tools", "mode": mode, "tools": tools}


FLAT_TOOLS = [{"type": "function", **one["function"]} for one in TOOLS]
SUBSETS = pytest.mark.parametrize(
    ("ask", "choice", "tools"),
    [
        (partial(chat, reasoning_effort="none"), named, TOOLS),
        (partial(responses, reasoning={"effort": "none"}), flat, FLAT_TOOLS),
    ],
    ids=["Chat", "Responses"],
)


@SUBSETS
def test_some_functions_are_allowed(server, ask, choice, tools):
    """The model sees these alone, and `mode` says whether it must call one of them."""
    for mode in ("auto", "required"):
        answer = submitted(server, *ask(tools=tools, tool_choice=choice("stop", mode=mode)))
        assert "stop" in answer.prompt
        assert "paint" not in answer.prompt
        assert answer.accepts("Hello.") == (mode == "auto")
    both = submitted(server, *ask(tools=tools, tool_choice=choice("stop", "paint")))
    assert both.prompt == submitted(server, *ask(tools=tools)).prompt


@SUBSETS
def test_functions_that_cannot_be_allowed(server, ask, choice, tools):
    for fields, says in (
        ({"tools": tools, "tool_choice": choice("stop", "sing")}, "names the function 'sing'"),
        ({"tool_choice": choice("stop")}, "the request has none; add tools"),
        ({"tools": tools, "tool_choice": choice()}, "at least 1 item"),
    ):
        response = server.post(*ask(**fields))
        assert response.status_code == 400
        assert says in response.json()["error"]["message"]


CHOSEN = {
    "llama3_json": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "deepseek_v3": "<｜Assistant｜>",
    "deepseek_v31": "<｜Assistant｜>",
    "hermes": "<|im_start|>assistant\n",
    "qwen3_coder": "<|im_start|>assistant\n",
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


NODE = {"type": "object", "properties": {"name": COLOUR, "parts": {"type": "array"}}}
NODE["properties"]["parts"]["items"] = {"$ref": "#"}
NESTED = {
    "colour": {"type": "object", "properties": {"colour": {"$ref": "#/$defs/Colour"}}},
    "node": NODE,
}
NESTED["colour"]["$defs"] = {"Colour": COLOUR}


@pytest.mark.parametrize("key", ["arguments", "parameters"])
@pytest.mark.parametrize("free", [False, True])
def test_references_of_schemas_mean_the_arguments(compiler, tokenizer, free, key):
    """Each function has a schema of its own, though all of a call is one object."""
    form = {**FIELDS["tool_calls"]}
    if key == "parameters":
        form["transform"] = {"type": "function", "function": JSON_CALL}
    template = ResponseTemplate(RESPONSE_TEMPLATE | {"fields": FIELDS | {"tool_calls": form}})
    tools = [tool(name, schema, strict=True) for name, schema in NESTED.items()]
    grammar = call_grammar(template, AllowedTools(tools, must_call=not free), free=free)

    def accepts(name, arguments, space):
        call = json.dumps({"name": name, key: arguments}, separators=(f",{space}", f":{space}"))
        constraint, size = compiler.compile(grammar)(), tokenizer.size
        for token in tokenizer.encode(f"<call>{call}</call>"):
            if not unpack(constraint.allowed()[None], size)[0][token]:
                return False
            constraint.advance(token)
        return True

    for space in ("", " "):
        assert accepts("colour", {"colour": "red"}, space)
        assert accepts("node", {"name": "red", "parts": [{"name": "blue"}]}, space)
        assert not accepts("colour", {"colour": "green"}, space)
        assert not accepts("node", {"name": "red", "parts": [{"name": "green"}]}, space)
        assert not accepts("paint", {}, space)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_calls_may_begin_and_end_with_slashes(compiler, free, parallel):
    """Which enclose the patterns of a grammar."""
    calls = {**FIELDS["tool_calls"], "open_pattern": "/call ", "close": "/end"}
    template = ResponseTemplate(RESPONSE_TEMPLATE | {"fields": FIELDS | {"tool_calls": calls}})
    functions = [{"type": "function", "function": {"name": "stop", "strict": True}}]
    tools = AllowedTools(functions, must_call=not free, parallel=parallel)
    assert compiler.compile(call_grammar(template, tools, free=free))


def test_calls_that_cannot_be_enforced(tmp_path):
    lines = {**FIELDS["tool_calls"], "content": "kv-lines"}
    template = RESPONSE_TEMPLATE | {"fields": FIELDS | {"tool_calls": lines}}
    with serving(tool_model(tmp_path, template)) as running:
        assert running.chat(tools=TOOLS, max_tokens=3).status_code == 200
        strict = [tool("paint", PAINT, strict=True)]
        assert running.chat(tools=strict, max_tokens=3).status_code == 200
        response = running.chat(tools=TOOLS, tool_choice="required")
        with_form = running.chat(tools=TOOLS, response_format=FORMAT)
    assert response.status_code == 400
    assert "cannot be enforced" in with_form.json()["error"]["message"]
    assert "cannot be enforced" in response.json()["error"]["message"]
