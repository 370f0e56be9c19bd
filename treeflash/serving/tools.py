"""Tools as requests describe them, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.schemas import Schema

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class Function(Schema):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Schema):
    """A tool. Only functions are supported."""

    type: Literal["function"]
    function: Function

    def template(self) -> dict[str, Any]:
        """As chat templates and grammars read it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class NamedFunction(Schema):
    """The name of a function."""

    name: str


class NamedToolChoice(Schema):
    """The function that the model must call."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


def allowed_tools(
    tools: Sequence[Tool] | None, choice: ToolChoice | None
) -> tuple[list[dict[str, Any]], bool]:
    """The tools that may be called, and whether one must be.

    Raises:
        APIError: the choice does not fit the tools.
    """
    if choice == "none":
        return [], False
    found = [tool.template() for tool in tools or ()]
    names = [tool["function"]["name"] for tool in found]
    if len(set(names)) < len(names):
        raise APIError(BAD_REQUEST, "two tools have the same name", param="tools")
    if choice is None or choice == "auto":
        return found, False
    if not found:
        raise APIError(BAD_REQUEST, "tool_choice needs tools", param="tool_choice")
    if isinstance(choice, NamedToolChoice):
        if (name := choice.function.name) not in names:
            raise APIError(
                BAD_REQUEST,
                f"tool_choice names the function {name!r}, which is not in tools",
                param="tool_choice",
            )
        found = [found[names.index(name)]]
    return found, True
