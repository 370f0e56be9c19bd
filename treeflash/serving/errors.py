"""Errors that clients see, in the forms of OpenAI's, Anthropic's and Ollama's APIs."""

from __future__ import annotations

import logging
import reprlib
import sys
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from treeflash.errors import (
    ConfigError,
    ContextLengthError,
    DeviceError,
    DeviceMemoryError,
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
NOT_SERVED = {
    **dict.fromkeys(
        ("/v1/embeddings", "/api/embed", "/api/embeddings", "/v1/rerank", "/v1/score"),
        "this server generates text; embeddings and scores need a server with an embedding model",
    ),
    **dict.fromkeys(
        ("/infill", "/v1/fim/completions"),
        "to fill a gap, send the text after it as suffix to /v1/completions",
    ),
    **dict.fromkeys(
        ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs"),
        "this server has the models that it was started with, and changes none",
    ),
}
"""Paths of the APIs that this server does not have, and what it says there and below them."""
INSTEAD = {
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        "use structured_outputs",
    ),
    "functions": "use tools",
    "function_call": "use tool_choice",
}
"""What to do instead of using a field that this server does not have; without an entry, remove it.
vLLM and OpenAI replaced most of these by others."""
WRONG_TYPE = ("_type", "_parsing", "literal_error", "union_tag_invalid", "union_tag_not_found")
"""Ends of the names of pydantic's errors for a value of another type."""

logger = logging.getLogger("treeflash.serving")


class APIError(Exception):
    """A request that cannot be answered: its HTTP status, and what to do about it.

    `param` is the field of the request that is wrong, `code` a name of the error for programs.
    `anthropic` and `ollama` are the messages in the forms of these APIs, where clients look for
    their words. `anthropic_details` tell Anthropic's client what to do instead.
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
        anthropic_details: Mapping[str, str] | None = None,
        ollama: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _escape_surrogates(message)
        self.param = None if param is None else _escape_surrogates(param)
        self.code = code
        self._anthropic = anthropic
        self._anthropic_details = anthropic_details
        self._ollama = None if ollama is None else _escape_surrogates(ollama)
        self.headers = dict(headers or {})

    def body(self, path: str) -> dict[str, Any]:
        """Return the error in the form of the API that a path belongs to."""
        if path.startswith(OLLAMA):
            return {"error": self._ollama or self.message}
        kind = ERROR_TYPES.get(self.status, INVALID_REQUEST)
        if path.startswith(ANTHROPIC):
            kind = ANTHROPIC_TYPES.get(self.status, kind)
            error: dict[str, Any] = {"type": kind, "message": self._anthropic or self.message}
            error |= {"details": self._anthropic_details} if self._anthropic_details else {}
            return {"type": "error", "error": error}
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
    if isinstance(error, DeviceError):
        code = "memory" if isinstance(error, DeviceMemoryError) else "gpu"
        return APIError(503, str(error), code=code)
    if is_out_of_memory(error):
        return APIError(503, "the device is out of memory; send the request again", code="memory")
    if isinstance(error, TreeflashError):
        return APIError(500, str(error))
    logger.error("a request failed", exc_info=error)
    return APIError(500, SERVER_FAILED, code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Let an application answer every error in the form of the path's API."""
    for kind in (HTTPException, RequestValidationError, APIError, TreeflashError, Exception):
        app.add_exception_handler(kind, _respond)


async def _respond(http: Request, error: Exception) -> JSONResponse:
    path = http.url.path
    if isinstance(error, HTTPException):  # no such path or method, or the body cannot be read
        reason = _not_served(path) if error.status_code == HTTPStatus.NOT_FOUND else None
        message = _unreadable_body(http, error.__cause__)
        message = message or f"{http.method} {path}: {reason or error.detail}"
        error = APIError(error.status_code, message, headers=error.headers)
    elif isinstance(error, RequestValidationError):
        error = field_error(error.errors(), error.body)
    return api_error(error).response(path)


def _not_served(path: str) -> str | None:
    """Return why a path of another API is not here; None for other paths."""
    reasons = (x for start, x in NOT_SERVED.items() if f"{path}/".startswith(f"{start}/"))
    return next(reasons, None)


def _unreadable_body(http: Request, cause: BaseException | None) -> str | None:
    """Return why a body cannot be read, by the error of reading it; None if it could be read."""
    if isinstance(cause, UnicodeDecodeError):
        if http.headers.get("content-encoding", "identity") != "identity":
            return "the body is compressed, which is not supported; send plain JSON"
        return "the body is not UTF-8 text; send JSON in UTF-8"
    if isinstance(cause, RecursionError):
        return "the body is nested too deep"
    if isinstance(cause, ValueError):
        return f"a number of the body has more than {sys.get_int_max_str_digits()} digits"
    return None


def field_error(errors: Sequence[dict[str, Any]], body: Any) -> APIError:
    """Name the field of the body that is wrong.

    A field that allows several types has an error for each of them. The type is meant that fits
    the value deepest; if the value has none of the types, the message names all of them.
    """
    paths = [field_path(error, body) for error in errors]
    path = max(paths, key=len)
    same = [error for error, other in zip(errors, paths, strict=True) if other == path]
    fitting = [error for error in same if not error["type"].endswith(WRONG_TYPE)]
    error = (fitting or same)[0]
    if error["type"] == "json_invalid":
        reason, position = error.get("ctx", {}).get("error", ""), error["loc"][-1]
        return bad_request(f"the body is not JSON: {reason} at character {position}", None)
    if not path and error["type"] == "missing":
        return bad_request("the body is empty; send a JSON object", None)
    if not path:
        return bad_request(f"the body is not a valid request: {error['msg']}", None)
    param = ".".join(path)
    if error["type"] == "extra_forbidden":
        advice = INSTEAD.get(param, "remove it")
        return bad_request(f"{param} is not supported by this server; {advice}", param)
    reasons = [error["msg"]] if fitting else [error["msg"] for error in same]
    value = error.get("input")
    got = f" (got {reprlib.repr(value)})" if isinstance(value, str | int | float) else ""
    return bad_request(f"{param}: {' or '.join(dict.fromkeys(reasons))}{got}", param)


def field_path(error: Mapping[str, Any], body: Any) -> list[str]:
    """Return the names and indices of a field, without the types that pydantic adds to them."""
    _, *location = error["loc"]
    missing = [str(location.pop())] if error["type"] == "missing" and location else []
    return _path_within(body, location) + missing


def _path_within(value: Any, location: Sequence[str | int]) -> list[str]:
    """Return the parts of a location that lead into the value.

    Some types have the names of fields, such as `text`. The longest way into the value is right.
    """
    if not location:
        return []
    part, *others = location
    path = _path_within(value, others)  # if the part is a type
    # A range compares a text with each of its numbers.
    is_index = isinstance(value, list) and isinstance(part, int) and part in range(len(value))
    if is_index or (isinstance(value, dict) and part in value):
        path = max(path, [str(part), *_path_within(value[part], others)], key=len)
    return path


def _escape_surrogates(text: str) -> str:
    """Return the text with lone surrogates, which a request may contain, as escape sequences."""
    return text.encode(errors="backslashreplace").decode()
