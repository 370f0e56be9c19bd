r"""Grammars of tool calls, in the forms in which models write them.

A call has an opening, its arguments and an end. Arguments are one JSON object or, in the form of
Qwen3.5, texts between tags:

    <tool_call>
    <function=paint>
    <parameter=colour>
    red
    </parameter>
    </function>
    </tool_call>

Each parameter is then a rule of its own, in the order of the schema's `properties`. A text has no
quotes: it ends at the first end of a tag, and only the values of `enum` and `const` are enforced in
it. Other values are JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from treeflash.serving.message_parser import ResponseTemplate
from treeflash.serving.response_templates import JSON_CALL, SPACE_RUN
from treeflash.serving.schemas import ANY_OBJECT, AllowedTools
from treeflash.text.grammar import (
    JSON_SPACE,
    SPACE,
    Grammar,
    bound_white_space,
    escape_slashes,
)
from treeflash.text.json_schema import SchemaReader, chosen_values

LOOKAHEAD = re.compile(r"\(\?=[^()]*\)$")
OPTIONAL_SPACE = r"\s*"
ARGUMENT_KEYS = {"{content}": "arguments", str(JSON_CALL): "parameters"}
"""The name of the arguments in the JSON of a call, by the transform of the call."""
NAME_GROUP = re.compile(r"\(\?P<name>[^()]*\)")
GAPS = {OPTIONAL_SPACE: SPACE, r"\n?": r"\n"}
"""What is written where a pattern allows white space."""
GAP = r"(?:(\\s\*|\\n\?))?"
TAG = re.compile(rf"(?s)(.*)\(\?P<key>([^()]*)\)(.*?){GAP}\(\?P<value>\.\*\?\){GAP}(.*)")
"""A pattern of tags: what begins one, the pattern of names, and what is before and after a value,
each with the white space that is no part of the value."""
BLANK = f"({JSON_SPACE})?"
REST_OF_TEXT = "(?s:.*)"
MOST_REPEATED = 2**22
"""Most characters of definitions in the grammars of all values, each of which has its schema's."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call, in the Lark format."""

    text: str  # the part of a rule that matches them; empty for none
    rules: Sequence[str] = ()  # rules that it refers to
    entries: Sequence[Mapping[str, Any]] = ()  # grammars that it refers to
    repeated: int = 0  # characters of schemas that several of the grammars have


def call_grammar(template: ResponseTemplate, tools: AllowedTools, *, free: bool) -> Grammar | None:
    """Return the grammar of messages with calls of these tools; None for forms without one.

    The arguments of `strict` functions follow their schemas; if the message must consist of calls,
    the arguments of all functions do. With `free` the calls may follow free text, or there may be
    none.
    """
    form = template.fields.get("tool_calls", {})
    opening, close = _pattern(form, "open"), _pattern(form, "close") or ""
    call = (form.get("transform") or {}).get("function")
    if call is None or opening is None or form.get("transform_each"):
        return None
    opening, *after_name = NAME_GROUP.split(opening, 1)
    if free and not opening:  # free text ends where a call begins, so that must be a certain text
        return None
    key = ARGUMENT_KEYS.get(str(call)) if _is_json(form) else None  # then all of it is JSON
    calls = []
    for i, tool in enumerate(tools.functions):
        called = tool["function"]
        enforced = called.get("parameters") if tools.must_call or called.get("strict") else None
        arguments = _arguments(form, f"arguments_{i}", enforced or ANY_OBJECT)
        if arguments is None or not (key or after_name):
            return None
        before, after = re.escape(called["name"]) + "".join(after_name), ""
        if key is not None:
            before = (SPACE if opening else "") + _before_arguments(called["name"], key)
            after = f" /{BLANK}\\}}/"
        text = f"/{escape_slashes(before)}/ /{SPACE}/ {arguments.text}{after}"
        calls.append(replace(arguments, text=text))
    if sum(call.repeated for call in calls) > MOST_REPEATED:
        return None
    return _grammar_of_calls(opening, calls, close, free=free, parallel=tools.parallel)


def _grammar_of_calls(
    opening: str, calls: Sequence[Arguments], close: str, *, free: bool, parallel: bool
) -> Grammar:
    """Return the grammar of messages with calls, each of one of `calls` between two patterns.

    See `call_grammar` for `free`. There is at most one call unless they are `parallel`.
    """
    rules, begin = [], ""
    if opening:  # it ends a lazy lexeme, so that free text ends where a call begins
        begin = "opening "
        text = REST_OF_TEXT if free else ""
        rules.append(f"opening[lazy]: /{text}{escape_slashes(opening)}/")
    one_of = " | ".join(call.text for call in calls)
    rules.append(f"call: {begin}({one_of}) /{SPACE}{escape_slashes(close)}/")
    start = "start: call"
    if not free:
        start += "+" if parallel else ""
    elif parallel:  # free text without a call may follow
        start += f"* /{REST_OF_TEXT}/"
    else:
        start += "? REST"
        begun = f"{REST_OF_TEXT}{escape_slashes(opening)}{REST_OF_TEXT}"
        rules.append(f"REST: /{REST_OF_TEXT}/ & ~/{begun}/")
    rules += (rule for call in calls for rule in call.rules)
    text = "\n".join([start, *rules])
    return Grammar(({"lark_grammar": text}, *(entry for call in calls for entry in call.entries)))


def _arguments(form: Mapping[str, Any], name: str, schema: Any) -> Arguments | None:
    """Return the arguments of a function, whose rules begin with `name`; None if they have none."""
    if _is_json(form):
        return _json_arguments(name, schema)
    tags = Tags.find(form)
    return None if tags is None else tags.arguments(name, schema)


