"""Copies from GPUs to the host that nothing waits for but their reader.

They have a stream of their own, beside which the device goes on computing, and pinned memory, which
it writes without the host's help.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


class HostCopies:
    """Copies of tensors of any GPUs."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def begin(self, x: Tensor) -> Tensor:
        """Begin to copy a tensor of a GPU to pinned memory; what it shows may change at once."""
        if x.device not in self._streams:
            self._streams[x.device] = torch.cuda.Stream(x.device)
        stream = self._streams[x.device]
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        own = x.clone(memory_format=torch.contiguous_format)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            host.copy_(own, non_blocking=True)
        own.record_stream(stream)  # nothing else gets its memory before
        return host

    def end(self) -> Callable[[], None]:
        """Return a function that waits for the copies that have begun."""
        # A thread that waits for such an event leaves its processor to others.
        events = [x.record_event(torch.cuda.Event(blocking=True)) for x in self._streams.values()]

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait


@cache
def host_copies() -> HostCopies:
    """Return the copies of this process."""
    return HostCopies()
