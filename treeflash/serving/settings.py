"""Settings of a server, besides those for decoding."""

from __future__ import annotations

from dataclasses import dataclass

from treeflash.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and access.

    Attributes:
        max_parallel: texts that are decoded at once.
        max_queue: texts that may wait beyond them; further requests are refused.
        max_memory_gb: GiB of device memory for the states of texts.
        prefix_cache_gb: GiB of those for the states of finished texts; 0 keeps none.
        max_body_mb: MiB of a request's body.
        body_timeout: seconds in which a request's body must arrive.
        timeout: seconds in which a request must be answered, waiting included.
        keep_alive: seconds without news after which a stream sends a comment, so that proxies
            and clients keep the connection.
        max_choices: answers to one request.
        api_keys: one of them must be sent with every request; empty asks for none.
        cors_origins: web origins whose pages may read answers; `*` is every origin.
    """

    max_parallel: int = 16
    max_queue: int = 128
    max_memory_gb: float = 4.0
    prefix_cache_gb: float = 1.0
    max_body_mb: float = 8.0
    body_timeout: float = 30.0
    timeout: float = 600.0
    keep_alive: float = 10.0
    max_choices: int = 16
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_parallel", "max_choices"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("max_queue", "prefix_cache_gb"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("max_memory_gb", "max_body_mb", "body_timeout", "timeout", "keep_alive"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
