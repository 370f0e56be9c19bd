"""Which accelerators of this machine can be used, and why the others cannot."""

from __future__ import annotations

from importlib.util import find_spec


def cuda_problem() -> str | None:
    """Return why no CUDA device can be used; None if one can."""
    if find_spec("torch") is None:
        return "PyTorch is not installed"
    from treeflash_cuda.device import choose_device

    from treeflash.errors import BackendError

    try:
        choose_device("cuda")
    except BackendError as error:
        return str(error)
    return None


def metal_problem() -> str | None:
    """Return why Metal cannot be used; None if it can."""
    if find_spec("mlx") is None:
        return "MLX is not installed"
    import mlx.core as mx

    return None if mx.metal.is_available() else "MLX finds no Metal device"
