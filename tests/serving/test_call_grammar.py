"""Calls whose arguments are texts between tags, as Qwen3.5 writes them, and what is enforced."""

from __future__ import annotations

import json

import pytest
from bodies import chat
from servers import check_error, serving, submitted
from tool_models import tool_model

from treeflash.config import DecodeConfig
from treeflash.decoding.loop import Step
from treeflash.serving.call_grammar import call_grammar
from treeflash.serving.message_parser import MessageForm, MessageParser, ResponseTemplate
from treeflash.serving.response_templates import QWEN3_5
from treeflash.serving.schemas import AllowedTools
from treeflash.text.json_schema import MOST_PARTS, SchemaReader
from treeflash.text.stream import Assembler

START = "<|im_start|>assistant\n"
TEMPLATE = "{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}{% endfor %}" + START
COLOUR = {"enum": ["red", "a/b (c)", "\tx\n", None]}
SPOT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
PAINT = {
    "type": "object",
    "properties": {
        "colour": {"$ref": "#/$defs/Colour"},
        "note": {"type": ["string", "null"]},
        "coats": {"anyOf": [{"type": "integer", "nullable": True}, {"const": "none"}]},
        "spots": {"allOf": [{"$ref": "#/$defs/Spots"}]},
    },
    "required": ["colour", "note"],
    "additionalProperties": False,
    "$defs": {"Colour": COLOUR, "Spots": {"type": "array", "items": SPOT}},
}


def tool(name, parameters, **fields):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = tool_model(tmp_path_factory.mktemp("tags"), None, TEMPLATE)
    with serving(model, tool_call_parser="qwen3_coder") as running:
        yield running


def call(name="paint", **values):
    """Write a call with texts as arguments, in a model's usual lines."""
    lines = [f"<parameter={key}>\n{text}\n</parameter>" for key, text in values.items()]
    return "\n".join(["<tool_call>", f"<function={name}>", *lines, "</function>", "</tool_call>"])


ONE = {"colour": "red", "note": "Be quick."}
RIGHT = [
    (ONE, ONE),
    (ONE | {"note": "a <b>\n</param> c"}, ONE | {"note": "a <b>\n</param> c"}),
    (ONE | {"note": "  if x:\n    y\n"}, ONE | {"note": "  if x:\n    y\n"}),  # lines of a program
    (ONE | {"colour": "\tx\n"}, ONE | {"colour": "\tx\n"}),
    (ONE | {"coats": " 3"}, ONE | {"coats": 3}),
    (ONE | {"colour": "a/b (c)", "note": ""}, {"colour": "a/b (c)", "note": ""}),
    (ONE | {"colour": "null", "note": "null"}, {"colour": None, "note": None}),
    (ONE | {"coats": "3"}, ONE | {"coats": 3}),
    (ONE | {"coats": "none"}, ONE | {"coats": "none"}),
    (ONE | {"coats": "null"}, ONE | {"coats": None}),
    (ONE | {"spots": '[{"x": 1}, {"x": -2}]'}, ONE | {"spots": [{"x": 1}, {"x": -2}]}),
]
WRONG = [
    {"colour": "red"},
    {"colour": "green", "note": ""},
    {"colour": '"red"', "note": ""},
    {"colour": " red", "note": ""},
    {"note": "", "colour": "red"},
    ONE | {"coats": "three"},
    ONE | {"coats": "1.5"},
    ONE | {"spots": '{"x": 1}'},
    ONE | {"spots": '[{"x": "1"}]'},
    ONE | {"spots": '[{"x": 1, "y": 1}]'},
    ONE | {"size": "1"},
]


@pytest.mark.parametrize("free", [False, True])
def test_arguments_follow_their_schema(server, free):
    choice = "auto" if free else "required"
    tools = [tool("paint", PAINT, strict=True), tool("stop", {"type": "object", "properties": {}})]
    answer = submitted(server, *chat(tools=tools, tool_choice=choice))
    for texts, _ in RIGHT:
        assert answer.accepts(call(**texts)), texts
        assert answer.accepts(call(**texts) + "\n" + call("stop"))
    for texts in WRONG:
        assert not answer.accepts(call(**texts)), texts
    assert not answer.accepts(call("sing"))
    assert answer.accepts("I paint.\n" + call(**ONE)) == free
    assert answer.accepts("I do not paint.") == free


