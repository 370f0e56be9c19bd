"""The models of one server: loaded when requests name them, put away when nobody uses them.

Each model in memory is a `Service` with an engine of its own: its scheduler, its caches, its
drafter. A request uses one for as long as its answer takes:

    a request for A     A is not in memory: it is loaded, and the request waits for that
    a request for B     there is room for one model: as soon as nobody uses A, it is put away, and B
                        is loaded; requests for A that come now wait for A's next load
    no request for B    it is put away after the seconds of `unload_after`

One model is loaded at a time, in the thread that will decode with it, so that the answers of others
go on. A load that fails is an error for the requests that wait for it, and for nobody else; the
next request tries again. If the device's memory is too short for a model, the least recently used
one of the idle models is put away, and the load is tried again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fastapi import Request as HTTPRequest

from treeflash.decoding.turns import Turns
from treeflash.errors import (
    ConfigError,
    PromptError,
    TreeflashError,
    first_line,
    is_out_of_memory,
)
from treeflash.language_model import LanguageModel
from treeflash.serving.engine import Engine
from treeflash.serving.errors import APIError, shutting_down
from treeflash.serving.metrics import Metrics
from treeflash.serving.model_facts import ModelFacts
from treeflash.serving.service import Service
from treeflash.serving.settings import Settings
from treeflash.serving.streaming import until_disconnect
from treeflash.text.options import Options

Reason: TypeAlias = Literal["memory", "idle", "request"]
"""Why a model is put away: others need its memory, its time is over, or a request asks for it."""

logger = logging.getLogger("treeflash.serving")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that a server offers: its names, how it is loaded and decoded, and its limits.

    Responses have the first of the names, and requests may have any. `defaults` are decoding
    options of requests that leave them out.
    """

    names: tuple[str, ...]
    load: Callable[[], LanguageModel]
    settings: Settings
    defaults: Options
    # the target's folder; None if it is only known once the model is loaded
    folder: Path | None = None
    images: bool = True  # whether the target's vision tower is loaded


@dataclass(eq=False)
class Stay:
    """One stay of a model in memory, from the first request that waits for it."""

    model: ServedModel
    keep_alive: float  # seconds without a request after which the stay ends
    # the end of loading; None for a model that was loaded when the server started
    loaded: asyncio.Future[None] | None = None
    service: Service | None = None  # the loaded model; None until it is loaded
    uses: int = 0  # number of requests that wait for the model or are answered by it
    # the time at which the last of these requests began or ended, seconds since 1970
    last_used: float = field(default_factory=time.time)
    ends: asyncio.TimerHandle | None = None  # the end of the stay if nobody uses the model before
    # New requests wait for this while it is decided whether the model leaves the memory.
    undecided: asyncio.Event | None = None

    @property
    def ends_at(self) -> float:
        """When the stay ends if no request comes, in seconds since 1970; infinity for never."""
        return (time.time() if self.uses else self.last_used) + self.keep_alive


@dataclass(eq=False)
class ServedModel:
    """A model of a server, in memory or not; its counts go on through all of its stays."""

    spec: ModelSpec
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970
    metrics: Metrics = field(default_factory=Metrics)
    stay: Stay | None = None
    known: ModelFacts | None = None  # its facts, once they were asked for or it was loaded

    @property
    def name(self) -> str:
        return self.spec.names[0]

    @property
    def service(self) -> Service | None:
        """The service while the model is in memory."""
        return None if self.stay is None else self.stay.service

    @property
    def facts(self) -> ModelFacts:
        """What lists tell of the model."""
        if self.known is None:
            assert self.spec.folder is not None
            self.known = ModelFacts.of_folder(
                self.spec.folder, self.spec.settings.tool_call_parser, images=self.spec.images
            )
        return self.known


