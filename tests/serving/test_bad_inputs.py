"""Each bad request gets an error that names what is wrong, and the server goes on."""

from __future__ import annotations

import gzip
import re

import pytest
from bodies import (
    CHAT,
    RESPONSES,
    TEXT,
    TOKENIZE,
    USER,
    chat,
    messages,
    ollama,
    responses,
    text,
)
from recordings import recording
from servers import check_error

from treeflash.serving import errors
from treeflash.serving.schemas import MAX_FAULTS, MAX_ITEMS, Function, allowed_tools
from treeflash.serving.service import Service

pytestmark = pytest.mark.usefixtures("no_traceback")

GREETING = [{"type": "text", "text": "Hi"}] * 2
DEEP = "[" * 5000 + "]" * 5000


def item(**fields):
    """A request with one item as its input."""
    return responses(input=[fields])


def said(**fields):
    """A chat with one more message."""
    return chat(messages=[USER, fields])


def function(name):
    return {"type": "function", "function": {"name": name}}


USE = {"type": "tool_use", "id": "call_1", "name": "paint", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "call_1"}
PAINT = {"name": "paint", "description": "Paints.", "input_schema": {"type": "object"}}
STOP = {"function": {"name": "stop"}}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}
CLEARED = {"edits": [{"type": "clear_tool_uses_20250919"}]}


def each(request, end="", **wrong):
    """Requests with one wrong value each, whose errors name the field."""
    return [(request(**{x: value}), x + end) for x, values in wrong.items() for value in values]


