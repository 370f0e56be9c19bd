"""The application: its endpoints, middleware and errors, and the server that runs it."""

from __future__ import annotations

import asyncio
import logging
import os
import reprlib
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from http import HTTPStatus
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from starlette.exceptions import HTTPException

from treeflash.cli.console import EXIT_DEVICE_LOST, EXIT_SIGNAL
from treeflash.errors import ConfigError, TreeflashError
from treeflash.interruption import say_interrupted
from treeflash.language_model import LanguageModel
from treeflash.serving import anthropic, chat, completions, ollama, page, responses
from treeflash.serving.authentication import add_guard
from treeflash.serving.connections import Protocol, allow_many_files
from treeflash.serving.engine import Engine
from treeflash.serving.errors import APIError, api_error, bad_request
from treeflash.serving.schemas import (
    MAX_TOOLS,
    Items,
    LongList,
    Message,
    Schema,
    TokenId,
    Tool,
    allowed_tools,
)
from treeflash.serving.service import Conversation, Service
from treeflash.serving.settings import Settings
from treeflash.text.options import Options

READING_SECONDS = 10
"""Seconds in which clients can read the last answers of a server that ends."""

logger = logging.getLogger("treeflash.serving")


def application(service: Service) -> FastAPI:
    """Return the server's application; the engine of the service must have been started."""
    app = FastAPI(title="treeflash", redoc_url=None)
    for endpoint in (chat, completions, responses, anthropic, ollama):
        endpoint.add_routes(app, service)
    add_routes(app, service)
    page.add_routes(app)
    add_guard(app, service.engine.settings, takes_images=service.takes_images)
    for kind in (HTTPException, RequestValidationError, APIError, TreeflashError, Exception):
        app.add_exception_handler(kind, _error)
    return app


class TokenizeRequest(Schema):
    """The body of a request to `/tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Items[Message] | None = Field(None, min_length=1)
    tools: Items[Tool] | None = Field(None, max_length=MAX_TOOLS)
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Schema):
    """The body of a request to `/detokenize`: token ids."""

    model: str | None = None
    tokens: LongList[TokenId]


def add_routes(app: FastAPI, service: Service) -> None:

    def description(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "treeflash",
            # Anthropic's API has these names.
            "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
            "max_input_tokens": service.engine.model.backend.max_positions,
            "max_model_len": service.engine.model.backend.max_positions,
            "input_modalities": ["text", "image"] if service.takes_images else ["text"],
        }

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        found = [description(name) for name in service.names]
        ends = {"has_more": False, "first_id": found[0]["id"], "last_id": found[-1]["id"]}
        return {"object": "list", "data": found, **ends}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return description(name)

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        service.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise bad_request("send either prompt or messages", "prompt")
        if request.messages is not None:
            messages = [message.template() for message in request.messages]
            tools = allowed_tools([tool.function for tool in request.tools or ()], None)
            args = request.chat_template_kwargs or {}
            conversation = Conversation(messages=messages, template_args=args, tools=tools)
            tokens = (await conversation.encode(service)).token_ids
        else:
            tokens = (await service.encode(request.prompt or "")).token_ids
        limit = service.engine.model.backend.max_positions
        return {"tokens": tokens, "count": len(tokens), "max_model_len": limit}

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> dict[str, str]:
        service.check_model(request.model)
        if max(request.tokens, default=0) >= service.engine.model.backend.vocab_size:
            raise bad_request("tokens has an id outside the vocabulary", "tokens")
        decode = service.tokenizer.decode_verbatim
        return {"prompt": await asyncio.to_thread(decode, request.tokens)}

    @app.get("/health")
    def health() -> dict[str, str]:
        if not service.engine.ready:
            raise APIError(503, "the server is shutting down", code="shutting_down")
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)


FILL = "to fill a gap, write the model's own tokens for it into the prompt of /v1/completions"
NOT_SERVED = {
    **dict.fromkeys(
        ("/v1/embeddings", "/api/embed", "/api/embeddings", "/v1/rerank", "/v1/score"),
        "this server generates text; embeddings and scores need a server of such a model",
    ),
    **dict.fromkeys(("/infill", "/v1/fim/completions"), FILL),
    **dict.fromkeys(
        ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs"),
        "this server has the model that it was started with, and changes no models",
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
    "suffix": FILL,
}
"""What to do instead of using a field that this server does not have; without an entry, remove it.
vLLM and OpenAI replaced most of these by others."""


async def _error(http: Request, error: Exception) -> JSONResponse:
    path = http.url.path
    if isinstance(error, HTTPException):  # no such path or method, or the body cannot be read
        reason = _not_served(path) if error.status_code == HTTPStatus.NOT_FOUND else None
        message = _unreadable_body(http, error.__cause__)
        message = message or f"{http.method} {path}: {reason or error.detail}"
        error = APIError(error.status_code, message, headers=error.headers)
    elif isinstance(error, RequestValidationError):
        error = _field_error(error.errors(), error.body)
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


WRONG_TYPE = ("_type", "_parsing", "literal_error", "union_tag_invalid", "union_tag_not_found")
"""Ends of the names of pydantic's errors for a value of another type."""


