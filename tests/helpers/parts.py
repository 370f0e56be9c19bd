"""A PyTorch backend that computes on a CPU what it does on a GPU."""

from treeflash_cuda import target_loading
from treeflash_cuda.backend import load
from treeflash_cuda.decoder import operations as decoder_operations
from treeflash_cuda.gpu.graphs import Graphs
from treeflash_cuda.operations import Operations

from treeflash.config import LoadConfig


class UncapturedGraphs(Graphs):
    """Gives functions the shapes that graphs need, but calls them."""

    is_capturing = True

    def __init__(self, device):
        super().__init__(device)
        self.keys = set()

    def run(self, name, settings, function, *inputs, capture=True):
        if capture:
            self.keys.add((name, settings, tuple(x.shape for x in inputs)))
        return super().run(name, settings, function, *inputs, capture=capture)

    def _capture(self, key, function, inputs):
        return None


def use_models(monkeypatch):
    """Let all targets be models of transformers."""
    monkeypatch.setattr(target_loading, "load_decoder", lambda *_, **__: "a test")


def load_with_parts(monkeypatch, target, drafter=None, *, models=False, **settings):
    """Load a pair whose operations are PyTorch's definitions.

    With `models` its target is a model of transformers, whatever it would be on a GPU.
    """
    settings = {"device": "cpu", "dtype": "float32"} | settings
    with monkeypatch.context() as patch:
        if models:
            use_models(patch)
        patch.setattr(target_loading, "load_target_operations", lambda *_: Operations())
        patch.setattr(decoder_operations, "can_pack", lambda *_: False)  # no GPU packs weights
        backend = load(target, drafter, LoadConfig(**settings))
    graphs = backend.target.graphs
    if graphs.enabled:
        backend.target.graphs = UncapturedGraphs(graphs.device)
    return backend
