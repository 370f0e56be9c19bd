"""A text that a scheduler runs: its decode loop, its state on the device, and its clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, NewType, TypeVar

from treeflash.config import AUTO, DecodeConfig
from treeflash.decoding.loop import Extend, Loop, Need, Phase, Step
from treeflash.decoding.requests import Request
from treeflash.decoding.text_state import TextState

Ticket = NewType("Ticket", int)
"""Names a text of a scheduler."""

N = TypeVar("N", bound=Need)


@dataclass(eq=False)
class RunningText:
    """A text that has started.

    Attributes:
        ticket: its name.
        request: what to decode.
        state: on the device.
        loop: its decode loop.
        tokens: of the prompt, and those emitted so far.
        need: what the loop waits for; None when the text is finished.
        extended: tokens of the need `Extend` that are committed already.
        has_drafted: whether a tree was drafted for it.
        shared: whether texts that begin alike may fork its state.
        seconds: by phase, since the last step.
        events: steps, and the error that ended the text, not handed out yet.
    """

    ticket: Ticket
    request: Request
    state: TextState
    loop: Loop
    tokens: list[int]
    need: Need | None = None
    extended: int = 0
    has_drafted: bool = False
    shared: bool = False
    seconds: dict[Phase, float] = field(default_factory=dict)
    events: list[Step | Exception] = field(default_factory=list)

    @property
    def config(self) -> DecodeConfig:
        """How it is decoded."""
        return self.request.config

    @property
    def adapts(self) -> bool:
        """Whether its trees have the size that pays."""
        return self.config.drafts and self.config.budget == AUTO

    @property
    def extension(self) -> int:
        """Tokens of the need `Extend` to run next at most: all, or those before a snapshot.

        The last token of a prompt is always run by the text itself, so that one before it is where
        texts with the same prompt fork.
        """
        rest = len(self.needed(Extend).token_ids) - self.extended
        return rest - 1 if rest > 1 and self.shared and self.state.needs_snapshots else rest

    def needed(self, kind: type[N]) -> N:
        """What the loop waits for, which is of that kind."""
        assert isinstance(self.need, kind)
        return self.need

    def resume(self, outcome: Any, phase: Phase | None = None) -> None:
        """Send an outcome to the loop; what it takes counts as the phase, if one is given."""
        started = time.perf_counter()
        self.need = None
        try:
            item = self.loop.send(outcome)
            while isinstance(item, Step):
                self.events.append(replace(item, seconds=self.seconds))
                self.tokens += item.tokens
                self.seconds = {}
                if item.finish_reason is not None:
                    return
                item = next(self.loop)
            self.need = item
        except Exception as error:  # from its constraint, for example: other texts continue
            self.events.append(error)
        if phase is not None:
            self.spend(phase, started)

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self.need = None
        self.events.append(error)

    def spend(self, phase: Phase, started: float) -> None:
        """Count the time since then."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def close(self) -> None:
        """End the loop and give the state's memory back."""
        self.loop.close()
        self.state.close()