def _field_error(errors: Sequence[dict[str, Any]], body: Any) -> APIError:
    """Name the field of the body that is wrong.

    A field that allows several types has an error for each of them. The type is meant that fits
    the value deepest; if the value has none of the types, the message names all of them.
    """
    paths = [_field_path(error, body) for error in errors]
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


def _field_path(error: Mapping[str, Any], body: Any) -> list[str]:
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


class Server(uvicorn.Server):
    """Ends after the running answers; until then, new requests get status 503."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish the running answers, then end; a second signal ends the process at once."""
        if self._engine.draining:
            # The engine's thread cannot be stopped within an iteration.
            logger.warning("stopped before %d answers were finished", self._engine.unfinished)
            logging.shutdown()
            os._exit(EXIT_SIGNAL + sig)
        logger.info("%s: finishing %d answers", signal.Signals(sig).name, self._engine.unfinished)
        self._engine.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; called ten times a second."""
        if self._engine.draining and not self._engine.unfinished:
            self.should_exit = True
        if self._engine.device_lost:
            self.should_exit = self.force_exit = True
        return await super().on_tick(counter)


def configuration(app: FastAPI, *, log_level: str | None = None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_level=log_level,
        log_config=None,
        lifespan="off",
        timeout_graceful_shutdown=READING_SECONDS,
    )


def serve(
    load: Callable[[], LanguageModel],
    settings: Settings,
    defaults: Options,
    names: tuple[str, ...],
    *,
    host: str,
    port: int,
    log_level: str,
) -> int:
    """Load the models and serve them; returns the exit status.

    `defaults` are decoding options of requests that leave them out; port 0 chooses a free one. A
    TreeflashError or OSError is raised if the models cannot be loaded, the chat template rejects
    the defaults, or the port is taken.
    """
    listening = bind(host, port)
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s: %(message)s")
    allow_many_files()
    engine = Engine(load, settings)
    with listening:
        _load(engine)
        try:
            service = Service(engine, defaults, names)
            service.check_defaults()
            app = application(service)
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            config = configuration(app, log_level=log_level)
            logger.info("serving %s on http://%s:%d", names[0], shown, port)
            asyncio.run(Server(config, engine).serve([listening]))
        finally:
            engine.stop()
    return EXIT_DEVICE_LOST if engine.device_lost else 0


def _load(engine: Engine) -> None:
    """Start the engine; an interruption ends the process.

    The engine's thread cannot be stopped while it loads, and the interpreter would abort if it shut
    down beside threads of a framework.
    """
    try:
        engine.start()
    except KeyboardInterrupt:
        os._exit(say_interrupted())


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket with the address, so that a taken port is an error before models are loaded."""
    try:
        # With its protocol: asyncio sends without delay on sockets that say they are TCP's.
        *kind, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as on_failure:
            listening = on_failure.enter_context(socket.socket(*kind))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            on_failure.pop_all()
    except (OSError, UnicodeError) as error:  # no address has such a name
        reason = error.strerror if isinstance(error, OSError) else "it is not a name of a host"
        raise ConfigError(
            f"cannot listen on {host}:{port} ({reason}); choose another --host or --port"
        ) from None
    return listening
