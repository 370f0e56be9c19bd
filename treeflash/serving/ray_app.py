"""Several replicas behind one address, with Ray Serve: `serve run treeflash.serving.ray_app:build`.

One ingress passes each request to a replica, which answers it with the server's application. The
ingress's `PrefixRouter` sends prompts with the same beginning to one replica, whose prefix cache
then has it.

Ray (2.60) has two parts of this, which do not fit. Its HTTP proxies stream ASGI applications, but
choose a replica before the body is read, so that no router sees a prompt. Its
`PrefixCacheAffinityRouter` chooses by the prompt in a call's argument, and cannot be imported
without vLLM or SGLang.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.request_router import (
    LocalityMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)
from starlette.types import ASGIApp

from treeflash.language_model import load
from treeflash.serving.application import application
from treeflash.serving.models import ModelPool, ModelSpec
from treeflash.serving.relay import (
    PrefixIndex,
    RelayedRequest,
    ResponseHead,
    relay_application,
    response_pieces,
)
from treeflash.serving.settings import Settings
from treeflash.text.options import Options


class RayConfig(BaseModel):
    """Arguments of `build`: `serve run treeflash.serving.ray_app:build replicas=4 ...`."""

    model_config = ConfigDict(extra="forbid")

    model: dict[str, Any] = Field(default_factory=dict)  # arguments of `treeflash.load`
    # Requests that leave decoding options out have these.
    options: dict[str, Any] = Field(default_factory=dict)
    # Each replica has these limits and this access; see `Settings`.
    settings: dict[str, Any] = Field(default_factory=dict)
    names: tuple[str, ...] = ("SmolLM2-135M-Instruct",)  # names of the model
    replicas: int = Field(1, ge=1)  # the minimum number
    max_replicas: int | None = Field(None, ge=1)  # None is `replicas`
    # A replica is added while replicas have more unfinished requests than this.
    target_requests: int = Field(16, ge=1)
    # If the queues of two replicas differ by more requests than this, the shortest queue decides
    # instead of the prefix.
    imbalance: int = Field(8, ge=0)
    cpus: float = 1.0  # processor cores that a replica reserves
    gpus: float = 0.0  # GPUs that a replica reserves


def build(args: RayConfig) -> serve.Application:
    """Build the application for `serve run` and `serve.run`."""
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
            request_router_class=PrefixRouter, request_router_kwargs={"imbalance": args.imbalance}
        ),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=settings.timeout,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
    )

    app = serve.ingress(lambda: ingress(args))()
    front = serve.deployment(app, name="Ingress", ray_actor_options={"num_cpus": 0})
    bound: serve.Application = front.bind(replica.bind(args))
    return bound


class Replica:
    """A loaded pair that answers requests."""

    def __init__(self, config: RayConfig) -> None:
        settings, options = Settings(**config.settings), config.options
        spec = ModelSpec(
            names=config.names,
            load=partial(load, **config.model),
            settings=settings,
            defaults=cast(Options, options),
        )
        self.pool = ModelPool([spec], settings)
        self.pool.start()
        self._app = application(self.pool)

    async def answer(self, request: RelayedRequest) -> AsyncIterator[ResponseHead | bytes]:
        """Yield the status and the headers, then the body piece by piece."""
        async for piece in response_pieces(self._app, request):
            yield piece

    def check_health(self) -> None:
        """Raise a RuntimeError if the engine has ended; Ray then replaces the replica."""
        if not self.pool.ready:
            raise RuntimeError("the engine has ended")


def ingress(config: RayConfig) -> ASGIApp:
    """Build the application that passes requests on, in a deployment beside the replicas."""
    name = serve.get_replica_context().app_name
    replicas = serve.get_deployment_handle("Replica", app_name=name)
    answers = replicas.options(stream=True, method_name="answer")
    return relay_application(answers.remote, RayError, Settings(**config.settings))


class PrefixRouter(LocalityMixin, RequestRouter):  # type: ignore[misc]
    """Sends a prompt to the replica that got the longest beginning of it before.

    Without such a replica, or if the queues differ too much, the replica with the shortest queue
    gets the prompt. Each ingress process knows only the prompts that it has routed itself.
    """

    def initialize_state(self, imbalance: int = 8) -> None:
        self._imbalance = imbalance
        self._prefixes = PrefixIndex()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Choose the replicas in order of preference; Ray takes the shortest queue of each list."""
        allowed = self.apply_locality_routing(pending_request)
        replicas = [replica for replica in candidate_replicas if replica.replica_id in allowed]
        random.shuffle(replicas)  # Ray takes the first of several shortest queues
        lengths = [self.replica_queue_len_cache.get(x.replica_id) or 0 for x in replicas] or [0]
        if pending_request is None or max(lengths) - min(lengths) > self._imbalance:
            return [replicas]
        ids = {replica.replica_id for replica in replicas}
        best = self._prefixes.find(pending_request.args[0], ids)
        first = [replica for replica in replicas if replica.replica_id in best]
        return [first, [replica for replica in replicas if replica.replica_id not in best]]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        self._prefixes.add(pending_request.args[0], replica_id)