# A request, and what its error must say; the status is 400.
WRONG = [
    *each(
        chat,
        temperature=[-1, "hot", True, 1e9, 1e-9, float("nan"), float("inf"), [1]],
        top_p=[0, 1.5],
        top_k=[-2, 1.5],
        min_p=[2, -0.1],
        max_tokens=[0, -5, 2.5, "4"],
        max_completion_tokens=[5],
        seed=[-(2**63) - 1, 2**64, "a"],
        presence_penalty=["x", 2.5, -2.1],
        logit_bias=[
            *({"a": 1}, {"-1": 1}, [1]),
            *({"5": bias} for bias in (1e30, -101, 101, float("nan"), "x")),
        ],
        frequency_penalty=[float("-inf"), 2.1],
        repetition_penalty=[0, 101],
        stop=["", ["a", ""], ["a"] * 17, [1], ["a" * 1001]],
        method=["magic"],
        budget=[0, 10**6, "huge"],
        stream=["yes"],
        stream_options=[{"include_usage": True}],
        top_logprobs=[2],
        logprobs=[3],
        store=[True],
        service_tier=["flex"],
        reasoning_effort=["much"],
        verbosity=["loud"],
        metadata=[{"a": 1}],
        prediction=[[]],
        no_stop_trim=[True],
        skip_special_tokens=[False],
        return_hidden_states=[True],
        continue_final_message=[True],
        separate_reasoning=[False],
        stream_reasoning=[False],
        include_reasoning=[False],
        response_format=[{"type": "xml"}],
        structured_outputs=[{"regex": "a", "choice": ["b"]}],
        chat_template_kwargs=[[1]],
    ),
    *each(text, echo=["yes"], best_of=[2], prompt=[[], [1.5], [-1], ["a", 1]], logprobs=[True, 50]),
    *each(
        messages,
        end=": ",
        max_tokens=[0],
        temperature=[-0.1],
        top_p=[0],
        top_k=[-2],
        stop_sequences=[["a"] * 17],
        tools=[[{**PAINT, "name": f"f{i}"} for i in range(257)]],
        messages=[[]],
        service_tier=["flex"],
    ),
    *each(
        responses,
        end=": ",
        background=[True],
        service_tier=["flex"],
        input=[[]],
        max_output_tokens=[0],
        temperature=[-0.1],
        top_p=[0, 1.1],
        tools=[[{"type": "function", "name": f"f{i}"} for i in range(257)]],
    ),
    *each(
        chat,
        end=" is not supported",
        audio=[{}],
        web_search_options=[{}],
        max_images=[99],
        best_of=[2],
    ),
    *each(chat, end=": ", n=[0]),
    # Decoding
    (chat(n=1000), "at most 16"),
    (chat(logit_bias={"9999": 1}), "vocabulary"),
    (chat(stream=True, stream_options={"other": True}), "stream_options.other"),
    (chat(stream=True, stream_options={"include_obfuscation": True}), "include_obfuscation"),
    (chat(return_progress=True), "return_progress applies to streams only"),
    (text(return_progress=True), "return_progress applies to streams only"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    # Fields and values that this server does not have
    (chat(modalities=["text", "audio"]), "modalities.1"),
    (text(include_reasoning=True), "include_reasoning is not supported"),
    (text(suffix="x"), "suffix needs a model whose tokenizer has tokens to fill a gap, such as"),
    (text(prompt=[1, 2], suffix="x"), "suffix needs a prompt that is a text, not token ids"),
    (text(echo=True, suffix="x"), "suffix and echo exclude each other; remove one of them"),
    # Tools
    (chat(tools=[function("f")] * 257), "tools: List should have at most 256 items"),
    (chat(tools=[function("two words")]), "tools.0.function.name"),
    (chat(tools=[function("a" * 129)]), "tools.0.function.name"),
    (chat(tools=[function("")]), "tools.0.function.name"),
    (chat(tools=[{"type": "web_search"}]), "tools.0.type"),
    (chat(response_format=FORMAT, structured_outputs={"regex": "a"}), "structured_outputs"),
    # Prompts
    (said(role="user", content=None), "a message with the role user needs content"),
    (
        said(role="tool", content="Done."),
        "role tool needs tool_call_id, the id of the call",
    ),
    (
        said(role="user", content="Hi", tool_call_id="call_1"),
        "must not have tool_call_id, which only messages with the role tool",
    ),
    (
        said(role="user", content="Hi", tool_calls=[], reasoning_content="Hm"),
        "must not have tool_calls or reasoning_content, which only",
    ),
    ((CHAT, {}), "messages"),
    ((CHAT, {"messages": []}), "messages"),
    ((CHAT, {"messages": "Hi"}), "messages"),
    ((CHAT, {"messages": [1]}), "messages.0"),
    ((CHAT, {"messages": [{"role": "user"}]}), "content"),
    ((CHAT, {"messages": [{"content": "Hi"}]}), "role"),
    ((CHAT, {"messages": [{"role": "king", "content": "Hi"}]}), "role"),
    ((CHAT, {"messages": [{"role": "user", "content": 5}]}), "content"),
    ((CHAT, {"messages": [{**USER, "name": 1}]}), "messages.0.name"),
    ((CHAT, {"messages": [{**USER, "content": [{"type": "image_url"}]}]}), "content.0.image_url"),
    ((CHAT, {"messages": [{**USER, "content": [{"type": "input_audio"}]}]}), "'input_audio'"),
    (
        (CHAT, {"messages": [{**USER, "content": [*GREETING, {**GREETING[0], "size": 1}]}]}),
        "messages.0.content.2.size is not supported",
    ),
    ((CHAT, {"messages": [{**USER, "refusal": "No."}]}), "messages.0.refusal is not supported"),
    ((CHAT, {"messages": [{**USER, "content": "a\ud800b"}]}), "Unicode"),
    (chat(chat_template_kwargs={"a": "\ud800"}, **{"\ud800": 1}), "unicode"),
    (text(prompt="\ud800"), "Unicode"),
    (chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}), "reserved"),
    (chat(chat_template_kwargs={"tokenize": True}), "'tokenize' is reserved"),
    ((TEXT, {}), "prompt"),
    (text(prompt=""), "empty"),
    (text(prompt=[10**6]), "vocabulary"),
    (text(prompt=[10**30]), "vocabulary"),
    (text(prompt=["a", ""]), "empty"),
    (text(max_tokens=0), "max_tokens is 0"),
    (text(guided_json={}), "guided_json is not supported by this server; use structured_outputs"),
    (text(unknown=1), "unknown is not supported by this server; remove it"),
    (text(prompt="x" * 600), "600 tokens and the target's limit is 512"),
    (text(prompt=[5] * 512), "512 tokens and the target's limit is 512"),
    ((TOKENIZE, {}), "either prompt or messages"),
    ((TOKENIZE, {"prompt": "a", "messages": [USER]}), "either prompt or messages"),
    ((TOKENIZE, {"prompt": 5}), "prompt"),
    (chat(add_generation_prompt=False), "continue_final_message"),
    (
        chat(continue_final_message=True, add_generation_prompt=False),
        "continue_final_message needs a last message of the assistant",
    ),
    # Anthropic's API
    (messages(messages=[USER, {"role": "assistant", "content": [USE]}]), "it must be text only"),
    (messages(messages=[{"role": "user", "content": [USE]}]), "only messages with the role assist"),
    (
        messages(messages=[{"role": "user", "content": [{"type": "thinking", "thinking": "Hm."}]}]),
        "only messages with the role assistant can have a thinking",
    ),
    (
        messages(messages=[{"role": "assistant", "content": [RESULT]}, USER]),
        "only messages with the role user can have a tool_result",
    ),
    (messages(tools=[PAINT], tool_choice={"type": "tool"}), "add tool_choice.name"),
    (messages(stop_sequences=[""]), "stop_sequences.0: "),
    (messages(tools=[{**PAINT, "name": "two words"}]), "tools.0.name: "),
    (messages(thinking={"type": "enabled", "budget_tokens": 0}), "thinking.budget_tokens: "),
    (messages(tools=[{"type": "web_search_20250305", "name": "web_search"}]), "tools.0"),
    (messages(container="c"), "container"),
    (messages(context_management=CLEARED), "context_management.edits.0.type"),
    # OpenAI's newer API: what needs stored responses or other tools, and values out of range
    (responses(conversation="conv_1"), "conversation is not supported"),
    (responses(tool_choice={"type": "file_search"}), "any of the expected tags: 'function', "),
    (responses(include=["message.output_text.logprobs"]), "include.0: "),
    (responses(tools=[{"type": "file_search"}]), "tools.0: "),
    (item(type="item_reference", id="msg_1"), "this server stores no responses; send the whole"),
    (responses(tools=[{"type": "function", "name": "two words"}]), "tools.0.name: "),
    (responses(tools=[{"type": "namespace", "name": "two words", "tools": []}]), "tools.0.name: "),
    (responses(stream_options={"include_obfuscation": True}), "include_obfuscation: "),
    (
        item(role="user", content=[{"type": "input_file", "file_data": "data:"}]),
        "input.0.content.0",
    ),
    (item(type="reasoning", encrypted_content="x"), "input.0.type: "),
    *(
        (
            item(type="function_call", call_id="a", name="paint", arguments=x),
            "a JSON object, as text",
        )
        for x in ("[1]", "{", "1", "[" * 100_000)
    ),
    *(
        (item(role=role, content=[IMAGE]), "only messages of the user and results of calls")
        for role in ("system", "developer", "assistant")
    ),
    # Ollama's API
    (ollama("chat", messages=[{"role": "tool", "content": "4"}]), "answers no call"),
    (
        ollama("chat", messages=[USER, {"role": "assistant", "tool_calls": [STOP]}]),
        "add their results",
    ),
    (ollama("generate", prompt="Hi", options={"mirostat": 1}), "options.mirostat"),
    (ollama("generate", prompt="Hi", options={"typical_p": 0.7}), "options.typical_p"),
    (ollama("generate", prompt="Hi", raw=True, system="Be kind."), "raw has no template"),
    (ollama("generate", prompt="Hi", suffix="."), "suffix needs a model whose tokenizer has"),
    (ollama("generate", keep_alive="soon"), "keep_alive must be seconds or a text such as"),
    (ollama("generate", keep_alive=float("nan")), "keep_alive: Input should be a finite number"),
    # Lists longer than conversations have
    *(
        (request(**{field: value}), f"at most {MAX_ITEMS} items")
        for request, field, value in (
            (chat, "messages", [USER] * (MAX_ITEMS + 1)),
            (chat, "messages", [{"role": "user", "content": GREETING[:1] * (MAX_ITEMS + 1)}]),
            (responses, "input", [USER] * (MAX_ITEMS + 1)),
            (messages, "messages", [USER] * (MAX_ITEMS + 1)),
            (text, "prompt", [[1]] * (MAX_ITEMS + 1)),
            (responses, "metadata", {f"x{i}": "" for i in range(MAX_ITEMS + 1)}),
        )
    ),
]
# Bodies that are no requests
WRONG += [
    ((CHAT, content), says)
    for content, says in [
        (b"", "the body is empty; send a JSON object"),
        (b"{", "not JSON"),
        (
            b'{"a": 1,, "b": 2}',
            "not JSON: Expecting property name enclosed in double quotes at character 8",
        ),
        (b'{"a": "\xff"}', "the body is not UTF-8 text"),
        (b"null", "the body"),
        (b"[]", "the body"),
        (b'"text"', "the body"),
        (b"\xff\xfe", "body"),
        (b'{"messages": [], }', "not JSON"),
        (DEEP.encode(), "the body is nested too deep"),
        (b"[" * 20_000 + b"]" * 20_000, "the body is nested too deep"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "a number of the body has more than 4300 digits"),
        (b'{"seed": 1, "prompt": "Hi"}' + b"\xff", "the body is not UTF-8 text"),
        (b'{"a": 1, "a": 2}', "messages"),
    ]
]


