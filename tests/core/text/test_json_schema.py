"""Which objects of a JSON schema are closed, and which texts llguidance then accepts."""

import json

import pytest

from treeflash.text.json_schema import close_objects

llguidance = pytest.importorskip("llguidance")

from treeflash.text.grammar import Grammar
from treeflash.text.grammar_sandbox import GrammarSandbox

NAME = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
AGE = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
NUMBER = {"type": "integer"}
BASE = {"$defs": {"Base": NAME}}
BY_BASE = {"allOf": [{"$ref": "#/$defs/Base"}, AGE], **BASE}
LIST = {
    "type": "object",
    "properties": {"v": NUMBER, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["v"],
}
NODE = {"properties": {"kids": {"type": "array", "items": {"$ref": "#/definitions/Node"}}}}
TREE = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "allOf": [{"$ref": "#/definitions/Node"}, {"properties": {"root": {"const": True}}}],
    "type": "object",
    "definitions": {"Node": {"type": "object", **NODE}},
}
ANN, FOUR = {"name": "Ann"}, {"age": 4}
ALL, KNOWN = "every key", "known keys alone"
EXAMPLES = {
    "an object": (NAME, [ANN], [{**ANN, "x": 1}]),
    "no properties": ({"type": "object"}, [{}, {"x": {"y": 1}}], [[1]]),
    "any value": ({}, [{"x": 1}], []),
    "no property": ({"type": "object", "properties": {}}, [{}], [{"x": 1}]),
    "it is open": ({**NAME, "additionalProperties": True}, [ANN, {**ANN, "x": 1}], [{}]),
    "it has numbers": (
        {**NAME, "additionalProperties": NUMBER},
        [{**ANN, "x": 1}],
        [{**ANN, "x": "1"}],
    ),
    "it has patterns": (
        {**NAME, "patternProperties": {"^x": NUMBER}},
        [{**ANN, "x": 1}, {**ANN, "y": "1"}],
        [{**ANN, "x": "1"}],
    ),
    "a required name without a schema": (
        {**NAME, "required": ["name", "id"]},
        [{**ANN, "id": [1]}],
        [ANN, {**ANN, "id": 1, "x": 1}],
    ),
    "objects in objects and lists": (
        {"properties": {"a": {"items": {"properties": {"b": NAME}}}}},
        [{"a": [{"b": ANN}]}],
        [{"a": [{"b": {**ANN, "x": 1}}]}, {"a": [{"b": ANN, "x": 1}]}],
    ),
    "objects in an open object": (
        {"type": "object", "additionalProperties": NAME},
        [{"x": ANN, "y": ANN}],
        [{"x": {**ANN, "x": 1}}],
    ),
    "a definition": (
        {"properties": {"a": {"$ref": "#/$defs/Base"}}, **BASE},
        [{"a": ANN}],
        [{"a": {**ANN, "x": 1}}],
    ),
    "a reference alone": ({"$ref": "#/$defs/Base", **BASE}, [ANN], [{**ANN, "x": 1}]),
    "a part alone": (
        {"allOf": [{"$ref": "#/$defs/Base"}], "title": "T", **BASE},
        [ANN],
        [{**ANN, "x": 1}],
    ),
    "one of two": ({"anyOf": [NAME, AGE]}, [ANN, FOUR], [{**ANN, **FOUR}, {**ANN, "x": 1}]),
    "one of two, one open": (
        {"anyOf": [{**NAME, "additionalProperties": NUMBER}, AGE]},
        [{**ANN, "x": 1}, FOUR],
        [{**FOUR, "x": "1"}],
    ),
    "an object or null": ({"oneOf": [NAME, {"type": "null"}]}, [ANN, None], [{**ANN, "x": 1}]),
    "all of two, one without properties": (
        {"allOf": [{"properties": {}}, NAME], "type": "object"},
        [ANN],
        [{**ANN, "x": 1}],
    ),
    "all of two": ({"allOf": [NAME, AGE]}, [{**ANN, **FOUR}], [ANN, {**ANN, **FOUR, "x": 1}]),
    "a base and more": (BY_BASE, [{**ANN, **FOUR}], [FOUR, {**ANN, **FOUR, "x": 1}]),
    "a base and more beside it": (
        {"$ref": "#/$defs/Base", **AGE, **BASE},
        [{**ANN, **FOUR}],
        [FOUR, {**ANN, **FOUR, "x": 1}],
    ),
    "a base that is used alone, too": (
        {"properties": {"a": BY_BASE["allOf"][0], "b": {"allOf": BY_BASE["allOf"]}}, **BASE},
        [{"a": ANN, "b": {**ANN, **FOUR}}],
        [{"a": {**ANN, **FOUR}}, {"b": {**ANN, **FOUR, "x": 1}}],
    ),
    "an open base and more": (
        {"allOf": [{**NAME, "additionalProperties": True}, AGE]},
        [{**ANN, **FOUR, "x": 1}],
        [FOUR],
    ),
    "a base of a base": (
        {
            "allOf": [{"$ref": "#/$defs/Middle"}, {"properties": {"top": NUMBER}}],
            "$defs": {"Base": NAME, "Middle": BY_BASE},
            "type": "object",
        },
        [{**ANN, **FOUR, "top": 1}],
        [{**ANN, **FOUR, "x": 1}],
    ),
    "at least one of two keys": (
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": NUMBER},
            "anyOf": [{"required": ["name"]}, {"required": ["age"]}],
        },
        [ANN, FOUR, {**ANN, **FOUR}],
        [{}, {**ANN, "x": 1}],
    ),
    "itself": (LIST, [{"v": 1, "next": {"v": 2}}], [{"v": 1, "next": {"v": 2, "x": 1}}]),
    "a tree of an old draft": (
        TREE,
        [{"kids": [{"kids": []}], "root": True}],
        [{"kids": [], "x": 1}, {"kids": [{"x": 1}]}, {"kids": [{"root": True}]}],
    ),
    "names that are keywords": (
        {"properties": {"properties": NUMBER, "allOf": NUMBER, "$ref": NUMBER}},
        [{"properties": 1, "allOf": 1, "$ref": 1}],
        [{"properties": 1, "x": 1}],
    ),
    "constants": ({"const": {"properties": {"a": 1}}}, [{"properties": {"a": 1}}], [{}]),
}


