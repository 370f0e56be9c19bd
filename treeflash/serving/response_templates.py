"""How a model writes reasoning and tool calls, by the response templates of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from treeflash.drafters.folder import read_config
from treeflash.language_model import LanguageModel
from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.grammars import SPACE, Grammar, bounded, slashed

REASONING = ("reasoning_content", "thinking", "reasoning")
"""What templates call the reasoning."""
NAME_GROUP = re.compile(r"\(\?P<name>[^()]*\)")


@dataclass(frozen=True, eq=False)
class ResponseTemplate:
    """The form of an assistant's message.

    Attributes:
        fields: the template's fields: how each begins and ends, and what is in it.
        source: the template, as `transformers.utils.chat_parsing` reads it.
    """

    fields: Mapping[str, Mapping[str, Any]]
    source: Any

    @classmethod
    def of(cls, model: LanguageModel) -> ResponseTemplate | None:
        """The tokenizer's own, else the one that transformers has for the model's family."""
        from transformers.cli.serving.utils import get_response_template

        family = None if model.folder is None else read_config(model.folder).get("model_type")
        config = SimpleNamespace(config=SimpleNamespace(model_type=family))
        source = get_response_template(model.tokenizer.transformers, config)
        return None if source is None else cls(source["fields"], source)

    def after_reasoning(self, grammar: Grammar, *, begun: bool) -> Grammar:
        """A grammar of the whole message, from the grammar of what follows the reasoning.

        Args:
            grammar: of what follows.
            begun: whether the prompt has begun the reasoning; else there may be none.
        """
        field = next((self.fields[name] for name in REASONING if name in self.fields), None)
        if field is None or not isinstance(close := field.get("close"), str):
            return grammar
        end = slashed(re.escape(close))
        if begun:
            return grammar.after(f"thought[lazy]: /(?s:.*){end}/", lead=f"thought /{SPACE}/")
        if not isinstance(opening := field.get("open"), str):
            return grammar
        rule = f"thought[lazy]: /{slashed(re.escape(opening))}(?s:.*){end}/"
        return grammar.after(rule, lead=f"(thought /{SPACE}/)?")

    def calls(
        self, tools: Sequence[Mapping[str, Any]], *, required: bool, parallel: bool, param: str
    ) -> Grammar:
        """The grammar of messages with calls of these tools.

        Args:
            tools: functions in OpenAI's form. The arguments of those that are `strict`, and of all
                if a call is required, follow their schemas.
            required: whether the message must consist of calls; else they may follow free text.
            parallel: whether there may be several calls.
            param: the field of the request that asks for it.

        Raises:
            APIError: the model does not write its calls in JSON.
        """
        field = self.fields.get("tool_calls", {})
        opening, close = _pattern(field, "open"), _pattern(field, "close")
        function = (field.get("transform") or {}).get("function")
        if (
            field.get("content") != "json"
            or field.get("content_args")
            or opening is None
            or close is None
            or function is None
        ):
            raise APIError(
                BAD_REQUEST,
                f"{param}: this model writes its calls in a form that cannot be enforced",
                param=param,
            )
        schemas = {
            tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object"}
            if required or tool["function"].get("strict")
            else {"type": "object"}
            for tool in tools
        }
        calls: dict[str, Any]
        if function == "{content}":  # name and arguments are in the JSON
            calls = {opening: {"anyOf": [_call(*item) for item in schemas.items()]}}
        else:  # the name is in the opening
            calls = {_named(opening, name): schema for name, schema in schemas.items()}
        rules, entries = [], []
        for i, (pattern, schema) in enumerate(calls.items()):
            # The opening ends a lazy lexeme: free text cannot go on where a call begins.
            text = "" if required else "(?s:.*)"
            rules.append(f"opening_{i}[lazy]: /{text}{slashed(pattern)}/")
            call = f"opening_{i} /{SPACE}/ @arguments_{i} /{SPACE}{slashed(close)}/"
            rules.append(f"call_{i}: {call}")
            entries.append({"name": f"arguments_{i}", "json_schema": bounded(schema)})
        one = "(" + " | ".join(f"call_{i}" for i in range(len(calls))) + ")"
        count = one + ("+" if parallel else "") if required else one + ("*" if parallel else "?")
        # What may follow is free text without a call.
        start = f"start: {count}" if required else f"start: {count} /(?s:.*)/"
        return Grammar(({"lark_grammar": "\n".join([start, *rules])}, *entries))


def _pattern(field: Mapping[str, Any], end: str) -> str | None:
    """The regular expression of a field's beginning or end."""
    if f"{end}_pattern" in field:
        return str(field[f"{end}_pattern"]).replace(r"\s*", SPACE)
    literal = field.get(end)
    if isinstance(literal, list):
        literal = literal[0]
    return None if literal is None else re.escape(literal)


def _named(opening: str, name: str) -> str:
    """An opening whose name is given."""
    return NAME_GROUP.sub(lambda _: re.escape(name), opening)


def _call(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a call."""
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": schema},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