@pytest.mark.parametrize(("request_", "says"), WRONG, ids=range(len(WRONG)))
def test_wrong_fields(server, request_, says):
    check_error(server.post(*request_), 400, says)


def test_a_budget_of_reasoning_is_below_the_length(tool_server):
    thinking = {"type": "enabled", "budget_tokens": 9}
    request = messages(thinking=thinking, max_tokens=9)
    check_error(tool_server.post(*request), 400, "below max_tokens (9)")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (chat(temperature=-1), "temperature: Input should be greater than or equal to 0 (got -1)"),
        (
            chat(stop=["a"] * 17),
            "stop: List should have at most 16 items after validation, not 17",
        ),
        (
            chat(budget="huge"),
            "budget: Input should be a valid integer or Input should be 'auto' (got 'huge')",
        ),
        (chat(tool_choice={"type": "function"}), "tool_choice.function: Field required"),
        (
            chat(max_tokens=4, max_completion_tokens=5),
            "max_tokens and max_completion_tokens are aliases but have different values, 4 and 5; "
            "send one of them",
        ),
    ],
)
def test_messages_say_what_is_wrong(server, request_, message):
    assert check_error(server.post(*request_), 400) == message


def test_a_compressed_body_is_called_that(server):
    body = gzip.compress(b'{"prompt": "hi"}')
    response = server.post(TEXT, body, **{"Content-Encoding": "gzip"})
    check_error(response, 400, "the body is compressed, which is not supported; send plain JSON")


