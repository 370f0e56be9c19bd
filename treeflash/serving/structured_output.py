"""What a request says about the form of its answer: `response_format` and `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.grammars import Grammar
from treeflash.serving.schemas import Schema

ANY_OBJECT: dict[str, Any] = {"type": "object"}


class TextFormat(Schema):
    """Free text."""

    type: Literal["text"]


class JSONObjectFormat(Schema):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Schema):
    """A JSON schema. It is always followed strictly, whatever `strict` says."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JSONSchemaFormat(Schema):
    """JSON that conforms to a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(Schema):
    """vLLM's field: one of these.

    Attributes:
        json_schema: a JSON schema; vLLM calls it `json`.
        regex: a regular expression that the whole answer matches.
        choice: the answer is one of these texts.
        grammar: in the Lark format, or that of llama.cpp.
        json_object: any JSON object.
    """

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: Literal[True] | None = None

    def to_grammar(self) -> Grammar:
        """The grammar of the answer.

        Raises:
            APIError: not exactly one field is given, or the grammar is not one.
        """
        if len(self.model_fields_set) != 1:
            raise APIError(
                BAD_REQUEST,
                "structured_outputs needs exactly one of json, regex, choice, grammar and "
                "json_object",
                param="structured_outputs",
            )
        if self.regex is not None:
            return Grammar.regex(self.regex)
        if self.choice is not None:
            return Grammar.choice(self.choice)
        if self.grammar is not None:
            try:
                return Grammar.lark_or_gbnf(self.grammar)
            except Exception as error:  # llguidance raises a bare one for GBNF
                raise APIError(
                    BAD_REQUEST, f"the grammar is not one: {error}", param="structured_outputs"
                ) from error
        return Grammar.json(ANY_OBJECT if self.json_schema is None else self.json_schema)


def answer_grammar(
    response_format: TextFormat | JSONObjectFormat | JSONSchemaFormat | None,
    structured_outputs: StructuredOutputs | None,
) -> tuple[Grammar, str] | None:
    """The grammar that a request asks for, and the field that asks for it; None for free text.

    Raises:
        APIError: both fields ask for one, or the grammar is not one.
    """
    found = None
    if isinstance(response_format, JSONObjectFormat):
        found = Grammar.json(ANY_OBJECT), "response_format"
    elif isinstance(response_format, JSONSchemaFormat):
        schema = response_format.json_schema.json_schema
        found = Grammar.json(ANY_OBJECT if schema is None else schema), "response_format"
    if structured_outputs is None:
        return found
    if found is not None:
        raise APIError(
            BAD_REQUEST,
            "response_format and structured_outputs both say what the answer must look like; give "
            "one of them",
            param="structured_outputs",
        )
    return structured_outputs.to_grammar(), "structured_outputs"
