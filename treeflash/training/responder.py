"""A target's responses to many prompts at once, as training data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from treeflash.config import DecodeConfig
from treeflash.decoding import Request as DecodeRequest
from treeflash.decoding import Scheduler, SchedulerConfig
from treeflash.decoding.interfaces import Backend
from treeflash.training.interfaces import Request


class BackendResponder:
    """`treeflash.training.interfaces.Responder` for any backend.

    Only throughput matters, so there is neither a drafter nor a tree.
    """

    def __init__(self, target: str, backend: Backend) -> None:
        """Take the name of a target and the target, loaded."""
        self.target = target
        self.backend = backend.name
        self.dtype = backend.dtype
        self.max_positions = backend.max_positions
        self._backend = backend

    def respond(
        self, requests: Sequence[Request], stop_token_ids: frozenset[int], slots: int
    ) -> Iterator[tuple[int, list[int]]]:
        """See `Responder.respond`."""
        scheduler = Scheduler(self._backend, SchedulerConfig(max_parallel=slots))
        indices = {}
        for index, request in enumerate(requests):
            config = DecodeConfig(
                method="ar",
                max_tokens=request.max_tokens,
                stop_token_ids=stop_token_ids,
                sampling=request.sampling,
            )
            submitted = DecodeRequest(prompt_ids=request.prompt_ids, config=config)
            indices[scheduler.submit(submitted)] = index
        tokens: dict[int, list[int]] = {index: [] for index in indices.values()}
        try:
            while scheduler.busy:
                for ticket, event in scheduler.step():
                    if isinstance(event, Exception):
                        raise event
                    index = indices[ticket]
                    tokens[index] += event.tokens
                    if event.finish_reason is not None:
                        yield index, tokens.pop(index)
        finally:
            scheduler.close()