NOT_JSON = ["NaN", "Infinity", "-Infinity", r'"\ud800"']
ECHOED = {
    "metadata": '{{"a": {}}}',
    **dict.fromkeys(("instructions", "user", "prompt_cache_key", "safety_identifier"), "{}"),
    "temperature": "{}",
    "tools": '[{{"type": "function", "name": "f", "parameters": {{"default": {}}}}}]',
    "text": '{{"format": {{"type": "json_schema", "name": "n", "schema": {{"const": {}}}}}}}',
}
"""Fields that a response of `/v1/responses` repeats."""


@pytest.mark.parametrize("field", ECHOED)
@pytest.mark.parametrize("value", NOT_JSON)
def test_what_a_response_could_not_repeat_is_refused(tool_server, field, value):
    """NaN and lone surrogates are no JSON, so the response that repeats them would be none."""
    for stream in ("false", "true"):
        fields = f'"{field}": {ECHOED[field].format(value)}, "max_output_tokens": 1'
        body = f'{{"input": "Hi", "stream": {stream}, {fields}}}'
        check_error(tool_server.post(RESPONSES, body.encode()), 400)


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/nothing", 404, ""),
        ("GET", CHAT, 405, ""),
        ("DELETE", "/v1/models/tiny", 405, ""),
        ("GET", "/v1/models/other", 404, ""),
        ("GET", "/v1/models/a/b", 404, ""),
        ("GET", "/../../etc/passwd", 404, ""),
        ("GET", "/redoc", 404, ""),
        ("POST", "/v1/embeddings", 404, "POST /v1/embeddings: this server generates text; embed"),
        ("POST", "/v1/rerank", 404, "POST /v1/rerank: this server generates text; embeddings"),
        ("POST", "/infill", 404, "POST /infill: to fill a gap, send the text after it as suffix"),
        ("POST", "/api/embed", 404, "this server generates text; embeddings"),
        ("POST", "/api/pull", 404, "this server has the models that it was started with"),
        ("DELETE", "/api/delete", 404, "this server has the models that it was started with"),
        ("POST", "/api/blobs/sha256:29fd", 404, "POST /api/blobs/sha256:29fd: this server has"),
    ],
)
def test_paths(server, method, path, status, says):
    json = {"model": "tiny", "input": "Hi"} if method == "POST" else None
    response = server.client.request(method, path, json=json)
    check_error(response, status, says)
    assert bool(response.headers.get("Allow")) == (status == 405)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/api/tags", "/nothing"])
