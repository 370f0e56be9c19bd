"""Structured output: the grammars that requests ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from treeflash.serving.errors import bad_request
from treeflash.serving.schemas import Schema
from treeflash.text.grammar import Grammar

ANY_OBJECT: dict[str, Any] = {"type": "object"}


class TextFormat(Schema):
    type: Literal["text"]


class JSONObjectFormat(Schema):
    type: Literal["json_object"]


class NamedSchema(Schema):
    """A JSON schema, which is always enforced, whatever the value of `strict`."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JSONSchemaFormat(Schema):
    type: Literal["json_schema"]
    json_schema: NamedSchema


AnyFormat = TextFormat | JSONObjectFormat | JSONSchemaFormat
ResponseFormat = Annotated[AnyFormat, Field(discriminator="type")]


class StructuredOutputs(Schema):
    """vLLM's field for structured output; exactly one of its own fields must be set.

    Attributes:
        json_schema: a JSON schema; vLLM calls it `json`.
        regex: a regular expression that the whole answer matches.
        choice: the answer is one of these texts.
        grammar: a grammar in the Lark format or in GBNF, the format of llama.cpp.
        json_object: any JSON object.
    """

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: Literal[True] | None = None

    def to_grammar(self) -> Grammar:
        """The grammar of the answer; raises an APIError unless exactly one field is set."""
        if len(self.model_fields_set) != 1:
            names = "json, regex, choice, grammar and json_object"
            message = f"structured_outputs must have exactly one of {names}"
            raise bad_request(message, "structured_outputs")
        if self.regex is not None:
            return Grammar.regex(self.regex)
        if self.choice is not None:
            return Grammar.choice(self.choice)
        if self.grammar is not None:
            return Grammar.lark_or_gbnf(self.grammar)
        return Grammar.json(ANY_OBJECT if self.json_schema is None else self.json_schema)


def answer_grammar(
    response_format: AnyFormat | None, structured_outputs: StructuredOutputs | None
) -> tuple[Grammar, str] | None:
    """The grammar that a request asks for, and the field that asks for it; None for free text.

    Raises:
        APIError: both fields ask for a grammar, or `structured_outputs` for several.
    """
    has_format = response_format is not None and response_format.type != "text"
    if structured_outputs is None:
        if not has_format:
            return None
        schema = None
        if isinstance(response_format, JSONSchemaFormat):
            schema = response_format.json_schema.json_schema
        return Grammar.json(ANY_OBJECT if schema is None else schema), "response_format"
    if has_format:
        raise bad_request(
            "response_format and structured_outputs both set the form of the answer; remove one of "
            "them",
            "structured_outputs",
        )
    return structured_outputs.to_grammar(), "structured_outputs"
