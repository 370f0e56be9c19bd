"""Which positions a draft sees if its context is limited: the first few, and the latest."""

from __future__ import annotations

SINK = 4
"""Attention puts what it has no use for on the first positions (StreamingLLM, arXiv 2309.17453)."""


def left_out(start: int, window: int | None) -> tuple[int, int]:
    """The positions that a draft does not see, the first of them and the first after them.

    Args:
        start: position of the draft's root.
        window: positions before the root that it sees, beside the first `SINK`; None for all.
    """
    return (SINK, max(SINK, start - window)) if window is not None else (0, 0)