def test_head_is_get_without_a_body(server, path):
    """Programs that watch servers send it."""
    whole, head = server.client.get(path), server.client.head(path)
    assert head.status_code == whole.status_code
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert not head.content


def test_no_field_of_a_request_names_a_file_a_url_or_a_template(server):
    """Otherwise a client could make the server read private files, or run code."""
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    names = {name for schema in schemas.values() for name in schema.get("properties", ())}
    assert names >= {"prompt", "messages", "input", "system", "tools", "input_schema"}
    odd = {name for name in names if re.search("ur[li]|file|path|folder|template", name)}
    # Images may only be embedded: test_images.py shows that other URLs and ids are refused.
    odd -= {"image_url", "url", "file_id"}
    assert odd == {"chat_template_kwargs"}, "whose `chat_template` is reserved"


# A body of a few megabytes is refused without work for each of its items: bodies are checked in the
# event loop, and a fault takes longer to describe than an item to check. A body with a million
# faults would hold up all streams for minutes.

MANY = 3 * MAX_ITEMS
NAMES = {f"x{i}": 0 for i in range(MANY)}
NAMESPACE = {"type": "namespace", "name": "n", "tools": [{}] * MANY}
FAULTY = {
    "messages": chat(messages=[{}] * MANY),
    "messages that are no objects": chat(messages=[0] * MANY),
    "parts": chat(messages=[{"role": "user", "content": [{}] * MANY}]),
    "calls": chat(messages=[{"role": "assistant", "tool_calls": [{}] * MANY}]),
    "tools": chat(tools=[{}] * MANY),
    "biases": chat(logit_bias=NAMES),
    "unknown fields": chat(**NAMES),
    "metadata": chat(metadata=NAMES),
    "prompts": text(prompt=[{}] * MANY),
    "token ids": text(prompt=[-1] * MANY),
    "lists of token ids": text(prompt=[[]] * MANY),
    "items": responses(input=[{}] * MANY),
    "functions of a namespace": responses(tools=[NAMESPACE]),
    "turns": messages(messages=[{}] * MANY),
    "blocks": messages(messages=[{"role": "user", "content": [{}] * MANY}]),
    "messages of Ollama": ollama("chat", messages=[{}] * MANY),
    "images of Ollama": ollama("generate", prompt="a", images=[0] * MANY),
    "tools to tokenize": (TOKENIZE, {"messages": [USER], "tools": [{}] * MANY}),
    "tokens": ("/detokenize", {"tokens": [-1] * MANY}),
}


@pytest.mark.parametrize("name", FAULTY)
def test_few_faults_are_described(server, name):
    with recording(errors, "field_error") as described:
        assert server.post(*FAULTY[name]).status_code == 400
    faults, _ = described[0]
    assert len(faults) <= MAX_FAULTS


def test_entries_are_named_if_they_are_few(server):
    check_error(server.chat(metadata={"a": 1, "b": 2}), 400, "metadata.a")
    assert check_error(server.chat(metadata=NAMES), 400) == f"metadata: {MANY} entries are invalid"


def test_too_many_prompts_are_refused_before_any_is_encoded(server):
    with recording(Service, "encode") as encoded:
        response = server.complete(["a"] * MAX_ITEMS)
    check_error(response, 400, f"asks for {MAX_ITEMS} answers")
    assert not encoded


class Counting(str):
    """A text that counts how often any of its kind is compared."""

    compared = 0

    def __eq__(self, other):
        type(self).compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.fixture
def counting():
    """A kind of texts of its own, which nothing has compared yet."""
    return type("Counting", (Counting,), {})


def test_names_of_tools_are_not_compared_each_with_each(counting):
    functions = [Function.model_construct(name=counting(f"f{i}")) for i in range(1000)]
    allowed_tools(functions, None)
    assert counting.compared < len(functions)


def test_the_name_of_a_type_is_not_looked_for_among_the_items(counting):
    error = {"type": "missing", "loc": ("body", "input", counting("list"), 0, "role")}
    path = errors.field_path(error, {"input": [{}] * 1000})
    assert path == ["input", "0", "role"]
    assert counting.compared < 10