class ModelPool:
    """The models of a server; all methods but `start` and `close` are the event loop's.

    Attributes:
        settings: the limits and the access of the whole server.
        models: the models, in the order in which lists have them.
        draining: whether new requests are refused, because the server is about to end.
    """

    def __init__(self, specs: Sequence[ModelSpec], settings: Settings) -> None:
        self.settings = settings
        self.models = [ServedModel(spec) for spec in specs]
        self.draining = False
        self._by_name: dict[str, ServedModel] = {}
        for model in self.models:
            for name in model.spec.names:
                if self._by_name.setdefault(name.casefold(), model) is not model:
                    raise ConfigError(
                        f"two models have the name {name}; give one of them another name"
                    )
        self.in_memory: list[Stay] = []
        self._turns = Turns()
        self.changing = asyncio.Lock()  # held while a model is loaded or put away
        self._freed = asyncio.Event()  # set when nobody uses one of the models any more
        self._tasks: set[asyncio.Task[None]] = set()  # an event loop keeps weak references alone
        self._loading: Engine | None = None

    @property
    def names(self) -> list[str]:
        return [name for model in self.models for name in model.spec.names]

    @property
    def unfinished(self) -> int:
        """The number of answers that are running or waiting."""
        return sum(service.engine.unfinished for service in self._services)

    @property
    def device_lost(self) -> bool:
        """Whether the server must end, because its device refuses further work."""
        return any(service.engine.device_lost for service in self._services)

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return not self.draining and all(service.engine.ready for service in self._services)

    @property
    def loading(self) -> bool:
        """Whether a thread is loading a model, which nothing can stop."""
        return self._loading is not None and not self._loading.loaded

    @cached_property
    def unloads(self) -> bool:
        """Whether requests may decide how long a model stays; the only model stays."""
        return len(self.models) > 1 or self.settings.unload_after is not None

    @property
    def _services(self) -> list[Service]:
        return [stay.service for stay in self.in_memory if stay.service is not None]

    def start(self) -> None:
        """Load a server's only model; raises what loading raises."""
        (model,) = self.models
        stay, started = self._new_stay(model), time.perf_counter()
        engine = self._engine(stay)
        engine.start()
        self._settle(stay, engine, time.perf_counter() - started)

    def drain(self) -> None:
        """Refuse new requests, from a signal's handler too."""
        self.draining = True
        for service in self._services:
            service.engine.draining = True

    def end_waiting(self) -> None:
        """Answer the requests that wait for a model, because the server is about to end."""
        for model in self.models:
            if model.stay is not None and (loaded := model.stay.loaded) and not loaded.done():
                loaded.set_exception(shutting_down())

    def close(self) -> None:
        """Drop all answers and put all models away, after the end of the event loop."""
        self.drain()
        engines = [service.engine for service in self._services]
        if self._loading is not None and self._loading.loaded:
            engines.append(self._loading)
        for engine in engines:
            engine.stop()

    def find(self, name: str | None) -> ServedModel:
        """Return the model of a name, by default the first; an APIError if there is none."""
        if name is None:
            return self.models[0]
        if (model := self._by_name.get(name.casefold())) is None:
            others = f"this server has {', '.join(self.names)}"
            raise APIError(
                404,
                f"the model {name!r} does not exist; {others}",
                param="model",
                code="model_not_found",
                ollama=f"model {name!r} not found; {others}",
            )
        return model

    @asynccontextmanager
    async def use(
        self, name: str | None, http: HTTPRequest, keep_alive: float | None = None
    ) -> AsyncIterator[Service]:
        """Yield the service of a model, which is loaded first unless it is in memory.

        It stays there until the block ends, and longer while a `hold` of the service does. With a
        `keep_alive`, it stays in memory for so many seconds after its last request.

        Raises an APIError if there is no such model, it cannot be loaded, or the client leaves.
        """
        model = self.find(name)
        stay = await self._stay(model, http)
        if keep_alive is not None and self.unloads:
            stay.keep_alive = keep_alive
        with self._hold(stay):
            if stay.service is None:
                assert stay.loaded is not None
                # Others may wait for it too.
                await until_disconnect(asyncio.shield(stay.loaded), http.receive)
            assert stay.service is not None
            yield stay.service

    def put_away(self, name: str) -> None:
        """Put a model away as soon as nobody uses it, if it is in memory; see `find`."""
        stay = self.find(name).stay
        if stay is not None:
            stay.keep_alive = 0.0
            if not stay.uses:
                self._limit(stay)

    async def _stay(self, model: ServedModel, http: HTTPRequest) -> Stay:
        """Return the present stay of a model, or the next one if the present one ends."""
        while model.stay is not None and (undecided := model.stay.undecided) is not None:
            await until_disconnect(undecided.wait(), http.receive)
        if self.draining:
            raise shutting_down()
        if model.stay is None:
            stay = self._new_stay(model)
            stay.loaded = asyncio.get_running_loop().create_future()
            self._spawn(self._load(stay, stay.loaded))
        assert model.stay is not None
        return model.stay

    def _new_stay(self, model: ServedModel) -> Stay:
        seconds = model.spec.settings.unload_after
        model.stay = Stay(model, math.inf if seconds is None else seconds)
        return model.stay

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @contextmanager
    def _hold(self, stay: Stay) -> Iterator[None]:
        """Keep a model in memory during the `with` block."""
        stay.uses += 1
        stay.last_used = time.time()
        if stay.ends is not None:
            stay.ends.cancel()
            stay.ends = None
        try:
            yield
        finally:
            stay.uses -= 1
            stay.last_used = time.time()
            if not stay.uses:
                self._freed.set()
                self._limit(stay)

    def _limit(self, stay: Stay) -> None:
        """Let the stay of an idle model end after its time."""
        if stay.ends is not None:
            stay.ends.cancel()
        if stay in self.in_memory and stay.keep_alive < math.inf:
            loop = asyncio.get_running_loop()
            stay.ends = loop.call_later(
                stay.keep_alive, lambda: self._spawn(self._end_if_idle(stay))
            )

    async def _end_if_idle(self, stay: Stay) -> None:
        async with self.changing:
            if not stay.uses and stay in self.in_memory:
                await self._put_away(stay, "idle" if stay.keep_alive else "request")

    async def _load(self, stay: Stay, loaded: asyncio.Future[None]) -> None:
        """Load a model for the requests that wait for it, and tell them."""
        model = stay.model
        error: APIError | None = None
        async with self.changing:
            if self.draining:
                error = shutting_down()
            elif stay.uses:  # else all have left
                try:
                    await self._load_into_room(stay)
                except Exception as reason:
                    model.metrics.count_failed_load()
                    error = _load_error(model.name, reason)
            if stay.service is None:
                model.stay = None
            self._loading = None  # unless the end of the event loop cancels this task
        if not loaded.done():  # else `end_waiting` has told them
            if error is None:
                loaded.set_result(None)
            else:
                loaded.set_exception(error)
        loaded.exception()  # all who waited may have left
        if not stay.uses:
            self._limit(stay)

    async def _load_into_room(self, stay: Stay) -> None:
        """Load a model, and put others away as far as it needs their memory.

        Nothing is loaded or put away once all have left who wait for the model.
        """
        limit = self.settings.max_models
        while limit is not None and len(self.in_memory) >= limit:
            if not await self._make_room(stay):
                return
        logger.info("loading %s", stay.model.name)
        started = time.perf_counter()
        while True:
            if self.draining:
                raise shutting_down()
            self._loading = engine = self._engine(stay)
            try:
                await engine.start_aside()
                break
            except Exception as error:
                if not self.in_memory or not is_out_of_memory(error):
                    raise
            logger.info("%s needs more memory than is free", stay.model.name)
            del engine  # outside of `except`, where the error keeps what was loaded in memory
            self._loading = None
            if not await self._make_room(stay):
                return
        seconds = time.perf_counter() - started
        self._settle(stay, engine, seconds)
        logger.info("%s loaded in %.1f s", stay.model.name, seconds)

    def _engine(self, stay: Stay) -> Engine:
        spec, metrics = stay.model.spec, stay.model.metrics
        engine = Engine(spec.load, spec.settings, metrics, self._turns)
        if len(self.models) > 1:
            loop = asyncio.get_running_loop()
            engine.ran_out_of_memory = partial(self._call_relieve, loop, stay)
        return engine

    def _call_relieve(self, loop: asyncio.AbstractEventLoop, stay: Stay) -> None:
        """Begin `_relieve`, from the engine's thread."""
        with suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(lambda: self._spawn(self._relieve(stay)))

    async def _relieve(self, needing: Stay) -> None:
        """Put an idle model away, because another one ran out of memory while it decoded."""
        async with self.changing:
            if (idle := self._idle(needing)) is not None:
                await self._put_away(idle, "memory")

    def _settle(self, stay: Stay, engine: Engine, seconds: float) -> None:
        """Offer a model that has been loaded; raises what `Service.check_defaults` does."""
        model, spec = stay.model, stay.model.spec
        service = Service(engine, spec.defaults, model.name, partial(self._hold, stay))
        try:
            service.check_defaults()
        except PromptError:
            engine.stop()
            raise
        stay.service = service
        self.in_memory.append(stay)
        model.known = ModelFacts.of_service(service)
        model.metrics.count_load(seconds)
        if self.draining:
            engine.draining = True

    def _idle(self, but: Stay | None = None) -> Stay | None:
        """Return the least recently used of the models that nobody uses, leaving one out."""
        idle = [stay for stay in self.in_memory if not stay.uses and stay is not but]
        return min(idle, key=lambda stay: stay.last_used, default=None)

    async def _make_room(self, needing: Stay) -> bool:
        """Put away the first model that nobody uses, and if all are used, wait for one.

        While it waits, the least recently used one takes no new requests, so that one will be idle.
        Returns False if all leave meanwhile who wait for the model that needs the room.
        """
        oldest = min(self.in_memory, key=lambda stay: stay.last_used)
        oldest.undecided = asyncio.Event()
        try:
            while needing.uses and (idle := self._idle()) is None:
                self._freed.clear()
                await self._freed.wait()
            if not needing.uses:
                return False
            assert idle is not None
            await self._put_away(idle, "memory")
            return True
        finally:
            oldest.undecided.set()
            oldest.undecided = None

    async def _put_away(self, stay: Stay, reason: Reason) -> None:
        """End the stay of a model that nobody uses, and free its memory."""
        model, service = stay.model, stay.service
        assert service is not None
        stay.service = model.stay = None
        self.in_memory.remove(stay)
        model.metrics.count_unload(reason)
        if stay.ends is not None:
            stay.ends.cancel()
        engines = [service.engine]
        del service

        def free() -> None:
            # A thread may keep for a moment what it was given to run, here this list: it is empty
            # before the garbage is collected, or the next load would miss the memory.
            engines.pop().stop()
            gc.collect()

        await asyncio.to_thread(free)
        logger.info("%s put away (%s)", model.name, reason)


def _load_error(name: str, error: Exception) -> APIError:
    """Return what the requests get that wait for a model that cannot be loaded."""
    if isinstance(error, APIError):
        return error
    if is_out_of_memory(error):
        logger.error("%s cannot be loaded: the device is out of memory", name)
        return APIError(
            503,
            f"the device has no memory for the model {name} beside the models that are in use; "
            "send the request again",
            code="memory",
        )
    if isinstance(error, TreeflashError | OSError):
        reason = first_line(error)
        logger.error("%s cannot be loaded: %s", name, reason)
    else:
        reason = "the server's log has the reason"
        logger.error("%s cannot be loaded", name, exc_info=error)
    message = f"the model {name} cannot be loaded: {reason}"
    return APIError(500, message, code="model_load_failed")
