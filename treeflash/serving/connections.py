"""Connections of clients: a request must begin in time, and its head has a limit.

uvicorn waits for the head of a request for ever, and logs every connection that it cannot accept
when files run out. So a connection without a request is closed, and the process may open as many
files as the system lets it. h11 limits a head to 64 KiB; httptools, which uvicorn prefers where it
is installed, has no limit.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_FILES = 1 << 16
"""Most files and connections of the process."""


class Protocol(H11Protocol):
    """A connection that ends if the head of its next request does not arrive in time."""

    head_seconds: ClassVar[float] = 30.0
    """Seconds within which the head of a request must arrive."""
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def on_response_complete(self) -> None:
        self._await_head()
        super().on_response_complete()  # begins the next request if it has arrived

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _await_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.head_seconds, self._end_without_head)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _end_without_head(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def allow_many_files(limit: int = MAX_FILES) -> None:
    """Raise the limit of open files, which is 1,024 on Linux and 256 on a Mac by default."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):  # the system has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