def _is_json(form: Mapping[str, Any]) -> bool:
    return form.get("content") == "json" and not form.get("content_args")


def _json_arguments(name: str, schema: Any) -> Arguments:
    return Arguments(f"@{name}", entries=[{"name": name, "json_schema": bound_white_space(schema)}])


@dataclass(frozen=True)
class Tags:
    """The patterns of the tags around a value."""

    begin: str  # before the name
    name: str  # of any name
    between: str  # after the name
    before: str  # white space before a text, which is no part of it
    after: str  # such white space after it
    end: str  # after the value

    @classmethod
    def find(cls, form: Mapping[str, Any]) -> Tags | None:
        """Return the tags of a call's form; None if its arguments are not values between tags."""
        args = form.get("content_args") or {}
        if form.get("content") != "xml-inline" or args.keys() != {"tag_pattern"}:
            return None
        if (found := TAG.fullmatch(args["tag_pattern"])) is None or not found[6]:
            return None
        return cls(*(GAPS.get(part, part) or "" for part in found.groups()))

    def arguments(self, name: str, schema: Any) -> Arguments | None:
        """Return the arguments of a function, whose rules begin with `name`.

        None if their schema says more than which properties an object has, or is invalid.
        """
        writer = _Writer(self, name, SchemaReader(schema))
        root, *others = writer.reader.alternatives(schema)
        if others or root.keys() & {"allOf", "patternProperties"}:
            return None
        properties, required = root.get("properties") or {}, root.get("required") or []
        types = root.get("type", "object")
        if not isinstance(properties, dict) or not isinstance(required, list) or types != "object":
            return None
        needed = dict.fromkeys((key for key in required if isinstance(key, str)), True)
        parts = [
            writer.argument(key, value) + ("" if key in needed else "?")
            for key, value in (properties | (needed | properties)).items()
        ]
        if (more := root.get("additionalProperties", "properties" not in root)) is not False:
            parts.append(writer.any_argument(more) + "*")
        if not all(map(is_definition, references([writer.entries, writer.definitions]))):
            return None  # the schema of a value is no part of the whole one any more
        repeated = len(json.dumps(writer.definitions)) * len(writer.entries)
        return Arguments(" ".join(parts), writer.rules, writer.entries, repeated)


@dataclass
class _Writer:
    """Writes the rules of a function's arguments."""

    tags: Tags
    name: str
    reader: SchemaReader
    rules: list[str] = field(default_factory=list)
    entries: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def definitions(self) -> dict[str, Any]:
        """The part of the schema that references of values need."""
        root = self.reader.root
        return {key: root[key] for key in ("$defs", "definitions") if key in root}

    def argument(self, key: str, schema: Any) -> str:
        """Add the rule of a parameter; returns its name."""
        return self._add(re.escape(key), self._value(schema))

    def any_argument(self, schema: Any) -> str:
        """Add the rule of a parameter with any name; returns its name."""
        return self._add(self.tags.name, self._value(schema))

    def _add(self, key: str, value: str) -> str:
        rule = f"{self.name}_{len(self.rules)}"
        opening = escape_slashes(f"{SPACE}{self.tags.begin}{key}{self.tags.between}")
        self.rules.append(f"{rule}: /{opening}/ {value}")
        return rule

    def _value(self, schema: Any) -> str:
        """Return the part of a rule for a value and its end."""
        texts, others = list[str](), list[Any]()
        for part in self.reader.alternatives(schema):
            if (values := chosen_values(part)) is not None:
                texts += [x if isinstance(x, str) else json.dumps(x) for x in values]
            elif "type" not in part or "string" in self.reader.types(part):
                return self._text()
            else:
                others.append(part)
            if part.get("nullable") is True:
                texts.append("null")
        choices, end = [], escape_slashes(self.tags.end)
        if texts:
            pattern = escape_slashes("|".join(map(re.escape, texts)))
            choices.append(f"/{self.tags.before}({pattern}){self.tags.after}{end}/")
        if others:
            name = f"{self.name}_value_{len(self.entries)}"
            value = _json_arguments(name, {"anyOf": others, **self.definitions})
            self.entries += value.entries
            choices.append(f"/{SPACE}/ {value.text} /{SPACE}{end}/")
        return f"({' | '.join(choices)})"

    def _text(self) -> str:
        """Return the part of a rule for a text and its end: the lexeme stops at the first end."""
        rule = f"{self.name}_{len(self.rules)}"
        self.rules.append(f"{rule}[lazy]: /{REST_OF_TEXT}{escape_slashes(self.tags.end)}/")
        return rule


def references(schema: Any) -> list[str]:
    """List what a schema refers to."""
    return re.findall(r'"\$ref": "([^"]*)"', json.dumps(schema))


def is_definition(reference: str) -> bool:
    return reference.startswith(("#/$defs/", "#/definitions/"))


def _pattern(form: Mapping[str, Any], end: str) -> str | None:
    """Return the regular expression of the beginning or the end of a call."""
    if f"{end}_pattern" in form:
        pattern = str(form[f"{end}_pattern"])
        if (found := LOOKAHEAD.search(pattern)) is not None:  # the call has no text before its JSON
            return "" if pattern[: found.start()] in (OPTIONAL_SPACE, SPACE_RUN) else None
        return pattern.replace(OPTIONAL_SPACE, SPACE)
    literal = form.get(end)
    literal = literal[0] if isinstance(literal, list) else literal
    return None if literal is None else re.escape(literal)


def _before_arguments(name: str, key: str) -> str:
    """Return the pattern of a call in JSON up to its arguments, whose name in it is `key`."""
    tokens = "{", '"name"', ":", json.dumps(name), ",", json.dumps(key), ":"
    return BLANK.join(map(re.escape, tokens))