@pytest.mark.parametrize(("texts", "values"), RIGHT)
def test_texts_become_values_of_the_types_that_references_name(server, texts, values):
    tokenizer = server.engine.model.tokenizer
    form = MessageForm.of(ResponseTemplate(QWEN3_5), START, [tool("paint", PAINT)])
    parser = MessageParser(form, tokenizer)
    assembler = Assembler(None, tokenizer, (1,), DecodeConfig())
    step = Step(tuple(tokenizer.encode(call(**texts))), finish_reason="stop")
    parser.read([assembler.add(step)])
    assert [json.loads(x.arguments) for x in parser.calls] == [values]


def test_other_arguments_are_free_where_the_schema_allows_them(server):
    schemas = {
        "any": None,
        "all": {"type": "object"},
        "more": {"type": "object", "properties": {"a": True}, "additionalProperties": True},
        "numbers": {"type": "object", "additionalProperties": {"type": "integer"}},
        "named": {"type": "object", "properties": {"a": True}, "required": ["b"]},
    }
    tools = [tool(name, schema) for name, schema in schemas.items()]
    answer = submitted(server, *chat(tools=tools, tool_choice="required"))
    for name in ("any", "all", "more"):
        assert answer.accepts(call(name))
        assert answer.accepts(call(name, a="x", c="y"))
    assert answer.accepts(call("numbers", a="1", b="2"))
    assert not answer.accepts(call("numbers", a="x"))
    assert answer.accepts(call("named", b="x"))
    assert answer.accepts(call("named", a="x", b="y"))
    for texts in ({}, {"a": "x"}, {"b": "x", "c": "y"}):
        assert not answer.accepts(call("named", **texts))


TREE = {"children": {"type": "array", "items": {"$ref": "#"}}}
UNENFORCED = [
    {"type": "object", "properties": TREE},  # its values have schemas of their own
    *({"patternProperties": {"a": {}}}, {"allOf": [{}, {}]}, {"anyOf": [{}, {}]}),
    *({"type": "string"}, {"type": ["object"]}, {"properties": ["a"]}, {"required": "a"}),
]


@pytest.mark.parametrize("schema", UNENFORCED)
def test_schemas_that_are_not_a_list_of_properties(server, caplog, schema):
    """They are refused where the call is required, and `strict` alone is left out with a line."""
    tools = [tool("paint", schema, strict=True)]
    refused = server.post(*chat(tools=tools, tool_choice="required"))
    check_error(refused, 400, "tool_choice is not supported with this model and these tools")
    with caplog.at_level("INFO", "treeflash.serving"):
        assert submitted(server, *chat(tools=tools)).accepts("<tool_call>")
    assert "strict is ignored" in caplog.text


def test_definitions_are_not_repeated_without_end():
    """Each value that is JSON has those of its schema."""
    properties = {f"p{i}": {"type": "integer"} for i in range(400)}
    for size, enforced in ((100, True), (20_000, False)):
        definitions = {"Any": {"description": "-" * size}}
        schema = {"type": "object", "properties": properties, "$defs": definitions}
        tools = AllowedTools([tool("paint", schema, strict=True)])
        grammar = call_grammar(ResponseTemplate(QWEN3_5), tools, free=True)
        assert (grammar is not None) == enforced


def nested(depth):
    """A schema with a chain of references, each of which also has a union of the others."""
    definitions = {str(i): {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(depth)}
    return {"$defs": definitions | {str(depth): {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        (nested(2) | {"$ref": "#/$defs/0"}, ["integer"]),
        (nested(1000) | {"$ref": "#/$defs/0"}, []),
        ({"$ref": "#"}, []),
        ({"$ref": "#/absent"}, []),
        ({"$ref": 1}, []),
        ({"anyOf": [{"type": "integer"}] * (MOST_PARTS + 1)}, []),
        ({"anyOf": 1, "type": 2}, []),
        ({"type": ["integer", 3, "null"]}, ["integer", "null"]),
        ({"type": [*["integer"] * MOST_PARTS, "null"]}, ["integer"]),
        ({"enum": [1, "a", None, 2.5, True, [], {}]},
         ["integer", "string", "null", "number", "boolean", "array", "object"]),
        ({"allOf": [{"type": "object"}]}, ["object"]),
        (True, []),
    ],
)  # fmt: skip
def test_types_of_any_schema(schema, types):
    """A request may have any schema, and each is read in bounded time."""
    assert SchemaReader(schema).types(schema) == types