def closed_copy(schema):
    """Close a copy that has each schema for itself, as JSON has it."""
    closed = json.loads(json.dumps(schema))
    close_objects(closed)
    return closed


def accepts(schema, value):
    text = json.dumps(value, separators=(",", ":")).encode()
    grammar = json.dumps({"grammars": [{"json_schema": schema}]})
    vocabulary = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.validate_tokens(list(text)) == len(text) and (
        all(map(matcher.consume_token, text)) and matcher.is_accepting()
    )


@pytest.mark.parametrize(("schema", "right", "wrong"), EXAMPLES.values(), ids=EXAMPLES)
def test_closed_objects(schema, right, wrong):
    closed = closed_copy(schema)
    for value in right:
        assert accepts(schema, value), "the example is wrong"
        assert accepts(closed, value), value
    for value in wrong:
        assert not accepts(closed, value), value


def test_an_unknown_reference_leaves_its_object_open():
    schema = {"$ref": "https://a.example/b", **NAME}
    assert closed_copy(schema) == schema


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"properties": 3, "allOf": {"a": 1}, "$ref": [1], "$defs": 2, "required": {"a": 1}},
        {"properties": [], "allOf": [NAME, 3, None], "anyOf": None},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}, "properties": {}},
        {"allOf": [{"$ref": "#/$defs/9"}, {"$ref": "#/allOf/7"}, {"$ref": "#"}], **NAME},
    ],
)
def test_what_is_no_schema_is_left_to_llguidance(schema):
    closed_copy(schema)


def test_the_order_of_keys_is_that_of_the_schema():
    closed = closed_copy(BY_BASE)
    assert accepts(closed, {"name": "Ann", "age": 4})
    assert not accepts(closed, {"age": 4, "name": "Ann"})


def test_depth_is_not_limited_by_the_stack():
    chain = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(3000)}
    closed = closed_copy({"$ref": "#/$defs/d0", "$defs": {**chain, "d3000": NAME}})
    assert closed["$defs"]["d3000"]["additionalProperties"] is False


def test_grammars_are_compiled_with_closed_objects():
    sandbox = GrammarSandbox({"tokenizer": "byte"})
    for grammar in (
        Grammar.json(NAME),
        Grammar.json({"anyOf": [NAME, AGE]}).either(Grammar.json(NAME)),
    ):
        *_, entry = json.loads(sandbox.run(grammar.entries))["grammars"]
        assert entry["json_schema"]["additionalProperties"] is False
        assert "additionalProperties" not in NAME
