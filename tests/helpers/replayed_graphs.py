"""CUDA graphs on a CPU: a capture is replayed with its own shapes, settings and addresses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from stand_ins import stand_in
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from treeflash_cuda import operations
from treeflash_cuda.gpu.graphs import Graph, Graphs
from treeflash_cuda.hf import attention_contexts

MOST_SHARED = 32
"""Committed positions of the longest sequence of a test whose graphs have addresses."""


def replayed(function, places, outputs):
    """A graph that computes the function again from the captured inputs, into the outputs."""

    def replay():
        for old, new in zip(outputs, function(*places), strict=True):
            if torch.is_tensor(old):
                old.copy_(new)

    return Graph(SimpleNamespace(replay=replay), places, outputs)


class ReplayedGraphs(Graphs):
    """Graphs of CPU tensors.

    With addresses, a replay reads and writes the tensors of its capture besides its inputs, as a
    graph does. It takes longer.
    """

    def __init__(self, *, with_addresses=False):
        super().__init__(torch.device("cuda"))
        self.enabled, self.with_addresses = True, with_addresses

    def record(self, function, places, **_):
        outputs = function(*places)
        if self.with_addresses:
            function = recorded(function, places, outputs)
        return replayed(function, places, outputs)


def fix_addresses(monkeypatch):
    """Let attention need no numbers from the device, as kernels do."""
    stand_in(monkeypatch, operations, most_shared=lambda keys: MOST_SHARED)
    stand_in(monkeypatch, attention_contexts, is_window=lambda *_: True)


def recorded(function, inputs, outputs):
    """A function with the shapes, addresses and numbers of a call, whose outputs are given."""
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        # Examples of the values of all nodes, which take most of the time.
        patch.setattr(proxy_tensor, "extract_val", lambda *_, **__: None)
        graph = make_fx(lambda *x: [y for y in function(*x) if torch.is_tensor(y)])(*inputs)

    def run(*inputs):
        tensors = iter(graph(*inputs))
        return tuple(next(tensors) if torch.is_tensor(x) else x for x in outputs)

    return run
