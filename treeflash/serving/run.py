"""Run the server until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from treeflash.errors import ConfigError
from treeflash.language_model import LanguageModel
from treeflash.serving.application import application
from treeflash.serving.engine import Engine
from treeflash.serving.metrics import Metrics
from treeflash.serving.service import Service
from treeflash.serving.settings import Settings
from treeflash.text.options import Options

logger = logging.getLogger("treeflash.serving")
POLL_S = 0.05


class Server(uvicorn.Server):
    """Ends after the running answers: until then, new requests get status 503."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        """Prepare to serve."""
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish the running answers, then end; a second signal ends at once."""
        if self._engine.draining:
            self.should_exit = self.force_exit = True
            return
        logger.info("%s: finishing %d answers", signal.Signals(sig).name, self._engine.unfinished)
        self._engine.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; called ten times a second."""
        if self._engine.draining and not self._engine.unfinished:
            self.should_exit = True
        return await super().on_tick(counter)


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
    """Load the models and serve them.

    Args:
        load: loads the models.
        settings: limits and access.
        defaults: decoding options of requests that do not have them.
        names: of the model.
        host: address to listen on.
        port: 0 chooses a free one.
        log_level: `error`, `warning`, `info` or `debug`.

    Returns:
        The exit status.

    Raises:
        TreeflashError, OSError: the models cannot be loaded, or the port is taken.
    """
    listening = bind(host, port)
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s: %(message)s")
    engine = Engine(load, settings, Metrics())
    try:
        engine.start()
        app = application(Service(engine, settings, defaults, names))
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(app, log_level=log_level, log_config=None, lifespan="off")
        logger.info("serving %s on http://%s:%d", names[0], shown, port)
        asyncio.run(Server(config, engine).serve([listening]))
    finally:
        listening.close()
    engine.stop()
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A socket with the address, so that a taken port is found before models are loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
        ) from None
    return listening
