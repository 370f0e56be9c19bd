"""`/v1/models`, `/tokenize`, `/health` and `/metrics`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field

from treeflash.serving.conversation import Conversation
from treeflash.serving.errors import BAD_REQUEST, APIError
from treeflash.serving.messages import Message, templates
from treeflash.serving.schemas import Schema
from treeflash.serving.service import Service
from treeflash.serving.tools import Tool, allowed_tools


class TokenizeRequest(Schema):
    """The body of a request: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()

    def description(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "treeflash",
            "max_model_len": service.engine.model.backend.max_positions,
        }

    @routes.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [description(name) for name in service.names]}

    @routes.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return description(name)

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise APIError(BAD_REQUEST, "give either prompt or messages", param="prompt")
        if body.messages is not None:
            tools, _ = allowed_tools(body.tools, None)
            tokens = await Conversation(
                messages=templates(body.messages),
                template_args=body.chat_template_kwargs or {},
                tools=tools,
            ).encode(service)
        else:
            tokens = await service.encode_text(body.prompt or "")
        limit = service.engine.model.backend.max_positions
        return {"tokens": tokens, "count": len(tokens), "max_model_len": limit}

    @routes.get("/health")
    def health() -> dict[str, str]:
        if not service.engine.ready:
            raise APIError(503, "the server is shutting down", code="shutting_down")
        return {"status": "ok"}

    @routes.get("/metrics")
    def metrics() -> Response:
        return Response(service.engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
