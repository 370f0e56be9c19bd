"""Errors that clients see, in the forms of OpenAI's, Anthropic's and Ollama's APIs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from treeflash.errors import (
    ConfigError,
    ContextLengthError,
    DeviceError,
    PromptError,
    TreeflashError,
    is_out_of_memory,
)

ANTHROPIC, OLLAMA = "/v1/messages", "/api/"
"""The beginnings of the paths of these APIs; all other paths have OpenAI's errors."""
INVALID_REQUEST = "invalid_request_error"
ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""OpenAI's names of error types, by status; all others are `INVALID_REQUEST`."""
ANTHROPIC_TYPES = {
    403: "permission_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}
"""Anthropic's names of error types, by status, where they differ from OpenAI's."""
SERVER_FAILED = "the server failed; its log has the reason"
GPU_LOST = "the GPU refuses further work, so the server ends; its log has the reason"

logger = logging.getLogger("treeflash.serving")


class APIError(Exception):
    """A request that cannot be answered: its HTTP status, and what to do about it.

    `param` is the field of the request that is wrong, `code` a name of the error for programs.
    `anthropic` and `ollama` are the messages in the forms of these APIs, where clients look for
    their words.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        anthropic: str | None = None,
        ollama: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _escape_surrogates(message)
        self.param = None if param is None else _escape_surrogates(param)
        self.code = code
        self._anthropic = anthropic
        self._ollama = None if ollama is None else _escape_surrogates(ollama)
        self.headers = dict(headers or {})

    def body(self, path: str) -> dict[str, Any]:
        """Return the error in the form of the API that a path belongs to."""
        if path.startswith(OLLAMA):
            return {"error": self._ollama or self.message}
        kind = ERROR_TYPES.get(self.status, INVALID_REQUEST)
        if path.startswith(ANTHROPIC):
            kind = ANTHROPIC_TYPES.get(self.status, kind)
            message = self._anthropic or self.message
            return {"type": "error", "error": {"type": kind, "message": message}}
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self, path: str) -> JSONResponse:
        """Return the response, in the form of the API that a path belongs to."""
        return JSONResponse(self.body(path), self.status, headers=self.headers)


def bad_request(message: str, param: str | None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def shutting_down() -> APIError:
    return APIError(503, "the server is shutting down", code="shutting_down")


def api_error(error: Exception) -> APIError:
    """Return the error that the client gets for an exception; a fault of the program is logged."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ContextLengthError):
        # In these words agents recognise that they have to compact the conversation.
        return APIError(
            400,
            f"This model's maximum context length is {error.limit} tokens. However, {error}",
            code="context_length_exceeded",
            anthropic=f"prompt is too long: {error.tokens} tokens > {error.limit} maximum",
        )
    if isinstance(error, PromptError | ConfigError):
        return bad_request(str(error), None)
    if isinstance(error, TimeoutError):
        return APIError(504, "the answer took longer than this server allows", code="timeout")
    if is_out_of_memory(error):
        return APIError(503, "the device is out of memory; send the request again", code="memory")
    if isinstance(error, DeviceError):
        return APIError(503, str(error), code="gpu")
    if isinstance(error, TreeflashError):
        return APIError(500, str(error))
    logger.error("a request failed", exc_info=error)
    return APIError(500, SERVER_FAILED, code="internal_error")


def _escape_surrogates(text: str) -> str:
    """Return the text with lone surrogates, which a request may contain, as escape sequences."""
    return text.encode(errors="backslashreplace").decode()
