"""The parts of a message in the order in which they were written, as they open, grow and close."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from treeflash.serving.message_parser import Delta, ToolCall

Kind = Literal["content", "reasoning", "call"]


@dataclass
class Block:
    """A part of a message: text, reasoning or a call.

    Attributes:
        index: in the message.
        kind: of the part.
        text: of the content or the reasoning, so far.
        call: complete.
    """

    index: int
    kind: Kind
    text: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True)
class Change:
    """Something that happened to a block.

    Attributes:
        event: `open` and `close` come once; `text` may come often, and never for a call.
        block: as it is afterwards.
        text: what was added.
    """

    event: Literal["open", "text", "close"]
    block: Block
    text: str = ""


class Blocks:
    """Joins deltas to blocks.

    Attributes:
        blocks: so far.
    """

    def __init__(self) -> None:
        """Start without blocks."""
        self.blocks: list[Block] = []
        self._open: Block | None = None

    def add(self, deltas: Sequence[Delta]) -> Iterator[Change]:
        """What the next deltas change."""
        for delta in deltas:
            if delta.call is not None:
                yield from self.close()
                yield from self._begin("call", delta.call)
                yield from self.close()
                continue
            if self._open is None or self._open.kind != delta.kind:
                yield from self.close()
                yield from self._begin(delta.kind)
            assert self._open is not None
            self._open.text += delta.text
            yield Change("text", self._open, delta.text)

    def finish(self) -> Iterator[Change]:
        """The end of the message, which has at least an empty content."""
        if not self.blocks:
            yield from self._begin("content")
        yield from self.close()

    def close(self) -> Iterator[Change]:
        """Close the block that is open, if one is."""
        if self._open is not None:
            yield Change("close", self._open)
            self._open = None

    def _begin(self, kind: Kind, call: ToolCall | None = None) -> Iterator[Change]:
        self._open = Block(len(self.blocks), kind, call=call)
        self.blocks.append(self._open)
        yield Change("open", self._open)
