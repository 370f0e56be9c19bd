"""The application: endpoints, middleware, and errors in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from treeflash.errors import TreeflashError
from treeflash.serving import anthropic, chat, completions, models, page, responses
from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.guard import Guard
from treeflash.serving.service import Service
from treeflash.serving.streaming import reported

TYPES = frozenset({"str", "int", "float", "bool", "constrained-str"})
"""What pydantic adds to a location for the types of a union."""


def application(service: Service) -> FastAPI:
    """The server's application; its engine must have been started."""
    app = FastAPI(title="treeflash", docs_url=None, redoc_url=None)
    for module in (chat, completions, responses, anthropic, models):
        app.include_router(module.router(service))
    app.include_router(page.router())
    app.add_middleware(Guard, settings=service.settings)
    if service.settings.cors_origins:  # added last, it comes first: it also answers for errors
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    for kind in (APIError, TreeflashError, Exception):
        app.add_exception_handler(kind, _failed)
    return app


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return reported(error).response(request.url.path)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """No such path, no such method, or a body that is not JSON."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    told = APIError(error.status_code, message, headers=error.headers)
    return told.response(request.url.path)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Name the field that is wrong."""
    assert isinstance(error, RequestValidationError)
    return _invalid_field(error).response(request.url.path)


def _invalid_field(error: RequestValidationError) -> APIError:
    # Of a field with several types, each has an error; the one that goes deepest is meant.
    found = max(error.errors(), key=lambda item: len(item["loc"]))
    if found["type"] == "json_invalid":
        reason = found.get("ctx", {}).get("error", "")
        return APIError(BAD_REQUEST, f"the body is not JSON: {reason}")
    param = ".".join(_path(found["loc"])) or None
    if found["type"] == "extra_forbidden":
        message = f"{param} is not supported by this server; leave it out"
    elif param is None:
        message = f"the body is not a valid request: {found['msg']}"
    else:
        message = f"{param}: {found['msg']}"
    return APIError(BAD_REQUEST, message, param=param)


def _path(location: Sequence[str | int]) -> list[str]:
    """The names and indices of a field, without the types that pydantic adds to them."""
    names = [str(part) for part in location[1:]]
    return [name for name in names if name not in TYPES and "[" not in name]
