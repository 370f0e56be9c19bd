"""CUDA graphs on a CPU: a capture is replayed with its own shapes, settings and addresses."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from treeflash_cuda import operations
from treeflash_cuda.gpu.graphs import Graph, Graphs
from treeflash_cuda.hf import attention_contexts

MOST_SHARED = 32
"""Committed positions of the longest sequence of a test whose graphs have addresses."""


class Replay:
    """Computes the captured function again from the captured inputs, into the captured outputs."""

    def __init__(self, function, places, outputs):
        self.function, self.places, self.outputs = function, places, outputs

    def replay(self):
        for old, new in zip(self.outputs, self.function(*self.places), strict=True):
            if torch.is_tensor(old):
                old.copy_(new)


def replay_graphs(monkeypatch, *, with_addresses=False):
    """Let graphs of CPU tensors be captured and replayed; returns the names of the captures.

    With addresses, a replay reads and writes the tensors of its capture besides its inputs, as a
    graph does. It takes longer.
    """
    names = []

    def capture(self, key, function, inputs):
        names.append(key[0])
        places = tuple(x.clone() for x in inputs)
        outputs = function(*places)
        if with_addresses:
            function = recorded(function, places, outputs)
        return Graph(Replay(function, places, outputs), places, outputs)

    monkeypatch.setattr(Graphs, "_capture", capture)
    if with_addresses:  # kernels need no numbers from the device, as PyTorch's definitions do
        monkeypatch.setattr(operations, "most_shared", lambda keys: MOST_SHARED)
        monkeypatch.setattr(attention_contexts, "is_window", lambda *_: True)
    return names


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


def enable(graphs):
    """Let graphs be captured although the tensors are on a CPU."""
    graphs.enabled, graphs.device = True, torch.device("cuda")
    return graphs
