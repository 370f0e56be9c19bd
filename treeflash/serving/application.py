"""The application: its endpoints and middleware, and the server that runs it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from types import FrameType
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field

from treeflash.cli.console import EXIT_DEVICE_LOST, EXIT_SIGNAL
from treeflash.errors import ConfigError
from treeflash.interruption import say_interrupted
from treeflash.serving import anthropic, chat, completions, ollama, page, responses
from treeflash.serving.authentication import add_guard
from treeflash.serving.connections import Protocol, allow_many_files
from treeflash.serving.errors import add_handlers, bad_request, shutting_down
from treeflash.serving.metrics import metrics_text
from treeflash.serving.models import ModelPool, ModelSpec, ServedModel
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

logger = logging.getLogger("treeflash.serving")


def application(pool: ModelPool) -> FastAPI:
    """Return the server's application; the pool of a single model must have been started."""
    app = FastAPI(title="treeflash", redoc_url=None)
    for endpoint in (chat, completions, responses, anthropic, ollama):
        endpoint.add_routes(app, pool)
    add_routes(app, pool)
    page.add_routes(app)
    add_guard(app, pool.settings, takes_images=any(x.facts.takes_images for x in pool.models))
    add_handlers(app)
    return app


class TokenizeRequest(Schema):
    """The body of a request to `/tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Items[Message] | None = Field(None, min_length=1)
    tools: Items[Tool] | None = Field(None, max_length=MAX_TOOLS)
    chat_template_kwargs: dict[str, Any] | None = None

    async def encode(self, service: Service) -> list[int]:
        """Return the token ids; raises an APIError or a PromptError for what cannot be encoded."""
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("send either prompt or messages", "prompt")
        if self.messages is None:
            return list((await service.encode(self.prompt or "")).token_ids)
        messages = [message.template() for message in self.messages]
        tools = allowed_tools([tool.function for tool in self.tools or ()], None)
        args = self.chat_template_kwargs or {}
        conversation = Conversation(messages=messages, template_args=args, tools=tools)
        return list((await conversation.encode(service)).token_ids)


class DetokenizeRequest(Schema):
    """The body of a request to `/detokenize`: token ids."""

    model: str | None = None
    tokens: LongList[TokenId]


def add_routes(app: FastAPI, pool: ModelPool) -> None:

    def description(model: ServedModel, name: str) -> dict[str, Any]:
        facts = model.facts
        return {
            "id": name,
            "object": "model",
            "created": model.created,
            "owned_by": "treeflash",
            # Anthropic's API has these names.
            "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(model.created, UTC).isoformat(),
            "max_input_tokens": facts.context,
            "max_model_len": facts.context,
            "input_modalities": ["text", "image"] if facts.takes_images else ["text"],
            # llama.cpp's router has this name.
            "status": {"value": "unloaded" if model.service is None else "loaded"},
        }

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        found = [description(model, name) for model in pool.models for name in model.spec.names]
        ends = {"has_more": False, "first_id": found[0]["id"], "last_id": found[-1]["id"]}
        return {"object": "list", "data": found, **ends}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        return description(pool.find(name), name)

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest, http: Request) -> dict[str, Any]:
        async with pool.use(request.model, http) as service:
            tokens = await request.encode(service)
            limit = service.engine.model.backend.max_positions
            return {"tokens": tokens, "count": len(tokens), "max_model_len": limit}

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest, http: Request) -> dict[str, str]:
        async with pool.use(request.model, http) as service:
            if max(request.tokens, default=0) >= service.engine.model.backend.vocab_size:
                raise bad_request("tokens has an id outside the vocabulary", "tokens")
            decode = service.tokenizer.decode_verbatim
            return {"prompt": await asyncio.to_thread(decode, request.tokens)}

    @app.get("/health")
    def health() -> dict[str, str]:
        if not pool.ready:
            raise shutting_down()
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics() -> Response:
        text = metrics_text({model.name: model.metrics for model in pool.models})
        return Response(text, media_type=CONTENT_TYPE_LATEST)


class Server(uvicorn.Server):
    """Ends after the running answers; until then, new requests get status 503."""

    def __init__(self, config: uvicorn.Config, pool: ModelPool) -> None:
        super().__init__(config)
        self.pool = pool

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish the running answers, then end; a second signal ends the process at once."""
        if self.pool.draining:
            # An engine's thread cannot be stopped within an iteration.
            logger.warning("stopped before %d answers were finished", self.pool.unfinished)
            logging.shutdown()
            os._exit(EXIT_SIGNAL + sig)
        name, count = signal.Signals(sig).name, self.pool.unfinished
        logger.info("%s: finishing %d answer%s", name, count, "s" * (count != 1))
        self.pool.drain()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; called ten times a second."""
        if self.pool.draining:
            self.pool.end_waiting()
            if not self.pool.unfinished:
                self.should_exit = True
        if self.pool.device_lost:
            self.should_exit = self.force_exit = True
        return await super().on_tick(counter)


def configuration(
    app: FastAPI,
    *,
    log_level: str | None = None,
    protocol: type[Protocol] = Protocol,
    reading_seconds: int = 10,
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_level=log_level,
        log_config=None,
        lifespan="off",
        timeout_graceful_shutdown=reading_seconds,
    )


def serve(
    specs: Sequence[ModelSpec],
    settings: Settings,
    *,
    host: str,
    port: int,
    log_level: str,
    reading_seconds: int = 10,
) -> int:
    """Serve models and return the exit status; a single one is loaded first.

    Port 0 chooses a free one. When the server ends, clients have `reading_seconds` to read their
    last answers. A TreeflashError or OSError is raised if the single model cannot be
    loaded, its chat template rejects the defaults, or the port is taken.
    """
    listening = bind(host, port)
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s: %(message)s")
    allow_many_files()
    with listening:
        pool = ModelPool(specs, settings)
        if len(specs) == 1:
            _load(pool)
        try:
            app = application(pool)
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            config = configuration(app, log_level=log_level, reading_seconds=reading_seconds)
            names = ", ".join(model.name for model in pool.models)
            logger.info("serving %s on http://%s:%d", names, shown, port)
            asyncio.run(Server(config, pool).serve([listening]))
        finally:
            pool.close()
    status = EXIT_DEVICE_LOST if pool.device_lost else 0
    if pool.loading:
        _end_while_loading(status)
    return status


def _load(pool: ModelPool) -> None:
    """Load the only model of a server; an interruption ends the process."""
    try:
        pool.start()
    except KeyboardInterrupt:
        _end_while_loading(say_interrupted())


def _end_while_loading(status: int) -> NoReturn:
    """End the process beside a thread that loads a model.

    Nothing can stop such a thread, and the interpreter would abort if it shut down beside threads
    of a framework.
    """
    logging.shutdown()
    os._exit(status)


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
