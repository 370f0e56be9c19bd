"""Several replicas behind one address, with Ray Serve: `serve run treeflash.serving.ray_app:build`.

An ingress passes each request to a replica, which answers it with the server's application. Ray's
prefix router sends prompts that begin alike to the same replica, whose prefix cache has them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from treeflash.language_model import load
from treeflash.serving.application import application
from treeflash.serving.engine import Engine
from treeflash.serving.errors import APIError
from treeflash.serving.guard import Guard
from treeflash.serving.metrics import Metrics
from treeflash.serving.relay import Head, Relayed, answer, respond
from treeflash.serving.service import Service
from treeflash.serving.settings import Settings
from treeflash.serving.streaming import frame

logger = logging.getLogger("treeflash.serving")
# The public name of the same class, in `ray.serve.llm`, needs vLLM to be installed.
PREFIX_ROUTER = (
    "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router"
    ":PrefixCacheAffinityRouter"
)


class RayConfig(BaseModel):
    """Arguments of `build`: `serve run treeflash.serving.ray_app:build replicas=4 target=...`.

    Attributes:
        model: arguments of `treeflash.load`.
        options: decoding options of requests that do not have them.
        settings: limits and access of each replica; see `Settings`.
        names: of the model.
        replicas: at least so many.
        max_replicas: at most so many; None is `replicas`.
        target_requests: a replica is added while more answers than these are unfinished in each.
        imbalance: requests by which the queues of two replicas may differ before the shorter one
            counts more than the prefix.
        cpus: processor cores that a replica reserves.
        gpus: GPUs that a replica reserves.
    """

    model_config = ConfigDict(extra="forbid")

    model: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    names: tuple[str, ...] = ("SmolLM2-135M-Instruct",)
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    target_requests: int = Field(16, ge=1)
    imbalance: int = Field(8, ge=0)
    cpus: float = 1.0
    gpus: float = 0.0


class Replica:
    """A loaded pair that answers requests."""

    def __init__(self, config: RayConfig) -> None:
        """Load the models."""
        settings = Settings(**config.settings)
        self._engine = Engine(partial(load, **config.model), settings, Metrics())
        self._engine.start()
        options: Any = config.options
        self._app = application(Service(self._engine, settings, options, config.names))

    async def answer(self, request: Relayed) -> AsyncIterator[Head | bytes]:
        """The status and the headers, then the body piece by piece."""
        async for piece in answer(self._app, request):
            yield piece

    def check_health(self) -> None:
        """Ray replaces a replica in which this fails.

        Raises:
            RuntimeError: the engine has ended.
        """
        if not self._engine.ready:
            raise RuntimeError("the engine has ended")


def ingress(config: RayConfig) -> ASGIApp:
    """What passes requests on; it runs inside a deployment of the same application."""
    name = serve.get_replica_context().app_name
    replicas = serve.get_deployment_handle("Replica", app_name=name)
    answers = replicas.options(stream=True, method_name="answer")

    async def pass_on(scope: Scope, receive: Receive, send: Send) -> None:
        request = await Relayed.receive(scope, receive)
        pieces = answers.remote(request)
        try:
            head = await anext(pieces)
        except RayError as error:
            logger.warning("a replica failed: %s", error)
            await _lost().response(scope["path"])(scope, receive, send)
            return
        try:
            await respond(head, _with_errors(pieces))(scope, receive, send)
        finally:
            pieces.cancel()  # after the end it does nothing

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/", pass_on)
    return Guard(app, Settings(**config.settings))


async def _with_errors(pieces: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """The pieces of a body; if the replica dies, an error is the last one."""
    try:
        async for piece in pieces:
            yield piece
    except RayError as error:
        logger.warning("a replica failed: %s", error)
        yield frame(_lost().body())


def _lost() -> APIError:
    return APIError(
        503,
        "the replica that answered has ended; send the request again",
        code="replica_lost",
        headers={"Retry-After": "1"},
    )


def build(args: RayConfig) -> serve.Application:
    """The application for `serve run` and `serve.run`."""
    settings = Settings(**args.settings)
    replica = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=settings.max_parallel + settings.max_queue,
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.replicas,
            max_replicas=max(args.max_replicas or 0, args.replicas),
            target_ongoing_requests=args.target_requests,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=PREFIX_ROUTER,
            request_router_kwargs={
                "imbalanced_threshold": args.imbalance,
                "do_eviction": True,
            },
        ),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=settings.timeout,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
    )

    def ingress_app() -> ASGIApp:
        return ingress(args)

    front = serve.deployment(
        serve.ingress(ingress_app)(), name="Ingress", ray_actor_options={"num_cpus": 0}
    )
    bound: serve.Application = front.bind(replica.bind(args))
    return bound
