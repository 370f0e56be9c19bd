"""A PyTorch backend that computes on a CPU what it does on a GPU."""

from treeflash_cuda import arena
from treeflash_cuda import backend as loading
from treeflash_cuda.attention_kernels import PlainKernels

from treeflash.config import LoadConfig

SLAB_BYTES = 1 << 20
"""Plain products read a whole slab."""


def load_with_parts(monkeypatch, target, drafter=None, **settings):
    """Load models whose attention is computed in parts, by plain products."""
    settings = {"device": "cpu", "dtype": "float32"} | settings
    with monkeypatch.context() as patch:
        patch.setattr(loading, "flash_kernels", lambda *_: (PlainKernels(), ""))
        patch.setattr(arena, "SLAB_BYTES", min(SLAB_BYTES, arena.SLAB_BYTES))
        backend = loading.load(target, drafter, LoadConfig(**settings))
        for part in (backend.target.arena, backend.drafter_arena):
            if part is not None:
                part.least_nbytes = arena.SLAB_BYTES
    return backend
