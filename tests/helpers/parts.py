"""A PyTorch backend that computes on a CPU what it does on a GPU."""

from treeflash_cuda import backend as loading
from treeflash_cuda.attention_kernels import PlainKernels

from treeflash.config import LoadConfig


def load_with_parts(monkeypatch, target, drafter=None, **settings):
    """Load models whose attention is computed in parts, by plain products."""
    settings = {"device": "cpu", "dtype": "float32"} | settings
    with monkeypatch.context() as patch:
        patch.setattr(loading, "flash_kernels", lambda *_: (PlainKernels(), ""))
        return loading.load(target, drafter, LoadConfig(**settings))
