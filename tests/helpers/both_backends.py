"""The same weights in PyTorch and in MLX."""

import numpy as np
from treeflash_cuda.backend import load as load_cuda
from treeflash_mlx.backend import load as load_mlx

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.testing.comparisons import assert_equal_steps, random_tokens, steps_of


def load_both(target, drafter):
    """The pair in both backends, on the CPU in float32."""
    return (
        load_cuda(target, drafter, LoadConfig(device="cpu", dtype="float32")),
        load_mlx(target, drafter, LoadConfig(dtype="float32")),
    )


def assert_equal_iterations(backends, method, sampling, vocab_size):
    """Both backends accept the same tokens, and more of a tree than its root."""
    config = DecodeConfig(method=method, budget=32, max_tokens=16, sampling=sampling)
    rng = np.random.default_rng(1)  # its prompts meet no tie of two nodes
    accepted = []
    for length in (1, 6, 30):  # the last is longer than the sliding windows
        prompt = random_tokens(rng, vocab_size, length)
        cuda, mlx = (steps_of(backend, prompt, config) for backend in backends)
        assert_equal_steps(mlx, cuda)
        accepted += [len(step.path) for step in cuda if step.path is not None]
    if method in ("ddtree", "treeflash"):
        assert max(accepted) >= 2
