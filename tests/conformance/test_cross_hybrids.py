"""The same weights of hybrid targets in PyTorch and in MLX: identical trees, paths and tokens.

Lightning attention is not among them: transformers has it in MiniMax-01 alone, which the PyTorch
backend refuses, and mlx-lm lacks that type.
"""

import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, LoadConfig
from treeflash.decoding import decode
from treeflash.testing import HYBRID_FAMILIES, require, write_drafter, write_target
from treeflash.testing.comparisons import assert_equal_steps
from treeflash.testing.pairs import DRAFTER_SEED, TARGET_SEED
from treeflash.testing.samplings import SAMPLINGS
from treeflash.testing.texts import random_tokens

require("torch")
require("mlx_lm")

import families  # noqa: E402
from treeflash_cuda.backend import load as load_cuda  # noqa: E402
from treeflash_mlx.backend import load as load_mlx  # noqa: E402

VOCAB_SIZE = 24
# Gated delta nets, Mamba-2 alone and beside attention in a layer, and short convolutions.
TYPES = (*("qwen3_next", "olmo_hybrid", "mamba2", "falcon_h1", "lfm2", "lfm2_moe"),)
# mlx-lm normalises several groups together, which is another model.
ONE_GROUP = {"mamba2": {"n_groups": 1}, "falcon_h1": {"mamba_n_groups": 1}}


@pytest.fixture(scope="module", params=HYBRID_FAMILIES + TYPES)
def backends(request, tmp_path_factory):
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    target, drafter = folder / "target", folder / "drafter"
    if name in HYBRID_FAMILIES:
        write_target(target, name, seed=TARGET_SEED, vocab_size=VOCAB_SIZE)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(families.SMALL, "vocab_size", VOCAB_SIZE)
            own = families.OVERRIDES.get(name, {}) | ONE_GROUP.get(name, {})
            patch.setitem(families.OVERRIDES, name, own)
            families.write(target, name)
    write_drafter(drafter, target, seed=DRAFTER_SEED)
    return (
        load_cuda(target, drafter, LoadConfig(device="cpu", dtype="float32")),
        load_mlx(target, drafter, LoadConfig(dtype="float32")),
    )


@pytest.mark.parametrize("sampling", [SAMPLINGS["greedy"], SAMPLINGS["all"]], ids=["greedy", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_iterations_are_identical(backends, method, sampling):
    config = DecodeConfig(method=method, budget=32, max_tokens=24, sampling=sampling)
    rng = np.random.default_rng(0)
    accepted = []
    for length in (1, 6, 30):
        prompt = random_tokens(rng, VOCAB_SIZE, length)
        cuda, mlx = (list(decode(backend, prompt, config)) for backend in backends)
        assert_equal_steps(mlx, cuda)
        accepted += [len(step.path) for step in cuda if step.path is not None]
    if method in ("ddtree", "treeflash"):
        assert max(accepted) >= 2
