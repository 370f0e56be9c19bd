"""Errors that clients see, in OpenAI's form."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from treeflash.errors import ConfigError, PromptError, TreeflashError, is_out_of_memory

BAD_REQUEST = 400
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


ANTHROPIC_TYPES = {
    "server_error": "api_error",
    "service_unavailable_error": "overloaded_error",
}
"""Anthropic's names, where they differ."""


class APIError(Exception):
    """A request cannot be answered.

    Attributes:
        status: of HTTP.
        message: what is wrong and what to do about it.
        param: the field of the request that is wrong, if it is one.
        code: a name for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the error."""
        super().__init__(message)
        self.status = status
        self.message = _valid(message)
        self.param = None if param is None else _valid(param)
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's name for this kind of error."""
        return TYPES.get(self.status, "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """As OpenAI's servers send it."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic_body(self) -> dict[str, Any]:
        """As Anthropic's servers send it."""
        kind = ANTHROPIC_TYPES.get(self.type, self.type)
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str) -> JSONResponse:
        """In the form of the API that the path belongs to."""
        anthropic = path.startswith("/v1/messages")
        body = self.anthropic_body() if anthropic else self.body()
        return JSONResponse(body, self.status, headers=self.headers)


def api_error(error: Exception) -> APIError:
    """The error that a client gets for one that decoding raised."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, PromptError | ConfigError):
        return APIError(BAD_REQUEST, str(error))
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return APIError(504, "the answer took longer than this server allows", code="timeout")
    if is_out_of_memory(error):
        return APIError(503, "the device is out of memory; send the request again", code="memory")
    if isinstance(error, TreeflashError):
        return APIError(500, str(error))
    return APIError(500, "the server failed; its log says why", code="internal_error")


def _valid(text: str) -> str:
    """The text with lone surrogates, which a request may have, spelled out."""
    return text.encode(errors="backslashreplace").decode()
